import json
from pathlib import Path

import numpy as np
import pytest
import torch
from messages import refuses

from stage2_prior.codes import Augmentation, CodeCache, code_dtype, code_statistics


@pytest.fixture
def splits(random_codes):
    return {"train": random_codes(10).numpy(), "val": random_codes(4, seed=1).numpy()}


@pytest.fixture
def folder(tmp_path, write_codes, splits) -> Path:
    labels = {name: np.arange(len(codes)) % 2 for name, codes in splits.items()}
    write_codes(tmp_path / "codes", splits, 5, ["cat", "dog"], labels)
    return tmp_path / "codes"


def test_rows_are_read_as_they_were_written(folder, splits):
    cache = CodeCache(folder)
    rows = torch.tensor([7, 0, 7])
    codes, labels = cache.splits["train"].read(rows), cache.splits["train"].read_labels(rows)
    assert codes.dtype == labels.dtype == torch.int64
    assert torch.equal(codes, torch.from_numpy(splits["train"][[7, 0, 7]]))
    assert labels.tolist() == [1, 0, 1]
    assert (len(cache.splits["train"]), len(cache.validation)) == (10, 4)
    assert np.array_equal(cache.validation.codes, splits["val"])


def test_codes_stay_on_disk(folder):
    codes = CodeCache(str(folder)).splits["train"].codes
    assert isinstance(codes, np.memmap)
    assert codes.dtype == np.uint16


def test_reading_returns_copies(folder, splits):
    split = CodeCache(folder).splits["train"]
    rows = torch.tensor([1, 2])
    split.read(rows).zero_()
    split.read_labels(rows).zero_()
    assert torch.equal(split.read(rows), torch.from_numpy(splits["train"][[1, 2]]))
    assert split.read_labels(rows).tolist() == [1, 0]


def test_large_codes_are_read_without_overflow(tmp_path, write_codes, splits):
    codes = {name: array + 60_000 for name, array in splits.items()}  # above what int16 holds
    write_codes(tmp_path / "codes", codes, 2**16)
    assert torch.equal(CodeCache(tmp_path / "codes").validation.read(torch.arange(4)), torch.tensor(codes["val"]))
    np.save(tmp_path / "codes" / "val.codes.npy", (codes["val"] + 10**6).astype(np.int32))
    read = CodeCache(tmp_path / "codes").validation.read(torch.arange(4))
    assert torch.equal(read, torch.tensor(codes["val"] + 10**6))


def test_codes_without_labels(tmp_path, write_codes, splits):
    write_codes(tmp_path / "codes", splits, 5)
    cache = CodeCache(tmp_path / "codes")
    assert cache.manifest.class_names is None
    assert cache.validation.read_labels(torch.arange(2)) is None


@pytest.mark.parametrize(("size", "dtype"), [(2, np.uint16), (2**16, np.uint16), (2**16 + 1, np.int32)])
def test_the_smallest_type_that_holds_the_codes(size, dtype):
    assert code_dtype(size) is dtype
    assert np.iinfo(dtype).max >= size - 1


def test_the_manifest_records_the_augmentation(tmp_path, write_codes, splits):
    write_codes(tmp_path / "codes", splits, 5, augmentation=Augmentation(horizontal_flip=True, crops=2))
    augmentation = CodeCache(tmp_path / "codes").manifest.augmentation
    assert augmentation == Augmentation(horizontal_flip=True, crops=2)
    assert augmentation.variants == 6
    assert [Augmentation(crops=n).variants for n in (0, 3)] == [1, 4]


def test_an_older_manifest_means_no_augmentation(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["augmentation"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert CodeCache(folder).manifest.augmentation == Augmentation()


def test_a_missing_folder_names_the_command(tmp_path):
    with refuses(f"codes {tmp_path}/none", "twostage encode"):
        CodeCache(tmp_path / "none")


def test_a_folder_without_a_manifest_is_not_a_code_cache(folder):
    (folder / "manifest.json").unlink()
    with refuses(f"codes {folder}", "manifest.json is missing", "twostage encode"):
        CodeCache(folder)


@pytest.mark.parametrize("text", ["", '{"format_version": 1,', "\x00"])
def test_broken_json_asks_for_another_encode(text, folder):
    (folder / "manifest.json").write_text(text)
    with refuses("manifest.json", "JSON", "encode the images again"):
        CodeCache(folder)


def test_mistakes_in_the_manifest_are_named(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["grid"]
    (folder / "manifest.json").write_text(json.dumps(manifest | {"codebook_size": 0, "colour": 1}))
    with refuses("manifest.json", "3 mistakes", "grid: required", "codebook_size: ", "colour: unknown key"):
        CodeCache(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"validation_split": "test"}, ("splits", "validation_split 'test'", "['train', 'val']")),
        ({"splits": {}}, ("splits", "validation_split 'val'", "[]")),
        ({"unigram_nats_per_code": {"train": 1.0}}, ("unigram_nats_per_code", "validation_split 'val'", "['train']")),
    ],
)
def test_a_manifest_without_a_split_that_it_needs(change, named, folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | change))
    with refuses(f"codes {folder / 'manifest.json'}", "1 mistake:", *named, "ncode the images again"):
        CodeCache(folder)


def test_a_manifest_without_the_training_split(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["splits"]["train"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with refuses("splits", "'train'", "['val']"):
        CodeCache(folder)


def test_statistics_match_a_calculation_by_hand(monkeypatch):
    monkeypatch.setattr("stage2_prior.codes._ROWS_AT_ONCE", 2)  # the three rows are read in two parts
    train, held_out = np.array([[[0, 0]], [[0, 2]], [[2, 2]]]), np.array([[[1, 1]], [[1, 2]]])
    statistics = code_statistics({"train": train, "val": held_out}, 4)
    assert statistics["codes_used"] == 2
    assert statistics["entropy_nats_per_code"] == pytest.approx(np.log(2))
    smoothed = np.array([4, 1, 4, 1]) / 10
    assert statistics["unigram_nats_per_code"] == {
        "train": pytest.approx(-np.log(smoothed[[0, 2]]).mean()),
        "val": pytest.approx(-np.log(smoothed[[1, 1, 1, 2]]).mean()),
    }
    assert str(code_statistics({"train": np.zeros((2, 1, 1), dtype=int)}, 4)["entropy_nats_per_code"]) == "0.0"


@pytest.mark.parametrize(("name", "shape"), [("train.codes.npy", (10, 2, 3)), ("val.labels.npy", (4,))])
def test_a_missing_array_is_named(name, shape, folder):
    (folder / name).unlink()
    with refuses(f"codes {folder / name}", "missing", shape, f"emove {folder} and encode"):
        CodeCache(folder)


@pytest.mark.parametrize(
    ("name", "length", "expected", "found"),
    [
        *[("train.codes.npy", length, 10, 0) for length in (0, 5, 60, 128, 130, 139)],
        *[("train.codes.npy", length, 10, 1) for length in (140, 151)],
        ("train.codes.npy", -1, 10, 9),
        ("val.labels.npy", -9, 4, 2),
    ],
)
def test_a_truncated_array_shows_how_many_rows_it_has(name, length, expected, found, folder):
    file = folder / name
    file.write_bytes(file.read_bytes()[:length])
    with refuses(f"codes {file}", f"expected {expected} rows", f"found {found}", f"emove {folder} and encode"):
        CodeCache(folder)


def test_headers_of_another_version_are_read(folder, splits):
    with (folder / "train.codes.npy").open("wb") as file:
        np.lib.format.write_array(file, splits["train"].astype(np.uint16), version=(2, 0))
    read = CodeCache(folder).splits["train"].read(torch.arange(10))
    assert torch.equal(read, torch.from_numpy(splits["train"]))


@pytest.mark.parametrize("shape", [(9, 2, 3), (10, 3, 2), (10, 6)])
def test_an_array_of_another_shape_is_refused(shape, folder):
    np.save(folder / "train.codes.npy", np.zeros(shape, dtype=np.uint16))
    with refuses("train.codes.npy", "(10, 2, 3)", f"found {shape}"):
        CodeCache(folder)


@pytest.mark.parametrize("dtype", [np.float32, np.bool_])
def test_an_array_that_is_not_of_integers_is_refused(dtype, folder):
    np.save(folder / "train.codes.npy", np.zeros((10, 2, 3), dtype=dtype))
    with refuses("train.codes.npy", "integers", f"found {np.dtype(dtype)}"):
        CodeCache(folder)


def test_pickled_arrays_are_never_loaded(folder):
    np.save(folder / "train.codes.npy", np.array([{}], dtype=object), allow_pickle=True)
    with refuses("train.codes.npy", "integers", "found object"):
        CodeCache(folder)


def test_codes_and_labels_within_their_range_pass(folder):
    CodeCache(folder).check_codes()


@pytest.mark.parametrize(("label", "row"), [(2, 3), (-1, 0), (5, 5000)])
def test_a_label_outside_the_classes_is_named(label, row, tmp_path, write_codes, random_codes):
    codes = random_codes(6000).numpy()
    labels = {"train": np.arange(4) % 2, "val": np.arange(6000) % 2}
    labels["val"][row] = label
    write_codes(tmp_path, {"train": codes[:4], "val": codes}, 5, ["cat", "dog"], labels)
    file, expected = f"codes {tmp_path / 'val.labels.npy'}", "from 0 to 1 (2 class_names in manifest.json)"
    with refuses(file, f"row {row} ", f"label {label},", expected, f"emove {tmp_path} and encode"):
        CodeCache(tmp_path).check_codes()


def test_labels_without_classes_are_not_used_and_may_be_any(tmp_path, write_codes, splits):
    write_codes(tmp_path, splits, 5, None, {name: np.full(len(codes), 7) for name, codes in splits.items()})
    CodeCache(tmp_path).check_codes()


@pytest.mark.parametrize(("dtype", "code", "row"), [(np.uint16, 5, 3), (np.uint16, 65535, 5000), (np.int32, -1, 4096)])
def test_a_code_outside_the_codebook_is_named(dtype, code, row, tmp_path, write_codes, random_codes):
    codes = random_codes(6000).numpy()
    write_codes(tmp_path, {"train": codes, "val": codes[:4]}, 5)
    codes[row, 1, 0] = code
    np.save(tmp_path / "train.codes.npy", codes.astype(dtype))
    file, expected = f"codes {tmp_path / 'train.codes.npy'}", "from 0 to 4 (codebook_size 5 in manifest.json)"
    with refuses(file, f"row {row} ", f"code {code},", expected, f"emove {tmp_path} and encode"):
        CodeCache(tmp_path).check_codes()
