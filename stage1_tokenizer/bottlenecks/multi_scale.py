"""The `multi_scale` bottleneck: grids of codes, coarse to fine, each of what the coarser ones leave over.

VAR's tokenizer, Tian et al. 2024 (arXiv 2404.02905). Axes: B images, C channels, h and w cells of the finest grid, S
scales, N codes of all scales, K codes in the codebook, which all scales share.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.bottleneck import (
    Bottleneck,
    BottleneckConfig,
    BottleneckOutput,
    Quantizer,
    full_precision,
    pass_gradient,
)
from stage1_tokenizer.bottlenecks.finite_scalar import FiniteScalarConfig
from stage1_tokenizer.bottlenecks.vector_quantizer import VectorConfig
from twostage.core.config.sections import Sides
from twostage.core.errors import InputError
from twostage.core.scales import Resize, describe_grids, join_scales, split_scales
from twostage.core.training.random import BatchRandom

__all__ = ["MultiScale", "MultiScaleConfig"]

COMMITMENT = 0.25
"""The weight of the loss `commitment` for codes without a weight of their own."""


@BottleneckConfig.register
class MultiScaleConfig(BottleneckConfig):
    """Grids of codes out of one codebook, coarse to fine."""

    type: Literal["multi_scale"] = "multi_scale"
    scales: tuple[Sides, ...] = Field(default=((1, 1), (2, 2), (4, 4), (8, 8)), min_length=2)
    """The grids: each a number, or (rows, columns) if it is not square. The last one is the grid of the backbone. They
    need not divide each other."""
    codes: Annotated[VectorConfig | FiniteScalarConfig, Field(discriminator="type")] = VectorConfig()
    """The codes: `{type: vector, codebook_size: 512}` or `{type: finite_scalar, levels: [8, 5, 5, 5]}`, with all keys
    of these bottlenecks."""
    collapse_remedy: ClassVar[str] = (
        "model.bottleneck.codes.revive_below=0.2, a smaller model.bottleneck.codes.codebook_size, or fewer "
        "model.bottleneck.scales"
    )

    @field_validator("scales")
    @classmethod
    def _grow(cls, scales: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        for before, after in pairwise(scales):
            if before == after or before[0] > after[0] or before[1] > after[1]:
                raise ValueError(
                    f"got {describe_grids(before)} before {describe_grids(after)}, expected grids that grow. Sort "
                    "them, and remove equal ones"
                )
        return scales

    @field_validator("codes")
    @classmethod
    def _differ_in_length(cls, codes: VectorConfig | FiniteScalarConfig) -> VectorConfig | FiniteScalarConfig:
        if isinstance(codes, VectorConfig) and codes.l2_normalize:
            raise ValueError(
                "l2_normalize true: gives all codes the length 1, but what is left over gets shorter from scale to "
                "scale. Set model.bottleneck.codes.l2_normalize=false"
            )
        return codes

    def check_channels(self, latent_channels: int) -> None:
        self.codes.check_channels(latent_channels)

    def build(self, shape: tuple[int, int, int], num_classes: int) -> "MultiScale":
        if self.scales[-1] != shape[1:]:
            raise InputError(
                f"model.bottleneck.scales {describe_grids((), self.scales)}: expected the grid of the backbone, "
                f"{describe_grids(shape[1:])}, as the last one. Add it, or change the backbone's downsampling"
            )
        return MultiScale(self, shape)


class MultiScale(Bottleneck):
    """z is the sum over the scales of the codes' vectors, interpolated to h x w.

    Scale s encodes the difference between the encoder's output and this sum so far, averaged down to its grid
    (algorithm 1 of the paper). The authors add a convolution after each interpolation. We do not: with grids as small
    as ours, it made reconstructions worse (docs/results.md).
    """

    ema_scale_counts: Tensor
    pending_scale_counts: Tensor

    def __init__(self, config: MultiScaleConfig, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.config, self.scales = config, config.scales
        channels, *grid = shape
        quantizer = config.codes.build(shape, 0)
        assert isinstance(quantizer, Quantizer)
        self.quantizer, self.codebook_size, self.encoded_channels = quantizer, quantizer.codebook_size, channels
        self.digits = quantizer.digits
        self.starts_from_data = quantizer.starts_from_data
        self.down = nn.ModuleList(Resize((grid[0], grid[1]), scale) for scale in self.scales)
        self.up = nn.ModuleList(Resize(scale, (grid[0], grid[1])) for scale in self.scales)
        counts = torch.ones(len(self.scales), self.codebook_size)
        self.register_buffer("ema_scale_counts", counts)
        self.register_buffer("pending_scale_counts", torch.zeros_like(counts), persistent=False)

    def forward(self, encoded: Tensor, labels: Tensor | None, random: BatchRandom) -> BottleneckOutput:
        """Quantizes (B, C, h, w). The gradient reaches the encoder as if z were its output. The losses compare the
        encoder's output with the sum after each scale, both averaged down to the grid of the scale, so that no loss
        asks a coarse scale for details. Each is the sum over the scales: `commitment` (weighted) trains the encoder
        and, unless the codebook is `ema`, `codebook` trains the codes. With the last sum alone, the encoder's output
        grew without bound in some runs."""
        codes = self.config.codes
        with torch.autocast(encoded.device.type, enabled=False):
            encoded = encoded.float()
            lefts, grids, sums = self._quantize(encoded)
            # One call with what was left at all scales: all scales count in the statistics of the codebook.
            row = torch.cat([left.flatten(2) for left in lefts], 2)[:, :, None]  # (B, C, 1, N)
            metrics = self.quantizer(row, labels, random).metrics
            if self.training:
                self._count(grids)
            pairs = [(down(encoded), down(total)) for down, total in zip(self.down, sums, strict=True)]
            commitment = torch.stack([F.mse_loss(mine, total.detach()) for mine, total in pairs]).sum()
            losses = {"commitment": getattr(codes, "commitment_weight", COMMITMENT) * commitment}
            if isinstance(codes, VectorConfig) and codes.codebook != "ema":
                losses["codebook"] = torch.stack([F.mse_loss(total, mine.detach()) for mine, total in pairs]).sum()
            errors = [F.mse_loss(total, encoded).detach() for total in sums]
            z = pass_gradient(encoded, sums[-1].detach())
        for scale, error, counts in zip(self.scales, errors, self.ema_scale_counts, strict=True):
            name = describe_grids(scale)
            metrics[f"error_{name}"] = error
            metrics[f"perplexity_{name}"] = torch.special.entr(counts / counts.sum()).sum().exp()
        return BottleneckOutput(z, join_scales(grids)[:, None], losses=losses, metrics=metrics)

    def encode(self, encoded: Tensor) -> BottleneckOutput:
        """The codes (B, 1, N) of (B, C, h, w) and their z, without losses."""
        with full_precision(encoded.device):
            _, grids, sums = self._quantize(encoded.float())
        return BottleneckOutput(sums[-1], join_scales(grids)[:, None])

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes (B, 1, N) -> z (B, C, h, w)."""
        grids = split_scales(indices[:, 0], self.scales)
        parts = [up(self.quantizer.lookup(grid)) for up, grid in zip(self.up, grids, strict=True)]
        return torch.stack(parts).sum(0)

    def codebook_numbers(self, width: int) -> Tensor:
        return torch.zeros(width, dtype=torch.long)

    def _quantize(self, encoded: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """For each scale: what was left before it (B, C, h_s, w_s), its codes (B, h_s, w_s), and the sum after it
        (B, C, h, w)."""
        lefts, grids, sums = [], [], []
        total = torch.zeros_like(encoded)
        for down, up in zip(self.down, self.up, strict=True):
            lefts.append(down((encoded - total).detach()))
            latent = self.quantizer.encode(lefts[-1])
            assert latent.indices is not None
            total = total + up(latent.z)
            grids.append(latent.indices)
            sums.append(total)
        return lefts, grids, sums

    @torch.no_grad()
    def initialize(self, encoded: Tensor, generator: torch.Generator) -> None:
        """Moves the codes onto the k-means centres of what the scales would leave over of (B, C, h, w) if each encoded
        its grid exactly."""
        total, lefts = torch.zeros_like(encoded), []
        for down, up in zip(self.down, self.up, strict=True):
            lefts.append(down(encoded - total))
            total = total + up(lefts[-1])
        self.quantizer.initialize(torch.cat([left.flatten(2) for left in lefts], 2)[:, :, None], generator)

    @torch.no_grad()
    def update_codebook(self, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Applies :meth:`VectorQuantizer.update_codebook`, and moves the counts of each scale."""
        self.quantizer.update_codebook(reduce_sum)
        self.ema_scale_counts.lerp_(reduce_sum(self.pending_scale_counts), 1 - self.quantizer.usage_decay)
        self.pending_scale_counts.zero_()

    @torch.no_grad()
    def _count(self, grids: list[Tensor]) -> None:
        for counts, codes in zip(self.pending_scale_counts, grids, strict=True):
            counts.index_add_(0, codes.flatten(), counts.new_ones(codes.numel()))
