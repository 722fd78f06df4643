"""Which rows of a split are shown or measured where not all of them are: spread over it, and over its classes."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["spread", "spread_over_classes"]


def spread(total: int, wanted: int | None) -> Tensor:
    """Every row of ``total``, or ``wanted`` of them at equal distances, (n,) int64: a split may be sorted by class."""
    count = min(wanted or total, total)
    return torch.arange(count) * total // count


def _evenly(rows: Tensor, count: int) -> Tensor:
    return rows[spread(len(rows), count)] if count else rows[:0]


def spread_over_classes(
    labels: Tensor | None, total: int, count: int, choose: Callable[[Tensor, int], Tensor] = _evenly
) -> Tensor:
    """At most ``count`` rows of a split: equally many of each class where it has them, the classes in turn.

    The same labels always give the same rows. With more classes than ``count``, the classes are spread evenly too.

    Args:
        labels: (total,) int64; None: the rows are one class.
        total: rows of the split.
        choose: gives the wanted number of one class's rows, (n,) int64 in ascending order; by default spread evenly.

    Returns:
        (min(count, total),) int64.
    """
    labels = torch.zeros(total, dtype=torch.long) if labels is None else labels
    sizes = labels.unique(return_counts=True)[1].tolist()
    groups = list(labels.argsort(stable=True).split(sizes))
    if len(groups) > count:
        groups = [groups[i] for i in spread(len(groups), count).tolist()]
    wanted = [0] * len(groups)
    left = min(count, sum(map(len, groups)))
    while left:  # a small class leaves its share to the others
        for i, group in enumerate(groups):
            if left and wanted[i] < len(group):
                wanted[i] += 1
                left -= 1
    chosen = [choose(group, share) for group, share in zip(groups, wanted, strict=True)]
    turns = [rows[turn] for turn in range(max(wanted, default=0)) for rows in chosen if turn < len(rows)]
    return torch.stack(turns) if turns else torch.empty(0, dtype=torch.long)
