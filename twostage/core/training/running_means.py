"""Means of the training metrics between two lines of metrics.jsonl. They stay on the device: reading them in every step
would make the step wait."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Means", "RunningMeans"]

_ROWS = ("sum of finite values", "count of finite values", "count of others", "first step of others + 1, or 0")


@dataclass
class Means:
    """The metrics that all processes recorded since the last :meth:`RunningMeans.take`."""

    values: dict[str, float]
    """The mean of the finite values by name; nan if there were none."""
    first_broken: dict[str, int]
    """The first step with a value that was not finite, only for names with such a step."""
    num_broken: dict[str, int]
    """The number of values that were not finite by name, the maximum over the processes."""


class RunningMeans:
    """Sums, counts and the first broken step of scalars by name."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, ...], Tensor] = {}  # by names recorded together: (4, names), see _ROWS

    def begins(self, metrics: dict[str, Tensor]) -> bool:
        """Whether a new term begins: these names overlap with, but differ from, a set that was recorded before."""
        return tuple(metrics) not in self._parts and any(set(metrics) & set(names) for names in self._parts)

    def add(self, metrics: dict[str, Tensor], step: int) -> None:
        """Adds scalars."""
        values = torch.stack([value.detach() for value in metrics.values()]).float()
        part = self._parts.get(tuple(metrics))
        if part is None:
            part = self._parts[tuple(metrics)] = values.new_zeros(len(_ROWS), len(values))
        finite = values.isfinite()
        part[0] += torch.where(finite, values, 0.0)
        part[1] += finite
        part[2] += ~finite
        part[3].masked_fill_(~finite & (part[3] == 0), step + 1)

    def take(self, gather: Callable[[Tensor], Tensor]) -> Means:
        """Returns the means, and starts over.

        Args:
            gather: (4, names) from each process -> (processes, 4, names).
        """
        names = [name for part in self._parts for name in part]
        if not names:
            return Means({}, {}, {})
        every = gather(torch.cat(list(self._parts.values()), 1)).cpu()
        self._parts = {}
        sums, counts = every[:, 0].sum(0), every[:, 1].sum(0)
        first = torch.where(every[:, 3] > 0, every[:, 3] - 1, torch.inf).amin(0).tolist()
        many = every[:, 2].amax(0).tolist()
        return Means(
            values=dict(zip(names, (sums / counts).tolist(), strict=True)),
            first_broken={name: int(step) for name, step in zip(names, first, strict=True) if step < torch.inf},
            num_broken={name: int(count) for name, count in zip(names, many, strict=True) if count},
        )

    def state(self, gather: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The state for :meth:`restore`: each process's part by position and names, (processes, 4, names)."""
        return {f"{i:03d} {' '.join(names)}": gather(part) for i, (names, part) in enumerate(self._parts.items())}

    def restore(self, state: dict[str, Tensor], process: int, processes: int) -> None:
        """The inverse of :meth:`state`. If the number of processes has changed, the first one takes all parts, weighted
        like its own later values."""
        for place, parts in sorted(state.items()):
            if len(parts) == processes:
                part = parts[process]
            else:
                sums = parts[:, :2].sum(0) * (processes / len(parts))
                part = torch.cat([sums, parts[:, 2:].amax(0)]) * (process == 0)
            self._parts[tuple(place.split()[1:])] = part
