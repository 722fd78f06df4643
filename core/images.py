"""The one place where pixels change their form: PIL image -> uint8 (C, H, W) -> float [-1, 1] and back."""

import os
import warnings
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

__all__ = ["image_to_uint8", "open_picture", "printable", "quiet_decoders", "to_float", "to_pil", "to_uint8"]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
"""Of pictures, whatever their names say; Pillow's others may start programs, as EPS does."""
UNSOUND = {"group3", "group4", "tiff_ccitt", "jpeg", "tiff_jpeg"}
"""Compressions of TIFF in which Pillow 12.3 with libtiff 4.7.1 tells no damage, but shows what was in memory before in
place of the pixels that it has not: others each time."""


def open_picture(file: Path | IO[bytes]) -> Image.Image:
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


def image_to_uint8(image: Image.Image, size: tuple[int, int], channels: int) -> np.ndarray:
    """Brings any picture to (channels, H, W) uint8: EXIF orientation applied, mode converted, cropped at its centre to
    the wanted shape and resized (Lanczos, antialiased) to ``size`` = (H, W).

    Transparent pictures are laid on white when ``channels`` is below 4; 16-bit grey is scaled to 8 bits.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        wide = np.nan_to_num(np.asarray(image, dtype=np.float64))
        scale = 257.0 if image.mode.startswith("I;16") or wide.max() > 255 else 1.0
        image = Image.fromarray(np.clip(wide / scale, 0, 255).round().astype(np.uint8))
    transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    if transparent and channels < 4:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(MODES[channels])
    height, width = size
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
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
