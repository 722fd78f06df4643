"""Decode images in threads, and count their modes, sizes and values."""

import contextlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from twostage.core.data.records import Records
from twostage.core.data.spread import spread
from twostage.core.images.arrays import num_pages
from twostage.core.images.conversion import classes_to_uint8, image_to_pixels
from twostage.core.images.pixel_values import UsedValues, ValueRange, described_mode, is_wide
from twostage.core.wording import one_line, printable

__all__ = ["Findings", "decode", "probable_bits"]

PROBED = 3
"""Images of a split by which its bits are guessed."""


@dataclass
class Findings:
    """The findings of decoding some images."""

    bad: dict[int, str] = field(default_factory=dict)
    """The reason for each unreadable row."""
    modes: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    """"width x height"."""
    animated: int = 0
    """The number of images with several frames, of which only the first is used."""
    values: dict[str, UsedValues] = field(default_factory=dict)
    """The values in the files, by their type (`8-bit`, `16-bit`, `float` ...)."""

    @property
    def bits(self) -> int:
        """The bits that hold all values: 8 or 16."""
        return 16 if any(used.deep for used in self.values.values()) else 8

    def add(self, other: "Findings") -> None:
        """Add the counts of ``other``."""
        self.bad.update(other.bad)
        for kind, used in other.values.items():
            self.values.setdefault(kind, UsedValues(used.type_range)).add(used)
        self.modes += other.modes
        self.sizes += other.sizes
        self.animated += other.animated


def decode(
    records: Records, rows: list[int], out: np.ndarray, value_range: ValueRange | None, classes: bool = False
) -> Findings:
    """Decode ``rows`` into ``out``, (len(rows), C, H, W) uint8 or uint16, in threads (Pillow releases Python's lock).

    Args:
        classes: whether they are maps of classes (C = 1), not images.
    """
    (channels, *size), bits = out.shape[1:], 8 * out.itemsize
    size = (size[0], size[1])

    def work(chunk: range) -> Findings:
        findings = Findings()
        for place in chunk:
            try:
                with records.open(rows[place]) as image:
                    mode, form = described_mode(image), "{} x {}".format(*image.size)
                    animated = bool(getattr(image, "is_animated", False))
                    if animated and num_pages(image) == channels:
                        mode, animated = f"{channels} pages of {mode}", False
                    if classes:
                        assert isinstance(image, Image.Image), "arrays have no maps"
                        out[place] = classes_to_uint8(image, size)
                    else:
                        out[place] = image_to_pixels(image, size, channels, value_range, findings.values, bits)
                findings.modes[mode] += 1
                findings.sizes[form] += 1
                findings.animated += animated
            except Exception as error:  # a broken file can raise almost any error in a decoder
                findings.bad[rows[place]] = _reason(error)
        return findings

    threads = min(torch.get_num_threads(), 8, max(1, len(rows) // 16))
    chunks = [range(start, len(rows), threads) for start in range(threads)]
    if threads == 1:
        return work(chunks[0])
    total = Findings()
    with ThreadPoolExecutor(threads) as pool:
        for findings in pool.map(work, chunks):
            total.add(findings)
    return total


def probable_bits(splits: Iterable[Records], channels: int, value_range: ValueRange | None) -> int:
    """The bits that images need, judged by a few of each split: 8 or 16."""
    used: dict[str, UsedValues] = {}
    for records in splits:
        for row in spread(len(records), PROBED).tolist():
            with contextlib.suppress(Exception), records.open(row) as image:  # decoding all images reports bad ones
                if is_wide(image):
                    image_to_pixels(image, (image.size[1], image.size[0]), channels, value_range, used)
    return Findings(values=used).bits


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a readable image"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return "too large: more than 89 million pixels"
    return one_line(printable(str(error)) or type(error).__name__)
