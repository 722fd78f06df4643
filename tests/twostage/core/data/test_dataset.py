"""From a source to uint8 batches: each row has its image, bad images are named, held-out images stay the same."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from messages import assert_names, refuses
from PIL import Image

from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images, load_larger
from twostage.core.data.image_data import ImageData, ImageSplit
from twostage.core.errors import InputError

ON_DISK = {"in_memory_gb": 0}


def load(source: Path | str, **options: object) -> ImageData:
    return load_images(DataConfig.model_validate({"source": str(source), "image_size": 8, **options}))


def all_rows(split: ImageSplit) -> torch.Tensor:
    return split.read(torch.arange(len(split)))


def reds(split: ImageSplit) -> list[int]:
    """The red of each image's first pixel, which tells the fixtures' images apart."""
    return all_rows(split)[:, 0, 0, 0].tolist()


def numbered(folder: str, count: int) -> list[str]:
    return [f"{folder}/{i:02d}.png" for i in range(count)]


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [{}, ON_DISK], ids=["in memory", "on disk"])
def test_each_row_has_its_image_and_its_label(images, mode):
    data = load(images("train/cat/0.png", "train/dog/1.png", "train/dog/2.png", "val/cat/3.png"), **mode)
    train, rows = data.splits["train"], torch.tensor([2, 0])
    assert train.in_memory == (mode == {})
    assert train.read(rows).dtype == torch.uint8
    assert torch.equal(train.read(rows)[:, :, 3, 3], torch.tensor([[20, 100, 200], [0, 100, 200]], dtype=torch.uint8))
    assert train.read_labels(rows).tolist() == [1, 0]
    assert (data.class_names, reds(data.validation)) == (["cat", "dog"], [30])
    assert data.sizes == {"8 x 8": 4}
    assert data.modes == {"RGB": 4}


def test_on_disk_reads_the_same_pixels_as_in_memory(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 11, 7, 3), dtype=np.uint8)  # enough for several threads
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
    form = {"image_size": [9, 6], "validation_share": 0.2}
    memory, disk = (load(tmp_path, **form, **mode) for mode in ({}, ON_DISK))
    for split in ("train", "val"):
        assert not disk.splits[split].in_memory
        assert torch.equal(all_rows(memory.splits[split]), all_rows(disk.splits[split]))
    assert all_rows(memory.splits["train"]).shape == (32, 3, 9, 6)
    assert len(all_rows(memory.splits["train"]).unique(dim=0)) == 32


def test_validation_is_val_where_there_is_one_else_test(images):
    root = images("train/0.png", "test/1.png")
    assert load(root).validation_name == "test"
    images("train/0.png", "test/1.png", "val/2.png")
    assert (load(root).validation_name, reds(load(root).validation)) == ("val", [20])


def test_larger_images_have_the_same_rows_and_leave_held_out_files_alone(images):
    root = images(*numbered("train", 6), "val/0.png")
    (root / "train" / "02.png").write_bytes(b"broken before")
    data = load(root, on_bad_image="skip")
    (root / "val" / "0.png").unlink()
    larger = load_larger(data, (10, 12))
    assert larger.in_memory
    assert all_rows(larger).shape == (5, 3, 10, 12)
    assert reds(larger) == reds(data.splits["train"]) == [0, 10, 30, 40, 50]
    (root / "train" / "04.png").write_bytes(b"broken since")
    with refuses("04.png", "readable when the run started", "Restore the file"):
        load_larger(data, (10, 12))


def test_larger_images_share_the_memory_of_the_plain_ones(images):
    data = load(images(*numbered("train", 6), "val/0.png"), in_memory_gb=4e-6)  # of 1.3 and 2.9 kB
    larger = load_larger(data, (12, 13))
    assert data.splits["train"].in_memory
    assert not larger.in_memory
    assert reds(larger) == reds(data.splits["train"])


def test_larger_drawn_shapes_show_the_same():
    data = load("shapes", image_size=16, num_images=8)
    larger = load_larger(data, (32, 32))
    assert torch.equal(larger.labels, data.splits["train"].labels)
    shrunk = torch.nn.functional.avg_pool2d(all_rows(larger).float(), 2)
    assert (shrunk - all_rows(data.splits["train"])).abs().mean() < 5


def test_drawn_shapes_take_no_settings_of_files():
    for name, value in {"label_column": "breed", "value_range": [0, 1]}.items():
        with refuses(f"data.{name} ", "data.source=shapes", f"Remove data.{name}"):
            load("shapes", **{name: value})


# --- holding out and limiting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [{}, ON_DISK], ids=["in memory", "on disk"])
def test_held_out_images_are_fixed_and_not_trained_on(images, mode):
    root = images(*numbered("any", 20))
    first, again = (load(root, validation_share=0.25, **mode) for _ in range(2))
    train, val = reds(first.splits["train"]), reds(first.splits["val"])
    assert (len(train), len(val)) == (15, 5)
    assert sorted(train + val) == [10 * i for i in range(20)]
    assert (reds(again.splits["train"]), reds(again.splits["val"])) == (train, val)
    assert first.notices == ["no `val` or `test` split: 5 of 20 training images are held out as `val`"]


def test_labels_follow_the_images_when_some_are_held_out(images):
    data = load(images(*numbered("cat", 10), *numbered("dog", 10)), validation_share=0.3)
    for split in data.splits.values():
        assert split.read_labels(torch.arange(len(split))).tolist() == [int(red >= 100) for red in reds(split)]


def test_num_images_limits_training_only(images):
    root = images(*numbered("train", 12), *numbered("test", 4))
    limited = load(root, num_images=5)
    assert len(set(reds(limited.splits["train"]))) == 5
    assert reds(limited.splits["train"]) == reds(load(root, num_images=5).splits["train"])
    assert set(reds(limited.splits["train"])) < set(reds(load(root).splits["train"]))
    assert len(limited.splits["test"]) == 4
    assert len(load(root, num_images=1000).splits["train"]) == 12, "at most"


def test_an_empty_test_table_is_no_held_out_split(table):
    folder = table("train.parquet", [0, 1, 0, 1]).parent
    table("test.parquet", [])
    assert list(load(folder).splits) == ["train", "val"]


def test_one_image_cannot_be_trained_on_and_held_out(images):
    root = images("0.png")
    with refuses(f"data.source {root}: has 1 image", "expected at least 2", "Add images"):
        load(root)


def test_at_least_one_image_is_left_to_train_on(images):
    data = load(images("0.png", "1.png"), validation_share=0.99)
    assert (len(data.splits["train"]), len(data.splits["val"])) == (1, 1)


def test_source_without_a_train_split_is_refused(table):
    path = table("test.parquet", [0, 1])
    with refuses(f"data.source {path}", "['test']", "expected one named train"):
        load(path)


# --- images that cannot be read -------------------------------------------------------------------------------------


@pytest.fixture
def spoil():
    def spoil(file: Path, how: str) -> None:
        content = file.read_bytes()
        file.write_bytes({"text": b"no image", "empty": b"", "cut short": content[: len(content) // 2]}[how])

    return spoil


@pytest.mark.parametrize("mode", [{}, ON_DISK], ids=["in memory", "on disk"])
@pytest.mark.parametrize("how", ["text", "empty", "cut short"])
def test_unreadable_image_stops_the_run_by_name(images, spoil, how, mode):
    root = images("train/0.png", "train/1.png", "test/2.png", size=(64, 64))
    spoil(root / "train" / "1.png", how)
    with refuses(f"data.source {root}: 1 unreadable image: {root}/train/1.png (", "data.on_bad_image=skip"):
        load(root, **mode)


@pytest.mark.parametrize("mode", [{}, ON_DISK], ids=["in memory", "on disk"])
def test_unreadable_images_are_skipped_and_counted_on_request(images, spoil, mode):
    root = images("train/cat/0.png", "train/cat/1.png", "train/dog/2.png", "train/dog/3.png", "test/cat/4.png")
    spoil(root / "train" / "cat" / "0.png", "text")
    spoil(root / "train" / "dog" / "3.png", "text")
    data = load(root, on_bad_image="skip", **mode)
    assert reds(data.splits["train"]) == [10, 20]
    assert data.splits["train"].read_labels(torch.arange(2)).tolist() == [0, 1]
    bad = [f"{root}/train/{name}.png (not a readable image)" for name in ("cat/0", "dog/3")]
    assert data.bad == bad
    assert data.notices == [f"2 unreadable images are skipped: {', '.join(bad)}"]


def test_unreadable_rows_of_a_table_are_named(table):
    path = table("train.parquet", [0, 0, 0])
    content = pa.parquet.read_table(path)
    cells = [*content["image"].to_pylist()[:1], {"bytes": b"no image", "path": None}, {"bytes": None, "path": None}]
    pa.parquet.write_table(content.set_column(0, "image", pa.array(cells)), path)
    with refuses(f"{path}:train:1 (not a readable image)", f"{path}:train:2 (no image in this row)"):
        load(path)


def test_unreadable_rows_of_a_large_table_on_disk_are_named_by_their_number(table):
    path = table("train.parquet", [0])
    cells = pa.parquet.read_table(path)["image"].to_pylist() * 1100
    cells[1050] = {"bytes": b"no image", "path": None}
    pa.parquet.write_table(pa.table({"image": cells}), path)
    table("test.parquet", [0])
    with refuses(f"1 unreadable image: {path.parent}:train:1050 "):
        load(path.parent, **ON_DISK)


def test_at_most_five_unreadable_images_are_named(images, spoil):
    root = images(*numbered("train", 8), "test/0.png")
    for name in numbered("train", 7):
        spoil(root / name, "text")
    with pytest.raises(InputError) as error:
        load(root)
    assert_names(str(error.value), "7 unreadable images", "04.png", "and 2 more")
    assert "05.png" not in str(error.value)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_a_readable_image_is_refused(images, spoil, split):
    root = images("train/0.png", "test/1.png")
    spoil(next((root / split).iterdir()), "text")
    with refuses(f"data.source {root}: ", f"`{split}`", "expected readable images", "(not a readable image)"):
        load(root, on_bad_image="skip")


def test_the_check_of_images_on_disk_is_remembered_until_a_file_changes(images, spoil):
    root = images("train/0.png", "train/1.png", "test/2.png")
    load(root, **ON_DISK)
    file, before = root / "train" / "1.png", (root / "train" / "1.png").stat()
    file.write_bytes(bytes(before.st_size))  # spoiled without a trace in size or time: only a memory would pass it
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(load(root, **ON_DISK).splits["train"]) == 2
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with refuses("1 unreadable image:", "train/1.png"):
        load(root, **ON_DISK)


def test_images_are_checked_where_nothing_can_be_remembered(monkeypatch, images, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load(images("train/0.png", "test/1.png"), **ON_DISK).splits["train"]) == 1


def test_a_changed_table_is_checked_again(table):
    path = table("train.parquet", [0, 1, 0, 1])
    load(path, **ON_DISK)
    cells = [{"bytes": b"no image", "path": None}] * 4
    pa.parquet.write_table(pa.table({"image": cells, "label": [0, 1, 0, 1]}), path)
    with refuses("4 unreadable images"):
        load(path, **ON_DISK)


def test_an_image_that_vanishes_while_training_is_named(images):
    root = images("train/0.png", "train/1.png", "test/2.png")
    train = load(root, **ON_DISK).splits["train"]
    (root / "train" / "1.png").unlink()
    assert train.read(torch.tensor([0])).shape == (1, 3, 8, 8)
    with refuses(f"{root}/train/1.png: was readable", "Restore the file", "same command again"):
        train.read(torch.tensor([1, 0]))


# --- notices, shapes, the network -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "notices"),
    [
        (1, ["2 of 5 images have colour and are converted to grey (data.channels=1)"]),
        (3, ["3 of 5 images are grey and are copied to all colours (data.channels=3)"]),
        (4, ["3 of 5 images are grey and are copied to all colours (data.channels=4)"]),
    ],
)
def test_one_notice_about_a_change_of_channels(images, channels, notices):
    root = images("train/0.png", "test/0.png")
    for i, mode in enumerate(["L", "LA", "I;16"]):
        Image.new(mode, (8, 8)).save(root / "train" / f"grey{i}.png")
    data = load(root, channels=channels)
    assert data.notices == notices
    assert all_rows(data.splits["train"]).shape == (4, channels, 8, 8)


def test_images_of_the_wanted_kind_need_no_notice(images):
    assert load(images("train/0.png", "test/0.png")).notices == []


def test_shapes_have_labelled_splits_without_a_shared_image():
    data = load("shapes", image_size=[12, 16], channels=1, num_images=200)
    train, test = all_rows(data.splits["train"]), all_rows(data.splits["test"])
    assert (train.shape, test.shape) == ((200, 1, 12, 16), (64, 1, 12, 16))
    assert len(torch.cat([train, test]).unique(dim=0)) == 264
    assert data.splits["test"].read_labels(torch.tensor([0, 7, 8])).tolist() == [0, 7, 0]
    assert len(data.class_names or []) == 8


@pytest.mark.usefixtures("no_network")
def test_local_sources_never_touch_the_network(images, table):
    for source in ["shapes", images("train/0.png", "test/1.png"), table("train.parquet", [0, 1])]:
        assert len(load(source, num_images=1).splits["train"]) == 1
