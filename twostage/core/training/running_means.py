"""Means of a training's metrics between two lines of metrics.jsonl, kept on the device: looking at them in every step
would make the step wait."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Means", "RunningMeans"]

_ROWS = ("sum of what was finite", "how many were", "how many were not", "first step of those + 1, or 0")


@dataclass
class Means:
    """What was recorded since the last time, over all processes."""

    values: dict[str, float]
    """The mean of what was finite; nan where nothing was."""
    first_broken: dict[str, int]
    """By name: the first step whose value was not finite, for those that had one."""
    num_broken: dict[str, int]
    """By name: how many values of a process were not finite; the most of any process."""


class RunningMeans:
    """Sums, counts and the first broken step of scalars by name, some names at a time."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, ...], Tensor] = {}  # (4, names): what _ROWS says

    def begins(self, metrics: dict[str, Tensor]) -> bool:
        """Whether these names are of another set than those recorded so far, because a term begins here."""
        return tuple(metrics) not in self._parts and any(set(metrics) & set(names) for names in self._parts)

    def add(self, metrics: dict[str, Tensor], step: int) -> None:
        """Takes scalars."""
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
        """The means, and begins anew.

        Args:
            gather: (4, names) of this process -> (processes, 4, names).
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
        """What :meth:`restore` takes: by place and names, each process's part, (processes, 4, names)."""
        return {f"{i:03d} {' '.join(names)}": gather(part) for i, (names, part) in enumerate(self._parts.items())}

    def restore(self, state: dict[str, Tensor], process: int, processes: int) -> None:
        """The inverse of :meth:`state`; the first process takes all where their number is another, with the weight that
        its own later values have."""
        for place, parts in sorted(state.items()):
            if len(parts) == processes:
                part = parts[process]
            else:
                sums = parts[:, :2].sum(0) * (processes / len(parts))
                part = torch.cat([sums, parts[:, 2:].amax(0)]) * (process == 0)
            self._parts[tuple(place.split()[1:])] = part
