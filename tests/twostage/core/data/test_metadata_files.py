"""Classes beside images: CSV files of names and classes, and StyleGAN's dataset.json."""

import json
import shutil

import pytest
from messages import assert_names, refuses

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
