"""Modules with shapes, but without memory or values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["unallocated"]


SMALL = 4096
"""The length of a range that is allocated: tables of up to its square follow from it."""


class _WithoutCompiler(TorchFunctionMode):
    """Leave initial values out, and compute small tables: random numbers and arithmetic on the `meta` device import
    torch's compiler, which takes 2 seconds."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        if func is torch.arange and len(args) == 1 and args[0] <= SMALL:
            kwargs = {"device": "cpu", **kwargs}
        return func(*args, **kwargs)


@contextmanager
def unallocated() -> Iterator[None]:
    """Modules built inside have no weights in memory: those are on the `meta` device."""
    with torch.device("meta"), _WithoutCompiler():
        yield
