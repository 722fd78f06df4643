"""Pictures that a person gives to a trained model: checked before they are decoded, then brought to the model's form."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from core.errors import InputError
from core.images import image_to_uint8

__all__ = ["MOST_BYTES", "MOST_PIXELS", "describe_conversion", "open_image", "read_image"]

MOST_BYTES = 20_000_000
MOST_PIXELS = 25_000_000
"""A picture is resized to a few hundred pixels a side; a larger one only costs memory."""


def open_image(path: str | Path) -> Image.Image:
    """Opens and decodes a picture.

    Raises:
        InputError: no such file, no readable picture, or one of more than `MOST_BYTES` or `MOST_PIXELS`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a picture (PNG, JPEG, WebP, GIF, TIFF, BMP)")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise InputError(f"{path}: has {size / 1e6:.0f} MB, at most {MOST_BYTES // 10**6} are taken; make it smaller")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MOST_PIXELS is below its limit
            image = Image.open(path)
        if image.width * image.height > MOST_PIXELS:
            raise InputError(
                f"{path}: has {image.width} x {image.height} pixels, at most {MOST_PIXELS // 10**6} million are taken; "
                "make it smaller"
            )
        image.load()
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{path}: not a readable picture; expected PNG, JPEG, WebP, GIF, TIFF or BMP") from None
    except Exception as error:  # a broken file can raise nearly anything in a decoder
        raise InputError(f"{path}: cannot be decoded ({' '.join(str(error).split())}); save it again") from None
    return image


def describe_conversion(image: Image.Image, size: tuple[int, int], channels: int) -> str | None:
    """What has to be changed for a model of images of ``size`` (height, width) and ``channels``, in words; None: nothing."""
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    words = []
    if image.size != (size[1], size[0]):
        words.append(f"{image.width}x{image.height} cropped at its centre and resized to {size[1]}x{size[0]} pixels")
    if image.mode != modes[channels]:
        words.append(f"mode {image.mode} converted to {modes[channels]}")
    return "; ".join(words) or None


def read_image(path: str | Path, size: tuple[int, int], channels: int) -> tuple[Tensor, str | None]:
    """A picture as a model sees it, (channels, *size) uint8, and what was changed about it, in words, or None.

    Raises:
        InputError: those of :func:`open_image`.
    """
    image = open_image(path)
    pixels = np.array(image_to_uint8(image, size, channels))
    return torch.from_numpy(pixels), describe_conversion(image, size, channels)
