"""The interface of every backbone, and the layers that several share.

Axes: B images, C channels, H and W pixels, h and w cells of the latent grid.
"""

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from twostage.core.config.registry import OpenUnion
from twostage.core.config.sections import Section

__all__ = ["ACTIVATIONS", "Activation", "BackboneConfig", "Networks", "ResBlock", "group_norm", "shifted"]

Activation = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "tanh"]
ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
"""torch's module for each activation, with torch's own settings, such as a slope of 0.01 for `leaky_relu`."""
Networks = tuple[nn.Module, nn.Module]
"""The encoder and the decoder."""


class BackboneConfig(OpenUnion, Section):
    """The group `model.backbone`; its `type` selects the encoder and the decoder."""

    fully_connected: ClassVar[bool] = False
    """Whether each weight is used once per image. On a CPU, such a network is not faster in bf16, which
    `mixed_precision: auto` then does not choose, nor with many threads if it is small."""

    @property
    def factor(self) -> int:
        """Pixels per cell along each side. Images are padded to a multiple of it, and cropped back."""
        raise NotImplementedError

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The latent grid (h, w) of images of ``image_size`` (H, W)."""
        return (math.ceil(image_size[0] / self.factor), math.ceil(image_size[1] / self.factor))

    def build(self, image_shape: tuple[int, int, int], encoded_channels: int, latent_channels: int) -> Networks:
        """An encoder: images (B, C, H, W) -> (B, encoded_channels, h, w); and a decoder: (B, latent_channels, h, w) ->
        images (B, C, H, W).

        The decoder's last layer is linear: pixels in [-1, 1], or logits for a Bernoulli likelihood.

        For `model.condition`, the ``forward`` of both also takes ``shift``, which it adds to the output of the first
        layer (a `Linear` or a `Conv2d`) by :func:`shifted`: (B, c), or (B, c, h, w) for maps; None by default.

        Args:
            image_shape: (C, H, W); H and W are multiples of ``factor``.
        """
        raise NotImplementedError


class ResBlock(nn.Module):
    """shortcut(x) + conv(act(norm(conv(act(norm(x)))))), (B, inputs, H, W) -> (B, outputs, H, W) (He et al. 2016,
    pre-activation). The shortcut is a 1x1 convolution if the widths differ.

    Args:
        norm: makes the normalisation of a number of channels.
    """

    def __init__(
        self, inputs: int, outputs: int, norm: Callable[[int], nn.Module], activation: Activation = "silu"
    ) -> None:
        super().__init__()
        self.act = ACTIVATIONS[activation]()
        self.norm1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.act(self.norm1(x)))
        return self.shortcut(x) + self.conv2(self.act(self.norm2(y)))


def shifted(features: Tensor, shift: Tensor | None) -> Tensor:
    """``features`` (B, c, ...) plus ``shift``: (B, c) in every cell, or (B, c, h, w) enlarged to their size; None:
    unchanged."""
    if shift is None:
        return features
    shift = shift.to(features.dtype)
    if features.ndim == 2:
        return features + shift.flatten(1)
    if shift.ndim == 2:
        return features + shift[..., None, None]
    return features + F.interpolate(shift, features.shape[2:])


def group_norm(channels: int, group_channels: int = 4) -> nn.GroupNorm:
    """Group normalisation with at most 32 groups of at least ``group_channels``; one group for few channels."""
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and (channels >= group_channels * g or g == 1))
    return nn.GroupNorm(groups, channels)
