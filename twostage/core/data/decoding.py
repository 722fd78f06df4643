"""Decode images in threads, and count their modes, sizes and values."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from twostage.core.data.records import Records
from twostage.core.images.conversion import classes_to_uint8, image_to_uint8
from twostage.core.images.pixel_values import UsedValues, ValueRange
from twostage.core.wording import one_line, printable

__all__ = ["Findings", "decode"]


@dataclass
class Findings:
    """The findings of decoding some images."""

    bad: dict[int, str] = field(default_factory=dict)
    """The reason for each unreadable row."""
    modes: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    """"width x height"."""
    animated: int = 0
    """The number of images with several frames."""
    values: dict[str, UsedValues] = field(default_factory=dict)
    """The values in the files, by their type (`8-bit`, `16-bit`, `float` ...)."""

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
    """Decode ``rows`` into ``out``, (len(rows), C, H, W) uint8, in threads (Pillow releases Python's lock).

    Args:
        classes: whether they are maps of classes (C = 1), not images.
    """
    channels, height, width = out.shape[1:]

    def work(chunk: range) -> Findings:
        findings = Findings()
        for place in chunk:
            try:
                with records.open(rows[place]) as image:
                    mode, size = image.mode, "{} x {}".format(*image.size)
                    animated = bool(getattr(image, "is_animated", False))
                    if classes:
                        assert isinstance(image, Image.Image), "arrays have no maps"
                        out[place] = classes_to_uint8(image, (height, width))
                    else:
                        out[place] = image_to_uint8(image, (height, width), channels, value_range, findings.values)
                findings.modes[mode] += 1
                findings.sizes[size] += 1
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


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a readable image"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return "too large: more than 89 million pixels"
    return one_line(printable(str(error)) or type(error).__name__)
