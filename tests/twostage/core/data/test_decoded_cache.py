"""Images are decoded once; later starts find them, unless anything that they depend on has changed."""

import os
import shutil
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from messages import refuses

from twostage.core.data import decoded_cache
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images, load_larger
from twostage.core.data.image_data import ImageData
from twostage.core.machine import progress

ROOT = Path("cache/twostage")


@pytest.fixture(autouse=True)
def _small_sets_too(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(decoded_cache, "MIN_IMAGES", 1)


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """The number of images in each call of `decode`."""
    counts, decode = [], decoded_cache.decode

    def counting(records, rows, *others):
        counts.append(len(rows))
        return decode(records, rows, *others)

    monkeypatch.setattr(decoded_cache, "decode", counting)
    return counts


def load(source: Path | str, **options: object) -> ImageData:
    return load_images(DataConfig.model_validate({"source": str(source), "image_size": 8, **options}))


def pixels(data: ImageData) -> list[torch.Tensor | None]:
    return [split.pixels for split in data.splits.values()]


def test_a_second_start_decodes_nothing_and_finds_the_same(images, decoded):
    root = images("train/0.png", "train/1.png", "test/2.png")
    first, num_first = load(root), decoded.copy()
    second = load(root)
    assert decoded == num_first == [2, 1]
    torch.testing.assert_close(pixels(second), pixels(first), rtol=0, atol=0)
    assert second.identity() == first.identity()
    assert (second.modes, second.sizes, second.values) == (first.modes, first.sizes, first.values)


def test_changes_in_memory_never_reach_the_copy(images):
    root = images("train/0.png", "test/1.png")
    before = load(root).splits["train"].pixels.clone()
    load(root).splits["train"].pixels.zero_()
    assert torch.equal(load(root).splits["train"].pixels, before)


def test_a_changed_file_another_form_and_another_range_are_decoded_again(images, decoded):
    root = images("train/0.png", "test/1.png")
    load(root)
    file = root / "train" / "0.png"
    shutil.copy(root / "test" / "1.png", file)
    assert load(root).splits["train"].pixels[0, 0, 0, 0] == 10
    assert load(root, image_size=4).splits["train"].pixels.shape == (1, 3, 4, 4)
    assert load(root, value_range=[0, 100]).splits["train"].pixels[0, 0, 0, 0] == 26
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    load(root)
    assert decoded == [1, 1, 1, 1, 1, 1, 1, 1]  # a start finds what did not change


def test_splits_of_one_table_with_as_many_rows_are_not_confused(table):
    """Both are in files of the same state."""
    path = table("train.parquet", [0, 1])
    table("test.parquet", [0, 1])
    cells = [{"bytes": b"no image", "path": None}, *pa.parquet.read_table(path)["image"].to_pylist()[1:]]
    pa.parquet.write_table(pa.table({"image": cells, "label": [0, 1]}), path)
    for memory in (0, 1):
        for _ in range(2):
            with refuses(f"1 unreadable image: {path.parent}:train:0 "):
                load(path.parent, in_memory_gb=memory)


def test_a_damaged_copy_is_replaced(images, decoded):
    root = images("train/0.png", "test/1.png")
    expected = pixels(load(root))
    copies = sorted((ROOT / "decoded").glob("*.npy"))
    copies[0].write_bytes(copies[0].read_bytes()[:-1])
    np.save(copies[1], np.zeros((1, 1, 8, 8), np.uint8))
    torch.testing.assert_close(pixels(load(root)), expected, rtol=0, atol=0)
    for scan in (ROOT / "scans").iterdir():
        scan.write_text('{"bad": 3}')
    torch.testing.assert_close(pixels(load(root)), expected, rtol=0, atol=0)
    assert decoded == [1] * 6
    load(root)
    assert decoded == [1] * 6


def test_maps_are_found_again_until_an_image_changes(images, decoded):
    root = images("train/0.png", "train/1.png", "test/2.png")
    maps = root.parent / "maps"
    shutil.copytree(root, maps)
    options = {"maps": str(maps), "map_kind": "image"}
    load(root, **options)
    assert torch.equal(load(root, **options).splits["train"].maps[1, 0], torch.full((8, 8), 10))
    assert decoded == [2, 1, 2, 1]
    images("train/0.png", size=(9, 9))
    with refuses("8 x 8 pixels, but its image has 9 x 9"):
        load(root, **options)


def test_larger_images_are_found_again(images, decoded):
    root = images("train/0.png", "test/1.png")
    first, second = (load_larger(load(root), (10, 10)) for _ in range(2))
    assert decoded == [1, 1, 1]
    assert torch.equal(first.pixels, second.pixels)


def test_nothing_is_stored_on_a_disk_without_room(images, monkeypatch):
    root = images("train/0.png", "test/1.png")
    usage = namedtuple("Usage", ["free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2 * 8 * 8 * 3 - 1))
    notice = load(root).notices[-1]
    assert "1 decoded images (1.92e-07 GB)" in notice
    assert f"{ROOT / 'decoded'} has 3.83e-07 GB free, expected twice their size" in notice
    assert "data.cache" in notice
    assert list((ROOT / "decoded").iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2 * 8 * 8 * 3))
    load(root)
    assert len(list((ROOT / "decoded").iterdir())) == 2


def test_images_beyond_the_limit_are_not_kept(images):
    root = images("train/0.png", "test/1.png")
    notice = load(root, cache_gb=1e-9).notices[-1]
    assert "1 decoded images (1.92e-07 GB) are not kept: 1e-09 GB is the limit" in notice
    assert "set a larger data.cache_gb" in notice
    assert list((ROOT / "decoded").iterdir()) == []


def test_larger_images_beyond_the_limit_are_named_beside_the_plain_ones(images):
    data = load(images("train/0.png", "test/1.png"), cache_gb=2e-7)
    assert not any("not kept" in notice for notice in data.notices)
    load_larger(data, (10, 10))
    assert "1 decoded images (3e-07 GB) are not kept: 2e-07 GB is the limit" in data.notices[-1]


@pytest.mark.parametrize("nowhere", [False, None, "false"])
def test_the_cache_is_another_folder_or_none(images, decoded, nowhere):
    root = images("train/0.png", "test/1.png")
    expected = pixels(load(root, cache=nowhere))
    assert not ROOT.exists()
    for _ in range(2):
        torch.testing.assert_close(pixels(load(root, cache="elsewhere/pixels")), expected, rtol=0, atol=0)
    assert decoded == [1] * 4
    assert len(list(Path("elsewhere/pixels/decoded").iterdir())) == 2
    assert not ROOT.exists()


def test_a_cache_that_cannot_be_written_is_refused(images):
    root = images("train/0.png", "test/1.png")
    Path("file").write_text("")
    for folder in ("file", "file/below"):
        with refuses(f"data.cache {folder}: cannot keep decoded images there", "data.cache=false"):
            load(root, cache=folder)


def test_what_was_not_used_for_the_longest_time_is_removed_first(images, monkeypatch, decoded):
    root = images("train/0.png", "test/1.png")
    for side in (8, 16):
        load(root, image_size=side)
    for place, file in enumerate(sorted((ROOT / "decoded").iterdir(), key=lambda file: file.stat().st_size)):
        os.utime(file, (place, place))
    load(root)  # now the newest
    load(root, image_size=12, cache_gb=2e-6)  # two of 560 bytes, beside two of 320 and two of 896
    assert sorted(file.stat().st_size for file in (ROOT / "decoded").iterdir()) == [320, 320, 560, 560]


def test_slow_decoding_says_what_is_read(images, monkeypatch, capsys):
    root, decode = images("train/0.png", "test/1.png"), decoded_cache.decode
    load(root)
    assert capsys.readouterr().out == ""

    def slow(*arguments):
        time.sleep(0.3)
        return decode(*arguments)

    monkeypatch.setattr(decoded_cache, "decode", slow)
    monkeypatch.setattr(progress, "SECONDS_OF_SILENCE", 0.01)
    load(root, image_size=4)
    assert capsys.readouterr().out.count(f"decoding 1 images of {root}") == 2
