"""Decodes or checks all pictures of a split by threads, and finds out what they are."""

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
from twostage.core.images.conversion import image_to_uint8, printable
from twostage.core.images.pixel_values import UsedValues, ValueRange

__all__ = ["Findings", "check", "decode"]


@dataclass
class Findings:
    """What some pictures are."""

    bad: dict[int, str] = field(default_factory=dict)
    """Why a row cannot be read."""
    modes: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    """"width x height"."""
    animated: int = 0
    """Pictures of several frames."""
    values: dict[str, UsedValues] = field(default_factory=dict)
    """By the type of the values in the files."""

    def add(self, other: "Findings") -> None:
        """Counts those of ``other`` too; the numbers of bad rows have to be of the same split."""
        self.bad.update(other.bad)
        for kind, used in other.values.items():
            self.values.setdefault(kind, UsedValues(used.type_range)).add(used)
        self.modes += other.modes
        self.sizes += other.sizes
        self.animated += other.animated


def decode(records: Records, rows: list[int], out: np.ndarray, value_range: ValueRange | None) -> Findings:
    """Decodes ``rows`` into ``out``, (len(rows), C, H, W) uint8, by threads (Pillow works outside the interpreter's
    lock)."""
    channels, height, width = out.shape[1:]

    def work(chunk: range) -> Findings:
        findings = Findings()
        for place in chunk:
            try:
                with records.open(rows[place]) as image:
                    mode, size = image.mode, f"{image.width} x {image.height}"
                    animated = bool(getattr(image, "is_animated", False))
                    out[place] = image_to_uint8(image, (height, width), channels, value_range, findings.values)
                findings.modes[mode] += 1
                findings.sizes[size] += 1
                findings.animated += animated
            except Exception as error:  # a broken file can raise nearly anything in a decoder
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
    """Why a picture cannot be read, in few words on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not a readable picture"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return "too large: more than 89 million pixels"
    words = " ".join(printable(str(error)).split())
    return (words if len(words) < 200 else f"{words[:200]} ...") or type(error).__name__


def check(
    records: Records, pixels: np.ndarray | None, form: tuple[int, int, int], value_range: ValueRange | None
) -> Findings:
    """Decodes every picture: into ``pixels`` (n, *form), or to see only whether it can be (remembered between runs)."""
    if pixels is not None:
        return decode(records, list(range(len(records))), pixels, value_range)
    cache = _scan_cache(records)
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
        findings.add(decode(records, rows, np.empty((len(rows), *form), dtype=np.uint8), value_range))
    values = {kind: vars(used) for kind, used in findings.values.items()}
    with contextlib.suppress(OSError):  # a home that cannot be written to costs the next run another check
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(vars(findings) | {"values": values}), encoding="utf-8")
        partial.replace(cache)
    return findings


def _scan_cache(records: Records) -> Path:
    digest = hashlib.sha256(f"3 {len(records)} {records.version}".encode())
    for file in records.files or []:
        stat = file.stat() if file.exists() else None  # a table can name a file that is not there
        about = f"|{stat.st_size}|{stat.st_mtime_ns}\n" if stat else "|missing\n"
        digest.update(os.fsencode(file.absolute()) + about.encode())
    root = Path(expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    return root / "twostage" / "scans" / f"{digest.hexdigest()[:32]}.json"
