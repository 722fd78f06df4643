"""Backbones: the encoder and the decoder around a bottleneck.

Axes: B images, C channels, H and W pixels, h and w cells of the latent grid.
"""

import itertools
import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from stage1_tokenizer.vqgan_backbone import VQGANConfig, VQGANDecoder, VQGANEncoder
from twostage.core.config.sections import Count, Section, Size, Width

__all__ = ["BackboneConfig", "ConvConfig", "MLPConfig", "build_backbone", "factor_of", "grid_of", "group_norm"]


class MLPConfig(Section):
    """Fully connected layers with ReLU: 784-400-20 is ``hidden_sizes: [400]`` with 20 latent channels."""

    type: Literal["mlp"] = "mlp"
    hidden_sizes: list[Width] = Field(default=[400], min_length=1, max_length=64)
    """Widths from the image to the latent; the decoder mirrors them."""


class ConvConfig(Section):
    """Residual blocks at halving resolutions (alias in other projects: `ch`, `ch_mult`)."""

    type: Literal["conv"] = "conv"
    channels: Width = 64
    """Width that ``channel_mult`` multiplies."""
    channel_mult: list[Width] = Field(default=[1, 2, 2], min_length=1, max_length=16)
    """One number a resolution, the full one first: n numbers reduce each side by 2^(n-1)."""
    num_res_blocks: list[Annotated[Size, Field(le=1_024)]] = Field(default=[0, 0, 2])
    """Residual blocks at each of these resolutions; few at the full one is what makes a tokenizer cheap."""

    attention_factors: list[Count] = Field(default=[])
    """Where self-attention follows each residual block: 4 is the resolution of a quarter of the image's sides."""

    @model_validator(mode="after")
    def _consistent(self) -> "ConvConfig":
        if len(self.channel_mult) != len(self.num_res_blocks):
            raise ValueError(
                f"channel_mult {self.channel_mult} and num_res_blocks {self.num_res_blocks} must be equally long"
            )
        factors = [2**level for level in range(len(self.channel_mult))]
        if unknown := [factor for factor in self.attention_factors if factor not in factors]:
            raise ValueError(f"attention_factors {unknown}: expected some of {factors}, the factors of channel_mult")
        return self

    @property
    def factor(self) -> int:
        """Pixels a cell, along a side."""
        return 2 ** (len(self.channel_mult) - 1)


BackboneConfig = Annotated[MLPConfig | ConvConfig | VQGANConfig, Field(discriminator="type")]


def factor_of(config: BackboneConfig) -> int:
    """What the sides of an image must be multiples of; others are padded to it and cropped back."""
    return 1 if isinstance(config, MLPConfig) else config.factor


def grid_of(config: BackboneConfig, size: tuple[int, int]) -> tuple[int, int]:
    """The latent grid (h, w) of images of ``size``; sides that are no multiple of the factor are rounded up."""
    if isinstance(config, MLPConfig):
        return (1, 1)
    return (math.ceil(size[0] / config.factor), math.ceil(size[1] / config.factor))


def build_backbone(
    config: BackboneConfig, channels: int, size: tuple[int, int], encoded_channels: int, latent_channels: int
) -> tuple[nn.Module, nn.Module]:
    """An encoder (B, C, H, W) -> (B, encoded_channels, h, w) and a decoder (B, latent_channels, h, w) -> (B, C, H, W).

    The decoder's last layer is linear: pixels in [-1, 1], or logits for a Bernoulli likelihood. H and W must be
    multiples of :func:`factor_of`.
    """
    if isinstance(config, MLPConfig):
        pixels = channels * size[0] * size[1]
        encoder = _mlp([pixels, *config.hidden_sizes, encoded_channels])
        decoder = _mlp([latent_channels, *reversed(config.hidden_sizes), pixels])
        return (
            nn.Sequential(UnitRange(), nn.Flatten(), encoder, nn.Unflatten(1, (encoded_channels, 1, 1))),
            nn.Sequential(nn.Flatten(), decoder, nn.Unflatten(1, (channels, *size))),
        )
    if isinstance(config, VQGANConfig):
        return VQGANEncoder(config, channels, encoded_channels), VQGANDecoder(config, channels, latent_channels)
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


def group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups, of at least four channels where there are so many."""
    return nn.GroupNorm(
        next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and (channels >= 4 * g or g == 1)), channels
    )


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), group normalisation (He et al. 2016, pre-activation)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = group_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


class AttentionBlock(nn.Module):
    """x + self-attention over all cells of norm(x), in heads of at most 64 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_heads = next(n for n in range(max(1, channels // 64), channels + 1) if channels % n == 0)
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        qkv = rearrange(self.qkv(self.norm(x)), "b (n a d) h w -> n b a (h w) d", n=3, a=self.num_heads)
        y = F.scaled_dot_product_attention(*qkv)  # (B, heads, h w, d)
        return x + self.out(rearrange(y, "b a (h w) d -> b (a d) h w", h=height, w=width))


def _level(config: ConvConfig, level: int) -> list[nn.Module]:
    """The blocks of one resolution."""
    width, blocks = config.channels * config.channel_mult[level], config.num_res_blocks[level]
    if 2**level not in config.attention_factors:
        return [ResBlock(width) for _ in range(blocks)]
    pairs: list[list[nn.Module]] = [[ResBlock(width), AttentionBlock(width)] for _ in range(blocks)]
    return [block for pair in pairs for block in pair] or [AttentionBlock(width)]


class ConvEncoder(nn.Module):
    """Full resolution first; each halving is one strided convolution."""

    def __init__(self, config: ConvConfig, channels: int, encoded_channels: int) -> None:
        super().__init__()
        widths = [config.channels * mult for mult in config.channel_mult]
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1)]
        for level, width in enumerate(widths):
            if level:
                layers += [nn.SiLU(), nn.Conv2d(widths[level - 1], width, 4, stride=2, padding=1)]
            layers += _level(config, level)
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
            layers += [*_level(config, level), nn.SiLU()]
            if level:
                layers.append(nn.ConvTranspose2d(widths[level], widths[level - 1], 4, stride=2, padding=1))
        layers.append(nn.Conv2d(widths[0], channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            z = layer(z)
        with torch.autocast(z.device.type, enabled=False):  # pixels, and what an adaptive weight is computed from
            return self.layers[-1](z.float())  # (B, C, H, W)
