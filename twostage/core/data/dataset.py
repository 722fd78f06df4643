"""`data`: from a named source to uint8 batches, indexed by row.

Sets that fit ``in_memory_gb`` are decoded once, into one uint8 array; larger ones are checked once and then decoded as
they are needed, by threads.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from pydantic import Field, field_validator
from torch import Tensor

from twostage.core.config.sections import Count, Flag, Number, PathName, Section
from twostage.core.data.decoding import Findings, check, decode
from twostage.core.data.labels import AUTO
from twostage.core.data.records import Records, Source, shortened
from twostage.core.data.shapes import CLASS_NAMES, draw_shapes
from twostage.core.data.sources import find_local, find_source
from twostage.core.data.spread import spread
from twostage.core.errors import InputError
from twostage.core.images.conversion import quiet_decoders
from twostage.core.images.pixel_values import UsedValues, is_grey
from twostage.core.machine.fits_memory import check_bytes
from twostage.core.runs.places import Contents

__all__ = ["DataConfig", "ImageData", "ImageSplit", "LabelColumnOption", "ValueRangeOption", "load_images"]

MAX_PIXELS = 65_536  # along a side
NUM_SHAPES = 20_000
MAX_NAMED = 5
LabelColumnOption = Annotated[
    str, typer.Option(help="The column of a table that holds the classes; found by its name by default, null for none.")
]
ValueRangeOption = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="BLACK WHITE", help="The files' values that become black and white, such as 0 4095."),
]
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
    label_column: Annotated[str, Field(min_length=1)] | None = AUTO
    """The column of a table that holds the classes; `auto`: the one called `label`, `class` or so; null: no classes."""
    value_range: tuple[Number, Number] | None = None
    """The values in the files that become black and white, such as [0, 4095] for 12 bits in 16; null: the range of the
    files' type, which is 0 to 1 for floats."""
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
        if not all(type(side) is int and 0 < side <= MAX_PIXELS for side in sides):
            raise ValueError(f"expected pixels such as 32, or [height, width], got {value!r}")
        return value

    @field_validator("value_range")
    @classmethod
    def _range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError(f"expected [black, white] with black below white, such as [0, 4095], got {list(value)}")
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
        if bad := decode(self.records, rows.tolist(), out, self.config.value_range).bad:
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
        return hashlib.sha256(self.read(spread(len(self), 256)).numpy().tobytes()).hexdigest()

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
    values: dict[str, UsedValues] = field(default_factory=dict)
    """The values that occur in the files, by their type (`8-bit`, `16-bit`, `float` ...)."""

    @property
    def untrained_classes(self) -> list[str]:
        """The class names that no training image has."""
        labels = self.splits["train"].labels
        if labels is None or self.class_names is None:
            return []
        counts = torch.bincount(labels, minlength=len(self.class_names)).tolist()
        return [name for name, count in zip(self.class_names, counts, strict=True) if not count]

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
        """The split that validation reads: `val` where there is one, else `test`; one with labels where `train` has."""
        labels, held_out = self.splits["train"].labels, [name for name in ("val", "test") if name in self.splits]
        return next(name for name in held_out if labels is None or self.splits[name].labels is not None)

    @property
    def validation(self) -> ImageSplit:
        return self.splits[self.validation_name]


def load_images(config: DataConfig) -> ImageData:
    """Opens the source, decodes or checks every picture, and makes sure that a split is held out.

    Raises:
        InputError: nothing at the source, or an unreadable picture (named) unless ``on_bad_image`` is `skip`.
    """
    if config.source == "shapes":
        for name, default in {"label_column": AUTO, "value_range": None}.items():
            if (given := getattr(config, name)) != default:
                raise InputError(f"data.{name} {given}: shapes are drawn with their classes and 8 bits; leave it out")
        _check_memory(config, config.num_images or NUM_SHAPES)
        return _load_shapes(config)
    quiet_decoders()
    source = find_source(config.source, config.label_column)
    _limit_and_hold_out(source, config)
    bytes_needed = sum(map(len, source.splits.values())) * _bytes_each(config)
    in_memory = bytes_needed <= config.in_memory_gb * 1e9
    _check_memory(config, bytes_needed // _bytes_each(config) if in_memory else 1)
    splits, bad, total = {}, [], Findings()
    for name, records in source.splits.items():
        pixels = np.empty((len(records), config.channels, *config.size), dtype=np.uint8) if in_memory else None
        found = check(records, pixels, (config.channels, *config.size), config.value_range)
        bad += [f"{records.names[row]} ({reason})" for row, reason in found.bad.items()]
        total.add(found)
        good = np.array([row for row in range(len(records)) if row not in found.bad], dtype=np.int64)
        if found.bad:
            records, pixels = records.take(good), None if pixels is None else pixels[good]
        splits[name] = ImageSplit(records.labels, pixels, records, config)
    _report_bad(bad, source, config)
    for name, split in splits.items():
        if not len(split):
            raise InputError(f"data.source {config.source}: no readable picture in `{name}`: {shortened(bad)}")
    _check_values(total.values, config)
    source.notices += _describe_values(total.values, config)
    source.notices += _describe_modes(total.modes, config.channels)
    if total.animated:
        source.notices.append(f"{total.animated} pictures have several frames; the first is used")
    data = ImageData(
        source.description,
        splits,
        source.class_names,
        source.notices,
        source.skipped,
        bad,
        total.modes,
        total.sizes,
        total.values,
    )
    if untrained := data.untrained_classes:
        data.notices.append(
            f"{len(untrained)} of {len(source.class_names or [])} classes have no training image, so no model learns "
            f"them: {', '.join(untrained[:MAX_NAMED])}{' ...' if len(untrained) > MAX_NAMED else ''}"
        )
    return data


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
    held_out = {name: source.splits[name] for name in ("val", "test") if source.splits.get(name)}
    if not any(train.labels is None or records.labels is not None for records in held_out.values()):
        if len(train) < 2:
            raise InputError(
                f"data.source {config.source}: holds {len(train)} picture{'s' * (len(train) != 1)}, expected at least "
                "2: one to train on and one held out"
            )
        count = min(max(1, round(len(train) * config.validation_share)), len(train) - 1)
        order = np.random.default_rng(0).permutation(len(train))
        why = " with labels" if held_out else ""
        source.notices.append(
            f"no `val` or `test` split{why}: {count} of {len(order)} pictures are held out as `val`"
            + (
                f" (in place of {len(held_out['val']):,} without labels, which are not used)"
                if "val" in held_out
                else ""
            )
        )
        held_out["val"] = train.take(np.sort(order[:count]))
        train = train.take(np.sort(order[count:]))
    if config.num_images is not None and config.num_images < len(train):
        train = train.take(np.sort(np.random.default_rng(1).permutation(len(train))[: config.num_images]))
    source.splits = {"train": train, **held_out}


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


def _check_values(values: dict[str, UsedValues], config: DataConfig) -> None:
    """Refuses values of which a range has to be given: floats outside of 0 to 1, and integers that would all be one
    shade."""
    for kind, used in values.items():
        low, high = config.value_range or used.type_range
        found = f"{used.images:,} pictures hold {kind} values from {used.low:g} to {used.high:g}"
        remedy = f"set data.value_range=[{used.low:g}, {used.high:g}], or the whole range that they are meant in"
        if config.value_range is None and used.outside(None):
            raise InputError(f"data.source {config.source}: {found}, expected floats from 0 to 1; {remedy}")
        if used.hidden(config.value_range):
            raise InputError(
                f"data.source {config.source}: {found}, which are all one shade in the range from {low:g} to {high:g}; "
                f"{remedy}"
            )


def _describe_values(values: dict[str, UsedValues], config: DataConfig) -> list[str]:
    notices = []
    for kind, used in values.items():
        low, high = config.value_range or used.type_range
        found = f"{used.images:,} pictures hold {kind} values from {used.low:g} to {used.high:g}"
        if used.low == used.high and len(values) == 1 and used.images > 1:
            notices.append(f"{used.images:,} pictures hold nothing but the value {used.low:g}: they all look the same")
        elif used.little(config.value_range):
            notices.append(
                f"{found}, little of the range from {low:g} to {high:g}: they will look dark, bright or flat. If they "
                f"are meant in another range, set data.value_range=[{used.low:g}, {used.high:g}]"
            )
        elif used.outside(config.value_range):
            notices.append(f"{found}; those outside of data.value_range=[{low:g}, {high:g}] are clipped")
        if used.not_finite:
            notices.append(f"{used.not_finite:,} pictures hold values that are NaN or infinite: NaN becomes black")
    return notices


def _describe_modes(modes: Counter[str], channels: int) -> list[str]:
    total = sum(modes.values())
    grey = sum(count for mode, count in modes.items() if is_grey(mode))
    if channels > 1 and grey:
        return [f"{grey} of {total} pictures are grey and are repeated over the colours (data.channels={channels})"]
    if channels == 1 and grey < total:
        return [f"{total - grey} of {total} pictures have colour and are reduced to grey (data.channels=1)"]
    return []
