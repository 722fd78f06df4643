"""The sources that twostage draws itself, and what each of their splits contains."""

from dataclasses import dataclass

import numpy as np

from twostage.core.data.captioned_shapes import caption_shapes, draw_captioned_shapes, shape_attributes
from twostage.core.data.records import Captions
from twostage.core.data.shapes import CLASS_NAMES, draw_shapes

__all__ = ["DRAWN_SOURCES", "DrawnSplit", "draw_split", "drawn_splits", "split_attributes"]

DRAWN_SOURCES = {"shapes": ("train", "test"), "captioned_shapes": ("train", "test", "unseen")}
"""The splits of each source. Of `captioned_shapes`, `unseen` only has combinations that `train` and `test` lack."""
NUM_TRAIN, MIN_HELD_OUT = 20_000, 64
SEEDS = {"train": 0, "test": 1, "unseen": 2}
"""Each split has a seed of its own, so that no held-out image equals a training image."""


@dataclass(frozen=True)
class DrawnSplit:
    """The images of one split and what belongs to them."""

    pixels: np.ndarray
    """(n, C, H, W) uint8."""
    labels: np.ndarray
    """(n,) int64, of `CLASS_NAMES`."""
    captions: Captions | None = None
    maps: np.ndarray | None = None
    """(n, H, W) uint8, of `MAP_NAMES`."""


def drawn_splits(source: str, num_images: int | None) -> dict[str, int]:
    """The number of images in each split; ``num_images`` are for training, by default 20,000."""
    train = num_images or NUM_TRAIN
    held_out = max(MIN_HELD_OUT, train // 10)
    return {split: train if split == "train" else held_out for split in DRAWN_SOURCES[source]}


def draw_split(source: str, split: str, count: int, size: tuple[int, int], channels: int) -> DrawnSplit:
    """Draw the first ``count`` images of a split, of ``size`` (height, width)."""
    labels = np.arange(count) % len(CLASS_NAMES)
    if source == "shapes":
        return DrawnSplit(draw_shapes(0, count, size, channels, SEEDS[split]), labels)
    pixels, maps = draw_captioned_shapes(0, count, size, channels, SEEDS[split], split == "unseen")
    return DrawnSplit(pixels, labels, caption_shapes(split_attributes(split, count)), maps)


def split_attributes(split: str, count: int) -> dict[str, np.ndarray]:
    """What the first ``count`` images of a split of `captioned_shapes` show; see :func:`shape_attributes`."""
    return shape_attributes(0, count, SEEDS[split], split == "unseen")
