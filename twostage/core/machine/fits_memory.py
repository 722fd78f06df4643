"""Whether what a configuration asks for can fit this machine at all: looked at before any of it is made."""

from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import nn

from twostage.core.errors import InputError

__all__ = ["check_bytes", "check_model"]

COPIES = 4
"""Of the weights, while training: themselves, the gradient and Adam's two moments; float32."""
LARGE = 128
"""Settings from here on are named as those that make a model large."""


def check_model(build: Callable[[], nn.Module], settings: dict[str, Any], name: str, device: torch.device,
                processes: int = 1) -> None:  # fmt: skip
    """Counts the weights of what ``build`` returns without making them.

    Args:
        settings: of the group ``name`` of the configuration, nested.
        processes: that share them out.

    Raises:
        InputError: they do not fit, while they are trained; names the settings that make them many.
    """
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in build().parameters())
    except (RuntimeError, OverflowError, TypeError):  # a tensor that cannot even be described
        count = 2**62
    check_bytes(4 * COPIES * count // processes, f"{count:,} weights", _large(settings, name), device)


def check_bytes(needed: int, what: str, settings: list[str], device: torch.device) -> None:
    """Refuses more bytes than the device has.

    Raises:
        InputError: names ``settings``.
    """
    there = (
        torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else psutil.virtual_memory().total
    )
    if needed > there:
        raise InputError(
            f"{', '.join(settings)}: {what} would take {needed / 2**30:,.1f} GiB while training, and there are "
            f"{there / 2**30:.1f} GiB; choose smaller ones"
        )


def _large(settings: dict[str, Any], prefix: str) -> list[str]:
    """`name value` of each number from LARGE on; of all of them where none is."""
    numbers = list(_numbers(settings, prefix).items())
    large = [
        f"{name} {value}" for name, value in numbers if max(value if isinstance(value, list) else [value]) >= LARGE
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
