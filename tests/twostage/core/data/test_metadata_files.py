"""Classes beside images: CSV files of names and classes, and StyleGAN's dataset.json."""

import json
import shutil

import pytest
from messages import assert_names, refuses

from twostage.core.data.records import Columns
from twostage.core.data.sources import find_source


def classes(root) -> dict[str, str]:
    """The class of each image by the name of its file."""
    source = find_source(str(root))
    return {
        name.rpartition("/")[2]: source.class_names[label]
        for records in source.splits.values()
        for name, label in zip(records.names, records.labels, strict=True)
    }


@pytest.mark.parametrize(
    "lines",
    [
        "file_name,label\n0.png,cat\n1.png,dog",
        "Filename,size,Category\n./0.png,3,cat\n1.png,4,dog",
        "id,label\n0,cat\n1,dog",
        "0.png,cat\n1.png,dog",
        "\ufeffimage_path,class\r\nimages/0.png,cat\r\nimages/1.png,dog\r\n",
    ],
)
def test_a_csv_of_names_and_classes(images, lines):
    root = images("images/0.png", "images/1.png") if "images/" in lines else images("0.png", "1.png")
    (root / "labels.csv").write_text(lines, encoding="utf-8")
    assert classes(root) == {"0.png": "cat", "1.png": "dog"}
    assert find_source(str(root)).skipped == []


def test_names_without_their_folders_are_found_if_they_are_unique(images):
    root = images("train/0.png", "train/1.png", "test/2.png")
    (root / "labels.csv").write_text("id,label\n0,cat\n1,dog\n2,cat\n")
    assert classes(root) == {"0.png": "cat", "1.png": "dog", "2.png": "cat"}
    shutil.copy(root / "train" / "0.png", root / "test" / "0.png")
    with refuses(f"data.source {root}", "have no label", "0.png"):
        find_source(str(root))


def test_a_csv_that_names_missing_files(images):
    root = images("0.png", "1.png")
    (root / "labels.csv").write_text("file_name,label\n0.png,cat\n1.png,dog\n7.png,cat\n")
    assert_names(" ".join(find_source(str(root)).notices), "7.png in labels.csv", "belong to no image")
    (root / "labels.csv").write_text("file_name,label\nwrong/0.png,cat\nwrong/1.png,dog\n")
    with refuses(f"data.source {root}/labels.csv", "none of its 2 rows", "such as 0.png", "wrong/0.png", "Fix"):
        find_source(str(root))


def test_a_csv_about_something_else_is_only_named(images):
    root = images("0.png", "1.png")
    (root / "a.csv").write_text("name,text\nBob,hello\n")
    (root / "b.csv").write_text("camera,owner\nx,y\n")
    (root / "c.csv").write_bytes(b"file_name,label\n0.png,caf\xe9\n")
    source = find_source(str(root))
    assert source.class_names is None
    assert_names(" ".join(source.skipped), "a.csv (a table that names no image here)", "b.csv (not an image: .csv)",
                 "c.csv (not a CSV file in UTF-8)")  # fmt: skip


def test_two_files_that_disagree(images):
    root = images("0.png", "1.png")
    (root / "labels.csv").write_text("0.png,0\n1.png,1\n")
    (root / "dataset.json").write_text(json.dumps({"labels": [["0.png", 0], ["1.png", 1]]}))
    assert classes(root) == {"0.png": "0", "1.png": "1"}
    (root / "dataset.json").write_text(json.dumps({"labels": [["0.png", 0], ["1.png", 0]]}))
    with refuses(f"data.source {root}", "two values of 'label' for 1.png", "Remove the wrong one"):
        find_source(str(root))


def test_dataset_json_decides_the_classes(images):
    root = images("00000/0.png", "00000/1.png", "00001/2.png")
    pairs = [["00000/0.png", 4], ["00000/1.png", 2], ["00001/2.png", 4]]
    (root / "dataset.json").write_text(json.dumps({"labels": pairs}))
    assert classes(root) == {"0.png": "4", "1.png": "2", "2.png": "4"}
    (root / "dataset.json").write_text('{"labels": null}')
    assert find_source(str(root)).class_names is None
    (root / "dataset.json").write_text('{"labels": [3]}')
    with refuses(f"data.source {root}/dataset.json", "[3]", '["00000/img0.png", 3]', "remove the file"):
        find_source(str(root))
    (root / "dataset.json").write_text('{"labels": [')
    with refuses(f"data.source {root}/dataset.json", "not valid JSON", "Copy the file again"):
        find_source(str(root))


def splits(root) -> dict[str, str]:
    """The split of each image by the name of its file."""
    source = find_source(str(root))
    return {name.rpartition("/")[2]: split for split, records in source.splits.items() for name in records.names}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("labels.csv", "id,Split,label\n0,Train,cat\n1,dev,dog\n2,TEST,cat\n"),
        ("splits.csv", "filename,split\n0.png,training\n1.png,validation\n2.png,eval\n"),
        ("metadata.csv", "file_name,split\n0.png,train\n1.png,val\n2.png,test\n"),
        ("metadata.jsonl", "".join(f'{{"file_name": "{i}.png", "split": "{split}"}}\n'
                                   for i, split in enumerate(["train", "valid", " test "]))),
],
)  # fmt: skip
def test_a_column_of_splits(images, file, text):
    root = images("0.png", "1.png", "2.png")
    (root / file).write_text(text)
    assert splits(root) == {"0.png": "train", "1.png": "val", "2.png": "test"}
    source = find_source(str(root))
    assert "the splits test, train, val from the column 'split'" in source.description
    assert not source.skipped


def test_a_column_divides_what_is_all_in_one_folder(images):
    root = images("train/cat/0.png", "train/dog/1.png", "train/cat/2.png", "train/dog/3.png")
    (root / "labels.csv").write_text("path,split\ntrain/cat/0.png,train\n1,train\n2,val\n3,val\n")
    assert splits(root) == {"0.png": "train", "1.png": "train", "2.png": "val", "3.png": "val"}
    assert classes(root) == {"0.png": "cat", "1.png": "dog", "2.png": "cat", "3.png": "dog"}
    assert find_source(str(root), Columns(label=None, caption=None)).splits.keys() == {"train", "val"}


def test_a_class_may_be_called_test_if_a_column_names_the_splits(images):
    root = images("test/0.png", "dog/1.png", "test/2.png", "dog/3.png")
    with refuses(f"data.source {root}", "test"):
        find_source(str(root))
    (root / "splits.csv").write_text("image,split\n0,train\n1,train\n2,val\n3,val\n")
    assert splits(root) == {"0.png": "train", "1.png": "train", "2.png": "val", "3.png": "val"}
    assert classes(root)["2.png"] == "test"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0.png,train\n1.png,holdout\n", ["1.png", "'holdout'", "expected train, val", "Fix the word"]),
        ("0.png,train\n1.png,\n", ["nothing about 1 of 2 images (1.png)", "Add them, or rename the column"]),
        ("0.png,train\n", ["nothing about 1 of 2 images (1.png)"]),
        ("0.png,val\n1.png,test\n", ["splits ['test', 'val']", "expected one named train"]),
    ],
)
def test_splits_that_are_none_are_refused(images, text, parts):
    root = images("0.png", "1.png")
    (root / "splits.csv").write_text(f"file_name,split\n{text}")
    with refuses(f"data.source {root}", *parts):
        find_source(str(root))


def test_folders_and_a_column_that_disagree(images):
    root = images("train/0.png", "val/1.png")
    (root / "splits.csv").write_text("file_name,split\ntrain/0.png,train\nval/1.png,val\n")
    assert splits(root) == {"0.png": "train", "1.png": "val"}
    (root / "splits.csv").write_text("file_name,split\ntrain/0.png,train\nval/1.png,train\n")
    with refuses(f"data.source {root}", "val/1.png is in `val`", "in `train` by the column 'split'", "rename it"):
        find_source(str(root))
