"""Measure the memory of a step, and check that a configuration can fit on this machine."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from twostage.core.errors import InputError
from twostage.core.machine.unallocated import unallocated

__all__ = ["MEASURED_BY", "check_bytes", "check_model", "peak_memory"]

MEASURED_BY = {
    "cpu": "tensors alive at once in one step, without the memory of kernels and libraries",
    "gpu": "torch.accelerator.max_memory_allocated in one step",
}
"""Descriptions of the result of :func:`peak_memory` on a CPU and on other devices."""
TRAINING_COPIES = 4
"""Float32 copies of the weights in training: the weights, the gradient and Adam's two moments."""
MIN_LARGE = 128
"""A message about a large model names settings from this value on."""


class _LiveTensors(TorchDispatchMode):
    """The memory of the tensors that operations read or create, tracked from first use to deletion."""

    def __init__(self) -> None:
        super().__init__()
        self.existing = self.created = self.max_created = 0  # bytes
        self._tracked: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._tracked:
                self._track(storage)
                self.existing += storage.nbytes()
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in self._tracked:
                self._track(storage, created=storage.nbytes())
        return out

    def _track(self, storage: torch.UntypedStorage, created: int = 0) -> None:
        self._tracked.add(storage._cdata)
        self.created += created
        self.max_created = max(self.max_created, self.created)
        weakref.finalize(storage, self._forget, storage._cdata, created).atexit = False

    def _forget(self, address: int, created: int) -> None:
        self._tracked.discard(address)
        self.created -= created


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """The storages of all tensors in ``values``; oneDNN's packed weights have none."""
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.layout == torch.strided)
    return (tensor.untyped_storage() for tensor in tensors)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yield a function that returns, after the block, the peak bytes of tensors on ``device``, including older tensors.

    On a CPU it counts the tensors that the block's operations read or create.
    """
    if device.type == "cpu":
        with _LiveTensors() as tensors:
            yield lambda: tensors.existing + tensors.max_created
    else:
        torch.accelerator.reset_peak_memory_stats(device)
        yield lambda: torch.accelerator.max_memory_allocated(device)


def check_model(build: Callable[[], nn.Module], settings: dict[str, Any], name: str, device: torch.device,
                processes: int = 1) -> None:  # fmt: skip
    """Count the weights of the model that ``build`` returns, without allocating them, and check that training fits.

    Args:
        settings: the group ``name`` of the configuration, nested.
        processes: how many processes share the weights.

    Raises:
        InputError: training does not fit in memory; names the settings that make the model large.
    """
    try:
        count = sum(p.numel() for p in unallocated(build).parameters())
    except (RuntimeError, OverflowError, TypeError):  # too large even for a tensor's shape
        count = 2**62
    check_bytes(4 * TRAINING_COPIES * count // processes, f"{count:,} weights", _large_settings(settings, name), device)


def check_bytes(needed: int, what: str, settings: list[str], device: torch.device) -> None:
    """Check that the device has ``needed`` bytes.

    Raises:
        InputError: it has fewer; the message names ``settings``.
    """
    available = (
        torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else psutil.virtual_memory().total
    )
    if needed > available:
        raise InputError(
            f"{', '.join(settings)}: {what} would need {needed / 2**30:,.1f} GiB in training, expected at most "
            f"{available / 2**30:.1f} GiB. Set smaller values"
        )


def _large_settings(settings: dict[str, Any], prefix: str) -> list[str]:
    """`name value` of each number from MIN_LARGE on, or of all numbers if none is that large."""
    numbers = list(_numbers(settings, prefix).items())
    large = [
        f"{name} {value}" for name, value in numbers if max(value if isinstance(value, list) else [value]) >= MIN_LARGE
    ]
    return large or [f"{name} {value}" for name, value in numbers]


def _numbers(settings: dict[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}.{key}"
        if isinstance(value, dict):
            found |= _numbers(value, name)
        elif type(value) is int or (isinstance(value, list) and value and all(type(v) is int for v in value)):
            found[name] = value
    return found
