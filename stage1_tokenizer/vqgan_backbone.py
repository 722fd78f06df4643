"""The `vqgan` backbone: VQGAN's encoder and decoder, in which the weights of the published tokenizers fit as they are.

Esser, Rombach and Ommer 2021, "Taming Transformers for High-Resolution Image Synthesis" (arXiv 2012.09841).
Axes: B images, C channels, H and W pixels, h and w cells of the latent grid, c channels of a layer.
"""

import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from twostage.core.config.sections import Count, Depth, Flag, Section, Width

__all__ = ["VQGANConfig", "VQGANDecoder", "VQGANEncoder"]


class VQGANConfig(Section):
    """Residual blocks at halving resolutions and attention at the coarsest; wide, deep and slow: the architecture of
    taming-transformers, of diffusers' `VQModel` and of LlamaGen. H and W must be multiples of ``factor``."""

    type: Literal["vqgan"] = "vqgan"
    channels: Width = 128
    """Width that ``channel_mult`` multiplies (alias: `ch`)."""
    channel_mult: list[Width] = Field(default=[1, 1, 2, 2, 4], min_length=1, max_length=16)
    """One number a resolution, the full one first: n numbers reduce each side by 2^(n-1) (alias: `ch_mult`)."""
    input_mult: Width = 1
    """The same for the encoder's first convolution."""
    num_res_blocks: Depth = 2
    """Residual blocks at each resolution; the decoder has one more."""
    attention_factors: list[Count] | None = None
    """Where self-attention follows each residual block: 16 is the resolution of a 16th of the image's sides. None: at
    the coarsest resolution alone."""
    decoder_attention_factors: list[Count] | None = None
    """The same in the decoder, where it differs; None: as in the encoder."""
    middle_attention: Flag = True
    """Whether self-attention stands between the two residual blocks of the coarsest resolution's middle."""
    inner_channels: Width = 256
    """Channels between the backbone and the 1x1 convolution to or from the latent (alias: `z_channels`)."""
    norm_groups: Width = 32
    """Groups of every group normalisation; each width must be a multiple of it."""

    @model_validator(mode="after")
    def _consistent(self) -> "VQGANConfig":
        factors = [2**level for level in range(len(self.channel_mult))]
        for name in ("attention_factors", "decoder_attention_factors"):
            if unknown := [factor for factor in getattr(self, name) or () if factor not in factors]:
                raise ValueError(f"{name} {unknown}: expected some of {factors}, the factors of channel_mult")
        for width in (self.input_width, *self.widths):
            if width % self.norm_groups:
                raise ValueError(
                    f"norm_groups {self.norm_groups}: each width (channels * channel_mult) must be a multiple of it, "
                    f"got {width}"
                )
        return self

    @property
    def factor(self) -> int:
        """Pixels a cell, along a side."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels at each resolution, the full one first."""
        return [self.channels * mult for mult in self.channel_mult]

    def attends(self, level: int, decoder: bool = False) -> bool:
        """Whether attention follows the residual blocks of a resolution, 0 being the full one."""
        factors = [self.factor] if self.attention_factors is None else self.attention_factors
        if decoder and self.decoder_attention_factors is not None:
            factors = self.decoder_attention_factors
        return 2**level in factors

    @property
    def input_width(self) -> int:
        """Channels of the encoder's first convolution."""
        return self.channels * self.input_mult


class ResBlock(nn.Module):
    """shortcut(x) + conv(silu(norm(conv(silu(norm(x)))))), (B, inputs, H, W) -> (B, outputs, H, W); the shortcut is a
    1x1 convolution where the widths differ."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(nn.Module):
    """x + self-attention over all cells of norm(x) in one head, (B, c, H, W) -> (B, c, H, W)."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.query, self.key, self.value, self.out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        heads = [rearrange(layer(y), "b c h w -> b 1 (h w) c") for layer in (self.query, self.key, self.value)]
        y = F.scaled_dot_product_attention(*heads)
        return x + self.out(rearrange(y, "b 1 (h w) c -> b c h w", h=x.shape[-2]))


class Downsample(nn.Conv2d):
    """Halves H and W by a strided 3x3 convolution, padded below and on the right only."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, stride=2)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Doubles H and W: each cell four times, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.interpolate(input, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, each with attention or without, then the step to the next resolution."""

    def __init__(self, widths: list[int], attend: bool, groups: int, resample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(before, after, groups) for before, after in itertools.pairwise(widths))
        self.attentions = nn.ModuleList(Attention(w, groups) if attend else nn.Identity() for w in widths[1:])
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x))
        return self.resample(x)


class Middle(nn.Module):
    """The coarsest resolution's own blocks, (B, c, h, w) -> (B, c, h, w)."""

    def __init__(self, width: int, attend: bool, groups: int) -> None:
        super().__init__()
        self.block1 = ResBlock(width, width, groups)
        self.attention = Attention(width, groups) if attend else nn.Identity()
        self.block2 = ResBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(x)))


class VQGANEncoder(nn.Module):
    """Images (B, channels, H, W) in [-1, 1] -> (B, encoded_channels, h, w); the last layer is the `quant_conv`."""

    def __init__(self, config: VQGANConfig, channels: int, encoded_channels: int) -> None:
        super().__init__()
        widths, groups, last = config.widths, config.norm_groups, len(config.widths) - 1
        self.conv_in = nn.Conv2d(channels, config.input_width, 3, padding=1)
        self.levels = nn.ModuleList()  # the full resolution first
        for level, (before, width) in enumerate(itertools.pairwise([config.input_width, *widths])):
            resample = nn.Identity() if level == last else Downsample(width)
            blocks = [before] + [width] * config.num_res_blocks
            self.levels.append(Level(blocks, config.attends(level), groups, resample))
        self.middle = Middle(widths[-1], config.middle_attention, groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.inner_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(config.inner_channels, encoded_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> (B, encoded_channels, h, w)."""
        x = self.conv_in(images)
        for level in self.levels:
            x = level(x)
        x = self.middle(x)  # (B, c, h, w)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(x))))


class VQGANDecoder(nn.Module):
    """A latent (B, latent_channels, h, w) -> images (B, channels, H, W); the first layer is the `post_quant_conv`, the
    last is linear."""

    def __init__(self, config: VQGANConfig, channels: int, latent_channels: int) -> None:
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        self.post_quant_conv = nn.Conv2d(latent_channels, config.inner_channels, 1)
        self.conv_in = nn.Conv2d(config.inner_channels, widths[-1], 3, padding=1)
        self.middle = Middle(widths[-1], config.middle_attention, groups)
        self.levels = nn.ModuleList()  # the coarsest resolution first
        before = widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            resample = Upsample(width) if level else nn.Identity()
            blocks = [before] + [width] * (config.num_res_blocks + 1)
            self.levels.append(Level(blocks, config.attends(level, decoder=True), groups, resample))
            before = width
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """A latent (B, latent_channels, h, w) -> images (B, C, H, W)."""
        x = self.middle(self.conv_in(self.post_quant_conv(z)))  # (B, c, h, w)
        for level in self.levels:
            x = level(x)
        x = F.silu(self.norm_out(x))
        with torch.autocast(z.device.type, enabled=False):  # pixels, and what an adaptive weight is computed from
            return self.conv_out(x.float())  # (B, C, H, W)
