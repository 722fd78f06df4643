"""All images of a split, decoded once: later starts find the result in a folder (`data.cache`).

There, `scans` says which images are readable, and `decoded` holds the pixels of sets that fit in memory. Nothing is
stored if the user's own cache folder, the default, cannot be written.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL

from twostage.core.cache_files import replacing_in_cache
from twostage.core.data.decoding import Findings, decode
from twostage.core.data.records import Records
from twostage.core.errors import InputError
from twostage.core.images.conversion import MODES
from twostage.core.images.pixel_values import UsedValues, ValueRange
from twostage.core.machine.progress import announced

__all__ = ["DecodedCache", "decode_all"]

MIN_IMAGES = 200
"""Smaller sets are decoded at each start."""
ROWS_AT_ONCE = 1024


@dataclass
class DecodedCache:
    """Where decoded images are kept."""

    folder: Path | None
    """None: nowhere."""
    max_bytes: float
    """Of all decoded sets; beyond it, those that were not used for the longest time are removed."""
    notices: list[str] = field(default_factory=list)
    """Sentences about images that were not kept."""

    @classmethod
    def at(cls, folder: str, max_bytes: float) -> "DecodedCache":
        """The cache in a folder that the user named, which is created.

        Raises:
            InputError: it cannot be written.
        """
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise InputError(
                f"data.cache {folder}: cannot keep decoded images there ({error.strerror}), expected a folder that can "
                "be written. Choose another one, or set data.cache=false"
            ) from None
        return cls(Path(folder), max_bytes)

    def store(self, pixels: np.ndarray, file: Path) -> bool:
        """Whether the pixels are kept: there are enough of them, and room for them."""
        if len(pixels) < MIN_IMAGES:
            return False
        file.parent.mkdir(parents=True, exist_ok=True)
        free, remedy = shutil.disk_usage(file.parent).free, "Later starts decode them again"
        if pixels.nbytes > self.max_bytes:
            why = f"{self.max_bytes / 1e9:g} GB is the limit. {remedy}; to keep them, set a larger data.cache_gb"
        elif free < 2 * pixels.nbytes:
            why = (
                f"{file.parent} has {free / 1e9:.3g} GB free, expected twice their size. {remedy}; to keep them, free "
                "some space, or set data.cache to a folder on another disk"
            )
        else:
            self._write(pixels, file)
            return True
        self.notices.append(f"{len(pixels):,} decoded images ({pixels.nbytes / 1e9:.3g} GB) are not kept: {why}")
        return False

    def _write(self, pixels: np.ndarray, file: Path) -> None:
        with replacing_in_cache(file) as partial:
            np.save(partial, pixels)
        others = sorted(file.parent.glob("*.npy"), key=lambda other: other.stat().st_mtime)
        total = sum(other.stat().st_size for other in others)
        for other in others:
            if total > self.max_bytes and other != file:
                total -= other.stat().st_size
                other.unlink()


def decode_all(
    records: Records,
    form: tuple[int, int, int],
    value_range: ValueRange | None,
    in_memory: bool,
    cache: DecodedCache,
    classes: bool = False,
    bits: int = 8,
) -> tuple[np.ndarray | None, Findings]:
    """Decode every image, or find the result of an earlier start.

    Args:
        form: (C, H, W).
        in_memory: whether to keep the pixels; if not, images are only checked.
        cache: where results are kept; gets a sentence if the pixels are not.
        classes: see :func:`twostage.core.data.decoding.decode`.
        bits: of the pixels: 8 or 16.

    Returns:
        The pixels (n, C, H, W) uint8 or uint16, or None; and what was found.
    """
    kept = f"{form} {value_range}" + f" {bits} bits" * (bits != 8) if in_memory else ""
    if not in_memory and (value_range or form[0] not in MODES):  # what else decides whether an image is readable
        kept = f"{form[0]} {value_range}"
    dtype = np.uint8 if bits == 8 else np.uint16
    key = f"5 {PIL.__version__} {'classes' if classes else ''} {kept} {records.state()}"
    name, folder = hashlib.sha256(key.encode()).hexdigest()[:32], cache.folder or Path(os.devnull)
    scan, copy = folder / "scans" / f"{name}.json", folder / "decoded" / f"{name}.npy"
    shape = (len(records), *form)
    with contextlib.suppress(
        OSError, ValueError, KeyError, TypeError, AttributeError
    ):  # missing or damaged: decode again
        findings = _read_scan(scan)
        if not in_memory:
            return None, findings
        pixels = np.load(copy, mmap_mode="c")  # changes in memory never reach the file
        if (pixels.shape, pixels.dtype) == (shape, dtype):
            os.utime(copy)
            return pixels, findings
    pixels = np.zeros(shape, dtype=dtype) if in_memory else None
    findings = Findings()
    with announced(f"{'decoding' if in_memory else 'checking'} {len(records):,} images of {records.origin} ..."):
        for start in range(0, len(records), ROWS_AT_ONCE):
            rows = list(range(start, min(start + ROWS_AT_ONCE, len(records))))
            out = np.empty((len(rows), *form), dtype=dtype) if pixels is None else pixels[start : start + len(rows)]
            findings.add(decode(records, rows, out, value_range, classes))
    with contextlib.suppress(OSError):
        if cache.folder and (pixels is None or cache.store(pixels, copy)):
            _write_scan(findings, scan)
    return pixels, findings


def _read_scan(file: Path) -> Findings:
    stored = json.loads(file.read_text(encoding="utf-8"))
    bad = {int(row): reason for row, reason in stored["bad"].items()}
    values = {
        kind: UsedValues(**used | {"type_range": tuple(used["type_range"])}) for kind, used in stored["values"].items()
    }
    if any("deep" not in used for used in stored["values"].values()) and (
        stored["animated"] or set(values) != {"8-bit"}
    ):
        raise KeyError("deep")  # an earlier version did not ask whether 8 bits are enough, and ignored further pages
    return Findings(bad, Counter(stored["modes"]), Counter(stored["sizes"]), stored["animated"], values)


def _write_scan(findings: Findings, file: Path) -> None:
    values = {kind: vars(used) for kind, used in findings.values.items()}
    with replacing_in_cache(file) as partial:
        partial.write_text(json.dumps(vars(findings) | {"values": values}), encoding="utf-8")
