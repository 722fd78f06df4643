"""The `residual` bottleneck: each cell becomes a sum of codes, each nearest to what the earlier ones left over.

RQ-VAE, Lee et al. 2022 (arXiv 2203.01941), with one codebook per depth. Axes: N = B h w vectors, D dimensions.
"""

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.bottleneck import Bottleneck, BottleneckConfig, BottleneckOutput, pass_gradient
from stage1_tokenizer.bottlenecks.vector_quantizer import CodebookConfig, VectorQuantizer
from twostage.core.config.sections import Depth
from twostage.core.training.random import BatchRandom

__all__ = ["ResidualConfig", "ResidualQuantizer"]


@BottleneckConfig.register
class ResidualConfig(CodebookConfig):
    """``depth`` codes per cell, coarse to fine, each from a codebook of its own."""

    type: Literal["residual"] = "residual"
    depth: Depth = 4
    """Codes per cell. A prior sees them side by side, as a grid (h, w * depth)."""
    collapse_remedy: ClassVar[str] = (
        "model.bottleneck.revive_below=0.2, a smaller model.bottleneck.codebook_size, or a smaller "
        "model.bottleneck.depth"
    )

    def build(self, shape: tuple[int, int, int], num_classes: int) -> "ResidualQuantizer":
        return ResidualQuantizer(self, shape[0])


class ResidualQuantizer(Bottleneck):
    """One :class:`VectorQuantizer` per depth. A cell's codes lie side by side in a grid (B, h, w * depth)."""

    starts_from_data = True

    def __init__(self, config: ResidualConfig, latent_channels: int) -> None:
        super().__init__()
        self.config, self.codebook_size, self.depth = config, config.codebook_size, config.depth
        self.encoded_channels = latent_channels
        self.levels = nn.ModuleList(VectorQuantizer(config, latent_channels) for _ in range(config.depth))

    @property
    def quantizers(self) -> list[VectorQuantizer]:
        """The quantizers of all depths, coarse to fine."""
        return [level for level in self.levels if isinstance(level, VectorQuantizer)]

    def forward(self, encoded: Tensor, labels: Tensor | None, random: BatchRandom) -> BottleneckOutput:
        """Quantizes (B, D, h, w); each loss is the sum over all depths (equation 9 of the paper)."""
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
        """The codes of (B, D, h, w) and the sums of their vectors, without losses."""
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
        """Moves each depth's codes onto the k-means centres of what the earlier depths leave over of (B, D, h, w)."""
        left = encoded.float()
        for quantizer in self.quantizers:
            quantizer.initialize(left, generator)
            left = left - quantizer.encode(left).z

    def update_codebook(self, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Applies :meth:`VectorQuantizer.update_codebook` at every depth."""
        for quantizer in self.quantizers:
            quantizer.update_codebook(reduce_sum)
