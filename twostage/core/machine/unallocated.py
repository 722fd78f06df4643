"""Modules with shapes, but without memory or values."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["unallocated"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

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


def unallocated(build: Callable[[], ModuleT]) -> ModuleT:
    """The module that ``build`` returns, without weights in memory: those are on the `meta` device."""
    try:
        with torch.device("meta"), _WithoutCompiler():
            return build()
    except RuntimeError:  # it computes with ranges and other tensors
        with torch.device("meta"):
            return build()
