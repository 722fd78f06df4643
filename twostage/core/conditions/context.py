"""What a prior's network sees of the conditions of its images.

Axes: B images, N = h w cells of a grid, L places of a sequence, D the width of the network's contexts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce

import torch
from torch import Tensor

from twostage.core.errors import InputError

__all__ = ["Context", "ContextForm", "ContextSpace", "join_contexts", "merge_contexts"]


@dataclass(frozen=True)
class ContextSpace:
    """The vectors that a network wants for its contexts."""

    width: int
    """D."""
    std: float
    """The standard deviation of their numbers before training."""
    grid: tuple[int, int]
    """The cells (h, w) of the code grid."""


@dataclass(frozen=True)
class ContextForm:
    """The parts that a prior's contexts have, so that a network builds layers for them only."""

    num_classes: int = 0
    """Labels are 0 to ``num_classes``; the last one means "no class"."""
    pooled: bool = False
    """One vector for each image."""
    cells: bool = False
    """One vector for each cell."""
    sequence: int = 0
    """The places L of a sequence to attend to; 0: there is none."""


@dataclass(frozen=True)
class Context:
    """What the conditions say about B images; parts that no condition has are None."""

    size: int
    """B."""
    labels: Tensor | None = None
    """(B,) int64: the network holds a vector for each. None: no image has a class."""
    pooled: Tensor | None = None
    """(B, D): added at every cell, or in every gate."""
    cells: Tensor | None = None
    """(B, N, D), row by row: the same for one cell."""
    sequence: Tensor | None = None
    """(B, L, D): attended to from every cell."""
    present: Tensor | None = None
    """(B, L) bool: False where the sequence has ended. Such places are never attended to."""

    def class_numbers(self, no_class: int, device: torch.device) -> Tensor:
        """The labels (B,), ``no_class`` for all images if none has a class."""
        return torch.full((self.size,), no_class, device=device) if self.labels is None else self.labels

    def rows(self, rows: Tensor | slice) -> "Context":
        """The context of some of the images, by their numbers."""
        size = len(range(self.size)[rows]) if isinstance(rows, slice) else len(rows)
        return self._with(size, lambda part: part[rows])

    def split(self, size: int) -> "list[Context]":
        """The contexts of ``size`` images each; the last one may have fewer."""
        return [self.rows(slice(start, start + size)) for start in range(0, self.size, size)]

    def in_order(self, order: Tensor) -> "Context":
        """The same with its cells in the ``order`` (N,) in which they are written."""
        return self if self.cells is None else replace(self, cells=self.cells[:, order])

    def added(self) -> Tensor | None:
        """What is added at the cells: (B, N, D), (B, 1, D) if it is the same everywhere, or None."""
        if self.cells is None:
            return None if self.pooled is None else self.pooled[:, None]
        return self.cells if self.pooled is None else self.cells + self.pooled[:, None]

    def _with(self, size: int, change: Callable[[Tensor], Tensor]) -> "Context":
        parts = (getattr(self, field.name) for field in fields(self)[1:])
        return Context(size, *(None if part is None else change(part) for part in parts))


def join_contexts(contexts: Sequence[Context]) -> Context:
    """The contexts of several groups of images, which have the same parts, as that of all of them in turn."""

    def joined(name: str) -> Tensor | None:
        parts = [getattr(context, name) for context in contexts]
        return None if parts[0] is None else torch.cat(parts)

    size = sum(context.size for context in contexts)
    return Context(size, *(joined(field.name) for field in fields(Context)[1:]))


def merge_contexts(size: int, contexts: Sequence[Context]) -> Context:
    """What several conditions say about the same ``size`` images: vectors are added, sequences follow each other."""

    def only(name: str) -> Tensor | None:
        return next((part for context in contexts if (part := getattr(context, name)) is not None), None)

    def total(name: str) -> Tensor | None:
        parts: list[Tensor] = [part for context in contexts if (part := getattr(context, name)) is not None]
        return reduce(torch.add, parts) if parts else None

    sequences = [context for context in contexts if context.sequence is not None]
    if any(context.size != size for context in contexts):
        raise InputError(f"conditions of {[context.size for context in contexts]} images: expected {size} of each")
    return Context(
        size,
        only("labels"),
        total("pooled"),
        total("cells"),
        torch.cat([context.sequence for context in sequences], 1) if sequences else None,  # type: ignore[misc]
        torch.cat([context.present for context in sequences], 1) if sequences else None,  # type: ignore[misc]
    )
