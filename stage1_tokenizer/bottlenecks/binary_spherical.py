"""The `binary_spherical` bottleneck: vectors on the unit sphere, whose signs are the bits of the code.

BSQ, Zhao et al. 2024 (arXiv 2406.07548). Axes: N = B h w vectors, D channels, 2^D codes.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor

from stage1_tokenizer.bottlenecks.bottleneck import BottleneckConfig, BottleneckOutput, Quantizer
from stage1_tokenizer.bottlenecks.lookup_free import MAX_BITS, bits_of, code_of_signs, entropies
from twostage.core.config.sections import Number
from twostage.core.training.random import BatchRandom

__all__ = ["BinarySpherical", "BinarySphericalConfig"]


@BottleneckConfig.register
class BinarySphericalConfig(BottleneckConfig):
    """2^`model.latent_channels` codes, the corners of a cube inside the unit sphere."""

    type: Literal["binary_spherical"] = "binary_spherical"
    entropy_weight: Number = Field(default=0.1, ge=0)
    """Weight of the entropy terms: each vector should choose one code clearly, and all vectors together should use
    every code equally often."""
    diversity_weight: Number = Field(default=1.0, ge=0)
    """Weight of the second entropy term relative to the first (alias: gamma)."""
    temperature: Number = Field(default=1.0, gt=0)
    """Temperature of the soft choice that the entropies measure: lower is harder."""
    group_bits: int = Field(default=9, strict=True, ge=1, le=MAX_BITS)
    """Bits whose joint choice the second entropy term measures; it takes different groups of bits for independent.
    1: all bits."""
    collapse_remedy: ClassVar[str] = (
        "a higher model.bottleneck.entropy_weight, a higher model.bottleneck.diversity_weight, or a smaller "
        "model.latent_channels"
    )

    def build(self, shape: tuple[int, int, int], num_classes: int) -> "BinarySpherical":
        return BinarySpherical(self, shape[0])

    def check_channels(self, latent_channels: int) -> None:
        if latent_channels > MAX_BITS:
            raise ValueError(
                f"latent_channels {latent_channels}: binary_spherical has 2^latent_channels codes; expected at most "
                f"{MAX_BITS}. Set a smaller latent_channels"
            )


class BinarySpherical(Quantizer):
    """sign(u) / sqrt(D) for u = z / |z|, with straight-through gradients, and the entropy terms (section 4 of the
    paper).

    Vector and code both have length 1, so the error is bounded and no commitment loss is needed. The soft choice is
    p(c) ~ exp(-|u - c|^2 / T), a product over bits, each 1 with probability sigmoid(4 u_d / (T sqrt(D))). The entropy
    of one vector's choice is a sum over bits. The entropy of the mean choice is approximated by the sum of those of
    groups of bits, which is at least the true one; no (N, 2^D) matrix is needed.
    """

    def __init__(self, config: BinarySphericalConfig, latent_channels: int) -> None:
        super().__init__(2**latent_channels, latent_channels)
        self.config, self.digits = config, (2,) * latent_channels

    def forward(self, encoded: Tensor, labels: Tensor | None, random: BatchRandom) -> BottleneckOutput:
        """Quantizes (B, D, h, w). The weighted losses are `code_entropy` (nats, of a vector's choice) and
        `codebook_entropy` (the negative entropy in nats of the mean choice over all processes)."""
        with torch.autocast(encoded.device.type, enabled=False):
            unit = F.normalize(encoded.float(), dim=1)
            output = self.encode(unit)
            assert output.indices is not None
            losses = {}
            if self.config.entropy_weight:
                slope = 4 / (self.config.temperature * self.encoded_channels**0.5)
                logits = slope * rearrange(unit, "b d h w -> (b h w) d")
                single, joint = entropies(logits, self.config.group_bits, share=self.training)
                losses["code_entropy"] = self.config.entropy_weight * single
                losses["codebook_entropy"] = -self.config.entropy_weight * self.config.diversity_weight * joint
            if self.training:
                self.count(output.indices.flatten())
            z = unit + (output.z - unit).detach()
        return BottleneckOutput(z, output.indices, losses=losses, metrics=self.usage_metrics())

    def encode(self, encoded: Tensor) -> BottleneckOutput:
        """The codes of (B, D, h, w) and their vectors, without losses."""
        indices = code_of_signs(encoded)
        return BottleneckOutput(self.lookup(indices), indices)

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes (B, h, w) -> their vectors (B, D, h, w) of -1 / sqrt(D) and 1 / sqrt(D)."""
        return bits_of(indices, self.encoded_channels) / self.encoded_channels**0.5
