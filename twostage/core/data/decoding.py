"""Decode or check all images of a split in threads, and count their modes, sizes and values."""

import contextlib
import hashlib
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from twostage.core.data.records import Records
from twostage.core.files import expand_home
from twostage.core.images.conversion import classes_to_uint8, image_to_uint8
from twostage.core.images.pixel_values import UsedValues, ValueRange
from twostage.core.wording import one_line, printable

__all__ = ["Findings", "check", "decode"]


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
                    mode, size = image.mode, f"{image.width} x {image.height}"
                    animated = bool(getattr(image, "is_animated", False))
                    if classes:
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


def check(
    records: Records,
    pixels: np.ndarray | None,
    form: tuple[int, int, int],
    value_range: ValueRange | None,
    classes: bool = False,
) -> Findings:
    """Decode every image into ``pixels``, (n, *form); None: only check that images decode, and cache the result."""
    if pixels is not None:
        return decode(records, list(range(len(records))), pixels, value_range, classes)
    cache = _scan_cache(records, "classes" if classes else "")
    if cache.is_file():
        stored = json.loads(cache.read_text(encoding="utf-8"))
        bad = {int(row): reason for row, reason in stored["bad"].items()}
        values = {
            kind: UsedValues(**used | {"type_range": tuple(used["type_range"])})
            for kind, used in stored["values"].items()
        }
        return Findings(bad, Counter(stored["modes"]), Counter(stored["sizes"]), stored["animated"], values)
    findings = Findings()
    for start in range(0, len(records), 1024):
        rows = list(range(start, min(start + 1024, len(records))))
        findings.add(decode(records, rows, np.empty((len(rows), *form), dtype=np.uint8), value_range, classes))
    values = {kind: vars(used) for kind, used in findings.values.items()}
    with contextlib.suppress(OSError):  # if the home folder is read-only, the next run checks again
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(vars(findings) | {"values": values}), encoding="utf-8")
        partial.replace(cache)
    return findings


def _scan_cache(records: Records, kind: str) -> Path:
    digest = hashlib.sha256(f"3 {len(records)} {kind}{records.version}".encode())
    for file in records.files or []:
        stat = file.stat() if file.exists() else None  # a table can name a missing file
        about = f"|{stat.st_size}|{stat.st_mtime_ns}\n" if stat else "|missing\n"
        digest.update(os.fsencode(file.absolute()) + about.encode())
    root = Path(expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    return root / "twostage" / "scans" / f"{digest.hexdigest()[:32]}.json"
