"""The captions of a split as two arrays, from which single images are read without loading the others.

Axes: n images, b bytes.
"""

from collections.abc import Sequence

import numpy as np

__all__ = ["StoredCaptions"]

_SEPARATOR = "\0"


class StoredCaptions:
    """One or more captions for each image.

    Args:
        text: (b,) uint8: the captions of all images in UTF-8; those of one image are separated by a zero byte.
        starts: (n + 1,) int64: where the captions of each image start, and where the last ones end.
    """

    def __init__(self, text: np.ndarray, starts: np.ndarray) -> None:
        self.text, self.starts = text, starts

    @classmethod
    def pack(cls, captions: Sequence[Sequence[str]]) -> "StoredCaptions":
        """Store the captions of each image, of which there is at least one."""
        parts = [_SEPARATOR.join(texts).encode() for texts in captions]
        starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(parts), dtype=np.uint8), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def read(self, images: Sequence[int]) -> list[tuple[str, ...]]:
        """The captions of these images."""
        return [self._text(image) for image in images]

    def _text(self, image: int) -> tuple[str, ...]:
        part = self.text[self.starts[image] : self.starts[image + 1]]
        return tuple(part.tobytes().decode().split(_SEPARATOR))

    def first_bad(self) -> int | None:
        """The first image whose captions are damaged: not UTF-8, or outside of the text; None if all are intact."""
        backwards = np.flatnonzero(np.diff(self.starts) < 0)
        if len(backwards) or (self.starts[0], self.starts[-1]) != (0, len(self.text)):
            return int(backwards[0]) if len(backwards) else 0
        for image in range(len(self)):
            try:
                self._text(image)
            except UnicodeDecodeError:
                return image
        return None
