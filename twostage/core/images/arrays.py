"""Images that are arrays of numbers, for files that are no image files."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageOps, ImageSequence

__all__ = ["ArrayImage", "OpenedImage", "channels_last", "num_pages", "stacked_pages"]

_PILLOW_CHANNELS = (1, 3, 4)


@dataclass
class ArrayImage:
    """An image of any type and number of channels, with what is asked of a Pillow image."""

    values: np.ndarray
    """(H, W, C)."""
    info: dict[str, Any] = field(default_factory=dict)

    def opened(self) -> "Image.Image | ArrayImage":
        """A Pillow image if it has 8 bits and Pillow knows its channels, else this."""
        values = self.values * np.uint8(255) if self.values.dtype == np.bool_ else self.values
        if values.dtype == np.uint8 and values.shape[2] in _PILLOW_CHANNELS:
            return Image.fromarray(np.ascontiguousarray(values[..., 0] if values.shape[2] == 1 else values))
        return ArrayImage(values)

    @property
    def mode(self) -> str:
        """Its type and channels; as in Pillow, grey modes begin with `I`."""
        channels = self.values.shape[2]
        return f"I;{self.values.dtype}" if channels == 1 else f"{channels}x{self.values.dtype}"

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.values.shape[1], self.values.shape[0]

    def getexif(self) -> dict[int, Any]:
        """Arrays have no orientation."""
        return {}

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> "ArrayImage":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


OpenedImage = Image.Image | ArrayImage


def num_pages(image: OpenedImage) -> int:
    """The pages of a grey TIFF, which can be the channels of one image; 1 for all other images."""
    if getattr(image, "format", None) != "TIFF" or not (image.mode in ("1", "L", "F") or image.mode.startswith("I")):
        return 1
    return getattr(image, "n_frames", 1)


def stacked_pages(image: Image.Image) -> ArrayImage:
    """The pages of a grey TIFF as the channels of one image, each with its EXIF orientation applied.

    Raises:
        ValueError: they differ in size or in mode.
    """
    pages = []
    for page in ImageSequence.Iterator(image):
        upright = ImageOps.exif_transpose(page)
        pages.append((upright.mode, np.array(upright)))
    if len({(mode, page.shape) for mode, page in pages}) > 1:
        found = ", ".join(f"{page.shape[1]}x{page.shape[0]} {mode}" for mode, page in pages[:4])
        raise ValueError(f"pages of different sizes or types ({found}), expected the channels of one image")
    return ArrayImage(np.stack([page for _, page in pages], axis=-1))


def channels_last(images: np.ndarray) -> np.ndarray:
    """Images (n, H, W), (n, H, W, C) or (n, C, H, W) as (n, H, W, C): the channels are the smaller one of the two
    sides where they can be."""
    if images.ndim == 3:
        return images[..., None]
    return images.transpose(0, 2, 3, 1) if images.shape[1] < images.shape[3] else images
