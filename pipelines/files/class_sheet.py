"""Contact sheets of images that were asked for by class."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from twostage.core.images.fonts import class_labels
from twostage.core.images.sheets import contact_sheet

__all__ = ["class_sheet"]


def class_sheet(pixels: Tensor, names: list[str] | None, numbers: Sequence[int] | None = None) -> Image.Image:
    """A contact sheet of images (n, C, H, W) uint8, where image i belongs to the class ``names[i % len(names)]``. Each
    class gets a column of its own if there are 4 to 12 of them.

    Args:
        numbers: the labels of the classes, if ``names`` are not all classes.
    """
    columns = len(names) if names and 4 <= len(names) <= 12 else 8
    labels = class_labels(names, numbers) if names else []
    captions = [labels[i % len(labels)] for i in range(len(pixels))] if labels else None
    return contact_sheet(pixels, min(columns, len(pixels)), captions)
