"""The `product` bottleneck: groups of channels, each with a quantizer of its own.

Product quantization, Jegou et al. 2011 (IEEE TPAMI 33(1)). Axes: B images, C channels in G groups, h and w cells.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from einops import rearrange
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.bottleneck import Bottleneck, BottleneckConfig, BottleneckOutput
from stage1_tokenizer.bottlenecks.vector_quantizer import VectorConfig
from twostage.core.config.sections import Depth
from twostage.core.errors import InputError
from twostage.core.training.random import BatchRandom, seed_for

__all__ = ["ProductConfig", "ProductQuantizer"]


@BottleneckConfig.register
class ProductConfig(BottleneckConfig):
    """``groups`` codes per cell, each for an equal part of `model.latent_channels`."""

    type: Literal["product"] = "product"
    groups: Annotated[Depth, Field(ge=2)] = 2
    """Groups of channels. A prior sees a cell's codes side by side, as a grid (h, w * groups)."""
    each: BottleneckConfig = VectorConfig()
    """The quantizer of each group, such as `{type: vector, codebook_size: 64}`; no weights are shared."""
    collapse_remedy: ClassVar[str] = "a smaller codebook in model.bottleneck.each, or fewer model.bottleneck.groups"

    def build(self, shape: tuple[int, int, int], num_classes: int) -> "ProductQuantizer":
        part = (shape[0] // self.groups, *shape[1:])
        parts = [self.each.build(part, num_classes) for _ in range(self.groups)]
        if not parts[0].codebook_size or parts[0].scales:
            why = "has codes of several scales" if parts[0].scales else "has no codes"
            raise InputError(
                f"model.bottleneck.each.type {self.each.type!r}: {why}, expected a bottleneck with one grid of codes. "
                "Set model.bottleneck.each={type: vector}"
            )
        return ProductQuantizer(parts)

    def check_channels(self, latent_channels: int) -> None:
        if latent_channels % self.groups:
            raise ValueError(
                f"latent_channels {latent_channels}: product needs a multiple of its {self.groups} groups; set "
                f"latent_channels to {-(-latent_channels // self.groups) * self.groups}"
            )
        try:
            self.each.check_channels(latent_channels // self.groups)
        except ValueError as error:
            raise ValueError(f"in each of {self.groups} groups: {error} in each group") from None

    @model_serializer(mode="wrap")
    def _with_type(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A hash of the settings without defaults still has the type of `each`."""
        found = handler(self)
        return found | {"each": {"type": self.each.type} | found["each"]} if "each" in found else found


class ProductQuantizer(Bottleneck):
    """Quantizers side by side, each for an equal part of the channels. A cell's codes lie side by side in a grid
    (B, h, w * depth)."""

    def __init__(self, parts: Sequence[Bottleneck]) -> None:
        super().__init__()
        first = parts[0]
        self.groups = nn.ModuleList(parts)
        self.codebook_size, self.depth = first.codebook_size, first.depth * len(parts)
        self.digits = first.digits
        self.encoded_channels = first.encoded_channels * len(parts)
        self.starts_from_data = first.starts_from_data

    @property
    def quantizers(self) -> list[Bottleneck]:
        """The quantizers of all groups."""
        return [group for group in self.groups if isinstance(group, Bottleneck)]

    def forward(self, encoded: Tensor, labels: Tensor | None, random: BatchRandom) -> BottleneckOutput:
        """Quantizes (B, encoded_channels, h, w). Losses and metrics are means over the groups, so a mean over channels
        stays one."""
        outputs = []
        for place, (quantizer, part) in enumerate(self._split(encoded)):
            quantizer.progress = self.progress
            own = BatchRandom(seed_for(random.seed, "group", place), random.rows, random.batch_size)
            outputs.append(quantizer(part, labels, own))
        losses, metrics = (
            {name: torch.stack([group[name] for group in groups]).mean() for name in groups[0]}
            for groups in ([output.losses for output in outputs], [output.metrics for output in outputs])
        )
        return BottleneckOutput(
            torch.cat([output.z for output in outputs], 1), self._joined(outputs), None, losses, metrics
        )

    def encode(self, encoded: Tensor) -> BottleneckOutput:
        """The codes of (B, encoded_channels, h, w) and their vectors, without losses."""
        outputs = [quantizer.encode(part) for quantizer, part in self._split(encoded)]
        return BottleneckOutput(torch.cat([output.z for output in outputs], 1), self._joined(outputs))

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes (B, h, w * depth) -> their vectors (B, C, h, w)."""
        grids = rearrange(indices, "b h (w g d) -> g b h (w d)", g=len(self.groups), d=self.depth // len(self.groups))
        parts = [quantizer.lookup(grid) for quantizer, grid in zip(self.quantizers, grids, strict=True)]
        return torch.cat(parts, 1)

    @torch.no_grad()
    def initialize(self, encoded: Tensor, generator: torch.Generator) -> None:
        """Starts the codebook of each group from its channels of (B, encoded_channels, h, w)."""
        for quantizer, part in self._split(encoded):
            quantizer.initialize(part, generator)

    def update_codebook(self, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Updates the codebook of each group."""
        for quantizer in self.quantizers:
            quantizer.update_codebook(reduce_sum)

    def _split(self, encoded: Tensor) -> list[tuple[Bottleneck, Tensor]]:
        return list(zip(self.quantizers, encoded.chunk(len(self.groups), 1), strict=True))

    def _joined(self, outputs: list[BottleneckOutput]) -> Tensor:
        """The codes of all groups, (B, h, w * depth)."""
        codes = torch.stack([output.indices for output in outputs if output.indices is not None])
        return rearrange(codes, "g b h (w d) -> b h (w g d)", d=self.depth // len(self.groups))
