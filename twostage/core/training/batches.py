"""The order in which training reads its data."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from twostage.core.errors import InputError
from twostage.core.machine.overlap import read_ahead
from twostage.core.training.random import BatchRandom, seed_for
from twostage.core.training.train_config import TrainConfig

__all__ = ["Batches"]

DataT = TypeVar("DataT")


class Batches:
    """The data order as a pure function of the step: nothing to save, and the same for any number of processes.

    Args:
        num_samples: size of the training split.
        what: what messages call the samples (`images`, `code grids`).

    Raises:
        InputError: fewer samples than one batch, or a batch that the processes cannot split equally.
    """

    def __init__(self, num_samples: int, train: TrainConfig, seed: int, accelerator: Accelerator, what: str) -> None:
        parts = accelerator.num_processes * train.gradient_accumulation_steps
        if num_samples < train.batch_size:
            raise InputError(
                f"train.batch_size {train.batch_size}: the training split only has {num_samples} {what}. Set "
                f"train.batch_size to at most {num_samples}"
            )
        if train.batch_size % parts:
            raise InputError(
                f"train.batch_size {train.batch_size}: cannot be split equally over {accelerator.num_processes} "
                f"processes x {train.gradient_accumulation_steps} train.gradient_accumulation_steps. Set it to a "
                f"multiple of {parts}"
            )
        self.num_samples, self.batch_size, self.seed = num_samples, train.batch_size, seed
        self.steps_per_epoch = num_samples // train.batch_size
        self.max_steps = train.max_steps or (train.epochs or 0) * self.steps_per_epoch
        size = train.batch_size // parts
        index, total = accelerator.process_index, accelerator.num_processes
        starts = [(part * total + index) * size for part in range(train.gradient_accumulation_steps)]
        self._slices = [slice(start, start + size) for start in starts]  # of this process in the global batch
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def rows(self, step: int) -> Tensor:
        """The rows of the training split that make up the global batch of ``step``, (batch_size,) int64."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = np.random.default_rng(seed_for(self.seed, "order", epoch)).permutation(self.num_samples)
            self._epoch, self._order = epoch, torch.from_numpy(order)
        return self._order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def at(self, step: int, read: Callable[[Tensor], DataT]) -> list[tuple[DataT, BatchRandom]]:
        """This process's parts of the batch of ``step``, each with its data and its random numbers."""
        rows, seed = self.rows(step), seed_for(self.seed, "step", step)
        return [(read(rows[part]), BatchRandom(seed, part, self.batch_size)) for part in self._slices]

    def read_ahead(self, start: int, read: Callable[[Tensor], DataT]) -> Iterator[list[tuple[DataT, BatchRandom]]]:
        """:meth:`at` from ``start`` to the last step; a thread reads each batch during the step before."""
        return (batch for _, batch in read_ahead(range(start, self.max_steps), lambda step: self.at(step, read)))
