"""Share a measurement between processes. Its figures depend neither on the batches nor on the number of processes.

Axes: n rows (images or code grids), B of them in a batch.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from twostage.core.data.image_data import ImageSplit
from twostage.core.machine.overlap import read_ahead
from twostage.core.machine.processes import join_processes
from twostage.core.machine.progress import ProgressBar
from twostage.core.training.random import BatchRandom, seed_for

__all__ = ["RowDigests", "RowRandom", "SharedWork"]

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class SharedWork:
    """The processes that measure together, and the size of the batches that they share out."""

    batch_size: int = 64
    state: PartialState = field(default_factory=join_processes)

    @property
    def device(self) -> torch.device:
        """The device on which this process runs the models."""
        return torch.device(self.state.device or "cpu")

    @property
    def float64_device(self) -> torch.device:
        """The same device, or the CPU instead of MPS, because MPS has no float64."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def batches(self, count: int, name: str) -> ProgressBar:
        """This process's batches of the places 0 to count - 1, each (B,) int64, behind a progress bar."""
        return ProgressBar(
            self.share(torch.arange(count).split(self.batch_size)),
            desc=name,
            unit="batch",
            disable=not self.state.is_main_process,
            leave=False,
        )

    def read(self, split: ImageSplit, rows: Tensor, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's batches of the images ``rows`` of a split: their places (B,) among the rows, and their pixels
        (B, C, H, W). Those that are not in memory are read in a thread, one batch ahead."""
        batches = self.batches(len(rows), name)
        return read_ahead(batches, lambda places: split.read(rows[places]), in_thread=not split.in_memory)

    def share(self, items: Sequence[ItemT]) -> Sequence[ItemT]:
        """The items that this process works on: every nth of them, for n processes."""
        return items[self.state.process_index :: self.state.num_processes]

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes, on the tensor's own device."""
        if self.state.num_processes == 1:
            return tensor
        summed = reduce(tensor.to(self.device), "sum")
        assert isinstance(summed, Tensor)
        return summed.to(tensor.device)


class RowDigests:
    """The sha256 of each of ``count`` images or code grids, collected batch by batch."""

    def __init__(self, count: int) -> None:
        self._digests = torch.zeros(count, 32, dtype=torch.uint8)

    def update(self, places: Tensor, rows: Tensor) -> None:
        """Adds the rows (B, ...), on the CPU, at the ``places`` (B,) that they have among all rows."""
        digests = b"".join(hashlib.sha256(row.numpy().tobytes()).digest() for row in rows)
        self._digests[places] = torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(-1, 32)

    def gather(self, work: SharedWork) -> None:
        """Combines what the processes collected."""
        self._digests = work.total(self._digests)

    @property
    def sha256(self) -> str:
        """The sha256 of all digests in the order of the rows, in hexadecimal."""
        return hashlib.sha256(self._digests.numpy().tobytes()).hexdigest()

    @property
    def values(self) -> list[bytes]:
        """The digest of each row."""
        return [bytes(digest) for digest in self._digests.numpy()]

    @property
    def distinct(self) -> int:
        """The number of different rows."""
        return len(set(self.values))

    @property
    def duplicates(self) -> int:
        """The number of rows that repeat an earlier one."""
        return len(self._digests) - self.distinct


class RowRandom(BatchRandom):
    """Random draws that belong to the ``rows`` (B,) of a split, whatever batch or process they are in. They are drawn
    on the CPU, so they are the same on every device."""

    def __init__(self, seed: int, rows: Tensor) -> None:
        super().__init__(seed, slice(0, len(rows)), len(rows))
        self._rows = rows.tolist()

    def uniform(self, purpose: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Uniform draws in [0, 1), (rows, *shape) float32."""
        return self._stack(torch.rand, purpose, shape, device)

    def normal(self, purpose: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Standard normal draws, (rows, *shape) float32."""
        return self._stack(torch.randn, purpose, shape, device)

    def _stack(self, draw: Callable[..., Tensor], purpose: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        seeds = [seed_for(self.seed, purpose, row) for row in self._rows]
        return torch.stack([draw(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(device)
