"""The `finite_scalar` bottleneck: rounds each channel to one of a few levels, so no codebook can collapse.

FSQ, Mentzer et al. 2023 (arXiv 2309.15505). Axes: N = B h w vectors, D channels with L levels each.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor

from stage1_tokenizer.bottlenecks.bottleneck import BottleneckConfig, BottleneckOutput, Quantizer
from twostage.core.training.random import BatchRandom

__all__ = ["FiniteScalar", "FiniteScalarConfig"]

MAX_CODES = 2**20  # counting their usage takes 4 MiB
Levels = Annotated[int, Field(strict=True, ge=3)]  # two levels would saturate tanh: use lookup_free for bits


@BottleneckConfig.register
class FiniteScalarConfig(BottleneckConfig):
    """All combinations of the levels as codes: [8, 5, 5, 5] has 1,000 codes."""

    type: Literal["finite_scalar"] = "finite_scalar"
    levels: list[Levels] = Field(default=[8, 5, 5, 5], min_length=1)
    """The number of levels of each channel; `model.latent_channels` is the number of channels."""
    collapse_remedy: ClassVar[str] = "fewer or smaller model.bottleneck.levels, a higher train.lr, or more data"

    @model_validator(mode="after")
    def _countable(self) -> "FiniteScalarConfig":
        if math.prod(self.levels) > MAX_CODES:
            raise ValueError(f"levels {self.levels}: {math.prod(self.levels):,} codes; expected at most {MAX_CODES:,}")
        return self

    def build(self, shape: tuple[int, int, int], num_classes: int) -> "FiniteScalar":
        return FiniteScalar(self)

    def check_channels(self, latent_channels: int) -> None:
        if len(self.levels) != latent_channels:
            raise ValueError(
                f"latent_channels {latent_channels}: finite_scalar needs one channel for each of its levels "
                f"{self.levels}; set latent_channels to {len(self.levels)}"
            )


class FiniteScalar(Quantizer):
    """round(bound(z)) with straight-through gradients (section 3.1 of the paper), without losses."""

    levels: Tensor
    basis: Tensor

    def __init__(self, config: FiniteScalarConfig) -> None:
        super().__init__(math.prod(config.levels), len(config.levels))
        self.digits = tuple(config.levels)
        levels = torch.tensor(config.levels)
        basis = torch.cat([levels.new_ones(1), levels[:-1]]).cumprod(0)
        self.register_buffer("levels", levels.float(), persistent=False)
        self.register_buffer("basis", basis, persistent=False)

    def forward(self, encoded: Tensor, labels: Tensor | None, random: BatchRandom) -> BottleneckOutput:
        """Quantizes (B, D, h, w); z is in [-1, 1]."""
        with torch.autocast(encoded.device.type, enabled=False):
            z, indices = self._round(encoded.float())
        if self.training:
            self.count(indices.flatten())
        return BottleneckOutput(z, indices, metrics=self.usage_metrics())

    def encode(self, encoded: Tensor) -> BottleneckOutput:
        """The codes of (B, D, h, w) and their vectors."""
        _, indices = self._round(encoded.float())
        return BottleneckOutput(self.lookup(indices), indices)

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes (B, h, w) -> their vectors (B, D, h, w)."""
        digits = indices[..., None] // self.basis % self.levels.long()
        return rearrange(self._scale(digits - self.levels // 2), "b h w d -> b d h w")

    def _round(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        x = rearrange(encoded, "b d h w -> b h w d")
        # tanh maps onto as many integers as there are levels; an even number of them lies half a step off the centre.
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = (self.levels % 2 == 0) * 0.5
        bounded = torch.tanh(x + torch.atanh(offset / half)) * half - offset
        rounded = bounded.detach().nan_to_num().round()  # a NaN still gets a valid code; z stays NaN
        indices = ((rounded + self.levels // 2).long() * self.basis).sum(-1)
        z = self._scale(bounded + (rounded - bounded).detach())
        return rearrange(z, "b h w d -> b d h w"), indices

    def _scale(self, digits: Tensor) -> Tensor:
        return digits / (self.levels // 2)
