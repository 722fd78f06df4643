"""Captions, vectors and maps lie beside the codes, in the order of their rows, and follow the augmentation."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from messages import assert_names, refuses
from PIL import Image

from pipelines.encoding import dataset_codes
from pipelines.saved.saved_model import find_data
from stage2_prior.codes import CodeCache
from stage2_prior.stored_captions import StoredCaptions
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images

COUNT = 12
HELD_OUT = 4


def words(i: int) -> list[str]:
    return [f"image {i} with a żółw 🐢", "to the left"][: 1 + i % 2]


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Noise of 24 x 24 pixels; the map of an image is a hash of its pixels' red, so that they can be compared."""
    noise = np.random.default_rng(0)
    root = tmp_path / "images"
    rows = []
    for i in range(COUNT + HELD_OUT):
        name = f"{'train' if i < COUNT else 'test'}/{i:02}.png"
        red = np.kron(noise.integers(0, 4, (6, 6)), np.ones((4, 4))).astype(np.uint8)
        for folder, pixels in {"images": np.stack([60 * red] * 3, axis=-1), "maps": red}.items():
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / folder / name)
        rows.append({"file_name": name, "captions": words(i), "probe": [i, -i, 0.5]})
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def encode(runs, dataset, twostage, tmp_path) -> Callable[..., object]:
    """``encode("codes", ...)``: `twostage encode` of the dataset into that folder, with captions, vectors and maps."""

    def encode(name: str, *options: object) -> object:
        settings = ["data.vector_column=probe", f"data.maps={tmp_path / 'maps'}", *options]
        return twostage("encode", runs.tokenizer, "--data", dataset, "--out", tmp_path / name, *settings)

    return encode


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def augmented(encode, tmp_path) -> Callable[[], CodeCache]:
    """Encodes the dataset with crops and mirrored images."""

    def augmented() -> CodeCache:
        ended = encode("codes", "--horizontal-flip", "--crops", 2)
        assert ended.code == 0, ended.err
        assert_names(ended.out, "6 of 12 training images", "left or right", "encode without --horizontal-flip")
        assert_names(ended.out, "with captions, vectors of 3 numbers, maps of 4 classes")
        return CodeCache(tmp_path / "codes")

    return augmented


def test_every_row_has_those_of_its_image(augmented):
    cache = augmented()
    cache.check_codes()
    manifest = cache.manifest
    assert manifest.has_captions
    assert (manifest.vector_length, manifest.map_classes, manifest.maps.classes) == (3, 4, [0, 1, 2, 3])
    train, test = cache.splits["train"], cache.splits["test"]
    assert (len(train), len(test)) == (6 * COUNT, HELD_OUT)
    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    images = (rows % COUNT).tolist()
    assert train.read_captions(rows) == [tuple(words(i)) for i in images]
    assert train.read_vectors(rows).tolist() == [[i, -i, 0.5] for i in images]
    assert test.read_captions(torch.tensor([1])) == [tuple(words(COUNT + 1))]
    assert isinstance(train.captions.text, np.memmap)
    assert isinstance(train.vectors, np.memmap)
    assert isinstance(train.maps, np.memmap)


def test_maps_are_cropped_and_mirrored_as_their_images(augmented, monkeypatch):
    """The images of all variants are compared with their maps; half of a pixel's shade can come from its neighbours."""
    read, seen = dataset_codes.ImageVariants.read, []
    monkeypatch.setattr(
        dataset_codes.ImageVariants, "read", lambda self, images: (seen.append(x) or x for x in read(self, images))
    )
    cache = augmented()
    variants, train = torch.cat(seen[:6]), cache.splits["train"]
    maps = train.read_maps(torch.arange(len(train)))
    assert maps.shape == (6 * COUNT, 16, 16)
    shades = variants[:, 0].int()
    assert ((shades - 60 * maps.int()).abs() <= 30).float().mean() > 0.85
    assert ((shades - 60 * maps.flip(-1).int()).abs() <= 30).float().mean() < 0.6, "this test would see it"
    assert torch.equal(maps[: 3 * COUNT].flip(-1), maps[3 * COUNT :])
    assert not torch.equal(maps[:COUNT], maps[COUNT : 2 * COUNT])


class Killed(BaseException):
    """Ends a call wherever it is."""


def test_an_interrupted_call_resumes_to_the_same_folder(encode, twostage, tmp_path, monkeypatch):
    assert encode("whole").code == 0
    with monkeypatch.context() as patch:

        def die(*_: object) -> None:
            raise Killed

        patch.setattr(dataset_codes, "_encode_split", die)
        with pytest.raises(Killed):
            encode("codes")
    partial = tmp_path / ".codes.partial" / "codes"
    for file in partial.glob("*.caption*"):
        file.unlink()  # an earlier version, which did not store them, was interrupted
    ended = encode("codes")
    assert ended.code == 0
    assert ".codes.partial: resuming, 0 of 16 rows" in ended.out
    assert contents(tmp_path / "codes") == contents(tmp_path / "whole")
    assert "nothing to do" in encode("codes").out


def test_other_settings_are_other_codes(encode, tmp_path):
    assert encode("codes").code == 0
    before = contents(tmp_path / "codes")
    ended = encode("codes", "data.caption_column=null")
    assert ended.code == 2
    assert_names(ended.err, "--out", "data.caption_column: was 'auto', now None", "Choose another --out")
    assert contents(tmp_path / "codes") == before
    assert encode("without", "data.caption_column=null", "data.vector_column=null", "data.maps=null").code == 0
    cache, plain = CodeCache(tmp_path / "codes"), CodeCache(tmp_path / "without")
    assert not plain.manifest.has_captions
    assert (plain.manifest.vector_length, plain.manifest.maps, plain.manifest.map_classes) == (None, None, None)
    everything = torch.arange(COUNT)
    for read in ("read_captions", "read_vectors", "read_maps"):
        assert getattr(plain.splits["train"], read)(everything) is None
    assert torch.equal(plain.splits["train"].read(everything)[0], cache.splits["train"].read(everything)[0])
    assert plain.contents().facts != cache.contents().facts


def test_only_settings_of_conditions_can_be_given(encode):
    ended = encode("codes", "data.image_size=8")
    assert ended.code == 2
    assert_names(ended.err, "'data.image_size=8'", "data.caption_column", "Remove it")


# --- missing captions -----------------------------------------------------------------------------------------------


def change_metadata(dataset: Path, change: Callable[[dict], dict]) -> None:
    file = dataset / "metadata.jsonl"
    rows = [change(json.loads(line)) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_missing_captions_stop_it_unless_they_are_skipped_or_empty(encode, dataset, tmp_path):
    change_metadata(dataset, lambda row: row | {"captions": [] if row["file_name"] < "train/03" else row["captions"]})
    ended = encode("codes")
    assert ended.code == 2
    assert_names(ended.err, dataset, "7 of 16 images have no caption", f"{dataset}/train/00.png")
    assert_names(ended.err, "data.on_missing_caption=skip", "data.on_missing_caption=empty", "data.caption_column=null")
    assert not list(tmp_path.glob("*codes*"))
    assert encode("empty", "data.on_missing_caption=empty").code == 0
    train = CodeCache(tmp_path / "empty").splits["train"]
    assert train.read_captions(torch.tensor([2, 3])) == [("",), tuple(words(3))]


def test_skipped_images_have_no_rows(encode, dataset, tmp_path):
    change_metadata(dataset, lambda row: row | {"captions": None if row["file_name"] == "train/01.png" else words(2)})
    ended = encode("codes", "data.on_missing_caption=skip")
    assert ended.code == 0, ended.err
    assert "1 images without a caption are skipped" in ended.out
    train = CodeCache(tmp_path / "codes").splits["train"]
    assert len(train) == COUNT - 1
    assert train.read_vectors(torch.tensor([1])).tolist() == [[2, -2, 0.5]]


def test_a_caption_without_an_image_stops_it(encode, dataset):
    change_metadata(dataset, lambda row: row | {"file_name": row["file_name"].replace("07", "70")})
    ended = encode("codes", "data.vector_column=null")
    assert ended.code == 2
    assert_names(ended.err, dataset, "1 caption without an image: train/70.png in metadata.jsonl", "Rename or remove")
    assert encode("codes", "data.vector_column=null", "data.on_missing_caption=skip").code == 0


def test_moved_images_and_maps_are_found(encode, twostage, tmp_path, dataset):
    """Stored paths lead to a folder that is no longer there; everything else moved together."""
    assert encode("codes").code == 0
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("images", "maps", "codes"):
        (tmp_path / name).rename(moved / name)
    manifest = CodeCache(moved / "codes").manifest
    config = DataConfig(source=manifest.source, image_size=16, channels=3, **manifest.condition_settings)
    found = find_data(config, moved / "codes", manifest.images)
    assert (found.source, found.maps) == (str(moved / "images"), str(moved / "maps"))
    assert load_images(found).identity() == manifest.images.facts


# --- damaged folders ------------------------------------------------------------------------------------------------


def test_damaged_arrays_are_named(encode, tmp_path):
    assert encode("codes").code == 0
    folder = tmp_path / "codes"
    starts, text = (np.load(folder / f"train.{name}.npy") for name in ("caption_starts", "captions"))
    remedy = f"Remove {folder} and encode the images again"
    broken = starts.copy()
    broken[4] = broken[7]
    np.save(folder / "train.caption_starts.npy", broken)
    with refuses(f"codes {folder}/train.captions.npy", "captions of row", "damaged", remedy):
        CodeCache(folder).check_codes()
    np.save(folder / "train.caption_starts.npy", starts)
    wrong = text.copy()
    wrong[starts[5]] = 0xFF
    np.save(folder / "train.captions.npy", wrong)
    with refuses(f"codes {folder}/train.captions.npy", "captions of row 5", "expected UTF-8", remedy):
        CodeCache(folder).check_codes()
    np.save(folder / "train.captions.npy", text[:-1])
    with refuses("train.captions.npy", f"expected the shape ({len(text)},)", remedy):
        CodeCache(folder)
    np.save(folder / "train.captions.npy", text)
    vectors = np.load(folder / "test.vectors.npy")
    vectors[2, 1] = np.nan
    np.save(folder / "test.vectors.npy", vectors)
    with refuses(f"codes {folder}/test.vectors.npy", "row 2", "NaN", remedy):
        CodeCache(folder).check_codes()
    np.save(folder / "test.vectors.npy", np.zeros((4, 3), dtype=np.int64))
    with refuses("test.vectors.npy", "expected floats", remedy):
        CodeCache(folder)
    (folder / "train.maps.npy").unlink()
    (folder / "test.vectors.npy").unlink()
    with refuses("train.maps.npy", "missing", "(12, 16, 16)", remedy):
        CodeCache(folder)


def test_captions_of_any_length_are_packed():
    captions = [("a",), ("", "b c"), ("",), ("🙂" * 1000, "ż")]
    stored = StoredCaptions.pack(captions)
    assert len(stored) == 4
    assert stored.first_bad() is None
    assert stored.read([3, 1, 1, 0, 2]) == [captions[i] for i in (3, 1, 1, 0, 2)]
    assert StoredCaptions.pack([("",), ("",)]).read([1]) == [("",)]
