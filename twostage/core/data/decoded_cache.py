"""All images of a split, decoded once: later starts find the result in the user's cache folder.

There, `scans` says which images are readable, and `decoded` holds the pixels of sets that fit in memory. Nothing is
stored if the folder cannot be written.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import PIL

from twostage.core.data.cache_files import cache_folder, replacing_in_cache
from twostage.core.data.decoding import Findings, decode
from twostage.core.data.records import Records
from twostage.core.images.pixel_values import UsedValues, ValueRange
from twostage.core.machine.progress import announced

__all__ = ["decode_all"]

MIN_IMAGES = 200
"""Smaller sets are decoded at each start."""
MAX_BYTES = 16e9
"""Of all decoded sets on disk; beyond it, those that were not used for the longest time are removed."""
ROWS_AT_ONCE = 1024


def decode_all(
    records: Records,
    form: tuple[int, int, int],
    value_range: ValueRange | None,
    in_memory: bool,
    classes: bool = False,
) -> tuple[np.ndarray | None, Findings]:
    """Decode every image, or find the result of an earlier start.

    Args:
        form: (C, H, W).
        in_memory: whether to keep the pixels; if not, images are only checked.
        classes: see :func:`twostage.core.data.decoding.decode`.

    Returns:
        The pixels (n, C, H, W) uint8, or None; and what was found.
    """
    kept = f"{form} {value_range}" if in_memory else ""
    key = f"5 {PIL.__version__} {'classes' if classes else ''} {kept} {records.state()}"
    name, cache = hashlib.sha256(key.encode()).hexdigest()[:32], cache_folder()
    scan, copy = cache / "scans" / f"{name}.json", cache / "decoded" / f"{name}.npy"
    shape = (len(records), *form)
    with contextlib.suppress(
        OSError, ValueError, KeyError, TypeError, AttributeError
    ):  # missing or damaged: decode again
        findings = _read_scan(scan)
        if not in_memory:
            return None, findings
        pixels = np.load(copy, mmap_mode="c")  # changes in memory never reach the file
        if (pixels.shape, pixels.dtype) == (shape, np.uint8):
            os.utime(copy)
            return pixels, findings
    pixels = np.zeros(shape, dtype=np.uint8) if in_memory else None
    findings = Findings()
    with announced(f"{'decoding' if in_memory else 'checking'} {len(records):,} images of {records.origin} ..."):
        for start in range(0, len(records), ROWS_AT_ONCE):
            rows = list(range(start, min(start + ROWS_AT_ONCE, len(records))))
            out = np.empty((len(rows), *form), dtype=np.uint8) if pixels is None else pixels[start : start + len(rows)]
            findings.add(decode(records, rows, out, value_range, classes))
    with contextlib.suppress(OSError):
        if pixels is None or _store(pixels, copy):
            _write_scan(findings, scan)
    return pixels, findings


def _read_scan(file: Path) -> Findings:
    stored = json.loads(file.read_text(encoding="utf-8"))
    bad = {int(row): reason for row, reason in stored["bad"].items()}
    values = {
        kind: UsedValues(**used | {"type_range": tuple(used["type_range"])}) for kind, used in stored["values"].items()
    }
    return Findings(bad, Counter(stored["modes"]), Counter(stored["sizes"]), stored["animated"], values)


def _write_scan(findings: Findings, file: Path) -> None:
    values = {kind: vars(used) for kind, used in findings.values.items()}
    with replacing_in_cache(file) as partial:
        partial.write_text(json.dumps(vars(findings) | {"values": values}), encoding="utf-8")


def _store(pixels: np.ndarray, file: Path) -> bool:
    """Whether the pixels are stored: there are enough of them, and the disk has room for twice as many."""
    if len(pixels) < MIN_IMAGES or pixels.nbytes > MAX_BYTES:
        return False
    file.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(file.parent).free < 2 * pixels.nbytes:
        return False
    with replacing_in_cache(file) as partial:
        np.save(partial, pixels)
    others = sorted(file.parent.glob("*.npy"), key=lambda other: other.stat().st_mtime)
    total = sum(other.stat().st_size for other in others)
    for other in others:
        if total > MAX_BYTES and other != file:
            total -= other.stat().st_size
            other.unlink()
    return True
