"""`data`: from a named source to uint8 batches, indexed by row.

Sets that fit ``in_memory_gb`` are decoded once, into one uint8 array; larger ones are checked once and then decoded as
they are needed, by threads.
"""

import contextlib
import hashlib
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pydantic import Field, field_validator
from torch import Tensor

from core.config import Count, Flag, Number, PathName, Section
from core.errors import InputError
from core.fits_memory import check_bytes
from core.images import image_to_uint8, printable, quiet_decoders
from core.places import Contents
from core.shapes import CLASS_NAMES, draw_shapes
from core.sources import Records, Source, find_local, find_source, shortened

__all__ = ["DataConfig", "ImageData", "ImageSplit", "load_images"]

MOST_PIXELS = 65_536  # along a side
NUM_SHAPES = 20_000
Share = Annotated[Number, Field(gt=0.0, lt=1.0)]


class DataConfig(Section):
    """Which pictures, and the form that they are brought to."""

    source: PathName = "shapes"
    """`shapes`, a folder, a parquet or arrow file or a folder of them, a name under $TWOSTAGE_DATA, or a Hugging Face
    dataset `owner/name`."""
    image_size: Count | tuple[Count, Count] = 32
    """Pixels: one number for squares, or [height, width]. Other pictures are cropped at their centre, then resized."""
    channels: Literal[1, 3, 4] = 3
    """1 grey, 3 RGB, 4 RGBA."""
    horizontal_flip: Flag = False
    """Training images are mirrored with probability 1/2."""
    num_images: Count | None = None
    """Training images used at most; None: all (20,000 for `shapes`)."""
    validation_share: Share = 0.05
    """Held out from `train` where the source has neither `val` nor `test`."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What to do about pictures that cannot be read: stop before training, or leave them out and say how many."""
    in_memory_gb: Number = Field(default=4.0, ge=0.0)
    """Sets up to this many gigabytes of pixels are kept decoded in memory."""

    @field_validator("image_size", mode="before")
    @classmethod
    def _pixels(cls, value: Any) -> Any:
        sides = list(value) if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
        if not all(type(side) is int and 0 < side <= MOST_PIXELS for side in sides):
            raise ValueError(f"expected pixels such as 32, or [height, width], got {value!r}")
        return value

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)


class ImageSplit:
    """The pictures of one split.

    Args:
        labels: (n,) int64, or None.
        pixels: (n, C, H, W) uint8 when they are kept in memory; else ``records`` are decoded on demand.
    """

    def __init__(
        self, labels: np.ndarray | None, pixels: np.ndarray | None, records: Records | None, config: DataConfig
    ) -> None:
        self.labels = None if labels is None else torch.from_numpy(labels)
        self.pixels = None if pixels is None else torch.from_numpy(pixels)
        self.records, self.config = records, config
        self._length = len(pixels) if pixels is not None else len(records or [])

    def __len__(self) -> int:
        return self._length

    @property
    def in_memory(self) -> bool:
        return self.pixels is not None

    def read(self, rows: Tensor) -> Tensor:
        """(len(rows), C, H, W) uint8."""
        if self.pixels is not None:
            return self.pixels[rows]
        assert self.records is not None
        out = np.empty((len(rows), self.config.channels, *self.config.size), dtype=np.uint8)
        if bad := _decode(self.records, rows.tolist(), out, self.config).bad:
            row, reason = next(iter(bad.items()))
            raise InputError(
                f"{self.records.names[row]}: could be read when the run began, and now cannot ({reason}). Nothing was "
                "put in its place; bring it back, then give the same command to go on"
            )
        return torch.from_numpy(out)

    def fingerprint(self) -> str:
        """The sha256 of what these pictures are, wherever they are: their number, names and labels, and their pixels
        where they are in memory, else the sizes of their files."""
        digest = hashlib.sha256(f"{len(self)} {self.config.channels} {self.config.size}".encode())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        if self.records is not None:
            for name in self.records.names:
                digest.update(f"{name.removeprefix(self.records.origin)}\n".encode())
        if self.pixels is not None:
            digest.update(self.pixels.numpy().data)
        elif self.records is not None:
            digest.update(self.records.sizes().tobytes())
        return digest.hexdigest()

    def sample_hash(self) -> str:
        """The sha256 of the pixels of up to 256 of these pictures, spread evenly: of those whose fingerprint knows
        only the sizes of their files."""
        count = min(len(self), 256)
        return hashlib.sha256(self.read(torch.arange(count) * len(self) // count).numpy().tobytes()).hexdigest()

    def names(self, rows: Tensor) -> list[str]:
        """What each picture is called in messages: its file, or its row."""
        if self.records is None:
            return [f"picture {row}" for row in rows.tolist()]
        return [self.records.names[row] for row in rows.tolist()]

    def read_labels(self, rows: Tensor) -> Tensor | None:
        """(len(rows),) int64, or None."""
        return None if self.labels is None else self.labels[rows]


@dataclass
class ImageData:
    """The splits of a source: `train`, and `val` or `test` or both."""

    description: str
    splits: dict[str, ImageSplit]
    class_names: list[str] | None
    notices: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """The files that were left out because they are no pictures, each with the reason."""
    bad: list[str] = field(default_factory=list)
    """The pictures that were left out because they cannot be read, each with the reason."""
    modes: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    """How often each mode and size ("width x height") occurs among the files."""

    def identity(self) -> dict[str, Any]:
        """What a run remembers of its pictures, as plain JSON."""
        identity: dict[str, Any] = {
            "classes": {str(label): name for label, name in enumerate(self.class_names or [])},
            **{
                name: {"pictures": len(split), "fingerprint": split.fingerprint()}
                for name, split in self.splits.items()
            },
        }
        on_disk = {name: split.sample_hash() for name, split in self.splits.items() if not split.in_memory}
        return identity | ({"sample": on_disk} if on_disk else {})

    def contents(self) -> Contents:
        """What `data.source` leads to."""
        place = find_local(self.validation.config.source)
        return Contents("images", None if place is None else place.absolute(), self.identity())

    @property
    def validation_name(self) -> str:
        """The split that validation reads: `val` where there is one, else `test`."""
        return "val" if "val" in self.splits else "test"

    @property
    def validation(self) -> ImageSplit:
        return self.splits[self.validation_name]


def load_images(config: DataConfig) -> ImageData:
    """Opens the source, decodes or checks every picture, and makes sure that a split is held out.

    Raises:
        InputError: nothing at the source, or an unreadable picture (named) unless ``on_bad_image`` is `skip`.
    """
    if config.source == "shapes":
        _check_memory(config, config.num_images or NUM_SHAPES)
        return _load_shapes(config)
    quiet_decoders()
    source = find_source(config.source)
    _limit_and_hold_out(source, config)
    bytes_needed = sum(map(len, source.splits.values())) * _bytes_each(config)
    in_memory = bytes_needed <= config.in_memory_gb * 1e9
    _check_memory(config, bytes_needed // _bytes_each(config) if in_memory else 1)
    splits, bad, modes, sizes, animated = {}, [], Counter(), Counter(), 0
    for name, records in source.splits.items():
        pixels = np.empty((len(records), config.channels, *config.size), dtype=np.uint8) if in_memory else None
        found = _check(records, pixels, config)
        bad += [f"{records.names[row]} ({reason})" for row, reason in found.bad.items()]
        modes += found.modes
        sizes += found.sizes
        animated += found.animated
        good = np.array([row for row in range(len(records)) if row not in found.bad], dtype=np.int64)
        if found.bad:
            records, pixels = records.take(good), None if pixels is None else pixels[good]
        splits[name] = ImageSplit(records.labels, pixels, records, config)
    _report_bad(bad, source, config)
    for name, split in splits.items():
        if not len(split):
            raise InputError(f"data.source {config.source}: no readable picture in `{name}`: {shortened(bad)}")
    source.notices += _describe_modes(modes, config.channels)
    if animated:
        source.notices.append(f"{animated} pictures have several frames; the first is used")
    return ImageData(source.description, splits, source.class_names, source.notices, source.skipped, bad, modes, sizes)


def _bytes_each(config: DataConfig) -> int:
    return config.channels * config.size[0] * config.size[1]


def _check_memory(config: DataConfig, count: int) -> None:
    settings = [f"data.image_size {config.image_size}", f"data.num_images {config.num_images}"]
    if config.source != "shapes":
        settings.append(f"data.in_memory_gb {config.in_memory_gb:g}")
    check_bytes(count * _bytes_each(config), f"{count:,} pictures", settings, torch.device("cpu"))


def _load_shapes(config: DataConfig) -> ImageData:
    num_train = config.num_images or NUM_SHAPES
    num_test = max(64, num_train // 10)
    splits = {}
    # The held-out pictures come from another seed, so that no training picture is ever among them.
    for seed, (name, count) in enumerate({"train": num_train, "test": num_test}.items()):
        pixels = draw_shapes(0, count, config.size, config.channels, seed)
        splits[name] = ImageSplit(np.arange(count) % len(CLASS_NAMES), pixels, None, config)
    description = f"shapes: drawn, {len(CLASS_NAMES)} classes, {num_train} for training, {num_test} held out"
    return ImageData(description, splits, list(CLASS_NAMES))


def _limit_and_hold_out(source: Source, config: DataConfig) -> None:
    if "train" not in source.splits:
        raise InputError(f"data.source {config.source}: has the splits {list(source.splits)}, expected one named train")
    train = source.splits["train"]
    if not any(source.splits.get(name) for name in ("val", "test")):
        if len(train) < 2:
            raise InputError(
                f"data.source {config.source}: holds {len(train)} picture{'s' * (len(train) != 1)}, expected at least "
                "2: one to train on and one held out"
            )
        held_out = min(max(1, round(len(train) * config.validation_share)), len(train) - 1)
        order = np.random.default_rng(0).permutation(len(train))
        source.splits["val"] = train.take(np.sort(order[:held_out]))
        train = train.take(np.sort(order[held_out:]))
        source.notices.append(f"no `val` or `test` split: {held_out} of {len(order)} pictures are held out as `val`")
    if config.num_images is not None and config.num_images < len(train):
        train = train.take(np.sort(np.random.default_rng(1).permutation(len(train))[: config.num_images]))
    source.splits = {"train": train, **{k: v for k, v in source.splits.items() if k in ("val", "test") and len(v)}}


# --- decoding -------------------------------------------------------------------------------------------------------


@dataclass
class _Findings:
    bad: dict[int, str] = field(default_factory=dict)  # row -> reason
    modes: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    animated: int = 0

    def add(self, other: "_Findings") -> None:
        self.bad.update(other.bad)
        self.modes += other.modes
        self.sizes += other.sizes
        self.animated += other.animated


def _decode(records: Records, rows: list[int], out: np.ndarray, config: DataConfig) -> _Findings:
    """Decodes ``rows`` into ``out`` by threads (Pillow works outside the interpreter's lock)."""

    def work(chunk: range) -> _Findings:
        findings = _Findings()
        for place in chunk:
            try:
                with records.open(rows[place]) as image:
                    mode, size = image.mode, f"{image.width} x {image.height}"
                    animated = bool(getattr(image, "is_animated", False))
                    out[place] = image_to_uint8(image, config.size, config.channels)
                findings.modes[mode] += 1
                findings.sizes[size] += 1
                findings.animated += animated
            except Exception as error:  # a broken file can raise nearly anything in a decoder
                findings.bad[rows[place]] = _reason(error)
        return findings

    threads = min(os.cpu_count() or 1, 8, max(1, len(rows) // 16))
    chunks = [range(start, len(rows), threads) for start in range(threads)]
    if threads == 1:
        return work(chunks[0])
    total = _Findings()
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


def _check(records: Records, pixels: np.ndarray | None, config: DataConfig) -> _Findings:
    """Decodes every picture: into ``pixels``, or to see only whether it can be (remembered between runs)."""
    if pixels is not None:
        return _decode(records, list(range(len(records))), pixels, config)
    cache = _scan_cache(records)
    if cache.is_file():
        stored = json.loads(cache.read_text(encoding="utf-8"))
        bad = {int(row): reason for row, reason in stored["bad"].items()}
        return _Findings(bad, Counter(stored["modes"]), Counter(stored["sizes"]), stored["animated"])
    findings = _Findings()
    for start in range(0, len(records), 1024):
        rows = list(range(start, min(start + 1024, len(records))))
        out = np.empty((len(rows), config.channels, *config.size), dtype=np.uint8)
        findings.add(_decode(records, rows, out, config))
    with contextlib.suppress(OSError):  # a home that cannot be written to costs the next run another check
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(vars(findings)), encoding="utf-8")
        partial.replace(cache)
    return findings


def _scan_cache(records: Records) -> Path:
    digest = hashlib.sha256(f"2 {len(records)} {records.version}".encode())
    for file in records.files or []:
        stat = file.stat()
        digest.update(os.fsencode(file.absolute()) + f"|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    root = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return root / "twostage" / "scans" / f"{digest.hexdigest()[:32]}.json"


def _report_bad(bad: list[str], source: Source, config: DataConfig) -> None:
    if not bad:
        return
    shown = shortened(bad)
    if config.on_bad_image == "error":
        raise InputError(
            f"data.source {config.source}: {len(bad)} unreadable pictures: {shown}. "
            "Mend or remove them, or set data.on_bad_image=skip to go on without them"
        )
    source.notices.append(f"{len(bad)} unreadable pictures are skipped: {shown}")


def _describe_modes(modes: Counter[str], channels: int) -> list[str]:
    total = sum(modes.values())
    grey = sum(count for mode, count in modes.items() if mode in ("1", "L", "LA", "I", "I;16", "F"))
    if channels > 1 and grey:
        return [f"{grey} of {total} pictures are grey and are repeated over the colours (data.channels={channels})"]
    if channels == 1 and grey < total:
        return [f"{total - grey} of {total} pictures have colour and are reduced to grey (data.channels=1)"]
    return []
