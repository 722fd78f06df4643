"""Pictures that people give to a trained model: checked before they are decoded, then brought to the model's form."""

import re
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pipelines.drawing.edits import MASK_NAMES, named_mask
from twostage.core.data.image_folder import IMAGE_SUFFIXES
from twostage.core.errors import InputError
from twostage.core.images.conversion import image_to_uint8, open_image
from twostage.core.images.pixel_values import UsedValues, ValueRange

__all__ = [
    "MAX_BYTES",
    "MAX_PIXELS",
    "describe_conversion",
    "find_images",
    "open_given_image",
    "read_image",
    "read_mask",
]

MAX_BYTES = 20_000_000
MAX_PIXELS = 25_000_000
"""A picture is resized to a few hundred pixels a side; a larger one only costs memory."""

MAX_NAMED = 20
"""Unreadable images of a folder."""


def open_given_image(path: str | Path) -> Image.Image:
    """Opens and decodes a picture.

    Raises:
        InputError: no such file, no readable picture, or one of more than `MAX_BYTES` or `MAX_PIXELS`.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected one image, such as {path / 'image.png'}")
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a picture (PNG, JPEG, WebP, GIF, TIFF, BMP)")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise InputError(f"{path}: has {size / 1e6:.0f} MB, at most {MAX_BYTES // 10**6} are taken; make it smaller")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is below its limit
            image = open_image(path)
        with image:  # closes the file; the pixels stay
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f"{path}: has {image.width} x {image.height} pixels, at most {MAX_PIXELS // 10**6} million are "
                    "taken; make it smaller"
                )
            image.load()
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{path}: not a readable image; expected PNG, JPEG, WebP, GIF, TIFF or BMP") from None
    except Exception as error:  # a broken file can raise nearly anything in a decoder
        raise InputError(f"{path}: cannot be decoded ({' '.join(str(error).split())}); save it again") from None
    return image


def find_images(given: list[Path], most: int, option: str) -> list[Path]:
    """The image files that are given: files as they are, of each folder its readable images in the order of their names
    (2 before 10), at most ``most``. It is printed which files of a folder are not used, and why.

    Args:
        option: that raises ``most``, for the message.

    Raises:
        InputError: a folder that cannot be read or has no readable image.
    """
    return [file for path in given for file in (_images_of(path, most, option) if path.is_dir() else [path])]


def _images_of(folder: Path, most: int, option: str) -> list[Path]:
    try:
        entries = sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=_natural_order)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); expected a folder of images") from None
    files = [path for path in entries if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()]
    others = [path.name for path in entries if path not in files and not path.is_dir()]
    folders = [path.name for path in entries if path.is_dir()]
    used, unreadable = [], []
    for file in files:
        if len(used) == most:
            break
        try:
            open_given_image(file)
            used.append(file)
        except InputError as error:
            unreadable.append(str(error))
    for reason in unreadable[:MAX_NAMED]:
        print(f"skipped: {reason}")
    if len(unreadable) > MAX_NAMED:
        print(f"{folder}: {len(unreadable) - MAX_NAMED} more unreadable images are skipped")
    if others:
        print(f"{folder}: not images: {_some_of(others)}")
    if not used:
        below = f", only the folders {_some_of(folders)}: give one of them, or --data {folder}" if folders else ""
        raise InputError(f"{folder}: no readable image in this folder{below or '; expected PNG, JPEG, WebP ...'}")
    if folders:
        print(f"{folder}: folders in it are not searched: {_some_of(folders)}")
    if len(used) + len(unreadable) < len(files):
        print(f"{folder}: the first {len(used)} of {len(files)} images; {option} shows more")
    return used


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """2 before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name) if part]


def _some_of(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def describe_conversion(image: Image.Image, size: tuple[int, int], channels: int) -> str | None:
    """What has to be changed for a model of images of ``size`` (height, width) and ``channels``, in words, or None."""
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    words = []
    if image.size != (size[1], size[0]):
        words.append(f"{image.width}x{image.height} cropped at its centre and resized to {size[1]}x{size[0]} pixels")
    if image.mode != modes[channels]:
        words.append(f"mode {image.mode} converted to {modes[channels]}")
    return "; ".join(words) or None


def read_image(
    path: str | Path, size: tuple[int, int], channels: int, value_range: ValueRange | None = None
) -> tuple[Tensor, str | None]:
    """A picture as a model sees it, (channels, *size) uint8, and what was changed about it, in words, or None.

    Args:
        value_range: the values that are black and white to the model; None: the range of the file's type.

    Raises:
        InputError: those of :func:`open_given_image`.
    """
    image = open_given_image(path)
    used: dict[str, UsedValues] = {}
    pixels = np.array(image_to_uint8(image, size, channels, value_range, used))
    notes = [describe_conversion(ImageOps.exif_transpose(image), size, channels)]
    for kind, values in used.items():
        low, high = value_range or values.type_range
        found = f"holds {kind} values from {values.low:g} to {values.high:g}"
        if value_range is None and (values.outside(None) or values.one_shade(None)):
            raise InputError(
                f"{path}: {found}, which the range from {low:g} to {high:g} cannot show; save it with 8 bits, or train "
                "the model with data.value_range"
            )
        if (kind != "8-bit" or value_range) and values.low_contrast(value_range):
            notes.append(f"{found}, little of the range from {low:g} to {high:g}")
    return torch.from_numpy(pixels), "; ".join(filter(None, notes)) or None


def read_mask(mask: str | Path, image: str | Path, size: tuple[int, int]) -> Tensor:
    """What is to be drawn again of the picture ``image`` as a model of images of ``size`` (H, W) sees it: (H, W) bool.

    Args:
        mask: a picture of the same width and height, white (a grey value of 128 or more; what is transparent counts as
            black) where ``image`` is to be drawn again. It is cropped and resized as ``image`` is, and a pixel that is
            made of any masked ones is masked. Or one of the words `edits.MASK_NAMES`.

    Raises:
        InputError: those of :func:`open_given_image`, a picture of another size, one that leaves nothing to draw again.
    """
    if mask in MASK_NAMES:
        return named_mask(str(mask), size)
    picture, of = ImageOps.exif_transpose(open_given_image(mask)), ImageOps.exif_transpose(open_given_image(image))
    if picture.size != of.size:
        raise InputError(
            f"{mask}: has {picture.width}x{picture.height} pixels, expected {of.width}x{of.height} as {image} has; "
            f"draw the mask over the picture itself, or give one of: {', '.join(MASK_NAMES)}"
        )
    *colours, alpha = image_to_uint8(picture, (picture.height, picture.width), 4).astype(np.float32)
    white = sum(colours) / 3 * alpha / 255 >= 128
    # The mean over each pixel's area, which is above 0 where any of it is masked.
    shares = ImageOps.fit(Image.fromarray(white.astype(np.float32)), (size[1], size[0]), Image.Resampling.BOX)
    masked = torch.from_numpy(np.array(shares) > 0)
    if not masked.any():
        where = "" if not white.any() else " within what the model sees of the picture (its centre)"
        raise InputError(f"{mask}: masks nothing{where}; paint white what is to be drawn again")
    return masked
