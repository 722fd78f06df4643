"""How a `data.source` is understood, and which messages refuse an ambiguous one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from messages import assert_names, refuses

from twostage.core.data.records import Columns, Source
from twostage.core.data.sources import find_source
from twostage.core.data.tables import named_splits
from twostage.core.files import expand_home

pytestmark = pytest.mark.usefixtures("no_network")


def labelled(source: Source, split: str) -> dict[str, str]:
    """The class of each image, by file name."""
    records = source.splits[split]
    assert records.labels is not None
    assert source.class_names is not None
    return {Path(n).name: source.class_names[label] for n, label in zip(records.names, records.labels, strict=True)}


def reds(source: Source, split: str = "train") -> list[int]:
    records = source.splits[split]
    opened = []
    for i in range(len(records)):
        with records.open(i) as image:
            opened.append(image.getpixel((0, 0))[0])
    return opened


# --- folders --------------------------------------------------------------------------------------------------------


def test_flat_folder_has_no_classes(images):
    source = find_source(str(images("b.png", "a.jpg", "c.PNG")))
    assert list(source.splits) == ["train"]
    assert [Path(name).name for name in source.splits["train"].names] == ["a.jpg", "b.png", "c.PNG"]
    assert source.class_names is None
    assert source.splits["train"].labels is None
    assert "images without classes" in source.description


def test_class_folders_give_sorted_classes(images):
    source = find_source(str(images("dog/0.png", "cat/1.png", "cat/deep/2.png", "ant/3.png")))
    assert source.class_names == ["ant", "cat", "dog"]
    assert labelled(source, "train") == {"0.png": "dog", "1.png": "cat", "2.png": "cat", "3.png": "ant"}
    assert reds(source) == [30, 10, 20, 0]


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "validation", "testing")])
def test_splits_above_class_folders(images, names):
    train, val, test = names
    root = images(f"{train}/cat/0.png", f"{train}/dog/1.png", f"{val}/dog/2.png", f"{test}/cat/3.png")
    source = find_source(str(root))
    assert source.class_names == ["cat", "dog"]
    assert labelled(source, "train") == {"0.png": "cat", "1.png": "dog"}
    assert labelled(source, "val") == {"2.png": "dog"}, "the class keeps its number where others are missing"
    assert labelled(source, "test") == {"3.png": "cat"}


def test_below_train_classes_may_be_called_like_splits(images):
    source = find_source(str(images("train/test/0.png", "train/dev/1.png", "train/ant/2.png", "test/test/3.png")))
    assert source.class_names == ["ant", "dev", "test"]
    assert labelled(source, "train") == {"0.png": "test", "1.png": "dev", "2.png": "ant"}
    assert labelled(source, "test") == {"3.png": "test"}


def test_a_held_out_split_without_class_folders_has_no_labels(images):
    source = find_source(str(images("train/cat/0.png", "train/dog/1.png", "test/2.png")))
    assert labelled(source, "train") == {"0.png": "cat", "1.png": "dog"}
    assert source.splits["test"].labels is None
    assert source.notices == ["`test` has no class folders and is used without classes"]


@pytest.mark.parametrize("names", [
    ("train/train/0.png", "train/train/1.png", "train/test/2.png"),
    ("train/train/cat/0.png", "train/train/dog/1.png", "train/test/cat/2.png"),
    ("cat/train/0.png", "dog/training/1.png", "dog/test/2.png"),
])  # fmt: skip
def test_splits_are_found_below_a_folder_of_the_same_name(images, names):
    source = find_source(str(images(*names)))
    assert {split: reds(source, split) for split in source.splits} == {"train": [0, 10], "test": [20]}


@pytest.mark.parametrize(
    "form", ["animals/{}", "{}/animals", "train/animals/{}", "data/train/animals/{}", "{}/deep/er"]
)
def test_folders_that_all_images_share_are_no_classes(images, form):
    source = find_source(str(images(f"{form.format('cat')}/0.png", f"{form.format('dog')}/1.png")))
    assert labelled(source, "train") == {"0.png": "cat", "1.png": "dog"}


@pytest.mark.parametrize("name", ["testA", "split=test", "holdout", "tst", "held_out"])
def test_names_that_read_as_held_out_are_pointed_out(images, table, name):
    source = find_source(str(images("trainA/0.png", f"{name}/1.png")))
    assert_names(" ".join(source.notices), f"folders {name} are used for training", "test/", "train/")
    table("part1.parquet", [0])
    source = find_source(str(table(f"{name}.parquet", [0]).parent))
    assert_names(" ".join(source.notices), f"{name}.parquet", "rename", "test-NAME.parquet")


def test_held_out_names_below_train_alone_are_pointed_out(images):
    source = find_source(str(images("train/cat/0.png", "train/cat/test/1.png", "train/dog/2.png")))
    assert_names(" ".join(source.notices), "folders test are used for training", "test/", "train/")


def test_splits_above_flat_folders(images):
    source = find_source(str(images("train/0.png", "train/1.png", "test/2.png")))
    assert {split: reds(source, split) for split in source.splits} == {"train": [0, 10], "test": [20]}
    assert source.class_names is None


def test_a_class_called_like_a_split_keeps_its_class(images):
    source = find_source(str(images("train_station/0.png", "testimony/1.png")))
    assert list(source.splits) == ["train"]
    assert labelled(source, "train") == {"0.png": "train_station", "1.png": "testimony"}


def test_other_files_and_hidden_ones_are_named(images):
    root = images("cat/0.png", "cat/.ipynb_checkpoints/0-checkpoint.png", ".thumbnails/0.png", "cat/._0.png")
    (root / "cat" / "notes.txt").touch()
    source = find_source(str(root))
    assert labelled(source, "train") == {"0.png": "cat"}
    skipped = [line.removeprefix(f"{root}/") for line in source.skipped]
    assert skipped == [
        ".thumbnails/0.png (hidden)",
        "cat/._0.png (hidden)",
        "cat/.ipynb_checkpoints/0-checkpoint.png (hidden)",
        "cat/notes.txt (not an image: .txt)",
    ]
    (notice,) = source.notices
    assert_names(notice, "4 files skipped", *skipped)


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("0.png", "cat/1.png", "dog/2.png"), ("{root}: ", "cat, dog", "expected either only images", "one folder")),
        (("train/cat/0.png", "test/cat/1.png", "test/dog/2.png"), ("{root}/test: ", "['dog']", "['cat']", "same")),
        (("train/cat/0.png", "test/1.png", "test/cat/2.png"), ("{root}/test: ", "outside class folders", "['cat']")),
        (("train/0.png", "test/cat/1.png"), ("{root}/test: ", "['cat']", "`train` has no classes", "same layout")),
        (("train/0.png", "bus/1.png", "car/2.png"), ("{root}: ", "split train ", "bus, car", "into train/", "rename")),
        (("test/0.png", "dev/1.png", "ant/2.png"), ("{root}: ", "splits dev, test ", "folders ant", "into train/")),
        (("cat/0.png", "cat/test/1.png"), ("{root}: ", "split test ", "images outside these folders", "into train/")),
        (("val/cat/0.png", "test/cat/1.png"), ("{root}: ", "['test', 'val']", "expected one named train")),
    ],
    ids=["mixed", "class only in test", "test is half flat", "train is flat", "train among classes",
         "held out among classes", "held out below a class", "no train"],
)  # fmt: skip
def test_an_ambiguous_folder_is_refused(images, names, parts):
    root = images(*names)
    with refuses("data.source ", *(part.format(root=root) for part in parts)):
        find_source(str(root))


def test_an_empty_folder_names_the_expected_types(tmp_path):
    with refuses(f"data.source {tmp_path}", "expected images", ".png", ".parquet"):
        find_source(str(tmp_path))


def test_single_image_file_is_refused(images):
    file = images("cat.png") / "cat.png"
    with refuses(f"data.source {file}", "expected a folder", ".parquet"):
        find_source(str(file))


# --- names ----------------------------------------------------------------------------------------------------------


def test_a_name_is_found_under_the_data_folder(monkeypatch, images):
    root = images("flowers/train/rose/0.png", "flowers/test/rose/1.png")
    monkeypatch.setenv("TWOSTAGE_DATA", str(root))
    assert find_source("flowers").class_names == find_source("someone/flowers").class_names == ["rose"]


def test_an_unknown_name_lists_the_places_searched(monkeypatch, tmp_path):
    with refuses("data.source 'flowers'", "(searched: flowers)", "set TWOSTAGE_DATA"):
        find_source("flowers")
    monkeypatch.setenv("TWOSTAGE_DATA", str(tmp_path))
    with refuses("data.source 'flowers'", f"(searched: flowers, {tmp_path}/flowers)", "Fix the path"):
        find_source("flowers")
    with refuses("data.source 'mnist'", "data.source=ylecun/mnist"):
        find_source("mnist")


@pytest.mark.parametrize(
    "name", ["./nothing", "../no/thing", "/no/thing", "~/no_such_thing", "~nobody_at_all/x", "no.parquet", "a/b.arrow"]
)
def test_a_missing_path_is_never_a_download(name):
    with refuses(f"data.source '{name}'", f"(searched: {Path(expand_home(name))})", "Fix the path"):
        find_source(name)


def test_a_dataset_that_cannot_be_downloaded_is_one_line(tmp_path):
    code = ("from twostage.core.data.sources import find_source\ntry: find_source('someone/flowers')\n"
            "except Exception as error: print(type(error).__name__, error)")  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TWOSTAGE_DATA": str(tmp_path)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True,
                          timeout=60, check=True, cwd=Path(__file__).parents[4])  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert_names(
        done.stdout, "InputError data.source 'someone/flowers'", f"(searched: someone/flowers, {tmp_path}/someone/",
        "train.parquet and test.parquet into $TWOSTAGE_DATA/flowers/", "data.source=FOLDER",
    )  # fmt: skip


# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train.parquet", "data.parquet", "train-00000-of-00001.arrow"])
def test_table_with_hugging_face_class_names(table, name):
    source = find_source(str(table(name, [1, 0, 1], class_names=["ant", "bee", "cow"])))
    assert source.class_names == ["ant", "bee", "cow"]
    assert source.splits["train"].labels.tolist() == [1, 0, 1]
    assert reds(source) == [0, 10, 20]


def test_arrow_file_format(table, tmp_path):
    with pa.ipc.open_stream(table("stream.arrow", [0, 1])) as reader:
        content = reader.read_all()
    path = tmp_path / "file.arrow"
    with pa.ipc.new_file(path, content.schema) as writer:
        writer.write_table(content)
    assert reds(find_source(str(path))) == [0, 10]


def test_plain_integer_labels_are_named_by_their_numbers(table):
    source = find_source(str(table("train.parquet", [0, 2, 100_000_000, 2])))
    assert source.class_names == ["0", "2", "100000000"]
    assert source.splits["train"].labels.tolist() == [0, 1, 2, 1]


def test_text_labels_are_sorted_over_all_splits(table):
    table("train.parquet", ["dog", "ant", "dog"])
    source = find_source(str(table("test.parquet", ["cat"]).parent))
    assert source.class_names == ["ant", "cat", "dog"]
    assert source.splits["train"].labels.tolist() == [2, 0, 2]
    assert source.splits["test"].labels.tolist() == [1]


def test_other_column_names_and_plain_bytes(table):
    source = find_source(str(table("train.parquet", count=2, column="img", as_struct=False)))
    assert reds(source) == [0, 10]
    assert source.class_names is None


def test_shards_of_a_split_are_joined_in_order(table):
    for name, labels in {"train-00000-of-00002": [0, 0], "train-00001-of-00002": [1], "validation-0": [1]}.items():
        folder = table(f"{name}.parquet", labels, class_names=["ant", "bee"]).parent
    source = find_source(str(folder))
    assert source.class_names == ["ant", "bee"]
    assert {split: records.labels.tolist() for split, records in source.splits.items()} == {
        "train": [0, 0, 1],
        "val": [1],
    }


@pytest.mark.parametrize(
    ("names", "splits", "ignored"),
    [
        (["train.parquet", "extra.parquet"], {"train": 1}, ["extra.parquet"]),
        (["train-00000-of-00001.parquet", "train_extra-00000-of-00001.parquet"], {"train": 1},
         ["train_extra-00000-of-00001.parquet"]),
        (["train.parquet", "train_extra.parquet"], {"train": 2}, []),
        (["cifar10_train.parquet", "cifar10_test.parquet"], {"train": 1, "test": 1}, []),
        (["a.parquet", "b.parquet"], {"train": 2}, []),
        (["train.parquet", "cache-1f2e.arrow"], {"train": 1}, ["cache-1f2e.arrow"]),
        (["train.parquet", "test/0.parquet"], {"train": 1, "test": 1}, []),
        (["TRAIN.PARQUET", "Test.Parquet"], {"train": 1, "test": 1}, []),
        (["train.parquet", "test.parquet", "old/train.parquet"], {"train": 1, "test": 1}, ["old/train.parquet"]),
        (["data.parquet", "old/data.parquet"], {"train": 1}, ["old/data.parquet"]),
        (["a/x.parquet", "b/y.parquet"], {"train": 2}, []),
        (["unsupervised-00000-of-00001.parquet", "training-00000-of-00001.parquet", "Eval.parquet"],
         {"train": 1, "test": 1}, ["unsupervised-00000-of-00001.parquet"]),
    ],
)  # fmt: skip
def test_a_table_that_is_no_split_is_named_and_never_trained_on(table, names, splits, ignored):
    for name in names:
        folder = table(name, [0]).parents[name.count("/")]
    source = find_source(str(folder))
    assert {split: len(records) for split, records in source.splits.items()} == splits
    assert sorted(line.partition(" (")[0] for line in source.skipped) == [f"{folder}/{name}" for name in ignored]


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["data.parquet", "test.parquet"], ["['test']", "(data.parquet)", "to train.parquet"]),
        (["train/train.parquet", "train/test.parquet"], ["train/test.parquet", "test or train", "Rename it"]),
        (["train_test.parquet"], ["train_test.parquet", "test or train", "Rename it"]),
    ],
)
def test_tables_with_an_ambiguous_split_are_refused(table, names, parts):
    for name in names:
        folder = table(name, [0]).parents[name.count("/")]
    with refuses(f"data.source {folder}: ", *parts):
        find_source(str(folder))


@pytest.mark.parametrize(
    ("parts", "chosen", "ignored"),
    [
        (["train", "validation", "test"], {"train": "train", "val": "validation", "test": "test"}, []),
        (["train", "extra", "test"], {"train": "train", "test": "test"}, ["extra"]),
        (["train", "train_extra", "dev"], {"train": "train", "val": "dev"}, ["train_extra"]),
        (["train_sft", "test_sft"], {"train": "train_sft", "test": "test_sft"}, []),
    ],
)
def test_the_splits_of_a_hub_dataset(parts, chosen, ignored):
    assert named_splits("someone/flowers", parts) == (chosen, ignored)


def test_a_lone_hub_split_of_any_name_is_trained_on(monkeypatch, images):
    images = [{"bytes": (images("0.png") / "0.png").read_bytes(), "path": None}] * 3
    parts = {"full": datasets.Dataset.from_dict({"image": images})}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(parts))
    source = find_source("someone/flowers")
    assert {split: len(records) for split, records in source.splits.items()} == {"train": 3}
    parts["more"] = parts["full"]
    with refuses("data.source someone/flowers", "['full', 'more']", "expected one named train"):
        find_source("someone/flowers")


def test_two_hub_splits_that_are_the_same_one_are_refused():
    with refuses("someone/flowers", "'train_a' and 'train_b' are both `train`", "expected one"):
        named_splits("someone/flowers", ["train_a", "train_b"])


def test_images_by_path_are_found_within_the_folder(tmp_path, images):
    root = images("a/0.png", "a/1.png")
    cells = ["images/a/1.png", "images/a/0.png", "images/gone.png", "../outside.png", "https://x.org/y.png", None]
    pa.parquet.write_table(pa.table({"file_name": cells, "text": ["x"] * 6}), tmp_path / "train.parquet")
    source = find_source(str(tmp_path))
    records = source.splits["train"]
    assert records.open(0).getpixel((0, 0))[0] == 10
    assert records.open(1).getpixel((0, 0))[0] == 0
    assert records.sizes().tolist() == [(root / f"a/{i}.png").stat().st_size for i in (1, 0)] + [0] * 4
    for row, reason in enumerate(["no such file", "leaves the table's folder", "no such file", "no image"], 2):
        with pytest.raises(ValueError, match=reason):
            records.open(row)


def test_a_folder_has_no_label_column(images):
    root = images("cat/0.png", "dog/1.png")
    with refuses("data.label_column 'breed'", root, "Remove data.label_column"):
        find_source(str(root), Columns(label="breed"))
    source = find_source(str(root), Columns(label=None))
    assert source.class_names is None
    assert source.splits["train"].labels is None


def test_tables_below_an_overview_are_the_dataset(images, table):
    """As `twostage generate --format parquet` and `hf download` leave them."""
    root = images("grid.png")
    out = table("images/shard_00000.parquet", [0, 1, 0]).parents[1]
    shutil.copy(root / "grid.png", out)
    source = find_source(str(out))
    assert len(source.splits["train"]) == 3
    assert [line.partition(" (")[0] for line in source.skipped] == [f"{out}/grid.png"]
    for i in range(3):
        shutil.copy(root / "grid.png", out / f"{i}.png")
    assert len(find_source(str(out)).splits["train"]) == 4, "a table below more images is something else"


@pytest.mark.parametrize("form", ["{}/train-00000-of-00001.parquet", "{}/train/0000.parquet"])
def test_configurations_are_not_mixed(table, form):
    for name in ("small", "large"):
        root = table(form.format(name), [0, 1]).parents[form.count("/")]
    with refuses(f"data.source {root}", f"Set data.source={root}/large", "two configurations"):
        find_source(str(root))
    assert len(find_source(str(root / "small")).splits["train"]) == 2


@pytest.mark.parametrize("suffix", ["avif", "jfif"])
def test_further_suffixes_of_images(images, suffix):
    root = images("0.avif", "1.avif") if suffix == "avif" else images("0.jpg", "1.jpg")
    for file in list(root.iterdir()):
        file.rename(file.with_suffix(f".{suffix}"))
    records = find_source(str(root)).splits["train"]
    assert [records.open(row).convert("RGB").size for row in range(2)] == [(8, 8)] * 2


def test_a_row_is_named_by_file_split_and_number(table):
    path = table("train.parquet", [0, 0])
    assert find_source(str(path)).splits["train"].names == [f"{path}:train:0", f"{path}:train:1"]


def test_corrupt_table_is_named(table):
    path = table("train.parquet", [0, 1])
    path.write_bytes(path.read_bytes()[:-20])
    with refuses(f"data.source {path}", "not a readable .parquet file", "Copy the file again"):
        find_source(str(path.parent))


@pytest.mark.parametrize(
    ("test_file", "parts"),
    [
        ({"labels": [5]}, ["`test`, row 0", "label is 5", "expected a number from 0 to 1", "data.label_column"]),
        ({"labels": [0, None]}, ["`test`", "1 of 2 rows have no label", "row 1", "data.label_column"]),
        ({"labels": [0], "column": "img"}, ["`test`", "['img', 'label']", "['image', 'label']", "same column names"]),
    ],
    ids=["unknown class", "no class", "no images"],
)
def test_splits_that_do_not_fit_together_are_refused(table, test_file, parts):
    folder = table("train.parquet", [0, 1], class_names=["ant", "bee"]).parent
    table("test.parquet", **test_file)
    with refuses(f"data.source {folder}: ", *parts):
        find_source(str(folder))


def test_shards_with_labels_of_two_kinds_are_refused(table):
    table("train-0.parquet", [0, 1])
    folder = table("train-1.parquet", ["ant"]).parent
    with refuses(f"data.source {folder}: ", "`train`", "different columns", "Make them the same"):
        find_source(str(folder))


def test_table_without_images_is_refused(table):
    path = table("train.parquet", [0], column="text")
    with refuses(path, "expected a column `image`", "['text', 'label']"):
        find_source(str(path))


def test_real_mnist(monkeypatch, data_folder):
    monkeypatch.setenv("TWOSTAGE_DATA", str(data_folder))
    source = find_source("ylecun/mnist")
    assert {split: len(records) for split, records in source.splits.items()} == {"test": 10_000, "train": 60_000}
    assert source.class_names == [str(digit) for digit in range(10)]
    assert np.bincount(source.splits["test"].labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    with source.splits["train"].open(0) as image:
        assert (image.size, image.mode) == ((28, 28), "L")
