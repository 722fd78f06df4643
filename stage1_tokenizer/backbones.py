"""Backbones: the encoder and the decoder around a bottleneck.

Axes: B images, C channels, H and W pixels, h and w cells of the latent grid.
"""

import itertools
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from core.config import Count, Section, Size
from core.errors import InputError

__all__ = ["BackboneConfig", "ConvConfig", "MLPConfig", "build_backbone", "grid_of"]


class MLPConfig(Section):
    """Fully connected layers with ReLU: 784-400-20 is ``hidden_sizes: [400]`` with 20 latent channels."""

    type: Literal["mlp"] = "mlp"
    hidden_sizes: list[Count] = Field(default=[400], min_length=1)
    """Widths from the image to the latent; the decoder mirrors them."""


class ConvConfig(Section):
    """Residual blocks at halving resolutions (alias in other projects: `ch`, `ch_mult`)."""

    type: Literal["conv"] = "conv"
    channels: Count = 64
    """Width that ``channel_mult`` multiplies."""
    channel_mult: list[Count] = Field(default=[1, 2, 2], min_length=1)
    """One number a resolution, the full one first: n numbers reduce each side by 2^(n-1)."""
    num_res_blocks: list[Size] = Field(default=[0, 0, 2])
    """Residual blocks at each of these resolutions; few at the full one is what makes a tokenizer cheap."""

    @model_validator(mode="after")
    def _same_length(self) -> "ConvConfig":
        if len(self.channel_mult) != len(self.num_res_blocks):
            raise ValueError(
                f"channel_mult {self.channel_mult} and num_res_blocks {self.num_res_blocks} must be equally long"
            )
        return self

    @property
    def factor(self) -> int:
        """Pixels a cell, along a side."""
        return 2 ** (len(self.channel_mult) - 1)


BackboneConfig = Annotated[MLPConfig | ConvConfig, Field(discriminator="type")]


def grid_of(config: MLPConfig | ConvConfig, size: tuple[int, int]) -> tuple[int, int]:
    """The latent grid (h, w) of images of ``size``.

    Raises:
        InputError: the sides cannot be halved as often as the backbone does.
    """
    if isinstance(config, MLPConfig):
        return (1, 1)
    if any(side % config.factor for side in size):
        raise InputError(
            f"data.image_size {size[0]}x{size[1]}: model.backbone.channel_mult {config.channel_mult} halves each side "
            f"{len(config.channel_mult) - 1} times, so both must be multiples of {config.factor}; "
            f"try {' x '.join(str(max(1, round(side / config.factor)) * config.factor) for side in size)}"
        )
    return (size[0] // config.factor, size[1] // config.factor)


def build_backbone(
    config: MLPConfig | ConvConfig, channels: int, size: tuple[int, int], encoded_channels: int, latent_channels: int
) -> tuple[nn.Module, nn.Module]:
    """An encoder (B, C, H, W) -> (B, encoded_channels, h, w) and a decoder (B, latent_channels, h, w) -> (B, C, H, W).

    The decoder's last layer is linear: pixels in [-1, 1], or logits for a Bernoulli likelihood.
    """
    if isinstance(config, MLPConfig):
        pixels = channels * size[0] * size[1]
        encoder = _mlp([pixels, *config.hidden_sizes, encoded_channels])
        decoder = _mlp([latent_channels, *reversed(config.hidden_sizes), pixels])
        return (
            nn.Sequential(UnitRange(), nn.Flatten(), encoder, nn.Unflatten(1, (encoded_channels, 1, 1))),
            nn.Sequential(nn.Flatten(), decoder, nn.Unflatten(1, (channels, *size))),
        )
    grid_of(config, size)
    return ConvEncoder(config, channels, encoded_channels), ConvDecoder(config, channels, latent_channels)


class UnitRange(nn.Module):
    """[-1, 1] -> [0, 1], what the classic fully connected autoencoders are fed: a black ground is 0, which learns
    faster than -1 (MNIST after 10 epochs: 2 nats)."""

    def forward(self, images: Tensor) -> Tensor:
        return images.add(1).mul_(0.5)


def _mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), group normalisation (He et al. 2016, pre-activation)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0)
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


class ConvEncoder(nn.Module):
    """Full resolution first; each halving is one strided convolution."""

    def __init__(self, config: ConvConfig, channels: int, encoded_channels: int) -> None:
        super().__init__()
        widths = [config.channels * mult for mult in config.channel_mult]
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1)]
        for level, (width, blocks) in enumerate(zip(widths, config.num_res_blocks, strict=True)):
            if level:
                layers += [nn.SiLU(), nn.Conv2d(widths[level - 1], width, 4, stride=2, padding=1)]
            layers += [ResBlock(width) for _ in range(blocks)]
        layers += [nn.SiLU(), nn.Conv2d(widths[-1], encoded_channels, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)  # (B, encoded_channels, h, w)


class ConvDecoder(nn.Module):
    """The encoder's mirror; each doubling is one transposed convolution whose stride divides its kernel."""

    def __init__(self, config: ConvConfig, channels: int, latent_channels: int) -> None:
        super().__init__()
        widths = [config.channels * mult for mult in config.channel_mult]
        layers: list[nn.Module] = [nn.Conv2d(latent_channels, widths[-1], 3, padding=1)]
        for level in reversed(range(len(widths))):
            layers += [ResBlock(widths[level]) for _ in range(config.num_res_blocks[level])]
            layers.append(nn.SiLU())
            if level:
                layers.append(nn.ConvTranspose2d(widths[level], widths[level - 1], 4, stride=2, padding=1))
        layers.append(nn.Conv2d(widths[0], channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)  # (B, C, H, W)
