"""The one place where pixels change their form: PIL image -> uint8 (C, H, W) -> float [-1, 1] and back."""

import os
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from twostage.core.images.pixel_values import (
    UsedValues,
    ValueRange,
    is_wide,
    pixel_values,
    scaled_to_8_bits,
    value_type,
    white_is_zero,
)

__all__ = ["image_to_uint8", "open_image", "printable", "quiet_decoders", "to_float", "to_pil", "to_uint8"]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
"""Of pictures, whatever their names say; Pillow's others may start programs, as EPS does."""
UNSOUND = {"group3", "group4", "tiff_ccitt", "jpeg", "tiff_jpeg"}
"""Compressions of TIFF in which Pillow 12.3 with libtiff 4.7.1 tells no damage, but shows what was in memory before in
place of the pixels that it has not: others each time."""


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """Opens a picture; it is decoded when its pixels are asked for.

    Raises:
        Exception: nearly any, for a broken file; `DecompressionBombError` above Pillow's limit of 179 million pixels
            and, after :func:`quiet_decoders`, `DecompressionBombWarning` above 89 million.
    """
    image = Image.open(file, formats=FORMATS)
    if image.format == "TIFF" and image.info.get("compression") in UNSOUND:
        image.close()
        raise ValueError(f"a TIFF with the compression {image.info['compression']}, which hides damage; save it as PNG")
    return image


def quiet_decoders() -> None:
    """For the whole process: Pillow's remarks about odd files are not shown, and pictures of more than 89 million
    pixels are errors. (Python's way to do so within a block is not safe with threads.)"""
    warnings.filterwarnings("ignore", module=r"PIL\b")
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def printable(name: str | os.PathLike[str]) -> str:
    """A file's name on one line, whatever bytes are in it."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def image_to_uint8(
    image: Image.Image,
    size: tuple[int, int],
    channels: int,
    value_range: ValueRange | None = None,
    used: dict[str, UsedValues] | None = None,
) -> np.ndarray:
    """Brings any picture to (channels, H, W) uint8: EXIF orientation applied, mode converted, cropped at its centre to
    the wanted shape and resized (Lanczos, antialiased) to ``size`` = (H, W).

    Transparent pictures are laid on white when ``channels`` is below 4.

    Args:
        value_range: the values that become black and white; None: the range of the file's type (`value_type`).
        used: gets the values that occur, by type.
    """
    (kind, type_range), inverted = value_type(image), white_is_zero(image)
    values = UsedValues(type_range, images=1)
    image = ImageOps.exif_transpose(image)
    transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    if is_wide(image):
        wide = pixel_values(image, kind)
        finite = wide[np.isfinite(wide)] if kind == "float" else wide
        values.not_finite = int(finite.size < wide.size)
        if finite.size:
            values.low, values.high = float(finite.min()), float(finite.max())
        pixels = scaled_to_8_bits(wide, value_range or type_range)
        image = Image.fromarray(255 - pixels if inverted else pixels)
    else:
        image = image.convert("RGBA" if transparent and channels < 4 else MODES[channels])
        extremes: Any = image.getextrema()  # a pair, or one for each channel
        colours = [extremes] if image.mode == "L" else extremes[:3]
        values.low, values.high = float(min(low for low, _ in colours)), float(max(high for _, high in colours))
        if value_range:
            table = scaled_to_8_bits(np.arange(256), value_range).tolist()
            image = image.point(table * len(colours) + list(range(256)) * (image.mode == "RGBA"))
        if transparent and channels < 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(MODES[channels])
    height, width = size
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    if used is not None:
        used.setdefault(kind, UsedValues(type_range)).add(values)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def to_float(pixels: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return pixels.float().mul_(2 / 255).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """float [-1, 1] -> uint8 [0, 255], clipped and rounded."""
    return images.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def to_pil(pixels: Tensor) -> Image.Image:
    """One uint8 image (C, H, W) as a PIL image."""
    array = pixels.cpu().numpy()
    return Image.fromarray(array[0] if array.shape[0] == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))
