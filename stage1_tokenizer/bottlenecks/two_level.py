"""The `two_level` bottleneck: a coarse grid of codes, the top, and a fine one, the bottom, which is encoded and decoded
with the top.

VQ-VAE-2, Razavi et al. 2019 (arXiv 1906.00446, section 3.1). Axes: B images, C channels, h and w cells of the bottom,
which is the backbone's grid, N codes of both grids.
"""

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.bottleneck import Bottleneck, BottleneckConfig, BottleneckOutput, full_precision
from stage1_tokenizer.bottlenecks.vector_quantizer import CodebookConfig, VectorQuantizer
from twostage.core.config.sections import Depth
from twostage.core.errors import InputError
from twostage.core.scales import describe_grids, join_scales, split_scales
from twostage.core.training.random import BatchRandom

__all__ = ["TwoLevel", "TwoLevelConfig"]


@BottleneckConfig.register
class TwoLevelConfig(CodebookConfig):
    """Two grids of codes, each from a codebook of its own; the top has half the rows and columns of the bottom."""

    type: Literal["two_level"] = "two_level"
    num_res_convs: Depth = 1
    """Residual convolutions between the two grids, on the way up and on the way down."""
    collapse_remedy: ClassVar[str] = "model.bottleneck.revive_below=0.2 or a smaller model.bottleneck.codebook_size"

    def build(self, shape: tuple[int, int, int], num_classes: int) -> "TwoLevel":
        if min(shape[1:]) < 2:
            raise InputError(
                f"model.bottleneck.type 'two_level': the backbone's grid is {describe_grids(shape[1:])}, expected at "
                "least 2x2 cells. Use the backbone conv with less downsampling"
            )
        return TwoLevel(self, shape)


class ResidualConvolutions(nn.Module):
    """(B, C, h, w) -> (B, C, h, w): each convolution adds to its input."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(F.silu(x))
        return x


class TwoLevel(Bottleneck):
    """The top is quantized first. The bottom's codes are chosen from the encoder's output and the decoded top; z is
    made of both, so the bottom need not repeat what the top says (algorithm 1 of the paper)."""

    starts_from_data = True

    def __init__(self, config: TwoLevelConfig, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = shape
        self.codebook_size, self.encoded_channels = config.codebook_size, channels
        self.scales = (-(-height // 2), -(-width // 2)), (height, width)
        self.up = nn.Sequential(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1), ResidualConvolutions(channels, config.num_res_convs)
        )
        self.top, self.bottom = (VectorQuantizer(config, channels) for _ in range(2))
        self.down = ResidualConvolutions(channels, config.num_res_convs)
        self.to_bottom = nn.Conv2d(2 * channels, channels, 1)
        self.to_z = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, encoded: Tensor, labels: Tensor | None, random: BatchRandom) -> BottleneckOutput:
        """Quantizes (B, C, h, w); each loss is the sum over both grids."""
        top = self.top(self.up(encoded), labels, random)
        decoded = self._decoded(top.z)
        bottom = self.bottom(self._joined(self.to_bottom, encoded, decoded), labels, random)
        losses = {name: loss + bottom.losses[name] for name, loss in top.losses.items()}
        metrics = {name: (value + bottom.metrics[name]) / 2 for name, value in top.metrics.items()}
        for scale, output in zip(self.scales, (top, bottom), strict=True):
            metrics[f"perplexity_{describe_grids(scale)}"] = output.metrics["perplexity"]
        z = self._joined(self.to_z, bottom.z, decoded)
        return BottleneckOutput(z, self._row(top, bottom), losses=losses, metrics=metrics)

    def encode(self, encoded: Tensor) -> BottleneckOutput:
        """The codes (B, 1, N) of (B, C, h, w), the top's first, and their z, without losses."""
        with full_precision(encoded.device):
            encoded = encoded.float()
            top = self.top.encode(self.up(encoded))
            decoded = self._decoded(top.z)
            bottom = self.bottom.encode(self._joined(self.to_bottom, encoded, decoded))
            return BottleneckOutput(self._joined(self.to_z, bottom.z, decoded), self._row(top, bottom))

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes (B, 1, N) -> z (B, C, h, w)."""
        top, bottom = split_scales(indices[:, 0], self.scales)
        return self._joined(self.to_z, self.bottom.lookup(bottom), self._decoded(self.top.lookup(top)))

    def codebook_numbers(self, width: int) -> Tensor:
        first = self.scales[0][0] * self.scales[0][1]
        return (torch.arange(width) >= first).long()

    def _decoded(self, top: Tensor) -> Tensor:
        """The top's vectors (B, C, h / 2, w / 2) as the bottom sees them, (B, C, h, w)."""
        height, width = self.scales[1]
        return self.down(top).repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :height, :width]

    @staticmethod
    def _joined(layer: nn.Module, first: Tensor, second: Tensor) -> Tensor:
        return layer(torch.cat([first, second.to(first.dtype)], 1))

    @staticmethod
    def _row(top: BottleneckOutput, bottom: BottleneckOutput) -> Tensor:
        assert top.indices is not None
        assert bottom.indices is not None
        return join_scales([top.indices, bottom.indices])[:, None]

    @torch.no_grad()
    def initialize(self, encoded: Tensor, generator: torch.Generator) -> None:
        """Moves the codes of each grid onto the k-means centres of what it will quantize of (B, C, h, w)."""
        to_top = self.up(encoded)
        self.top.initialize(to_top, generator)
        decoded = self._decoded(self.top.encode(to_top).z)
        self.bottom.initialize(self._joined(self.to_bottom, encoded, decoded), generator)

    def update_codebook(self, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Applies :meth:`VectorQuantizer.update_codebook` to both grids."""
        self.top.update_codebook(reduce_sum)
        self.bottom.update_codebook(reduce_sum)
