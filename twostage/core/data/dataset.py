"""`data`: from a named source to uint8 batches, indexed by row.

A dataset that fits ``in_memory_gb`` is decoded once into one uint8 array. A larger one is checked once and then decoded
on demand, in threads.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, overload

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.utils.data import Dataset

from twostage.core.config.sections import Count, Flag, Number, PathName, Section
from twostage.core.data.captions import has_captions
from twostage.core.data.decoded_cache import decode_all
from twostage.core.data.decoding import Findings, decode
from twostage.core.data.drawn_sources import DRAWN_SOURCES, draw_split, drawn_splits
from twostage.core.data.maps import MapKind, decode_maps
from twostage.core.data.records import AUTO, Captions, Columns, Records, Source
from twostage.core.data.shapes import CLASS_NAMES
from twostage.core.data.sources import find_local, find_source
from twostage.core.data.spread import names_without_images, spread
from twostage.core.data.vectors import VECTOR_FILE, add_vectors
from twostage.core.errors import InputError
from twostage.core.images.conversion import quiet_decoders, to_float
from twostage.core.images.pixel_values import UsedValues, is_grey
from twostage.core.machine.memory import check_bytes
from twostage.core.runs.contents import Contents
from twostage.core.wording import some_of

__all__ = [
    "DataConfig",
    "ImageData",
    "ImageSplit",
    "load_images",
    "load_larger",
]

MAX_SIDE = 65_536  # pixels
Share = Annotated[Number, Field(gt=0.0, lt=1.0)]


class DataConfig(Section):
    """The images to use, and their size, channels and value range."""

    source: PathName = "shapes"
    """`shapes`, `captioned_shapes`, a folder of images, a table (parquet, arrow), archive (tar, zip) or file of arrays
    (npy, npz) or a folder of these, a name under $TWOSTAGE_DATA, or a Hugging Face dataset `owner/name`."""
    image_size: Count | tuple[Count, Count] = 32
    """Pixels: one number for squares, or [height, width]. Other images are cropped at the centre, then resized."""
    channels: Literal[1, 3, 4] = 3
    """1 grey, 3 RGB, 4 RGBA."""
    label_column: Annotated[str, Field(min_length=1)] | None = AUTO
    """The column of a table with the classes; `auto` looks for `label`, `class` and similar names; null: no classes."""
    caption_column: Annotated[str, Field(min_length=1)] | None = AUTO
    """The column of a table or of a metadata file with the captions: a text, or a list of texts; `auto` looks for
    `caption`, `text`, `prompt` and similar names, and for text files beside the images; null: no captions."""
    on_missing_caption: Literal["error", "skip", "empty"] = "error"
    """Whether images without a caption stop `twostage encode`, are skipped, or have an empty caption."""
    vector_column: Annotated[str, Field(min_length=1)] | None = None
    """The column with a vector for each image: lists of numbers, all of the same length. Or a `.npz` file of
    `twostage embed`."""
    maps: PathName | None = None
    """A map for each image, such as a segmentation: another image column, or a folder of images with the same names."""
    map_kind: MapKind = "labels"
    """`labels`: the grey values or palette indices of maps are classes, and are never blended; `image`: maps are
    ordinary images."""
    value_range: tuple[Number, Number] | None = None
    """The values in the files that become black and white, such as [0, 4095] for 12 bits stored in 16; null: the range
    of the files' type, which is 0 to 1 for floats."""
    horizontal_flip: Flag = False
    """Mirrors each training image with probability 1/2."""
    random_crop: Share | None = None
    """The smallest share of an image's sides that a tokenizer sees of it in training, such as 0.8: each time a window
    of random size and place. Training images are then kept larger (1/0.8 times as large), so that no window has to be
    enlarged, if the files are large enough. null: whole images."""
    num_images: Count | None = None
    """The maximum number of training images; null: all (20,000 for `shapes` and `captioned_shapes`)."""
    validation_share: Share = 0.05
    """The share of `train` to hold out if the source has neither `val` nor `test`."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Whether unreadable images stop the run before training, or are skipped and counted."""
    in_memory_gb: Number = Field(default=4.0, ge=0.0)
    """Datasets with up to this many gigabytes of pixels are kept decoded in memory. The larger images that
    `random_crop` needs are kept too if they fit beside the plain ones."""

    @field_validator("image_size", mode="before")
    @classmethod
    def _pixels(cls, value: Any) -> Any:
        sides = list(value) if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
        if not all(type(side) is int and 0 < side <= MAX_SIDE for side in sides):
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

    @property
    def columns(self) -> Columns:
        """What to read beside the images."""
        vectors = None if self.vector_file else self.vector_column
        return Columns(self.label_column, self.caption_column, vectors, self.maps)

    @property
    def vector_file(self) -> Path | None:
        """The file that ``vector_column`` names, if it is no column."""
        given = self.vector_column
        return Path(given) if given is not None and given.endswith(VECTOR_FILE) else None


class ImageSplit(Dataset[tuple[Tensor, int]]):
    """The images of one split, a dataset for a `DataLoader`.

    ``split[i]`` is an image (C, H, W) in [-1, 1] and its class, -1 for none. ``split[:100]`` is (100, C, H, W) images
    and (100,) classes.

    Args:
        labels: (n,) int64, or None.
        pixels: (n, C, H, W) uint8; None: ``records`` are decoded on demand.
        records: None for images that twostage draws.
        captions: the captions of each image, () for none; None: no image has captions.
        vectors: (n, d) float32, or None.
        maps: (n, H, W) uint8 classes, or (n, C, H, W) uint8 images; None: no maps, or those of ``records`` are decoded
            on demand.
        map_channels: C; None: maps of classes, or no maps.
    """

    def __init__(
        self,
        labels: np.ndarray | None,
        pixels: np.ndarray | None,
        records: Records | None,
        config: DataConfig,
        *,
        captions: Captions | None = None,
        vectors: np.ndarray | None = None,
        maps: np.ndarray | None = None,
        map_channels: int | None = None,
    ) -> None:
        self.labels = None if labels is None else torch.from_numpy(labels)
        self.pixels = None if pixels is None else torch.from_numpy(pixels)
        self.maps = None if maps is None else torch.from_numpy(maps)
        self.records, self.config, self.captions, self.vectors = records, config, captions, vectors
        self.map_channels = map_channels

    def __len__(self) -> int:
        return len(self.records or [] if self.pixels is None else self.pixels)

    @overload
    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Tensor, Tensor]: ...
    def __getitem__(self, index: int | slice) -> tuple[Tensor, int | Tensor]:
        rows = torch.arange(len(self))[index]  # an IndexError ends a loop over the split
        labels = torch.full_like(rows, -1) if self.labels is None else self.labels[rows]
        if rows.ndim == 0:
            return to_float(self.read(rows[None]))[0], int(labels)
        return to_float(self.read(rows)), labels

    @property
    def in_memory(self) -> bool:
        return self.pixels is not None

    def read(self, rows: Tensor) -> Tensor:
        """(len(rows), C, H, W) uint8."""
        if self.pixels is not None:
            return self.pixels[rows]
        assert self.records is not None
        out = np.empty((len(rows), self.config.channels, *self.config.size), dtype=np.uint8)
        _check_readable(self.records, decode(self.records, rows.tolist(), out, self.config.value_range))
        return torch.from_numpy(out)

    def read_maps(self, rows: Tensor) -> Tensor | None:
        """(len(rows), H, W) uint8 classes, or (len(rows), C, H, W) uint8 images; None without maps."""
        if self.map_form is None:
            return None
        if self.maps is not None:
            return self.maps[rows]
        assert self.records is not None
        assert self.records.maps is not None
        maps, classes = self.records.maps, self.map_channels is None
        out = np.empty((len(rows), self.map_channels or 1, *self.config.size), dtype=np.uint8)
        _check_readable(maps, decode(maps, rows.tolist(), out, None, classes))
        return torch.from_numpy(out[:, 0] if classes else out)

    @property
    def map_form(self) -> tuple[int, ...] | None:
        """The shape of a map: (H, W) for classes, (C, H, W) for images; None without maps."""
        if self.maps is None and (self.records is None or self.records.maps is None):
            return None
        return self.config.size if self.map_channels is None else (self.map_channels, *self.config.size)

    def fingerprint(self) -> str:
        """The sha256 of the content, independent of its location: the number, names and labels of the images, their
        vectors, and the pixels of images and maps if in memory, else the sizes of their files.

        Captions are not part of it: images and codes are the same with other captions.
        """
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
        if self.vectors is not None:
            digest.update(self.vectors.data)
        if self.map_form is not None:
            digest.update(f"maps {self.map_form}".encode())
            if self.maps is not None:
                digest.update(self.maps.numpy().data)
            elif self.records is not None and self.records.maps is not None:
                digest.update(self.records.maps.sizes().tobytes())
        return digest.hexdigest()

    def sample_hash(self) -> str:
        """The sha256 of the pixels of up to 256 evenly spaced images: for a split that is not in memory, whose
        fingerprint only covers file sizes."""
        rows = spread(len(self), 256)
        digest = hashlib.sha256(self.read(rows).numpy().tobytes())
        if (maps := self.read_maps(rows)) is not None:
            digest.update(maps.numpy().tobytes())
        return digest.hexdigest()

    def names(self, rows: Tensor) -> list[str]:
        """The name of each image in messages: its file, or its row."""
        if self.records is None:
            return [f"image {row}" for row in rows.tolist()]
        return [self.records.names[row] for row in rows.tolist()]

    def read_labels(self, rows: Tensor) -> Tensor | None:
        """(len(rows),) int64, or None."""
        return None if self.labels is None else self.labels[rows]

    def read_captions(self, rows: Tensor) -> list[tuple[str, ...]] | None:
        """The captions of each image, () for none; None if no image has any."""
        return None if self.captions is None else [self.captions[row] for row in rows.tolist()]

    def read_vectors(self, rows: Tensor) -> Tensor | None:
        """(len(rows), d) float32, or None."""
        return None if self.vectors is None else torch.from_numpy(self.vectors[rows.numpy()])


@dataclass
class ImageData:
    """The splits of a source: `train`, and `val`, `test` or both; `captioned_shapes` also has `unseen`."""

    description: str
    splits: dict[str, ImageSplit]
    class_names: list[str] | None
    notices: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Files skipped because they are not images, each with the reason."""
    unmatched_captions: list[str] = field(default_factory=list)
    """Caption files, and rows of metadata files, that belong to no image."""
    bad: list[str] = field(default_factory=list)
    """Images skipped because they are unreadable, each with the reason."""
    modes: Counter[str] = field(default_factory=Counter)
    """The number of files with each mode."""
    sizes: Counter[str] = field(default_factory=Counter)
    """The number of files with each size ("width x height")."""
    values: dict[str, UsedValues] = field(default_factory=dict)
    """The values in the files, by their type (`8-bit`, `16-bit`, `float` ...)."""

    @property
    def untrained_classes(self) -> list[str]:
        """The classes without any training image."""
        return names_without_images(self.splits["train"].labels, self.class_names)

    def identity(self) -> dict[str, Any]:
        """The facts by which a run recognizes its images, as plain JSON."""
        identity: dict[str, Any] = {"classes": {str(i): name for i, name in enumerate(self.class_names or [])}}
        for name, split in self.splits.items():
            identity[name] = {"pictures": len(split), "fingerprint": split.fingerprint()}
        on_disk = {name: split.sample_hash() for name, split in self.splits.items() if not split.in_memory}
        return identity | ({"sample": on_disk} if on_disk else {})

    def contents(self) -> Contents:
        """The content that `data.source` refers to."""
        place = find_local(self.validation.config.source)
        return Contents("images", None if place is None else place.absolute(), self.identity())

    @property
    def validation_name(self) -> str:
        """The split for validation: `val` if there is one, else `test`; if `train` has labels, one with labels."""
        labels, held_out = self.splits["train"].labels, [name for name in ("val", "test") if name in self.splits]
        return next(name for name in held_out if labels is None or self.splits[name].labels is not None)

    @property
    def validation(self) -> ImageSplit:
        return self.splits[self.validation_name]


def load_larger(data: ImageData, size: tuple[int, int]) -> ImageSplit:
    """The training images of ``data`` in the same order at another size (H, W), for cutting windows out of them.

    They come from their files again, because enlarged images would lack the detail of large ones. They are kept in
    memory if they fit into ``in_memory_gb`` beside those of ``data``.

    Raises:
        InputError: an image is no longer readable, or they do not fit in memory.
    """
    train = data.splits["train"]
    config = train.config.model_copy(update={"image_size": size})
    labels = None if train.labels is None else train.labels.numpy()
    if train.records is None:
        _check_memory(config, len(train))
        return _draw_images(config, "train", len(train))
    larger = ImageSplit(labels, None, train.records, config, map_channels=train.map_channels)
    plain_bytes = sum(split.pixels.nbytes for split in data.splits.values() if split.pixels is not None)
    in_memory = plain_bytes + len(train) * _bytes_each(config) <= config.in_memory_gb * 1e9
    _check_memory(config, len(train) if in_memory else 1)
    if in_memory:
        pixels, found = decode_all(train.records, (config.channels, *size), config.value_range, in_memory)
        _check_readable(train.records, found)
        larger.pixels = None if pixels is None else torch.from_numpy(pixels)
    return larger


def load_images(config: DataConfig) -> ImageData:
    """Open the source, decode or check every image, and make sure that a split is held out.

    Raises:
        InputError: the source is missing or ambiguous, images do not fit in memory, their value range is unknown, or an
            image (the message names it) is unreadable and ``on_bad_image`` is not `skip`.
    """
    if config.source in DRAWN_SOURCES:
        return _load_drawn(config)
    quiet_decoders()
    source = find_source(config.source, config.columns)
    if config.vector_file:
        source.splits = add_vectors(source.splits, config.vector_file)
    _apply_caption_policy(source, config)
    _limit_and_hold_out(source, config)
    count = sum(map(len, source.splits.values()))
    in_memory = count * _bytes_each(config) <= config.in_memory_gb * 1e9
    _check_memory(config, count if in_memory else 1)
    splits, bad, total = {}, [], Findings()
    for name, records in source.splits.items():
        pixels, found = decode_all(records, (config.channels, *config.size), config.value_range, in_memory)
        bad += [f"{records.names[row]} ({reason})" for row, reason in found.bad.items()]
        total.add(found)
        if found.bad:
            good = np.array([row for row in range(len(records)) if row not in found.bad], dtype=np.int64)
            records, pixels = records.take(good), None if pixels is None else pixels[good]
        splits[name] = ImageSplit(
            records.labels, pixels, records, config, captions=records.captions, vectors=records.vectors
        )
    _report_bad(bad, source, config)
    for name, split in splits.items():
        if not len(split):
            raise InputError(f"data.source {config.source}: expected readable images in `{name}`, got {some_of(bad)}")
    _add_maps(splits, config, in_memory)
    notices = [*source.notices, *_value_notices(total.values, config), *_mode_notices(total.modes, config.channels)]
    if total.animated:
        notices.append(f"{total.animated} images have several frames; only the first is used")
    data = ImageData(
        source.description,
        splits,
        source.class_names,
        notices,
        source.skipped,
        source.unmatched_captions,
        bad,
        total.modes,
        total.sizes,
        total.values,
    )
    if untrained := data.untrained_classes:
        data.notices.append(
            f"{len(untrained)} of {len(source.class_names or [])} classes have no training images, so no model learns "
            f"them: {some_of(untrained)}"
        )
    return data


def _check_readable(records: Records, found: Findings) -> None:
    """Refuse to continue with images that have become unreadable."""
    if found.bad:
        row, reason = next(iter(found.bad.items()))
        raise InputError(
            f"{records.names[row]}: was readable when the run started but no longer is ({reason}). Restore "
            "the file, then run the same command again to resume"
        )


def _add_maps(splits: dict[str, ImageSplit], config: DataConfig, in_memory: bool) -> None:
    records = {name: split.records.maps for name, split in splits.items() if split.records and split.records.maps}
    if records:
        maps, channels = decode_maps(records, config.map_kind, config.size, in_memory)
        for name, found in maps.items():
            splits[name].maps = None if found is None else torch.from_numpy(found)
            splits[name].map_channels = channels


def _bytes_each(config: DataConfig) -> int:
    map_channels = 0 if config.maps is None else 1 if config.map_kind == "labels" else 3
    return (config.channels + map_channels) * config.size[0] * config.size[1]


def _check_memory(config: DataConfig, count: int) -> None:
    settings = [f"data.image_size {config.image_size}", f"data.num_images {config.num_images}"]
    if config.source not in DRAWN_SOURCES:
        settings.append(f"data.in_memory_gb {config.in_memory_gb:g}")
    check_bytes(count * _bytes_each(config), f"{count:,} images", settings, torch.device("cpu"))


def _load_drawn(config: DataConfig) -> ImageData:
    """The splits of one of `DRAWN_SOURCES`.

    Raises:
        InputError: a setting does not apply to it.
    """
    for name in ("label_column", "caption_column", "vector_column", "maps", "value_range"):
        if (given := getattr(config, name)) != DataConfig.model_fields[name].default:
            raise InputError(
                f"data.{name} {given!r}: does not apply to data.source={config.source}. Remove data.{name}"
            )
    if config.source == "captioned_shapes" and config.channels == 1:
        raise InputError(
            "data.channels 1: expected 3 or 4 for data.source=captioned_shapes, whose captions name colours. Set "
            "data.channels=3, or data.source=shapes"
        )
    counts = drawn_splits(config.source, config.num_images)
    _check_memory(config, sum(counts.values()))
    splits = {name: _draw_images(config, name, count) for name, count in counts.items()}
    found = f"{counts['train']} images for training, {counts['test']} held out"
    if "unseen" in counts:
        found += f", {counts['unseen']} held out with unseen combinations of colour and shape"
    return ImageData(f"{config.source}: {len(CLASS_NAMES)} classes, {found}", splits, list(CLASS_NAMES))


def _draw_images(config: DataConfig, split: str, count: int) -> ImageSplit:
    drawn = draw_split(config.source, split, count, config.size, config.channels)
    return ImageSplit(drawn.labels, drawn.pixels, None, config, captions=drawn.captions, maps=drawn.maps)


def _apply_caption_policy(source: Source, config: DataConfig) -> None:
    """Skip images without a caption, or give them an empty one, if `data.on_missing_caption` asks for it.

    Nothing is done if no image has a caption: then the source has none.
    """
    if config.on_missing_caption == "error" or not any(has_captions(r.captions) for r in source.splits.values()):
        return
    missing = []
    for name, records in source.splits.items():
        captions = records.captions or [()] * len(records)
        if config.on_missing_caption == "empty":
            source.splits[name] = replace(records, captions=[texts or ("",) for texts in captions])
            continue
        missing += [records.names[row] for row, texts in enumerate(captions) if not texts]
        source.splits[name] = records.take(np.array([row for row, texts in enumerate(captions) if texts], np.int64))
        if not len(source.splits[name]):
            raise InputError(
                f"data.source {config.source}: no image of `{name}` has a caption, expected some. Add captions, or set "
                "data.on_missing_caption=empty"
            )
    if missing:
        source.notices.append(f"{len(missing):,} images without a caption are skipped: {some_of(missing)}")
        source.skipped += [f"{name} (no caption)" for name in missing]


def _limit_and_hold_out(source: Source, config: DataConfig) -> None:
    if "train" not in source.splits:
        raise InputError(f"data.source {config.source}: has the splits {list(source.splits)}, expected one named train")
    train = source.splits["train"]
    held_out = {name: source.splits[name] for name in ("val", "test") if source.splits.get(name)}
    if not any(train.labels is None or records.labels is not None for records in held_out.values()):
        if len(train) < 2:
            raise InputError(
                f"data.source {config.source}: has {len(train)} image{'s' * (len(train) != 1)}, expected at least 2: "
                "one to train on and one to hold out. Add images"
            )
        count = min(max(1, round(len(train) * config.validation_share)), len(train) - 1)
        order = np.random.default_rng(0).permutation(len(train))
        notice = f"{count} of {len(order)} training images are held out as `val`"
        if "val" in held_out:
            notice += f", replacing {len(held_out['val']):,} without labels"
        why = "no `val` or `test` split" + (" with labels" if held_out else "")
        source.notices.append(f"{why}: {notice}")
        held_out["val"] = train.take(np.sort(order[:count]))
        train = train.take(np.sort(order[count:]))
    if config.num_images is not None and config.num_images < len(train):
        train = train.take(np.sort(np.random.default_rng(1).permutation(len(train))[: config.num_images]))
    source.splits = {"train": train, **held_out}


def _report_bad(bad: list[str], source: Source, config: DataConfig) -> None:
    if bad and config.on_bad_image == "error":
        raise InputError(
            f"data.source {config.source}: {len(bad)} unreadable image{'s' * (len(bad) != 1)}: {some_of(bad)}. "
            "Fix or remove them, or set data.on_bad_image=skip"
        )
    if bad:
        source.notices.append(f"{len(bad)} unreadable images are skipped: {some_of(bad)}")


def _value_notices(values: dict[str, UsedValues], config: DataConfig) -> list[str]:
    """Warnings about unusual value ranges.

    Raises:
        InputError: `data.value_range` must be set: floats outside 0 to 1, or integers that would all be one shade.
    """
    notices = []
    for kind, used in values.items():
        low, high = config.value_range or used.type_range
        found = f"{used.images:,} images have {kind} values from {used.low:g} to {used.high:g}"
        own_range = f"data.value_range=[{used.low:g}, {used.high:g}]"
        remedy = f"Set {own_range}, or the full range that they are meant for"
        if config.value_range is None and used.outside(None):
            raise InputError(f"data.source {config.source}: {found}, expected floats from 0 to 1. {remedy}")
        if used.one_shade(config.value_range):
            raise InputError(
                f"data.source {config.source}: {found}, which is a single shade in the range {low:g} to {high:g}. "
                f"{remedy}"
            )
        if used.low == used.high and len(values) == 1 and used.images > 1:
            notices.append(f"all {used.images:,} images only have the value {used.low:g}: they all look the same")
        elif used.low_contrast(config.value_range):
            notices.append(
                f"{found}, a small part of the range {low:g} to {high:g}: they will look dark, bright or flat. If they "
                f"are meant for another range, set {own_range}"
            )
        elif used.outside(config.value_range):
            notices.append(f"{found}; those outside data.value_range=[{low:g}, {high:g}] are clipped")
        if used.not_finite:
            notices.append(f"{used.not_finite:,} images have NaN or infinite values: NaN becomes black")
    return notices


def _mode_notices(modes: Counter[str], channels: int) -> list[str]:
    total = sum(modes.values())
    grey = sum(count for mode, count in modes.items() if is_grey(mode))
    if channels > 1 and grey:
        return [f"{grey} of {total} images are grey and are copied to all colours (data.channels={channels})"]
    if channels == 1 and grey < total:
        return [f"{total - grey} of {total} images have colour and are converted to grey (data.channels=1)"]
    return []
