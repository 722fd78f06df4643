"""A survey finds the usual form of images from their headers."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from twostage.core.data.survey import survey


def save(folder: Path, mode: str, *sizes: tuple[int, int]) -> Path:
    """An image of each (width, height), the first pixel transparent if the mode has alpha."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes, len(list(folder.iterdir()))):
        pixels = np.full((size[1], size[0], len(mode)), 255, np.uint8)
        pixels[0, 0] = 0
        Image.fromarray(pixels.squeeze(), mode).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize(("sizes", "expected"), [
    ([(20, 10), (12, 12), (20, 10)], (10, 20)),
    ([(20, 10), (40, 20), (12, 12)], (10, 20)),  # one shape, several sizes: the commonest
    ([(20, 10), (10, 20), (12, 16), (16, 14), (9, 31)], (10, 10)),  # no common shape: the median of the short sides
])  # fmt: skip
def test_the_commonest_shape_counts_not_the_first(tmp_path, sizes, expected):
    assert survey(str(save(tmp_path / "images", "RGB", *sizes))).size == expected


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_channels(tmp_path, mode, channels):
    assert survey(str(save(tmp_path / "images", mode, (8, 8), (8, 8)))).channels == channels


def test_one_colour_image_or_opaque_alpha_means_rgb(tmp_path):
    save(tmp_path / "images", "L", (8, 8), (8, 8))
    assert survey(str(save(tmp_path / "images", "RGB", (8, 8)))).channels == 3
    (tmp_path / "opaque").mkdir()
    Image.new("RGBA", (8, 8), "red").save(tmp_path / "opaque" / "0.png")
    assert survey(str(tmp_path / "opaque")).channels == 3


@pytest.mark.parametrize(("rgb", "rgba", "channels"), [(80, 20, 3), (20, 80, 4), (2, 3, 4), (2, 2, 3)])
def test_a_minority_of_transparent_images_does_not_decide(tmp_path, rgb, rgba, channels):
    save(tmp_path / "images", "RGBA", *[(2, 2)] * rgba)
    assert survey(str(save(tmp_path / "images", "RGB", *[(2, 2)] * rgb))).channels == channels


def test_photographs_on_their_side_and_unreadable_files(tmp_path):
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(3):
        Image.new("RGB", (20, 10)).save(tmp_path / "images" / f"{number}.jpg", exif=exif)
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    found = survey(str(tmp_path / "images"))
    assert (found.size, found.num_train) == ((20, 10), 4)


def test_classes_and_shapes(tmp_path):
    for name, count in {"cat": 3, "dog": 1}.items():
        save(tmp_path / "images" / name, "RGB", *[(8, 8)] * count)
    assert survey(str(tmp_path / "images")).class_counts == {"cat": 3, "dog": 1}
    assert survey(str(tmp_path / "images"), label_column=None).class_counts == {}
    assert survey("shapes").size == (32, 32)
    assert survey("shapes").size_within(16) == (16, 16)
