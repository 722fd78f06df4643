"""Folders that people and programs make: every file in them is used or named, and a name breaks nothing."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.reliability.processes import Command, run
from twostage.core.config.sections import parse_config
from twostage.core.data.dataset import DataConfig, load_images
from twostage.core.errors import InputError


@pytest.fixture(autouse=True)
def _own_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def picture(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, 90, 200)).save(path, format="PNG")


def whole_images(tmp_path: Path) -> None:
    """Two to train on and one held out."""
    for name in ("train/a.png", "train/b.png", "val/c.png"):
        picture(tmp_path / "pictures" / name)


def load(source: str = "pictures", **options: object):
    document = {"source": source, "image_size": 8, "on_bad_image": "skip", **options}
    return load_images(parse_config(DataConfig, document, "data"))


def used(data) -> set[str]:
    return {split.records.names[row] for split in data.splits.values() for row in range(len(split))}


def test_every_file_is_used_or_named(twostage, tmp_path):
    root = tmp_path / "pictures"
    good = ["a/0.png", "a/1 with spaces.PNG", "a/new\nline.png", "a/żółć.png", "a/train.png", "a/tested/2.png",
            "b/valley/deep/deeper/3.png", "train_station/4.png", "testimony/5.png"]  # fmt: skip
    for name in good:
        picture(root / name)
    picture(root / "a" / ".hidden.png")
    picture(root / ".thumbnails" / "6.png")
    (root / "a" / "notes.txt").write_text("no picture")
    (root / "a" / "empty.png").touch()
    (root / "a" / "README").touch()
    (root / "a" / "broken.png").symlink_to("nowhere.png")
    (root / "a" / "itself.png").symlink_to("itself.png")
    (root / "a" / "up").symlink_to("..")
    (root / "b" / "round").symlink_to(root)
    os.mkfifo(root / "b" / "pipe.png")
    picture(tmp_path / "elsewhere" / "7.png")
    (root / "b" / "linked").symlink_to(tmp_path / "elsewhere")  # a link to another folder is followed
    (root / "b" / "8.png").symlink_to(tmp_path / "elsewhere" / "7.png")
    bad_name = os.fsencode(root / "a") + b"/\xff\xfe.png"
    Path(os.fsdecode(bad_name)).write_bytes((root / "a/0.png").read_bytes())

    data = load()
    expected = {*good, "b/linked/7.png", "b/8.png", "a/\\xff\\xfe.png"} - {"a/new\nline.png"} | {"a/new\\nline.png"}
    assert used(data) == {f"pictures/{name}" for name in expected}
    assert data.class_names == ["a", "b", "testimony", "train_station"]
    skipped = dict(line.removeprefix("pictures/").split(" (", 1) for line in data.skipped + data.bad)
    assert skipped == {
        "a/.hidden.png": "hidden)",
        ".thumbnails/6.png": "hidden)",
        "a/notes.txt": "not an image: .txt)",
        "a/README": "not an image)",
        "a/empty.png": "not a readable image)",
        "a/broken.png": "a broken link)",
        "a/itself.png": "a broken link)",
        "a/up": "a link to a parent folder)",
        "b/round": "a link to a parent folder)",
        "b/pipe.png": "not a regular file)",
    }
    ended = twostage("inspect", "pictures", "--json", "found.json", "--image-size", 8)
    assert ended.code == 0, ended.err
    found = json.loads((tmp_path / "found.json").read_text())
    assert sorted(name for names in found["used"].values() for name in names) == sorted(used(data))
    assert found["files"] == len(expected) + len(skipped)
    assert "unreadable: pictures/a/empty.png (not a readable image)" in ended.out
    assert "skipped: pictures/a/up (a link to a parent folder)" in ended.out


def test_folders_that_are_the_same_split(tmp_path):
    for name in ("train/0.png", "val/1.png", "validation/2.png"):
        picture(tmp_path / "pictures" / name)
    with pytest.raises(InputError, match="folders train, val, validation mean the same split"):
        load()


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    picture(tmp_path / "pictures" / "a" / "0.png")
    picture(tmp_path / "pictures" / "a" / "1.png")
    (tmp_path / "pictures" / "b").symlink_to("x" * 255 + "/")
    assert load().skipped == ["pictures/b (a broken link)"]


# --- what the pixels become -----------------------------------------------------------------------------------------


def pixels(image: Image.Image, name: str, channels: int = 3, size: int = 8, **options: object) -> np.ndarray:
    """What training sees of a picture that is written as ``name``."""
    shutil.rmtree("pictures", ignore_errors=True)
    Path("pictures").mkdir()
    for copy in ("a", "b"):
        image.save(Path("pictures") / f"{copy}{name}", **options)
    data = load(channels=channels, image_size=size)
    assert not data.bad, data.bad
    return data.splits["train"].pixels[0].numpy()


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_sixteen_bits_keep_their_brightness(name):
    grey = Image.fromarray(np.full((8, 8), 128 * 257, dtype=np.uint16))
    assert np.all(pixels(grey, name, channels=1) == 128)


@pytest.mark.parametrize(("mode", "colour", "name", "expected"), [
    ("CMYK", (0, 255, 255, 0), "x.jpg", (255, 0, 0)),
    ("CMYK", (0, 255, 255, 0), "x.tif", (255, 0, 0)),
    ("LA", (100, 255), "x.png", (100, 100, 100)),
    ("RGBA", (10, 20, 30, 0), "x.png", (255, 255, 255)),
    ("1", 1, "x.png", (255, 255, 255)),
    ("YCbCr", (76, 85, 255), "x.jpg", (254, 0, 0)),
    ("F", 200 / 255, "x.tif", (200, 200, 200)),
    ("I", 0, "x.tif", (128, 128, 128)),
])  # fmt: skip
def test_every_mode_becomes_colour(mode, colour, name, expected):
    found = pixels(Image.new(mode, (8, 8), colour), name)
    assert np.abs(found.astype(int) - np.array(expected)[:, None, None]).max() <= 3


def test_a_palette_with_a_transparent_colour():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 9, 99, 199])
    assert np.all(pixels(image, "x.png", transparency=1) == 255), "laid on white"
    assert np.all(pixels(image, "x.png", transparency=0)[2] == 199)


@pytest.mark.parametrize(("name", "side"), [("wide.png", (20000, 10)), ("high.png", (10, 20000)), ("one.png", (1, 1))])
def test_extreme_shapes(name, side):
    assert np.all(pixels(Image.new("RGB", side, (7, 8, 9)), name)[0] == 7)


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png", "x.tif"])
def test_of_several_frames_the_first_is_used_and_said(name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    lossless = {"lossless": True} if name == "x.webp" else {}
    found = pixels(frames[0], name, save_all=True, append_images=frames[1:], **lossless)
    assert np.abs(found.astype(int) - np.array([255, 0, 0])[:, None, None]).max() <= 3
    assert "2 images have several frames; only the first is used" in load().notices


def test_the_orientation_is_applied():
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise: the upper half is the right one
    found = pixels(image, "x.jpg", exif=exif, quality=100)
    assert found[0, :, 6].min() > 200
    assert found[0, :, 1].max() < 50


def test_a_bomb_is_named_before_it_is_decoded(tmp_path):
    whole_images(tmp_path)
    for name, side in {"bomb": 10_000, "monster": 20_000}.items():
        Image.new("1", (side, side)).save(tmp_path / f"pictures/train/{name}.png")
    assert load().bad == [
        "pictures/train/bomb.png (too large: more than 89 million pixels)",
        "pictures/train/monster.png (too large: more than 89 million pixels)",
    ]


@pytest.mark.parametrize("compression", ["group4", "jpeg"])
def test_compressions_that_hide_damage_are_refused(tmp_path, compression):
    whole_images(tmp_path)
    mode = "1" if compression == "group4" else "RGB"
    Image.new(mode, (8, 8)).save(tmp_path / "pictures/train/c.tif", compression=compression)
    (said,) = load().bad
    assert (
        said == f"pictures/train/c.tif (a TIFF with the compression {compression}, which hides damage; save it as PNG)"
    )


def test_what_may_start_a_program_is_no_picture(tmp_path):
    whole_images(tmp_path)
    (tmp_path / "pictures/train/c.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    assert load().bad == ["pictures/train/c.png (not a readable image)"]


# --- while training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_picture_that_goes_away_while_training(configs, tmp_path, policy):
    for i in range(40):
        picture(tmp_path / "pictures" / f"{i:02d}.png", 6 * i)
    words = [
        *("-m", "stage1_tokenizer.train_tokenizer", configs / "tokenizer.yaml", "run.dir=run", "data.num_images=null"),
        *(f"data.source={tmp_path / 'pictures'}", "data.in_memory_gb=0", f"data.on_bad_image={policy}"),
        *("train.max_steps=120", "train.checkpoint_every=10", "train.validate_every=60", "train.log_every=5"),
    ]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    run(words, whole)
    command = Command(words, broken)
    assert command.wait_until(lambda: (broken / "run/checkpoints/step_00000020").exists())
    gone = tmp_path / "pictures" / "17.png"
    content = gone.read_bytes()
    gone.unlink()
    assert command.wait() == 2, command.said
    assert command.said.count("error: ") == 1
    assert "Traceback" not in command.said
    assert f"{gone}: could be read when the run began, and now cannot" in command.said
    assert list((broken / "run/checkpoints").glob("step_*"))

    again = Command(words, broken)
    assert again.wait() == 2
    assert "holds different images than when the run in run began (train.pictures: " in again.said
    assert "Bring the same ones back to resume" in again.said

    gone.write_bytes(content)
    run(words, broken)
    for name in ("checkpoints/step_00000120/model.safetensors", "metrics.jsonl"):
        assert (broken / "run" / name).read_bytes() == (whole / "run" / name).read_bytes()
