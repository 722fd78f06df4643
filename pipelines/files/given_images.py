"""Image files that users give to a model: checked before they are decoded, then converted to the model's form."""

import io
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from stage1_tokenizer.autoencoder_config import AutoencoderConfig
from twostage.core.data.folder_content import IMAGE_SUFFIXES
from twostage.core.errors import InputError
from twostage.core.images.arrays import num_pages
from twostage.core.images.conversion import MODES, image_to_pixels, open_image
from twostage.core.images.pixel_values import UsedValues, ValueRange, is_wide
from twostage.core.wording import one_line, some_of

__all__ = ["MAX_BYTES", "MAX_PIXELS", "find_images", "open_given_image", "read_image", "read_images"]

MAX_BYTES = 20_000_000
MAX_PIXELS = 25_000_000
"""Images are resized to a few hundred pixels a side, so a larger file only costs memory."""
MAX_NAMED = 20
"""Maximum unreadable images of a folder that are named."""
FILE_TYPES = "PNG, JPEG, WebP, AVIF, GIF, TIFF or BMP"


def open_given_image(path: str | Path) -> Image.Image:
    """Opens and decodes an image file.

    Raises:
        InputError: no such file, no readable image, or more than `MAX_BYTES` or `MAX_PIXELS`.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected one image, such as {path / 'image.png'}")
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected an image ({FILE_TYPES})")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise InputError(f"{path}: has {size / 1e6:.0f} MB, expected at most {MAX_BYTES // 10**6}. Make it smaller")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is below its limit
            image = open_image(io.BytesIO(path.read_bytes()))  # the file is closed, and its pages can be read
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f"{path}: has {image.width} x {image.height} pixels, expected at most {MAX_PIXELS // 10**6} "
                    "million. Make it smaller"
                )
            image.load()
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{path}: not a readable image; expected {FILE_TYPES}") from None
    except Exception as error:  # a broken file can raise nearly anything in a decoder
        raise InputError(f"{path}: cannot be decoded ({' '.join(str(error).split())}). Save it again") from None
    return image


def find_images(given: list[Path], max_images: int, option: str) -> list[Path]:
    """The image files among ``given``: each file, and up to ``max_images`` readable images of each folder in the order
    of their names (2 before 10). Prints which files of a folder are not used, and why.

    Args:
        option: the command's option for ``max_images``.

    Raises:
        InputError: a folder that cannot be read or has no readable image.
    """
    return [file for path in given for file in (_images_of(path, max_images, option) if path.is_dir() else [path])]


def _images_of(folder: Path, max_images: int, option: str) -> list[Path]:
    try:
        entries = sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=_natural_order)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); expected a folder of images") from None
    files = [path for path in entries if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()]
    others = [path.name for path in entries if path not in files and not path.is_dir()]
    folders = [path.name for path in entries if path.is_dir()]
    used, unreadable = [], []
    for file in files:
        if len(used) == max_images:
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
        print(f"{folder}: not images: {some_of(others)}")
    if not used:
        below = f", only the folders {some_of(folders)}. Give one of them, or --data {folder}" if folders else ""
        raise InputError(f"{folder}: no readable image in this folder{below or f'; expected {FILE_TYPES}'}")
    if folders:
        print(f"{folder}: subfolders are not searched: {some_of(folders)}")
    if len(used) + len(unreadable) < len(files):
        print(f"{folder}: the first {len(used)} of {len(files)} images; {option} shows more")
    return used


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """2 before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name) if part]


def read_images(files: list[Path], config: AutoencoderConfig) -> Tensor:
    """Image files in the model's form, (n, C, H, W) uint8 or uint16. Prints how each file was changed.

    Raises:
        InputError: see :func:`read_image`.
    """
    images = []
    for file in files:
        image, changes = read_image(file, config.image_size, config.channels, config.value_range, config.bits)
        images.append(image)
        if changes:
            print(f"{file}: {changes}")
    return torch.stack(images)


def read_image(
    path: str | Path, size: tuple[int, int], channels: int, value_range: ValueRange | None = None, bits: int = 8
) -> tuple[Tensor, str | None]:
    """An image file as a model sees it, (channels, *size) uint8 or uint16, and how it was changed, in words, or None.

    Args:
        value_range: the values that are black and white to the model; None: the range of the file's type.
        bits: those of the model's images.

    Raises:
        InputError: see :func:`open_given_image`; other channels, or values that do not fit the range.
    """
    used: dict[str, UsedValues] = {}
    image = open_given_image(path)
    upright, pages, changes = ImageOps.exif_transpose(image), num_pages(image), []
    try:
        pixels = np.array(image_to_pixels(image, size, channels, value_range, used, bits))
    except Exception as error:  # other channels, or a broken page
        raise InputError(
            f"{path}: has no {channels} channels ({one_line(error)}). Give a TIFF file with a page for each channel"
        ) from None
    if upright.size != (size[1], size[0]):
        changes.append(
            f"{upright.width}x{upright.height} cropped at its centre and resized to {size[1]}x{size[0]} pixels"
        )
    if pages not in (1, channels):
        changes.append(f"only the first of its {pages} pages is used")
    kept = 1 < pages == channels or (bits == 16 and channels == 1 and is_wide(upright))
    if not kept and upright.mode != MODES[channels]:
        changes.append(f"mode {upright.mode} converted to {MODES[channels]}")
    for kind, values in used.items():
        low, high = value_range or values.type_range
        found = f"has {kind} values from {values.low:g} to {values.high:g}"
        if value_range is None and (values.outside(None) or values.one_shade(None)):
            raise InputError(
                f"{path}: {found}, which do not fit the range from {low:g} to {high:g}. Save it with 8 bits, or train "
                "the model with data.value_range"
            )
        if (kind != "8-bit" or value_range) and values.low_contrast(value_range):
            changes.append(f"{found}, which is little of the range from {low:g} to {high:g}")
    return torch.from_numpy(pixels), "; ".join(changes) or None
