"""What was found at a `data.source`: the undecoded pictures of each split."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["Records", "Source", "shortened"]


@dataclass
class Records:
    """The undecoded pictures of one split: a name for messages, a label, and how to open each."""

    names: list[str]
    labels: np.ndarray | None  # (n,) int64
    open: Callable[[int], Image.Image]
    sizes: Callable[[], np.ndarray]
    """Bytes of each picture, (n,) int64; 0 for one that is not there."""
    origin: str
    """What the names begin with: where they are, which does not matter to what they are."""
    files: list[Path] | None = None
    """Where each picture has a file of its own."""
    version: str = ""
    """Changes when a file that holds many pictures does."""

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: np.ndarray) -> "Records":
        """Some of them, in that order."""
        return Records(
            [self.names[row] for row in rows],
            None if self.labels is None else self.labels[rows],
            lambda i: self.open(int(rows[i])),
            lambda: self.sizes()[rows],
            self.origin,
            None if self.files is None else [self.files[row] for row in rows],
            self.version,
        )


@dataclass
class Source:
    """What was understood of a `data.source`."""

    description: str
    splits: dict[str, Records]
    class_names: list[str] | None
    notices: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Files that are no pictures, each with the reason."""


def shortened(names: list[str], most: int = 5) -> str:
    """The first of many names."""
    return "; ".join(names[:most]) + (f"; and {len(names) - most:,} more" if len(names) > most else "")
