"""Tensors and networks on the device that computes."""

from typing import Any, Self

import torch
from torch import Tensor, nn

__all__ = ["ConvolutionalNetwork", "copy_to"]

CHANNELS_LAST_DEVICES = ("cuda",)
"""Devices whose convolutions are computed with the channels last in memory. On a CPU, docs/results.md has the times."""


def copy_to(device: torch.device, tensor: Tensor) -> Tensor:
    """``tensor.to(device)``; the host does not wait for a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class ConvolutionalNetwork(nn.Module):
    """A network that keeps its kernels with their channels last on a GPU: there, convolutions would otherwise convert
    images, results and kernels in each call."""

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """``nn.Module.to``."""
        super().to(*args, **kwargs)
        for parameter in self.parameters():
            if parameter.ndim == 4 and parameter.device.type in CHANNELS_LAST_DEVICES:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return self
