"""Modules with shapes, but without memory or values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["unallocated"]


class _NoInitialization(TorchFunctionMode):
    """Leave initial values out: random ones on the `meta` device import torch's compiler, which takes 2 seconds."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextmanager
def unallocated() -> Iterator[None]:
    """Modules built inside are on the `meta` device, with undefined values."""
    with torch.device("meta"), _NoInitialization():
        yield
