"""A quick look at a source: the usual form of its images and how many there are.

Only headers are read, but up to 16 images with an alpha channel are decoded, to see whether they are transparent.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from twostage.core.data.drawn_sources import DRAWN_SOURCES, drawn_splits
from twostage.core.data.records import AUTO, Columns, Records
from twostage.core.data.shapes import CLASS_NAMES
from twostage.core.data.sources import find_source
from twostage.core.data.spread import spread
from twostage.core.images.arrays import ArrayImage, OpenedImage, num_pages
from twostage.core.images.conversion import quiet_decoders, upright_size
from twostage.core.images.pixel_values import is_grey

__all__ = ["Survey", "survey"]

OPENED, DECODED = 400, 16
"""Images whose header is read; images with an alpha channel whose transparency is checked."""
SAME_SHAPE = 0.05
"""Relative difference of two aspect ratios that count as the same."""


@dataclass(frozen=True)
class Survey:
    """What a source holds."""

    size: tuple[int, int]
    """(height, width) in pixels: the commonest one if at least half of the images have its shape, else a square."""
    channels: int
    """1 if all images are grey; 4 if most have an alpha channel, and most of those have transparent pixels; the number
    of channels or pages if most images are arrays or TIFF files with several; else 3."""
    num_train: int
    """Images in the training split, before any are held out."""
    class_counts: dict[str, int]
    """Training images by class; {} without classes."""

    def size_within(self, max_side: int) -> tuple[int, int]:
        """The size, reduced if a side is longer than ``max_side``."""
        scale = min(1.0, max_side / max(self.size))
        height, width = (max(1, round(side * scale)) for side in self.size)
        return height, width


def survey(source: str, label_column: str | None = AUTO) -> Survey:
    """Looks at evenly spaced images of the training split.

    Raises:
        InputError: see :func:`find_source`.
    """
    if source in DRAWN_SOURCES:
        num_train = drawn_splits(source, None)["train"]
        return Survey((32, 32), 3, num_train, dict.fromkeys(CLASS_NAMES, num_train // len(CLASS_NAMES)))
    quiet_decoders()
    found = find_source(source, Columns(label=label_column, caption=None))
    records = found.splits.get("train") or next(iter(found.splits.values()))
    counts = {}
    if found.class_names and records.labels is not None:
        numbers = np.bincount(records.labels, minlength=len(found.class_names))
        counts = dict(zip(found.class_names, numbers.tolist(), strict=True))
    sizes, channels = _forms(records)
    return Survey(_usual_size(sizes), channels, len(records), counts)


def _forms(records: Records) -> tuple[Counter[tuple[int, int]], int]:
    """How often each (height, width) occurs, and the channels. Unreadable images are skipped."""
    sizes: Counter[tuple[int, int]] = Counter()
    several: Counter[int] = Counter()
    grey, with_alpha, transparent = 0, 0, 0
    for row in spread(len(records), OPENED).tolist():
        try:
            with records.open(row) as image:
                width, height = upright_size(image)
                mode, has_alpha = image.mode, _has_alpha(image)
                planes = image.values.shape[2] if isinstance(image, ArrayImage) else num_pages(image)
                transparent += has_alpha and with_alpha < DECODED and _is_transparent(image)
        except Exception:  # load_images counts and reports these
            continue
        several[planes] += planes > 1
        grey += is_grey(mode)
        with_alpha += has_alpha
        sizes[height, width] += 1
    usual, count = several.most_common(1)[0] if several else (1, 0)
    if 2 * count > sizes.total():
        return sizes, usual
    if 2 * with_alpha > sizes.total() and 2 * transparent > min(with_alpha, DECODED):
        return sizes, 4
    return sizes, 1 if 0 < grey == sizes.total() else 3


def _has_alpha(image: OpenedImage) -> bool:
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def _is_transparent(image: OpenedImage) -> bool:
    return isinstance(image, Image.Image) and image.convert("RGBA").getextrema()[3][0] < 255  # type: ignore[index]


def _usual_size(sizes: Counter[tuple[int, int]]) -> tuple[int, int]:
    """See :attr:`Survey.size`; 32x32 if no image could be read."""
    if not sizes:
        return 32, 32
    height, width = sizes.most_common(1)[0][0]
    same = sum(count for (h, w), count in sizes.items() if abs(h * width / (w * height) - 1) < SAME_SHAPE)
    if 2 * same >= sizes.total():
        return height, width
    side = int(np.median([min(size) for size in sizes.elements()]))
    return side, side
