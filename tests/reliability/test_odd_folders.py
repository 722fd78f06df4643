"""Folders as people and programs leave them: every file is used or reported, and no file name causes an error."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from messages import assert_names, refuses
from PIL import Image

from twostage.core.config.sections import parse_config
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images


@pytest.fixture(autouse=True)
def _own_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def draw(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, 90, 200)).save(path, format="PNG")


def write_images(tmp_path: Path) -> None:
    """Two training images and one held-out image."""
    for name in ("train/a.png", "train/b.png", "val/c.png"):
        draw(tmp_path / "images" / name)


def load(source: str = "images", **options: object):
    document = {"source": source, "image_size": 8, "on_bad_image": "skip", **options}
    return load_images(parse_config(DataConfig, document, "data"))


def used(data) -> set[str]:
    return {split.records.names[row] for split in data.splits.values() for row in range(len(split))}


def test_every_file_is_used_or_reported(twostage, tmp_path):
    root = tmp_path / "images"
    good = ["a/0.png", "a/1 with spaces.PNG", "a/new\nline.png", "a/żółć.png", "a/train.png", "a/tested/2.png",
            "b/valley/deep/deeper/3.png", "train_station/4.png", "testimony/5.png"]  # fmt: skip
    for name in good:
        draw(root / name)
    draw(root / "a" / ".hidden.png")
    draw(root / ".thumbnails" / "6.png")
    (root / "a" / "notes.txt").write_text("no image")
    (root / "a" / "empty.png").touch()
    (root / "a" / "README").touch()
    (root / "a" / "broken.png").symlink_to("nowhere.png")
    (root / "a" / "itself.png").symlink_to("itself.png")
    (root / "a" / "up").symlink_to("..")
    (root / "b" / "round").symlink_to(root)
    os.mkfifo(root / "b" / "pipe.png")
    draw(tmp_path / "elsewhere" / "7.png")
    (root / "b" / "linked").symlink_to(tmp_path / "elsewhere")  # a link to another folder is followed
    (root / "b" / "8.png").symlink_to(tmp_path / "elsewhere" / "7.png")
    bad_name = os.fsencode(root / "a") + b"/\xff\xfe.png"
    Path(os.fsdecode(bad_name)).write_bytes((root / "a/0.png").read_bytes())

    data = load()
    expected = {*good, "b/linked/7.png", "b/8.png", "a/\\xff\\xfe.png"} - {"a/new\nline.png"} | {"a/new\\nline.png"}
    assert used(data) == {f"images/{name}" for name in expected}
    assert data.class_names == ["a", "b", "testimony", "train_station"]
    skipped = dict(line.removeprefix("images/").split(" (", 1) for line in data.skipped + data.bad)
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
    ended = twostage("inspect", "images", "--json", "found.json", "--image-size", 8)
    assert ended.code == 0, ended.err
    found = json.loads((tmp_path / "found.json").read_text())
    assert sorted(name for names in found["used"].values() for name in names) == sorted(used(data))
    assert found["files"] == len(expected) + len(skipped)
    assert "unreadable: images/a/empty.png (not a readable image)" in ended.out
    assert "skipped: images/a/up (a link to a parent folder)" in ended.out


def test_folders_that_are_the_same_split(tmp_path):
    for name in ("train/0.png", "val/1.png", "validation/2.png"):
        draw(tmp_path / "images" / name)
    with refuses("images", "train, val, validation", "same split"):
        load()


def test_an_unreadable_folder_is_reported(tmp_path):
    draw(tmp_path / "images" / "a" / "0.png")
    draw(tmp_path / "images" / "a" / "1.png")
    (tmp_path / "images" / "b").symlink_to("x" * 255 + "/")
    assert load().skipped == ["images/b (a broken link)"]


# --- the pixels that are read -----------------------------------------------------------------------------------------


def pixels(image: Image.Image, name: str, channels: int = 3, size: int = 8, **options: object) -> np.ndarray:
    """The pixels (C, H, W) that training reads from an image saved as ``name``."""
    shutil.rmtree("images", ignore_errors=True)
    Path("images").mkdir()
    for copy in ("a", "b"):
        image.save(Path("images") / f"{copy}{name}", **options)
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
    ("I", 0, "x.tif", (32768, 32768, 32768)),
])  # fmt: skip
def test_every_mode_becomes_rgb(mode, colour, name, expected):
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
def test_the_first_of_several_frames_is_used_and_reported(name):
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


def test_a_decompression_bomb_is_reported_without_decoding(tmp_path):
    write_images(tmp_path)
    for name, side in {"bomb": 10_000, "monster": 20_000}.items():
        Image.new("1", (side, side)).save(tmp_path / f"images/train/{name}.png")
    assert load().bad == [
        "images/train/bomb.png (too large: more than 89 million pixels)",
        "images/train/monster.png (too large: more than 89 million pixels)",
    ]


@pytest.mark.parametrize("compression", ["group4", "jpeg"])
def test_compressions_that_hide_damage_are_refused(tmp_path, compression):
    write_images(tmp_path)
    mode = "1" if compression == "group4" else "RGB"
    Image.new(mode, (8, 8)).save(tmp_path / "images/train/c.tif", compression=compression)
    (report,) = load().bad
    assert_names(report, "images/train/c.tif", compression, "PNG")


def test_a_format_that_can_start_a_program_is_not_read(tmp_path):
    write_images(tmp_path)
    (tmp_path / "images/train/c.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    assert load().bad == ["images/train/c.png (not a readable image)"]


# --- while training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_an_image_that_disappears_while_training(configs, begin, done, here, tmp_path, policy):
    for i in range(40):
        draw(tmp_path / "images" / f"{i:02d}.png", 6 * i)
    words = [
        *("train-tokenizer", configs / "tokenizer.yaml", "run.dir=run", "data.num_images=null"),
        *(f"data.source={tmp_path / 'images'}", "data.in_memory_gb=0", f"data.on_bad_image={policy}"),
        *("train.max_steps=120", "train.checkpoint_every=10", "train.validate_every=60", "train.log_every=5"),
    ]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    done(words, whole)
    command = begin(words, broken)
    assert command.wait_until(lambda: (broken / "run/checkpoints/step_00000020").exists())
    gone = tmp_path / "images" / "17.png"
    content = gone.read_bytes()
    gone.unlink()
    assert command.wait() == 2, command.said
    assert command.said.count("error: ") == 1
    assert "Traceback" not in command.said
    assert str(gone) in command.said
    assert list((broken / "run/checkpoints").glob("step_*"))

    again = here(words, broken)
    assert again.code == 2
    assert_names(again.err, "data.source", "different images")

    gone.write_bytes(content)
    done(words, broken)
    for name in ("checkpoints/step_00000120/model.safetensors", "metrics.jsonl"):
        assert (broken / "run" / name).read_bytes() == (whole / "run" / name).read_bytes()
