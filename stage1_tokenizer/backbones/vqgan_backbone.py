"""The `vqgan` backbone: VQGAN's encoder and decoder, which load the weights of published tokenizers unchanged.

Esser, Rombach and Ommer 2021, "Taming Transformers for High-Resolution Image Synthesis" (arXiv 2012.09841).
Axes: B images, C channels, H and W pixels, h and w cells of the latent grid, c channels of a layer.
"""

import itertools
import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from stage1_tokenizer.backbones.backbone import ACTIVATIONS, Activation, BackboneConfig, Networks, ResBlock, shifted
from twostage.core.config.sections import Count, Depth, Flag, Width

__all__ = ["VQGANConfig", "VQGANDecoder", "VQGANEncoder"]

MIN_CELLS = 256
"""The grid from which on upsampling is a transposed convolution; the weights outweigh smaller ones."""


@BackboneConfig.register
class VQGANConfig(BackboneConfig):
    """Residual blocks at halving resolutions and attention at the coarsest: wide, deep and slow. The architecture of
    taming-transformers, of diffusers' `VQModel` and of LlamaGen."""

    type: Literal["vqgan"] = "vqgan"
    channels: Width = 128
    """Base width, which ``channel_mult`` multiplies (alias: `ch`)."""
    channel_mult: list[Width] = Field(default=[1, 1, 2, 2, 4], min_length=1, max_length=16)
    """One multiplier per resolution, full one first: n numbers shrink each side by 2^(n-1) (alias: `ch_mult`)."""
    input_mult: Width = 1
    """The multiplier of the encoder's first convolution."""
    activation: Activation = "silu"
    """Published tokenizers use `silu`."""
    num_res_blocks: Depth = 2
    """Residual blocks at each resolution; the decoder has one more."""
    attention_factors: list[Count] | None = None
    """Resolutions at which self-attention follows each residual block: 16 means a 16th of the image's sides. None: only
    the coarsest resolution."""
    decoder_attention_factors: list[Count] | None = None
    """`attention_factors` of the decoder; None: as in the encoder."""
    middle_attention: Flag = True
    """Self-attention between the two residual blocks in the middle, at the coarsest resolution."""
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
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels at each resolution, full resolution first."""
        return [self.channels * mult for mult in self.channel_mult]

    @property
    def input_width(self) -> int:
        """Channels of the encoder's first convolution."""
        return self.channels * self.input_mult

    def attends(self, level: int, decoder: bool = False) -> bool:
        """Whether attention follows the residual blocks of a level; level 0 is the full resolution."""
        factors = [self.factor] if self.attention_factors is None else self.attention_factors
        if decoder and self.decoder_attention_factors is not None:
            factors = self.decoder_attention_factors
        return 2**level in factors

    def norm(self, channels: int) -> nn.GroupNorm:
        """The group normalisation of all layers."""
        return nn.GroupNorm(self.norm_groups, channels, eps=1e-6)

    def build(self, image_shape: tuple[int, int, int], encoded_channels: int, latent_channels: int) -> Networks:
        """(B, C, H, W) -> (B, encoded_channels, h, w), and (B, latent_channels, h, w) -> (B, C, H, W)."""
        channels = image_shape[0]
        return VQGANEncoder(self, channels, encoded_channels), VQGANDecoder(self, channels, latent_channels)


Norm = Callable[[int], nn.Module]


class Attention(nn.Module):
    """x + self-attention over all cells of norm(x) in one head, (B, c, H, W) -> (B, c, H, W)."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        self.norm = norm(width)
        self.query, self.key, self.value, self.out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        heads = [rearrange(layer(y), "b c h w -> b 1 (h w) c") for layer in (self.query, self.key, self.value)]
        y = F.scaled_dot_product_attention(*heads)
        return x + self.out(rearrange(y, "b 1 (h w) c -> b c h w", h=x.shape[-2]))


class Downsample(nn.Conv2d):
    """Halves H and W with a strided 3x3 convolution, padded only at the bottom and on the right."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, stride=2)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Doubles H and W: repeats each cell four times, then applies a 3x3 convolution.

    The nine pixels under a kernel are only four different cells. So both steps are one transposed convolution, whose
    weight for a cell is the sum of those for its pixels.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        if math.prod(input.shape[2:]) < MIN_CELLS:
            return super().forward(F.interpolate(input, scale_factor=2.0, mode="nearest"))
        taps = F.pad(self.weight.transpose(0, 1).flip(2, 3), (1, 1, 1, 1))  # (c, c, 5, 5)
        taps = taps[:, :, 1:] + taps[:, :, :-1]
        return F.conv_transpose2d(input, taps[..., 1:] + taps[..., :-1], self.bias, stride=2, padding=1)


class Level(nn.Module):
    """One resolution: residual blocks, each with or without attention, then the step to the next resolution."""

    def __init__(
        self, widths: list[int], attend: bool, norm: Norm, activation: Activation, resample: nn.Module
    ) -> None:
        super().__init__()
        pairs = itertools.pairwise(widths)
        self.blocks = nn.ModuleList(ResBlock(before, after, norm, activation) for before, after in pairs)
        self.attentions = nn.ModuleList(Attention(w, norm) if attend else nn.Identity() for w in widths[1:])
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x))
        return self.resample(x)


class Middle(nn.Module):
    """The blocks in the middle, at the coarsest resolution, (B, c, h, w) -> (B, c, h, w)."""

    def __init__(self, width: int, attend: bool, norm: Norm, activation: Activation) -> None:
        super().__init__()
        self.block1 = ResBlock(width, width, norm, activation)
        self.attention = Attention(width, norm) if attend else nn.Identity()
        self.block2 = ResBlock(width, width, norm, activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(x)))


class VQGANEncoder(nn.Module):
    """Images (B, channels, H, W) in [-1, 1] -> (B, encoded_channels, h, w); the last layer is the `quant_conv`."""

    def __init__(self, config: VQGANConfig, channels: int, encoded_channels: int) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(channels, config.input_width, 3, padding=1)
        self.levels = nn.ModuleList()  # full resolution first
        for level, (before, width) in enumerate(itertools.pairwise([config.input_width, *widths])):
            resample = nn.Identity() if level == last else Downsample(width)
            blocks = [before] + [width] * config.num_res_blocks
            self.levels.append(Level(blocks, config.attends(level), config.norm, config.activation, resample))
        self.middle = Middle(widths[-1], config.middle_attention, config.norm, config.activation)
        self.norm_out, self.act = config.norm(widths[-1]), ACTIVATIONS[config.activation]()
        self.conv_out = nn.Conv2d(widths[-1], config.inner_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(config.inner_channels, encoded_channels, 1)

    def forward(self, images: Tensor, shift: Tensor | None = None) -> Tensor:
        x = shifted(self.conv_in(images), shift)
        for level in self.levels:
            x = level(x)
        x = self.middle(x)  # (B, c, h, w)
        return self.quant_conv(self.conv_out(self.act(self.norm_out(x))))


class VQGANDecoder(nn.Module):
    """(B, latent_channels, h, w) -> images (B, channels, H, W); first layer `post_quant_conv`, last layer linear."""

    def __init__(self, config: VQGANConfig, channels: int, latent_channels: int) -> None:
        super().__init__()
        widths = config.widths
        self.post_quant_conv = nn.Conv2d(latent_channels, config.inner_channels, 1)
        self.conv_in = nn.Conv2d(config.inner_channels, widths[-1], 3, padding=1)
        self.middle = Middle(widths[-1], config.middle_attention, config.norm, config.activation)
        self.levels = nn.ModuleList()  # coarsest resolution first
        before = widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            resample = Upsample(width) if level else nn.Identity()
            blocks = [before] + [width] * (config.num_res_blocks + 1)
            attend = config.attends(level, decoder=True)
            self.levels.append(Level(blocks, attend, config.norm, config.activation, resample))
            before = width
        self.norm_out, self.act = config.norm(widths[0]), ACTIVATIONS[config.activation]()
        self.conv_out = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, z: Tensor, shift: Tensor | None = None) -> Tensor:
        x = self.middle(self.conv_in(shifted(self.post_quant_conv(z), shift)))  # (B, c, h, w)
        for level in self.levels:
            x = level(x)
        x = self.act(self.norm_out(x))
        with torch.autocast(z.device.type, enabled=False):  # full precision for pixels and for the adaptive weight
            return self.conv_out(x.float())  # (B, C, H, W)
