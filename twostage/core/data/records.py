"""The content of `data.source`: the images of each split, not yet decoded."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from twostage.core.images.arrays import OpenedImage

__all__ = ["AUTO", "Captions", "Columns", "Records", "Source"]

AUTO = "auto"
"""The column that is looked for by its usual names."""
Captions = list[tuple[str, ...]]
"""The captions of each image; () for an image without one."""


@dataclass(frozen=True)
class Columns:
    """What to read beside the images; see :class:`twostage.core.data.data_config.DataConfig`."""

    label: str | None = AUTO
    caption: str | None = AUTO
    vector: str | None = None
    maps: str | None = None


@dataclass
class Records:
    """The images of one split, not yet decoded. They can be pickled, for the worker processes of a `DataLoader`."""

    names: list[str]
    """The name of each image in messages."""
    labels: np.ndarray | None
    """(n,) int64."""
    open: Callable[[int], OpenedImage]
    sizes: Callable[[], np.ndarray]
    """Bytes of each image, (n,) int64; 0 for a missing one."""
    origin: str
    """The beginning of every name: the location, which content hashes ignore."""
    files: list[str] | None = None
    """The file of each image; None if a file holds many images. Texts, because paths take five times the memory."""
    version: str = ""
    """Changes whenever a file that holds many images changes."""
    captions: Captions | None = None
    vectors: np.ndarray | None = None
    """(n, d) float32."""
    maps: "Records | None" = None
    """A map for each image, in the same order."""

    def __len__(self) -> int:
        return len(self.names)

    def state(self) -> str:
        """The sha256 of the names, sizes and times of the files: it changes whenever an image may have changed."""
        digest = hashlib.sha256("\n".join([self.version, *self.names]).encode("utf-8", "surrogatepass"))
        here = Path.cwd()
        for place in self.files or []:
            try:
                stat = os.stat(place)  # noqa: PTH116  # a Path takes three times as long
            except OSError:  # a table can name a missing file
                stat = None
            about = f"|{stat.st_size}|{stat.st_mtime_ns}\n" if stat else "|missing\n"
            digest.update(os.fsencode(os.path.join(here, place)) + about.encode())  # noqa: PTH118
        return digest.hexdigest()

    def take(self, rows: np.ndarray) -> "Records":
        """These rows, in this order."""
        return replace(
            self,
            names=[self.names[row] for row in rows],
            labels=None if self.labels is None else self.labels[rows],
            open=partial(_open_one_of, self.open, rows),
            sizes=partial(_some_sizes, self.sizes, rows),
            files=None if self.files is None else [self.files[row] for row in rows],
            captions=None if self.captions is None else [self.captions[row] for row in rows],
            vectors=None if self.vectors is None else self.vectors[rows],
            maps=None if self.maps is None else self.maps.take(rows),
        )


def _open_one_of(open_row: Callable[[int], OpenedImage], rows: np.ndarray, i: int) -> OpenedImage:
    return open_row(int(rows[i]))


def _some_sizes(sizes: Callable[[], np.ndarray], rows: np.ndarray) -> np.ndarray:
    return sizes()[rows]


@dataclass
class Source:
    """The splits, classes and notices of one `data.source`."""

    description: str
    splits: dict[str, Records]
    class_names: list[str] | None
    notices: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Files that are not images, each with the reason."""
    unmatched_captions: list[str] = field(default_factory=list)
    """Caption files, and rows of metadata files, that belong to no image."""
