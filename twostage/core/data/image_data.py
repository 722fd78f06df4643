"""Images by split and row, as uint8 or uint16 batches: in memory, or decoded on demand in threads."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from twostage.core.data.captioned_shapes import MAP_NAMES
from twostage.core.data.data_config import DataConfig
from twostage.core.data.decoding import Findings, decode
from twostage.core.data.records import Captions, Records
from twostage.core.data.sources import find_local
from twostage.core.data.spread import names_without_images, spread
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_float
from twostage.core.images.map_colours import maps_as_images
from twostage.core.images.pixel_values import UsedValues
from twostage.core.runs.contents import Contents

__all__ = ["ImageData", "ImageSplit", "check_readable"]


class ImageSplit(Dataset[tuple[Tensor, int]]):
    """The images of one split, a dataset for a `DataLoader`.

    ``split[i]`` is an image (C, H, W) in [-1, 1] and its class, -1 for none. ``split[:100]`` is (100, C, H, W) images
    and (100,) classes.

    Args:
        labels: (n,) int64, or None.
        pixels: (n, C, H, W) uint8 or uint16; None: ``records`` are decoded on demand.
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

    @property
    def bits(self) -> int:
        """Those of a pixel's channel: 8, or 16 if the images need them."""
        if self.config.train_on == "maps" and self.map_form is not None:
            return 8
        if self.pixels is not None:
            return 16 if self.pixels.dtype == torch.uint16 else 8
        return self.config.bits or 8

    def read(self, rows: Tensor) -> Tensor:
        """(len(rows), C, H, W) uint8 or uint16; maps as images (uint8), if they are what is trained on."""
        if self.config.train_on == "maps" and (maps := self.read_maps(rows)) is not None:
            return maps_as_images(maps, self.config.channels)
        if self.pixels is not None:
            return self.pixels[rows]
        assert self.records is not None
        form = (len(rows), self.config.channels, *self.config.size)
        out = np.empty(form, dtype=np.uint8 if self.bits == 8 else np.uint16)
        check_readable(self.records, decode(self.records, rows.tolist(), out, self.config.value_range))
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
        check_readable(maps, decode(maps, rows.tolist(), out, None, classes))
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
    def map_names(self) -> tuple[str, ...]:
        """The names of the classes of maps, from class 0 on; empty if they are not known."""
        config = self.validation.config
        return tuple(MAP_NAMES) if config.source == "captioned_shapes" else config.map_names or ()

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

    def contents(self, captions: bool = False) -> Contents:
        """The content that `data.source` refers to; with its ``captions`` for a model that sees them."""
        place = find_local(self.validation.config.source)
        facts = self.identity() | ({"captions": self._captions_hash()} if captions else {})
        return Contents("images", None if place is None else place.absolute(), facts)

    def _captions_hash(self) -> str:
        digest = hashlib.sha256()
        for name, split in self.splits.items():
            digest.update(f"{name} {len(split)}\n".encode())
            for texts in split.captions or []:
                digest.update("\0".join([*texts, "\n"]).encode())
        return digest.hexdigest()

    @property
    def validation_name(self) -> str:
        """The split for validation: `val` if there is one, else `test`; if `train` has labels, one with labels."""
        labels, held_out = self.splits["train"].labels, [name for name in ("val", "test") if name in self.splits]
        return next(name for name in held_out if labels is None or self.splits[name].labels is not None)

    @property
    def validation(self) -> ImageSplit:
        return self.splits[self.validation_name]


def check_readable(records: Records, found: Findings) -> None:
    """Refuse to continue with images that have become unreadable."""
    if found.bad:
        row, reason = next(iter(found.bad.items()))
        raise InputError(
            f"{records.names[row]}: was readable when the run started but no longer is ({reason}). Restore "
            "the file, then run the same command again to resume"
        )
