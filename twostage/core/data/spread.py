"""Choose the rows of a split to show or measure, and find classes without images."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["names_without_images", "spread", "spread_over_classes"]


def names_without_images(labels: Tensor | np.ndarray | None, class_names: Sequence[str] | None) -> list[str]:
    """The names of classes without any label; [] without labels or names.

    Args:
        labels: (n,) int64.
    """
    if labels is None or class_names is None:
        return []
    counts = np.bincount(np.asarray(labels), minlength=len(class_names))
    return [name for name, count in zip(class_names, counts, strict=True) if not count]


def spread(total: int, wanted: int | None) -> Tensor:
    """``wanted`` rows at equal distances, (n,) int64, because a split may be sorted by class; None: all ``total``."""
    count = min(wanted or total, total)
    return torch.arange(count) * total // count


def _evenly(rows: Tensor, count: int) -> Tensor:
    return rows[spread(len(rows), count)] if count else rows[:0]


def spread_over_classes(
    labels: Tensor | None, total: int, count: int, choose: Callable[[Tensor, int], Tensor] = _evenly
) -> Tensor:
    """At most ``count`` rows of a split, as equally over the classes as possible, cycling through the classes.

    The same labels always give the same rows. If there are more classes than ``count``, evenly spaced classes are used.

    Args:
        labels: (total,) int64; None: all rows belong to one class.
        total: rows of the split.
        choose: picks the wanted number from one class's rows, (n,) int64 in ascending order; by default evenly spaced.

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
    while left:  # what a small class cannot fill goes to the others
        for i, group in enumerate(groups):
            if left and wanted[i] < len(group):
                wanted[i] += 1
                left -= 1
    chosen = [choose(group, share) for group, share in zip(groups, wanted, strict=True)]
    cycled = [rows[i] for i in range(max(wanted, default=0)) for rows in chosen if i < len(rows)]
    return torch.stack(cycled) if cycled else torch.empty(0, dtype=torch.long)
