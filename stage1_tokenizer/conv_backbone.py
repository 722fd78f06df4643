"""The `conv` backbone: a fast convolutional encoder and decoder, the default.

Axes: B images, C channels, H and W pixels, h and w cells of the latent grid.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from stage1_tokenizer.backbone import BackboneConfig, Networks, ResBlock, group_norm
from twostage.core.config.sections import Count, Size, Width

__all__ = ["ConvConfig"]


@BackboneConfig.register
class ConvConfig(BackboneConfig):
    """Residual blocks at halving resolutions (alias in other projects: `ch`, `ch_mult`)."""

    type: Literal["conv"] = "conv"
    channels: Width = 64
    """Base width, which ``channel_mult`` multiplies."""
    channel_mult: list[Width] = Field(default=[1, 2, 2], min_length=1, max_length=16)
    """One multiplier per resolution, full resolution first: n numbers shrink each side by 2^(n-1)."""
    num_res_blocks: list[Annotated[Size, Field(le=1_024)]] = Field(default=[0, 0, 2])
    """Residual blocks at each of these resolutions. Few at full resolution keep the tokenizer fast."""

    attention_factors: list[Count] = Field(default=[])
    """Resolutions at which self-attention follows each residual block: 4 means a quarter of the image's sides."""

    @model_validator(mode="after")
    def _consistent(self) -> "ConvConfig":
        if len(self.channel_mult) != len(self.num_res_blocks):
            raise ValueError(
                f"channel_mult {self.channel_mult} and num_res_blocks {self.num_res_blocks}: expected lists of the "
                "same length"
            )
        factors = [2**level for level in range(len(self.channel_mult))]
        if unknown := [factor for factor in self.attention_factors if factor not in factors]:
            raise ValueError(f"attention_factors {unknown}: expected some of {factors}, the factors of channel_mult")
        return self

    @property
    def factor(self) -> int:
        return 2 ** (len(self.channel_mult) - 1)

    def build(self, image_shape: tuple[int, int, int], encoded_channels: int, latent_channels: int) -> Networks:
        """(B, C, H, W) -> (B, encoded_channels, h, w), and (B, latent_channels, h, w) -> (B, C, H, W)."""
        return ConvEncoder(self, image_shape[0], encoded_channels), ConvDecoder(self, image_shape[0], latent_channels)


class AttentionBlock(nn.Module):
    """x + self-attention over all cells of norm(x), in heads of about 64 channels."""

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
        return [ResBlock(width, width, group_norm) for _ in range(blocks)]
    pairs: list[list[nn.Module]] = [[ResBlock(width, width, group_norm), AttentionBlock(width)] for _ in range(blocks)]
    return [block for pair in pairs for block in pair] or [AttentionBlock(width)]


class ConvEncoder(nn.Module):
    """Starts at full resolution; each halving is one strided convolution."""

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
    """Mirrors the encoder; each doubling is one transposed convolution whose kernel is a multiple of its stride."""

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
        with torch.autocast(z.device.type, enabled=False):  # full precision for pixels and for the adaptive weight
            return self.layers[-1](z.float())  # (B, C, H, W)
