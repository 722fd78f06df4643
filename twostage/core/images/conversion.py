"""The only place that converts pixels: image -> uint8 or uint16 (C, H, W) -> float [-1, 1] and back."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from twostage.core.images.arrays import ArrayImage, OpenedImage, num_pages, stacked_pages
from twostage.core.images.pixel_values import (
    WIDENED,
    UsedValues,
    ValueRange,
    fit_in_8_bits,
    is_wide,
    pixel_values,
    scaled_to_bits,
    value_type,
    white_is_zero,
)

__all__ = [
    "MODES",
    "classes_to_uint8",
    "image_to_pixels",
    "is_pillow_form",
    "open_image",
    "quiet_decoders",
    "to_float",
    "to_integers",
    "to_pil",
    "to_shown",
    "to_uint8",
    "upright_size",
    "white_level",
]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode for each number of channels."""
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP")
"""The image formats to read, whatever a file's name says. Other Pillow formats may start programs, as EPS does."""
UNSOUND = {"group3", "group4", "tiff_ccitt", "jpeg", "tiff_jpeg"}
"""TIFF compressions in which Pillow 12.3 with libtiff 4.7.1 does not report damage, but fills missing pixels with
whatever was in memory, differently each time."""

LUMINANCE = np.array([[0.299], [0.587], [0.114]])
"""The shares of red, green and blue in grey (ITU-R BT.601), as in Pillow."""

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


def image_to_pixels(
    image: OpenedImage,
    size: tuple[int, int],
    channels: int,
    value_range: ValueRange | None = None,
    used: dict[str, UsedValues] | None = None,
    bits: int = 8,
) -> np.ndarray:
    """Convert any image to (channels, H, W) uint8 or uint16.

    Apply the EXIF orientation, convert the mode, crop at the centre to the wanted shape and resize (Lanczos,
    antialiased). Transparent images get a white background if ``channels`` is below 4. The pages of a grey TIFF are its
    channels if there are as many. A JPEG at least four times as large is decoded at 1/2, 1/4 or 1/8 of its size, but at
    least at twice the wanted one.

    Args:
        size: (H, W).
        value_range: the values that become black and white; None: the range of the file's type.
        used: collects the values that occur, by type.
        bits: 8, or 16 to keep the detail of files with more than 8.

    Raises:
        ValueError: an image with other channels, or pages that differ.
    """
    (kind, type_range), inverted = value_type(image), white_is_zero(image)
    values = UsedValues(type_range, images=1)
    if not isinstance(image, ArrayImage):
        if 1 < channels == num_pages(image):
            image = stacked_pages(image)
        elif channels not in MODES:
            raise _wrong_channels(num_pages(image) if num_pages(image) > 1 else len(image.getbands()), channels)
        else:
            image.draft(None, (2 * max(size), 2 * max(size)))  # for other formats than JPEG this does nothing
            image = ImageOps.exif_transpose(image)
    if isinstance(image, ArrayImage) or is_wide(image):
        wide, known = pixel_values(image, kind), value_range or type_range
        finite = wide[np.isfinite(wide)] if kind == "float" else wide
        values.not_finite = int(finite.size < wide.size)
        if finite.size:
            values.low, values.high = float(finite.min()), float(finite.max())
        values.deep = not fit_in_8_bits(wide, known)
        scaled = scaled_to_bits(wide, known, bits)
        pixels = _fit_array(2**bits - 1 - scaled if inverted else scaled, size, channels)
    else:
        pixels = _fit_image(image, size, channels, value_range, values)
        if bits == 16:
            pixels = pixels.astype(np.uint16) * np.uint16(WIDENED)
    if used is not None:
        used.setdefault(kind, UsedValues(type_range)).add(values)
    return pixels


def _fit_image(
    image: Image.Image, size: tuple[int, int], channels: int, value_range: ValueRange | None, values: UsedValues
) -> np.ndarray:
    """An 8-bit image as (channels, H, W) uint8; sets the lowest and highest of ``values``."""
    transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    image = image.convert("RGBA" if transparent and channels < 4 else MODES[channels])
    extremes: Any = image.getextrema()  # a pair, or one for each channel
    colours = [extremes] if image.mode == "L" else extremes[:3]
    values.low, values.high = float(min(low for low, _ in colours)), float(max(high for _, high in colours))
    if value_range:
        table = scaled_to_bits(np.arange(256), value_range, 8).tolist()
        image = image.point(table * len(colours) + list(range(256)) * (image.mode == "RGBA"))
    if transparent and channels < 4:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return _cropped(image.convert(MODES[channels]), size)


def _fit_array(pixels: np.ndarray, size: tuple[int, int], channels: int) -> np.ndarray:
    """Pixels (H, W) or (H, W, C) uint8 or uint16 as (channels, *size) of the same type.

    Raises:
        ValueError: they have other channels.
    """
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    given = pixels.shape[2]
    if given != channels and not {given, channels} <= MODES.keys():
        raise _wrong_channels(given, channels)
    if pixels.dtype == np.uint8 and given in MODES:
        return _cropped(Image.fromarray(pixels[..., 0] if given == 1 else pixels).convert(MODES[channels]), size)
    white = np.iinfo(pixels.dtype).max
    planes = np.moveaxis(_with_channels(pixels, channels, white), 2, 0)
    fitted = np.concatenate([_cropped(Image.fromarray(plane.astype(np.float32)), size) for plane in planes])
    return fitted.round().clip(0, white).astype(pixels.dtype)


def _with_channels(pixels: np.ndarray, channels: int, white: int) -> np.ndarray:
    """Pixels (H, W, 1, 3 or 4) with 1, 3 or 4 ``channels``, as Pillow converts them, but with all their bits."""
    if (given := pixels.shape[2]) == channels:
        return pixels
    colours, alpha = pixels[..., :3].astype(np.float64), pixels[..., 3:]
    if given == 4:
        colours = white + (colours - white) * (alpha / white)
    if channels == 1:
        return colours @ LUMINANCE
    opaque = np.full_like(colours[..., :1], white)
    return np.concatenate([np.broadcast_to(colours, (*colours.shape[:2], 3)), *[opaque] * (channels == 4)], axis=2)


def _cropped(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """(C, *size): the middle of an image, resized."""
    height, width = size
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _wrong_channels(given: int, channels: int) -> ValueError:
    return ValueError(f"{given} channels, expected data.channels={channels}; set data.channels={given}")


def classes_to_uint8(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Convert a map of classes to (1, H, W) uint8: its grey values or palette indices, cropped as
    :func:`image_to_pixels` crops and resized to the nearest pixel.

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


def white_level(pixels: Tensor) -> int:
    """The number that is white in images (...): 65,535 for uint16, else 255."""
    return 65_535 if pixels.dtype == torch.uint16 else 255


def to_float(pixels: Tensor) -> Tensor:
    """Convert uint8 [0, 255] or uint16 [0, 65535] to float32 [-1, 1]."""
    return pixels.float().mul_(2 / white_level(pixels)).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Convert float [-1, 1] to uint8 [0, 255], clipped and rounded."""
    return to_integers(images, 8)


def to_integers(images: Tensor, bits: int) -> Tensor:
    """Convert float [-1, 1] to uint8 [0, 255] or uint16 [0, 65535], clipped and rounded."""
    white = 2**bits - 1
    levels = images.float().add(1).mul_(white / 2).round_().clamp_(0, white)
    return levels.to(torch.uint8 if bits == 8 else torch.uint16)


def to_shown(pixels: Tensor, shown_channels: Sequence[int] | None = None) -> Tensor:
    """Images (..., C, H, W) uint8 or uint16 in a form that can be shown: uint8 with 1, 3 or 4 channels.

    Args:
        shown_channels: the channels to show, as grey or as red, green and blue (`data.shown_channels`); None: all of 1,
            3 or 4, the first of 2, and the first three of more.
    """
    if shown_channels is None and (channels := pixels.shape[-3]) not in MODES:
        shown_channels = range(1 if channels == 2 else 3)
    if shown_channels is not None:
        pixels = pixels[..., list(shown_channels), :, :]
    return (
        pixels
        if pixels.dtype == torch.uint8
        else pixels.int().add(WIDENED // 2).div_(WIDENED, rounding_mode="floor").to(torch.uint8)
    )


def is_pillow_form(channels: int, bits: int) -> bool:
    """Whether Pillow has images with that many channels and bits, which PNG files hold too."""
    return channels == 1 or (bits == 8 and channels in MODES)


def to_pil(pixels: Tensor) -> Image.Image:
    """One image (C, H, W) as a PIL image, without loss; see :func:`is_pillow_form`."""
    array = pixels.cpu().numpy()
    if len(array) == 1:
        return Image.fromarray(array[0])
    assert is_pillow_form(len(array), 8 * array.itemsize)
    return Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))
