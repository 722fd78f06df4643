"""How much memory tensors take at once."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["MEASURED_BY", "peak_memory"]

MEASURED_BY = {
    "cpu": "tensors alive at once in one step; what kernels and libraries take beside them is not in it",
    "gpu": "torch.accelerator.max_memory_allocated in one step",
}
"""What :func:`peak_memory` returns on a CPU and elsewhere."""


class _LiveTensors(TorchDispatchMode):
    """Follows the memory of the tensors that operations read and make, from their first use to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.there_before = self.made = self.most_made = 0  # bytes
        self._followed: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._followed:
                self._follow(storage)
                self.there_before += storage.nbytes()
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in self._followed:
                self._follow(storage, made=storage.nbytes())
        return out

    def _follow(self, storage: torch.UntypedStorage, made: int = 0) -> None:
        self._followed.add(storage._cdata)
        self.made += made
        self.most_made = max(self.most_made, self.made)
        weakref.finalize(storage, self._forget, storage._cdata, made).atexit = False

    def _forget(self, address: int, made: int) -> None:
        self._followed.discard(address)
        self.made -= made


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """Of all tensors among ``values``; oneDNN's packed weights have none."""
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.layout == torch.strided)
    return (tensor.untyped_storage() for tensor in tensors)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Gives a function that returns, after the block, the most bytes that tensors on ``device`` took within it, those
    included that were there before. On a CPU these are the tensors that the block's operations read or make."""
    if device.type == "cpu":
        with _LiveTensors() as tensors:
            yield lambda: tensors.there_before + tensors.most_made
    else:
        torch.accelerator.reset_peak_memory_stats(device)
        yield lambda: torch.accelerator.max_memory_allocated(device)
