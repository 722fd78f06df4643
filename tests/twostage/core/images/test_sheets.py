"""Contact sheets show every image in its place; curves show what was measured."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from twostage.core.images.sheets import contact_sheet, draw_curves, save_image

COLOURS = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255]], dtype=torch.uint8)


def tiles(height: int, width: int) -> torch.Tensor:
    return COLOURS[:, :, None, None].expand(-1, -1, height, width)


def patches(sheet: Image.Image, colour: torch.Tensor) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of a colour."""
    y, x = np.nonzero((np.asarray(sheet) == colour.numpy()).all(-1))
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


@pytest.mark.parametrize("words", [{}, {"captions": ["a", "b", "c", "d", "e"]}, {"row_titles": ["first", "second"]}])
def test_every_image_is_in_its_place(words):
    sheet = contact_sheet(tiles(20, 40), columns=3, **words)
    boxes = [patches(sheet, colour) for colour in COLOURS]
    assert {(right - left, bottom - top) for left, top, right, bottom in boxes} == {(80, 40)}, "enlarged twice"
    lefts, tops = [box[0] for box in boxes], [box[1] for box in boxes]
    assert lefts[:2] == lefts[3:] == sorted(lefts[:2])
    assert lefts[2] > lefts[1]
    assert len(set(tops[:3])) == len(set(tops[3:])) == 1
    assert tops[3] > tops[0]


def test_captions_and_titles_are_drawn():
    def dark(**words: object) -> int:
        return int((np.asarray(contact_sheet(tiles(32, 32), columns=3, **words)) == 0).all(-1).sum())

    assert dark() == 0
    assert dark(captions=list("abcde")) > 0
    assert dark(row_titles=["first", "second"]) > 0


def test_grey_and_transparent_images():
    grey = contact_sheet(torch.full((1, 1, 100, 100), 77, dtype=torch.uint8), columns=1)
    assert grey.getpixel((50, 50)) == (77, 77, 77)
    clear = torch.zeros(1, 4, 100, 100, dtype=torch.uint8)
    assert contact_sheet(clear, columns=1).getpixel((50, 50)) == (255, 255, 255)


def test_small_images_keep_square_pixels():
    pixels = torch.tensor([[[[0, 255], [255, 0]]]], dtype=torch.uint8)
    sheet = np.asarray(contact_sheet(pixels, columns=1).convert("L"))
    assert set(np.unique(sheet)) == {0, 255}


def test_an_image_is_saved_whole(tmp_path):
    path = tmp_path / "samples" / "step_1.png"
    save_image(Image.new("RGB", (3, 2), "red"), path)
    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", (3, 2))
    assert [p.name for p in path.parent.iterdir()] == ["step_1.png"]


LINES = [{"step": step, "split": split, "loss": 10 / step + gap} for step in (1, 2, 3) for split, gap in
         (("train", 0.0), ("val", 1.0))]  # fmt: skip


BROKEN = [*LINES, *({"step": 4, "split": split, "loss": float("nan")} for split in ("train", "val"))]


def drawn(tmp_path, lines: list[dict], **options: object) -> np.ndarray:
    path = tmp_path / "losses.png"
    draw_curves(lines, path, "a title", **options)
    with Image.open(path) as image:
        return np.asarray(image)


def test_curves_and_baselines_are_drawn(tmp_path):
    curves, with_baseline = drawn(tmp_path, LINES), drawn(tmp_path, LINES, baselines={"unigram": 3.0})
    assert curves.shape == with_baseline.shape
    assert (curves != with_baseline).any()
    assert (curves != drawn(tmp_path, LINES[:4])).any()


@pytest.mark.parametrize("lines", [[], LINES[:1], BROKEN])
def test_curves_of_little_or_broken_data_are_drawn_without_a_warning(tmp_path, lines):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drawn(tmp_path, lines).size
