"""What the maps beside images or codes are."""

from typing import Literal

from twostage.core.config.sections import Count, Section, Size

__all__ = ["MapCodes", "MapForm"]


class MapCodes(Section):
    """The tokenizer that turned maps into codes."""

    hash: str
    """Its content hash."""
    path: str
    """Its folder when it wrote the codes."""
    grid: tuple[Count, Count]
    """The codes (h, w) of a map."""
    codebook_size: Count


class MapForm(Section):
    """What the maps beside the codes are."""

    kind: Literal["labels", "image"]
    channels: Count | None
    """1 or 3 for images; None for labels."""
    classes: list[Size] | None
    """The classes that occur in the maps of the training split, sorted; None for images."""
    names: tuple[str, ...] = ()
    """The names of the classes, from class 0 on; empty if they are not known."""
    codes: MapCodes | None = None
    """None: the maps themselves are stored, not their codes."""
