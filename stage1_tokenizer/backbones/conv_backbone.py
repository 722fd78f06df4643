"""The `conv` backbone: a fast convolutional encoder and decoder, the default.

Axes: B images, C channels, H and W pixels, h and w cells of the latent grid.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from stage1_tokenizer.backbones.backbone import (
    ACTIVATIONS,
    Activation,
    BackboneConfig,
    Networks,
    ResBlock,
    group_norm,
    shifted,
)
from twostage.core.config.sections import Count, Size, Width

__all__ = ["ConvConfig"]


@BackboneConfig.register
class ConvConfig(BackboneConfig):
    """Residual blocks at halving resolutions (alias in other projects: `ch`, `ch_mult`)."""

    type: Literal["conv"] = "conv"
    patch_size: Literal[1, 2, 4, 8, 16] = 1
    """The first layer sees the pixels of a square patch of this side as channels, and the last layer writes them so
    (space to depth). With 2, everything between runs at half the resolution, which is far cheaper."""
    channels: Width = 64
    """Base width, which ``channel_mult`` multiplies."""
    channel_mult: list[Width] = Field(default=[1, 2, 2], min_length=1, max_length=16)
    """One multiplier per resolution, that of the patches first: n numbers shrink each side by patch_size * 2^(n-1)."""
    num_res_blocks: list[Annotated[Size, Field(le=1_024)]] = Field(default=[0, 0, 2])
    """Residual blocks at each of these resolutions. Few at full resolution keep the tokenizer fast."""
    group_channels: Width = 4
    """The least channels that one group of a group normalisation holds. From 16 on, the network computes with its
    channels last in memory, which is faster on most machines; fewer make that slow."""
    activation: Activation = "silu"
    attention_factors: list[Count] = Field(default=[])
    """Resolutions at which self-attention follows each residual block: 4 means a quarter of the image's sides."""

    @model_validator(mode="after")
    def _consistent(self) -> "ConvConfig":
        if len(self.channel_mult) != len(self.num_res_blocks):
            raise ValueError(
                f"channel_mult {self.channel_mult} and num_res_blocks {self.num_res_blocks}: expected lists of the "
                "same length"
            )
        factors = [self.patch_size * 2**level for level in range(len(self.channel_mult))]
        if unknown := [factor for factor in self.attention_factors if factor not in factors]:
            raise ValueError(f"attention_factors {unknown}: expected some of {factors}, the factors of channel_mult")
        return self

    @property
    def factor(self) -> int:
        return self.patch_size * 2 ** (len(self.channel_mult) - 1)

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout of images and features. Group normalisation in small groups is slow with channels last."""
        return torch.channels_last if self.group_channels >= 16 else torch.contiguous_format

    def norm(self, channels: int) -> nn.GroupNorm:
        """The group normalisation of all layers."""
        return group_norm(channels, self.group_channels)

    def build(self, image_shape: tuple[int, int, int], encoded_channels: int, latent_channels: int) -> Networks:
        """(B, C, H, W) -> (B, encoded_channels, h, w), and (B, latent_channels, h, w) -> (B, C, H, W)."""
        return ConvEncoder(self, image_shape[0], encoded_channels), ConvDecoder(self, image_shape[0], latent_channels)


class AttentionBlock(nn.Module):
    """x + self-attention over all cells of norm(x), in heads of about 64 channels."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.num_heads = next(n for n in range(max(1, channels // 64), channels + 1) if channels % n == 0)
        self.norm = norm(channels)
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
    if config.patch_size * 2**level not in config.attention_factors:
        return [ResBlock(width, width, config.norm, config.activation) for _ in range(blocks)]
    pairs: list[list[nn.Module]] = [
        [ResBlock(width, width, config.norm, config.activation), AttentionBlock(width, config.norm)]
        for _ in range(blocks)
    ]
    return [block for pair in pairs for block in pair] or [AttentionBlock(width, config.norm)]


class ConvEncoder(nn.Module):
    """Starts at full resolution; each halving is one strided convolution."""

    def __init__(self, config: ConvConfig, channels: int, encoded_channels: int) -> None:
        super().__init__()
        self.patch_size, self.memory_format = config.patch_size, config.memory_format
        widths, act = [config.channels * mult for mult in config.channel_mult], ACTIVATIONS[config.activation]
        layers: list[nn.Module] = [nn.Conv2d(channels * config.patch_size**2, widths[0], 3, padding=1)]
        for level, width in enumerate(widths):
            if level:
                layers += [act(), nn.Conv2d(widths[level - 1], width, 4, stride=2, padding=1)]
            layers += _level(config, level)
        layers += [act(), nn.Conv2d(widths[-1], encoded_channels, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor, shift: Tensor | None = None) -> Tensor:
        patches = F.pixel_unshuffle(images, self.patch_size).contiguous(memory_format=self.memory_format)
        return self.layers[1:](shifted(self.layers[0](patches), shift))  # (B, encoded_channels, h, w)


class ConvDecoder(nn.Module):
    """Mirrors the encoder; each doubling is one transposed convolution whose kernel is a multiple of its stride."""

    def __init__(self, config: ConvConfig, channels: int, latent_channels: int) -> None:
        super().__init__()
        self.patch_size, self.memory_format = config.patch_size, config.memory_format
        widths, act = [config.channels * mult for mult in config.channel_mult], ACTIVATIONS[config.activation]
        layers: list[nn.Module] = [nn.Conv2d(latent_channels, widths[-1], 3, padding=1)]
        for level in reversed(range(len(widths))):
            layers += [*_level(config, level), act()]
            if level:
                layers.append(nn.ConvTranspose2d(widths[level], widths[level - 1], 4, stride=2, padding=1))
        layers.append(nn.Conv2d(widths[0], channels * config.patch_size**2, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor, shift: Tensor | None = None) -> Tensor:
        z = shifted(self.layers[0](z.contiguous(memory_format=self.memory_format)), shift)
        for layer in self.layers[1:-1]:
            z = layer(z)
        with torch.autocast(z.device.type, enabled=False):  # full precision for pixels and for the adaptive weight
            return F.pixel_shuffle(self.layers[-1](z.float()), self.patch_size)  # (B, C, H, W)
