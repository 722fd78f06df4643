"""The only place that converts pixels: PIL image -> uint8 (C, H, W) -> float [-1, 1] and back."""

import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from twostage.core.images.arrays import ArrayImage, OpenedImage
from twostage.core.images.pixel_values import (
    UsedValues,
    ValueRange,
    is_wide,
    pixel_values,
    scaled_to_8_bits,
    value_type,
    white_is_zero,
)

__all__ = [
    "MODES",
    "classes_to_uint8",
    "image_to_uint8",
    "open_image",
    "quiet_decoders",
    "to_float",
    "to_pil",
    "to_uint8",
    "upright_size",
]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode for each number of channels."""
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP")
"""The image formats to read, whatever a file's name says. Other Pillow formats may start programs, as EPS does."""
UNSOUND = {"group3", "group4", "tiff_ccitt", "jpeg", "tiff_jpeg"}
"""TIFF compressions in which Pillow 12.3 with libtiff 4.7.1 does not report damage, but fills missing pixels with
whatever was in memory, differently each time."""

_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
"""The EXIF tag, and its values for images that are stored on their side."""


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """Open an image; Pillow decodes it when its pixels are first needed.

    Raises:
        Exception: almost any type for a broken file; `DecompressionBombError` above Pillow's limit of 179 million
            pixels and, after :func:`quiet_decoders`, `DecompressionBombWarning` above 89 million.
    """
    image = Image.open(file, formats=FORMATS)
    if image.format == "TIFF" and image.info.get("compression") in UNSOUND:
        image.close()
        raise ValueError(f"TIFF compression {image.info['compression']!r} can hide damage; save the image as PNG")
    return image


def quiet_decoders() -> None:
    """Hide Pillow's warnings about odd files and make images above 89 million pixels an error, for the whole process
    (`warnings.catch_warnings` is not safe with threads)."""
    warnings.filterwarnings("ignore", module=r"PIL\b")
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def image_to_uint8(
    image: OpenedImage,
    size: tuple[int, int],
    channels: int,
    value_range: ValueRange | None = None,
    used: dict[str, UsedValues] | None = None,
) -> np.ndarray:
    """Convert any image to (channels, H, W) uint8.

    Apply the EXIF orientation, convert the mode, crop at the centre to the wanted shape and resize (Lanczos,
    antialiased). Transparent images get a white background if ``channels`` is below 4. A JPEG at least four times as
    large is decoded at 1/2, 1/4 or 1/8 of its size, but at least at twice the wanted one.

    Args:
        size: (H, W).
        value_range: the values that become black and white; None: the range of the file's type.
        used: collects the values that occur, by type.
    """
    (kind, type_range), inverted = value_type(image), white_is_zero(image)
    values = UsedValues(type_range, images=1)
    if not isinstance(image, ArrayImage):
        image.draft(None, (2 * max(size), 2 * max(size)))  # for other formats than JPEG this does nothing
        image = ImageOps.exif_transpose(image)
    transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    if isinstance(image, ArrayImage) or is_wide(image):
        wide = pixel_values(image, kind)
        finite = wide[np.isfinite(wide)] if kind == "float" else wide
        values.not_finite = int(finite.size < wide.size)
        if finite.size:
            values.low, values.high = float(finite.min()), float(finite.max())
        pixels = scaled_to_8_bits(wide, value_range or type_range)
        image = Image.fromarray(255 - pixels if inverted else _known_channels(pixels))
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


def _known_channels(pixels: np.ndarray) -> np.ndarray:
    """Pixels (H, W) or (H, W, C) for Pillow, which knows 1, 3 or 4 channels.

    Raises:
        ValueError: it does not know them.
    """
    if pixels.ndim == 2 or pixels.shape[2] in (3, 4):
        return pixels
    if pixels.shape[2] != 1:
        raise ValueError(f"{pixels.shape[2]} channels, expected 1, 3 or 4")
    return pixels[..., 0]


def classes_to_uint8(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Convert a map of classes to (1, H, W) uint8: its grey values or palette indices, cropped as
    :func:`image_to_uint8` crops and resized to the nearest pixel.

    Raises:
        ValueError: it has colours, fractions, or classes above 255.
    """
    image = ImageOps.exif_transpose(image)
    values = np.asarray(image)
    if image.mode in ("LA", "PA") or (image.mode in ("RGB", "RGBA") and (values[..., :1] == values[..., 1:3]).all()):
        values = values[..., 0]
    elif image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
        raise ValueError(
            f"mode {image.mode}: expected grey values or palette indices; for maps with colours, set "
            "data.map_kind=image"
        )
    low, high = values.min(), values.max()
    if low < 0 or high > 255:
        raise ValueError(f"the class {low if low < 0 else high}, expected classes from 0 to 255")
    classes, (height, width) = Image.fromarray(values.astype(np.uint8)), size
    return np.asarray(ImageOps.fit(classes, (width, height), Image.Resampling.NEAREST))[None]


def upright_size(image: OpenedImage) -> tuple[int, int]:
    """(width, height) once the EXIF orientation is applied."""
    width, height = image.size
    return (height, width) if image.getexif().get(_ORIENTATION) in _TURNED else (width, height)


def to_float(pixels: Tensor) -> Tensor:
    """Convert uint8 [0, 255] to float32 [-1, 1]."""
    return pixels.float().mul_(2 / 255).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Convert float [-1, 1] to uint8 [0, 255], clipped and rounded."""
    return images.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def to_pil(pixels: Tensor) -> Image.Image:
    """One uint8 image (C, H, W) as a PIL image."""
    array = pixels.cpu().numpy()
    return Image.fromarray(array[0] if array.shape[0] == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))
