"""The `residual` bottleneck: each cell becomes a sum of codes, each the nearest to what the ones before left over.

RQ-VAE, Lee et al. 2022 (arXiv 2203.01941), with a codebook for each depth. Axes: N = B h w vectors, D dimensions.
"""

from collections.abc import Callable
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from stage1_tokenizer.bottleneck_output import BottleneckOutput
from stage1_tokenizer.quantizer import pass_gradient
from stage1_tokenizer.vector_quantizer import CodebookConfig, VectorQuantizer
from twostage.core.config.sections import Depth
from twostage.core.training.random import BatchRandom

__all__ = ["ResidualConfig", "ResidualQuantizer"]


class ResidualConfig(CodebookConfig):
    """``depth`` codes a cell, coarse to fine, each of its own ``codebook_size`` vectors."""

    type: Literal["residual"] = "residual"
    depth: Depth = 4
    """Codes a cell. A prior sees them side by side: a grid (h, w * depth)."""


class ResidualQuantizer(nn.Module):
    """A :class:`VectorQuantizer` a depth. Codes are folded into a grid (B, h, w * depth), a cell's side by side."""

    def __init__(self, config: ResidualConfig, latent_channels: int) -> None:
        super().__init__()
        self.config, self.codebook_size, self.depth = config, config.codebook_size, config.depth
        self.encoded_channels = latent_channels
        self.levels = nn.ModuleList(VectorQuantizer(config, latent_channels) for _ in range(config.depth))

    @property
    def quantizers(self) -> list[VectorQuantizer]:
        """Coarse to fine."""
        return [level for level in self.levels if isinstance(level, VectorQuantizer)]

    def forward(self, encoded: Tensor, labels: Tensor | None, random: BatchRandom) -> BottleneckOutput:
        """Quantizes (B, D, h, w); the losses are those of all depths, summed (equation 9 of the paper)."""
        with torch.autocast(encoded.device.type, enabled=False):
            height, width = encoded.shape[2:]
            vectors = rearrange(encoded.float(), "b d h w -> (b h w) d")
            total, codes, losses = torch.zeros_like(vectors), [], {}
            for quantizer in self.quantizers:
                indices, chosen, terms = quantizer.quantize(vectors - total, random)
                total = total + chosen.detach()
                codes.append(indices)
                losses = {name: losses.get(name, 0) + term for name, term in terms.items()}
            z = pass_gradient(vectors, total, self.config.gradient)
            z = rearrange(z, "(b h w) d -> b d h w", h=height, w=width)
            grid = rearrange(torch.stack(codes, 1), "(b h w) n -> b h (w n)", h=height, w=width)
        usage = [quantizer.usage_metrics() for quantizer in self.quantizers]
        metrics = {name: torch.stack([part[name] for part in usage]).mean() for name in usage[0]}
        return BottleneckOutput(z, grid, losses=losses, metrics=metrics)

    def encode(self, encoded: Tensor) -> BottleneckOutput:
        """The codes and the sums of their vectors, no losses."""
        left, codes = encoded.float(), []
        for quantizer in self.quantizers:
            output = quantizer.encode(left)
            left = left - output.z
            codes.append(output.indices)
        grid = rearrange(torch.stack(codes, -1), "b h w n -> b h (w n)")
        return BottleneckOutput(self.lookup(grid), grid)

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes (B, h, w * depth) -> the sums of their vectors (B, D, h, w)."""
        grid = rearrange(indices, "b h (w n) -> n b h w", n=self.depth)
        total = self.quantizers[0].lookup(grid[0])
        for quantizer, codes in zip(self.quantizers[1:], grid[1:], strict=True):
            total = total + quantizer.lookup(codes)
        return total

    @torch.no_grad()
    def initialize(self, encoded: Tensor, generator: torch.Generator) -> None:
        """k-means of encoded images (B, D, h, w), and of what each depth leaves over."""
        left = encoded.float()
        for quantizer in self.quantizers:
            quantizer.initialize(left, generator)
            left = left - quantizer.encode(left).z

    def update_codebook(self, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Of every depth; see :meth:`VectorQuantizer.update_codebook`."""
        for quantizer in self.quantizers:
            quantizer.update_codebook(reduce_sum)
