import json
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import InputError
from stage2_prior.codes import CodeCache, code_dtype


@pytest.fixture
def splits(random_codes):
    return {"train": random_codes(10).numpy(), "val": random_codes(4, seed=1).numpy()}


@pytest.fixture
def folder(tmp_path, write_codes, splits) -> Path:
    labels = {name: np.arange(len(codes)) % 2 for name, codes in splits.items()}
    write_codes(tmp_path / "codes", splits, 5, ["cat", "dog"], labels)
    return tmp_path / "codes"


def test_rows_come_back_as_they_were_written(folder, splits):
    cache = CodeCache(folder)
    codes, labels = cache.splits["train"].read(torch.tensor([7, 0, 7]))
    assert codes.dtype == labels.dtype == torch.int64
    assert torch.equal(codes, torch.from_numpy(splits["train"][[7, 0, 7]]))
    assert labels.tolist() == [1, 0, 1]
    assert (len(cache.splits["train"]), len(cache.validation)) == (10, 4)
    assert np.array_equal(cache.validation.codes, splits["val"])


def test_codes_stay_on_disk(folder):
    codes = CodeCache(str(folder)).splits["train"].codes
    assert isinstance(codes, np.memmap)
    assert codes.dtype == np.uint16


def test_codes_without_labels(tmp_path, write_codes, splits):
    write_codes(tmp_path / "codes", splits, 5)
    cache = CodeCache(tmp_path / "codes")
    assert cache.manifest.class_names is None
    assert cache.validation.read(torch.arange(2))[1] is None


@pytest.mark.parametrize(("size", "dtype"), [(2, np.uint16), (2**16, np.uint16), (2**16 + 1, np.int32)])
def test_the_smallest_type_that_holds_the_codes(size, dtype):
    assert code_dtype(size) is dtype
    assert np.iinfo(dtype).max >= size - 1


def test_a_missing_folder_names_the_command(tmp_path):
    with pytest.raises(InputError, match=f"codes {tmp_path}/none: no such folder; make one with: twostage encode"):
        CodeCache(tmp_path / "none")


def test_a_folder_without_a_manifest_is_no_code_cache(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"no code cache \(manifest.json is missing\)"):
        CodeCache(folder)


@pytest.mark.parametrize("text", ["", '{"format_version": 1,', "\x00"])
def test_broken_json_is_one_sentence(text, folder):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json: not valid JSON; encode the images again"):
        CodeCache(folder)


def test_mistakes_in_the_manifest_are_named(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["grid"]
    (folder / "manifest.json").write_text(json.dumps(manifest | {"codebook_size": 0, "colour": 1, "format_version": 2}))
    with pytest.raises(InputError, match=r"manifest\.json has 4 mistakes") as refusal:
        CodeCache(folder)
    for name in ("grid: required", "codebook_size: ", "colour: unknown key", "format_version: "):
        assert name in str(refusal.value)


@pytest.mark.parametrize("name", ["train.codes.npy", "val.labels.npy"])
def test_a_missing_array_is_named(name, folder):
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"codes {folder / name}: missing or cut short .*encode the images again"):
        CodeCache(folder)


@pytest.mark.parametrize("length", [0, 5, 60, 130, -1])
def test_an_array_that_was_cut_short_is_named(length, folder):
    file = folder / "train.codes.npy"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(InputError, match=rf"codes {file}: .*cut short .*expected the shape \(10, 2, 3\)"):
        CodeCache(folder)


@pytest.mark.parametrize("shape", [(9, 2, 3), (10, 3, 2), (10, 6)])
def test_another_shape_than_the_manifests_is_shown(shape, folder):
    np.save(folder / "train.codes.npy", np.zeros(shape, dtype=np.uint16))
    with pytest.raises(InputError) as refusal:
        CodeCache(folder)
    assert f"train.codes.npy: expected the shape (10, 2, 3), found {shape}" in str(refusal.value)


def test_pickled_arrays_are_never_loaded(folder):
    np.save(folder / "train.codes.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"train\.codes\.npy"):
        CodeCache(folder)
