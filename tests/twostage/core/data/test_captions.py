"""Each image has its captions and its vector, wherever they come from; what is missing or contradictory is named."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from messages import assert_names, refuses

from twostage.core.config.sections import parse_config
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.image_data import ImageData


def load(source: Path | str, **options: object) -> ImageData:
    return load_images(DataConfig.model_validate({"source": str(source), "image_size": 8, **options}))


def captions_by_red(data: ImageData) -> dict[int, tuple[str, ...]]:
    """The captions of each image of the fixtures, by the red that tells it apart."""
    found = {}
    for split in data.splits.values():
        reds = split.read(torch.arange(len(split)))[:, 0, 0, 0].tolist()
        assert split.captions is not None
        found |= dict(zip(reds, split.captions, strict=True))
    return found


def write_jsonl(file: Path, *rows: dict) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [{}, {"in_memory_gb": 0}], ids=["in memory", "on disk"])
def test_texts_and_lists_of_texts(table, mode):
    captions = ["a cat", " two\ncats ", "żółć 🙂", "d", "e"]
    data = load(table("train.parquet", count=5, caption=captions), **mode)
    expected = {0: ("a cat",), 10: ("two\ncats",), 20: ("żółć 🙂",), 30: ("d",), 40: ("e",)}
    assert captions_by_red(data) == expected, "wherever validation took its images from"

    lists = [["a", "b"], ["c"], [], ["  "], None]
    data = load(table("train.parquet", count=5, captions=lists), **mode)
    assert captions_by_red(data) == {0: ("a", "b"), 10: ("c",), 20: (), 30: (), 40: ()}


def test_auto_finds_a_column_of_texts_by_its_name(table):
    path = table("train.parquet", [0, 1, 0], caption=[1, 2, 3], text=["a", "b", "c"], prompt=["d", "e", "f"])
    data = load(path)
    assert captions_by_red(data) == {0: ("a",), 10: ("b",), 20: ("c",)}, "numbers are no captions"
    assert_names(" ".join(data.notices), "'text'", "not from 'prompt'", "data.caption_column=NAME")
    assert captions_by_red(load(path, caption_column="prompt")) == {0: ("d",), 10: ("e",), 20: ("f",)}
    assert load(path, caption_column=None).splits["train"].captions is None
    data = load(path, label_column="text")
    assert captions_by_red(data) == {0: ("d",), 10: ("e",), 20: ("f",)}, "a column has one use"
    assert load(table("train.parquet", [0, 1])).splits["train"].captions is None


def test_a_column_that_cannot_hold_captions_is_named(table):
    path = table("train.parquet", [0, 1, 0], size=[1, 2, 3])
    with refuses("data.caption_column 'size'", "texts, or lists of texts", "int64", "data.caption_column"):
        load(path, caption_column="size")
    with refuses("data.caption_column 'sizes'", "expected a column", "['image', 'label', 'size']"):
        load(path, caption_column="sizes")


def test_text_that_is_not_utf8_is_named(table, tmp_path):
    path = table("train.parquet", count=3)
    texts = pa.array([b"good", b"caf\xe9", b"good"]).view(pa.string())
    pa.parquet.write_table(pa.parquet.read_table(path).append_column("text", texts), path)
    with refuses(f"data.source {path.parent}: `train`, row 1", "UTF-8", "data.caption_column"):
        load(path.parent)
    assert load(path, caption_column=None).splits["train"].captions is None


def test_a_split_without_the_column_has_no_captions(table):
    table("train.parquet", [0, 1], caption=["a", "b"])
    data = load(table("test.parquet", [0, 1]).parent)
    assert data.splits["test"].captions == [(), ()]
    assert data.splits["train"].captions == [("a",), ("b",)]


# --- missing captions -----------------------------------------------------------------------------------------------


def test_missing_captions_are_kept_skipped_or_empty(table):
    path = table("train.parquet", count=6, caption=["a", None, "", "d", " ", "f"])
    assert set(captions_by_red(load(path)).values()) == {("a",), (), ("d",), ("f",)}, "a tokenizer does not need them"
    data = load(path, on_missing_caption="skip")
    assert captions_by_red(data) == {0: ("a",), 30: ("d",), 50: ("f",)}
    assert_names(" ".join(data.notices), "3 images without a caption are skipped", f"{path}:train:1")
    assert [line for line in data.skipped if "no caption" in line] == [
        f"{path}:train:{row} (no caption)" for row in (1, 2, 4)
    ]
    data = load(path, on_missing_caption="empty")
    assert captions_by_red(data) == {0: ("a",), 10: ("",), 20: ("",), 30: ("d",), 40: ("",), 50: ("f",)}


def test_skipping_a_whole_split_is_refused(table):
    table("train.parquet", count=2, caption=["a", "b"])
    path = table("test.parquet", count=2).parent
    with refuses(f"data.source {path}", "no image of `test`", "data.on_missing_caption=empty"):
        load(path, on_missing_caption="skip")
    assert load(table("train.parquet", count=2).parent, on_missing_caption="skip").splits["train"].captions is None


def test_images_are_the_same_with_other_captions(table):
    """Captions are found in datasets whose tokenizers were trained before: their runs must resume."""
    options = {"labels": [0, 1, 0]}
    plain = load(table("train.parquet", **options)).identity()
    assert load(table("train.parquet", **options, caption=["a", "b", "c"])).identity() == plain
    vectors = load(table("train.parquet", **options, v=[[1], [2], [3]]), vector_column="v").identity()
    assert plain != vectors != load(table("train.parquet", **options, v=[[1], [2], [4]]), vector_column="v").identity()


def test_older_configs_have_the_defaults():
    config = parse_config(DataConfig, {"source": "shapes"}, "data")
    assert (config.caption_column, config.on_missing_caption) == ("auto", "error")
    assert (config.vector_column, config.maps, config.map_kind) == (None, None, "labels")


# --- metadata files and text files ----------------------------------------------------------------------------------


def test_jsonl_in_the_root_and_in_split_folders(images):
    root = images("train/a/0.png", "train/b/1.png", "test/a/2.png", "test/b/3.png")
    write_jsonl(root / "metadata.jsonl", {"file_name": "train/a/0.png", "text": "zero"})
    write_jsonl(root / "train" / "metadata.jsonl", {"file_name": "b/1.png", "text": ["one", "uno"]})
    held_out = [{"file_name": "a/2.png", "text": "two"}, {"file_name": "b/3.png", "text": None}]
    write_jsonl(root / "test" / "metadata.jsonl", *held_out)
    data = load(root)
    assert captions_by_red(data) == {0: ("zero",), 10: ("one", "uno"), 20: ("two",), 30: ()}
    assert data.skipped == [], "used files are not reported"
    assert load(root, caption_column=None, label_column=None).skipped != []


def test_csv_has_captions_classes_and_vectors(images):
    root = images("0.png", "1.png", "2.png", "3.png")
    (root / "metadata.csv").write_text(
        '\ufefffile_name,text,label,probe\n0.png,"a, b",10,"[1, 2.5]"\n1.png,"two\nlines",2,"[0, 0]"\n'
        '2.png,c,2,"[3, 4]"\n3.png,,10,"[5, 6]"\n',
        encoding="utf-8",
    )
    data = load(root, vector_column="probe", num_images=None)
    assert captions_by_red(data) == {0: ("a, b",), 10: ("two\nlines",), 20: ("c",), 30: ()}
    assert data.class_names == ["2", "10"], "numbers are sorted as numbers"
    vectors = np.concatenate([split.vectors for split in data.splits.values()])
    assert sorted(map(tuple, vectors.tolist())) == [(0, 0), (1, 2.5), (3, 4), (5, 6)]
    assert vectors.dtype == np.float32
    assert load(root, label_column=None).class_names is None


def test_class_folders_go_before_the_metadata(images):
    root = images("cat/0.png", "dog/1.png", "dog/2.png")
    labels = {"cat/0.png": "x", "dog/1.png": "x", "dog/2.png": "y"}
    write_jsonl(root / "metadata.jsonl", *[{"file_name": name, "label": label} for name, label in labels.items()])
    data = load(root)
    assert data.class_names == ["cat", "dog"]
    assert_names(" ".join(data.notices), "'label'", "data.label_column=label")
    assert load(root, label_column="label").class_names == ["x", "y"]
    with refuses("data.label_column 'breed'", root, "['label']", "Remove data.label_column"):
        load(root, label_column="breed")


def test_other_metadata_files_are_only_reported(images):
    root = images("0.png", "1.png")
    (root / "metadata.csv").write_text("camera,owner\nx,y\n")
    data = load(root)
    assert [line for line in data.skipped if "metadata.csv" in line]
    assert data.splits["train"].captions is None


def test_text_files_beside_the_images(images):
    root = images("a/0.png", "a/1.jpg", "a/2.PNG", "b/3.png")
    for name, text in {"a/0.txt": "\ufeffzero\n", "a/1.txt": "one\n\n uno \r\n", "a/2.TXT": ""}.items():
        (root / name).write_text(text, encoding="utf-8")
    (root / "a" / "9.txt").write_text("nine")
    (root / "b" / "notes.txt").write_text("not a caption: no image in this folder has one")
    data = load(root)
    found = captions_by_red(data)
    assert [found[red] for red in sorted(found)] == [("zero",), ("one", "uno"), (), ()]
    assert data.unmatched_captions == ["a/9.txt"]
    assert_names(" ".join(data.skipped), "a/9.txt (a caption without an image)", "b/notes.txt (not an image: .txt)")
    assert not any(name in line for name in ("0.txt", "1.txt", "2.TXT") for line in data.skipped)
    assert load(root, caption_column=None).splits["train"].captions is None


def test_two_sources_that_disagree(images):
    root = images("0.png", "1.png")
    write_jsonl(root / "metadata.jsonl", {"file_name": "0.png", "text": "zero"}, {"file_name": "1.png", "text": "one"})
    (root / "0.txt").write_text("zero")
    assert captions_by_red(load(root)) == {0: ("zero",), 10: ("one",)}
    (root / "0.txt").write_text("null")
    with refuses(
        f"data.source {root}/0.png", "'zero'", "'null'", "data.caption_column=text", "data.caption_column=txt"
    ):
        load(root)
    assert captions_by_red(load(root, caption_column="text")) == {0: ("zero",), 10: ("one",)}
    assert captions_by_red(load(root, caption_column="txt")) == {0: ("null",), 10: ()}
    (root / "metadata.csv").write_text("file_name,text\n0.png,nil\n")
    with refuses(f"data.source {root}", "0.png", "'nil'", "'zero'", "Remove the wrong one"):
        load(root)


def test_metadata_that_names_missing_files(images):
    root = images("0.png", "1.png")
    write_jsonl(
        root / "metadata.jsonl", {"file_name": "0.png", "text": "a"}, {"file_name": "../7.png", "text": "b"}, {}
    )
    data = load(root)
    assert data.unmatched_captions == ["../7.png in metadata.jsonl", "None in metadata.jsonl"]
    assert_names(" ".join(data.notices), "2 captions", "belong to no image", "../7.png")
    write_jsonl(root / "metadata.jsonl", *[{"file_name": f"wrong/{i}.png", "text": "a"} for i in range(2)])
    data = load(root)
    assert data.splits["train"].captions is None
    assert len(data.unmatched_captions) == 2, "a mistake in all paths is not overlooked"
    assert load(root, caption_column=None).unmatched_captions == []
    assert "2 captions" in " ".join(load(root, caption_column=None).notices)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("metadata.jsonl", b'{"file_name": "0.png"}\n{"file_name": "1', ["metadata.jsonl, line 2", "JSON", "Fix"]),
        ("metadata.jsonl", b'["0.png"]', ["metadata.jsonl, line 1", "expected an object", "['0.png']"]),
        ("metadata.csv", b'file_name,text\n0.png,"a', ["metadata.csv", "CSV"]),
        ("metadata.csv", b"file_name,text\n0.png,caf\xe9\n", ["metadata.csv", "UTF-8"]),
        ("metadata.jsonl", b'{"file_name": "0.png", "text": "\\ud800"}', ["0.png", "not valid Unicode", "'\\ud800'"]),
        ("0.txt", b"caf\xe9", ["0.txt", "UTF-8", "data.caption_column=null"]),
    ],
)
def test_damaged_text_names_the_file(images, name, content, parts):
    root = images("0.png", "1.png")
    (root / name).write_bytes(content)
    with refuses("data.source ", str(root), *parts):
        load(root)


def test_a_folder_without_metadata_has_no_columns(images):
    root = images("0.png", "1.png")
    for key in ("caption_column", "vector_column"):
        with refuses(f"data.{key} 'probe'", root, "metadata.jsonl", "expected a column"):
            load(root, **{key: "probe"})


# --- vectors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.large_list(pa.int16()), pa.list_(pa.float32(), 2)])
def test_vectors_of_a_table(table, kind):
    cells = pa.array([[1, 2], [3, 4], [5, 6], [7, 8]], kind)
    data = load(table("train.parquet", count=4, v=cells), vector_column="v", in_memory_gb=0, num_images=2)
    for split in data.splits.values():
        reds = split.read(torch.arange(len(split)))[:, 0, 0, 0].tolist()
        assert split.vectors.tolist() == [[1 + red / 5, 2 + red / 5] for red in reds]
    assert load(table("train.parquet", count=4, v=cells)).splits["train"].vectors is None


@pytest.mark.parametrize(
    ("cells", "parts"),
    [
        ([[1.0, 2.0], [3.0]], ["train:1", "1 numbers", "expected 2", "data.vector_column=null"]),
        ([[1.0, 2.0], None], ["train:1", "no vector", "expected 2"]),
        ([[], [1.0]], ["train:0", "no vector", "at least one number"]),
        ([[1.0, 2.0], [3.0, float("nan")]], ["train:1", "missing, infinite or too large"]),
        ([[1.0, 2.0], [3.0, None]], ["train:1", "missing, infinite or too large"]),
        ([[1.0, 2.0], [3.0, 1e300]], ["train:1", "missing, infinite or too large"]),
        ([["1"], ["2"]], ["train:0", "['1']", "a list of numbers"]),
        ([1.0, 2.0], ["'v'", "lists of numbers", "double"]),
    ],
)
def test_bad_vectors_are_named(table, cells, parts):
    path = table("train.parquet", count=2, v=cells)
    with refuses(*parts):
        load(path, vector_column="v")


def test_vectors_of_two_lengths_in_two_splits(table):
    table("train.parquet", count=2, v=[[1], [2]])
    path = table("test.parquet", count=2, v=[[1, 2], [2, 3]]).parent
    with refuses("data.vector_column 'v'", "1 in `train`", "2 in `test`", "one length"):
        load(path, vector_column="v")
    table("test.parquet", count=2)
    with refuses("data.vector_column 'v'", "`test` has ['image']"):
        load(path, vector_column="v")


@pytest.mark.parametrize("cell", ["soft", [1, "2"], {"a": 1}])
def test_a_metadata_cell_that_is_no_vector(images, cell):
    root = images("0.png", "1.png")
    write_jsonl(root / "metadata.jsonl", {"file_name": "0.png", "v": [1]}, {"file_name": "1.png", "v": cell})
    with refuses(f"data.source {root}/1.png", "expected a list of numbers"):
        load(root, vector_column="v")


# --- real data ------------------------------------------------------------------------------------------------------


def test_real_emoji(data_folder):
    data = load(data_folder / "emoji", num_images=64, channels=4, in_memory_gb=0)
    assert all(len(texts) == 1 and texts[0].endswith(" style") for texts in data.splits["train"].captions)
    assert len(data.splits["test"].captions) == 618
