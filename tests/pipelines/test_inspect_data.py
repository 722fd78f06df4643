"""`inspect` shows what a source holds, names unreadable files, and saves the images as a model would see them."""

import json
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four cats and two dogs (one of them grey) for training, one of each held out, and a broken cat."""
    root = tmp_path / "animals"
    for split, cats, dogs in (("train", 4, 2), ("test", 1, 1)):
        for name, count in (("cat", cats), ("dog", dogs)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 10), (40 * i, 0, 90)).save(root / split / name / f"{i}.png")
    Image.new("L", (8, 12), 7).save(root / "train" / "dog" / "1.png")
    (root / "train" / "cat" / "broken.png").write_bytes(b"no image")
    return root


def test_a_folder_of_classes(folder, twostage, tmp_path):
    ended = twostage("inspect", folder, "--out", tmp_path / "sheet.png")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0] == f"folder {folder}: the splits test, train, each with one folder per class (2 classes)"
    assert lines[lines.index("  train: 6 images") + 1] == "    classes: cat 4, dog 2"
    assert lines[lines.index("  test: 2 images") + 1] == "    classes: cat 1, dog 1"
    assert "  sizes (width x height): 20 x 10 (7), 8 x 12 (1)" in lines
    assert "  modes: RGB (7), L (1)" in lines
    assert any("1 of 8 images are grey and are copied to all colours" in line for line in lines)
    bad = [line for line in lines if line.startswith("  unreadable: ")]
    assert len(bad) == 1
    assert str(folder / "train" / "cat" / "broken.png") in bad[0]
    assert "data.image_size=[10, 20] data.channels=3" in lines[-4]
    assert lines[-3] == "suggested for 7 training images, usually 20 x 10 pixels, RGB; 2 classes of 2 to 5 images:"
    assert lines[-2] == "  data.image_size=[10,20] data.channels=3, configs/tokenizer/vqvae_cifar10.yaml"
    assert f"twostage train-tokenizer {folder}" in lines[-1]


def test_the_sheet_shows_what_a_model_would_see(folder, twostage, tmp_path):
    out = tmp_path / "sheet.png"
    ended = twostage("inspect", folder, "--image-size", 8, "--channels", 1, "--out", out)
    assert "data.image_size=[8, 8] data.channels=1" in ended.out
    with Image.open(out) as sheet:
        assert sheet.size == (6 * (8 * 11 + 4) + 4, 8 * 11 + 4 + 18 + 4)
        red, green, blue = sheet.getpixel((10, 10))
        assert red == green == blue


def test_the_suggested_command_keeps_the_options(folder, twostage, tmp_path):
    options = ("--label-column", "null", "--value-range", 0, 200)
    ended = twostage("inspect", folder, *options, "--out", tmp_path / "sheet.png")
    assert "data.label_column=null 'data.value_range=[0.0, 200.0]'" in ended.out.splitlines()[-1]


def test_shapes_need_nothing_on_disk(twostage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = twostage("inspect", "shapes")
    assert "train: 20,000 images" in ended.out
    assert "circle 2,500" in ended.out
    assert (tmp_path / "inspect.png").is_file()


def test_captioned_shapes_have_a_split_of_unseen_combinations(twostage, tmp_path):
    ended = twostage("inspect", "captioned_shapes", "--image-size", 8, "--out", tmp_path / "sheet.png")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert [line for line in lines if " images" in line][1:4] == [
        "  train: 20,000 images",
        "  test: 2,000 images",
        "  unseen: 2,000 images",
    ]
    assert "data.image_size=32 data.channels=3, configs/tokenizer/vqvae_captioned_shapes.yaml" in lines[-2]
    assert lines[-1].endswith("twostage train-tokenizer captioned_shapes")


def test_captions_vectors_and_maps(folder, twostage, tmp_path):
    rows = [f'train/cat/{i}.png,{"a black cat" if i else ""},"[{i}, 0]"' for i in range(4)]
    rows += [f'{name}/{i}.png,A dog,"[9, 9]"' for name, n in (("train/dog", 2), ("test/dog", 1)) for i in range(n)]
    rows += ['test/cat/0.png,the cat; on a mat,"[9, 9]"', "test/cat/7.png,none,"]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text,probe", *rows]) + "\n")
    (folder / "train" / "cat" / "broken.png").unlink()
    for file in folder.rglob("*.png"):
        with Image.open(file) as image:
            size = image.size
        there = tmp_path / "maps" / file.relative_to(folder)
        there.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size, 3 if "cat" in str(file) else 1).save(there)
    options = ["--vector-column", "probe", "--maps", tmp_path / "maps"]
    ended = twostage("inspect", folder, *options, "--out", tmp_path / "sheet.png", "--json", tmp_path / "about.json")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    first = "  captions: 7 of 8 images have one; 3 words in the median, 5 in the longest; 7 different words"
    assert lines[lines.index(first) + 1 :][:3] == ["    'a black cat'", "    'a black cat'", "    'A dog'"]
    assert f"  images without a caption: {folder}/train/cat/0.png" in lines
    assert "  captions that belong to no image: test/cat/7.png in metadata.csv" in lines
    assert "  vectors: 2 numbers for each image" in lines
    assert "  maps: 8 of 2 classes (1, 3)" in lines
    assert f"data.vector_column=probe data.maps={tmp_path / 'maps'}" in lines[-1]
    assert json.loads((tmp_path / "about.json").read_text())["captions"]["test"] == [["the cat; on a mat"], ["A dog"]]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] == 6 * (2 * 20 * 2 + 4) + 4
        assert sheet.getpixel((4 + 20 * 2 + 5, 10)) == (128, 128, 0), "class 3, to the right of its image"
    plain = twostage("inspect", folder, "--caption-column", "null", "--out", tmp_path / "sheet.png").out
    assert "captions: " not in plain
    assert "data.caption_column=null" in plain.splitlines()[-1]
