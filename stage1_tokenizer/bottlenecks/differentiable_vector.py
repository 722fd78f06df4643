"""The `diveq` bottleneck: the nearest code as the vector plus an error whose length has a gradient.

DiVeQ, Vali et al. 2025 (arXiv 2509.26469). Axes: N = B h w vectors, D dimensions, K codes.
"""

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from stage1_tokenizer.bottlenecks.bottleneck import BottleneckConfig
from stage1_tokenizer.bottlenecks.vector_quantizer import LearnedCodebookConfig, VectorQuantizer
from twostage.core.config.sections import Number
from twostage.core.training.random import BatchRandom

__all__ = ["DiVeQ", "DiVeQConfig"]

EPSILON = 1e-12  # added to a squared length: the derivative of the root is infinite at 0


@BottleneckConfig.register
class DiVeQConfig(LearnedCodebookConfig):
    """A codebook that only the decoder's gradient trains, without commitment and codebook losses."""

    type: Literal["diveq"] = "diveq"
    noise_variance: Number = Field(default=1e-3, ge=0)
    """Variance of the noise, in each dimension, on the direction from a vector to its code."""
    collapse_remedy: ClassVar[str] = "model.bottleneck.revive_below=0.2 or a smaller model.bottleneck.codebook_size"

    def build(self, shape: tuple[int, int, int], num_classes: int) -> "DiVeQ":
        return DiVeQ(self, shape[0])


class DiVeQ(VectorQuantizer):
    """Nearest-code lookup with z_q = z + |e - z| sg[v / |v|], v = e - z + noise (section 3.1 of the paper).

    The length |e - z| has a gradient for the vector z and for its code e, so no other loss is needed. Unused codes get
    none, and are revived as in :class:`VectorQuantizer`. ``encode`` returns the codes themselves, without noise.
    """

    def __init__(self, config: DiVeQConfig, latent_channels: int) -> None:
        super().__init__(config, latent_channels)
        self.noise_std = config.noise_variance**0.5

    def losses(self, vectors: Tensor, chosen: Tensor) -> dict[str, Tensor]:
        """None: the decoder's gradient trains the vectors and the codes."""
        return {}

    def passed_on(self, vectors: Tensor, chosen: Tensor, random: BatchRandom) -> Tensor:
        """z_q (N, D) for vectors z (N, D) and their codes e (N, D), both with a gradient."""
        error = chosen - vectors
        images = random.rows.stop - random.rows.start
        noise = random.normal("diveq", (len(vectors) // images, vectors.shape[1]), vectors.device)
        direction = F.normalize(error.detach() + self.noise_std * noise.flatten(0, 1), dim=1)
        return vectors + (error.square().sum(1, keepdim=True) + EPSILON).sqrt() * direction
