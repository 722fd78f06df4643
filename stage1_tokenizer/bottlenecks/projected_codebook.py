"""The `projected` bottleneck: a small transformer maps all codes at once, so that every code gets a gradient.

FVQ, Chang et al. 2025 (arXiv 2509.10140), whose projector is called VQBridge. Axes: N = B h w vectors, D dimensions,
K codes, P codes in a patch, M = K / P patches.
"""

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.bottleneck import BottleneckConfig, pass_gradient
from stage1_tokenizer.bottlenecks.nearest_codes import nearest_codes
from stage1_tokenizer.bottlenecks.vector_quantizer import LearnedCodebookConfig, VectorQuantizer
from twostage.core.config.sections import Count, Depth, Number, Width
from twostage.core.training.random import BatchRandom

__all__ = ["Bridge", "ProjectedCodebook", "ProjectedCodebookConfig"]

PLACEMENTS = 4
"""Rounds in which revived codes are moved."""


@BottleneckConfig.register
class ProjectedCodebookConfig(LearnedCodebookConfig):
    """A codebook that is the output of a projector; the codes before it and the projector are trained."""

    type: Literal["projected"] = "projected"
    commitment_weight: Number = Field(default=0.25, ge=0)
    """Weight of the loss that pulls the encoder towards the codes (alias: beta)."""
    patch_codes: Count = 4
    """Codes that the projector compresses into one token; attention costs (codebook_size / patch_codes)^2."""
    width: Width = 128
    """Channels of the projector's tokens."""
    layers: Depth = 1
    """Transformer layers of the projector."""
    heads: Count = 4
    """Attention heads of each layer."""
    collapse_remedy: ClassVar[str] = (
        "model.bottleneck.revive_below=0.2, a larger model.bottleneck.width, or a smaller "
        "model.bottleneck.codebook_size"
    )

    @model_validator(mode="after")
    def _divides(self) -> "ProjectedCodebookConfig":
        if self.codebook_size % self.patch_codes:
            raise ValueError(
                f"patch_codes {self.patch_codes}: expected a divisor of codebook_size {self.codebook_size}. Change one "
                "of the two"
            )
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads}: expected a divisor of width {self.width}. Change one of the two")
        return self

    def build(self, shape: tuple[int, int, int], num_classes: int) -> "ProjectedCodebook":
        return ProjectedCodebook(self, shape[0])


class Bridge(nn.Module):
    """Codes (K, D) -> codes (K, D): compress patches of codes into tokens, process them with attention, recover codes.

    Its output is added to its input (our choice; the paper replaces the codes), and is 0 at first. So the codes start
    where k-means or a revival has put them.
    """

    def __init__(self, config: ProjectedCodebookConfig, dim: int) -> None:
        super().__init__()
        self.patch_codes = config.patch_codes
        self.compress = nn.Linear(config.patch_codes * dim, config.width)
        self.process = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.width,
                config.heads,
                2 * config.width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.layers)
        )
        self.recover = nn.Linear(config.width, config.patch_codes * dim)
        nn.init.zeros_(self.recover.weight)
        nn.init.zeros_(self.recover.bias)

    def forward(self, codes: Tensor) -> Tensor:
        tokens = self.compress(rearrange(codes, "(m p) d -> 1 m (p d)", p=self.patch_codes))
        for layer in self.process:
            tokens = layer(tokens)
        return codes + rearrange(self.recover(tokens), "1 m (p d) -> (m p) d", p=self.patch_codes)


class ProjectedCodebook(VectorQuantizer):
    """Nearest-code lookup in e = bridge(c), with straight-through gradients and the losses of the VQ-VAE.

    ``codebook`` holds the codes c, and ``projected`` their projection, which ``update_codebook`` computes after each
    update: inference needs no bridge. Attention mixes all codes, so a code moves even if no vector has chosen it.
    """

    projected: Tensor

    def __init__(self, config: ProjectedCodebookConfig, latent_channels: int) -> None:
        super().__init__(config, latent_channels)
        self.commitment_weight = config.commitment_weight
        self.bridge = Bridge(config, latent_channels)
        self.register_buffer("projected", self.codebook.detach().clone())

    def quantize(self, vectors: Tensor, random: BatchRandom) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Vectors (N, D) -> codes (N,), their vectors (N, D), losses by name; collects statistics during training."""
        projected = self.bridge(self.codebook) if self.training else self.projected
        indices = nearest_codes(vectors, projected.detach())
        if self.training:
            self._gather_statistics(vectors.detach(), indices, random)
        chosen = F.embedding(indices, projected)
        return indices, chosen, self.losses(vectors, chosen)

    def losses(self, vectors: Tensor, chosen: Tensor) -> dict[str, Tensor]:
        """`commitment` (weighted) and `codebook`, each a mean over all elements (N, D)."""
        return {
            "commitment": self.commitment_weight * F.mse_loss(vectors, chosen.detach()),
            "codebook": F.mse_loss(chosen, vectors.detach()),
        }

    def passed_on(self, vectors: Tensor, chosen: Tensor, random: BatchRandom) -> Tensor:
        """The codes' vectors (N, D), with a gradient straight through to ``vectors`` (N, D)."""
        return pass_gradient(vectors, chosen.detach())

    def embed(self, indices: Tensor) -> Tensor:
        """Codes (...) -> their projected vectors (..., D), without a gradient."""
        return F.embedding(indices, self.projected)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """All projected vectors (K, D)."""
        return self.projected

    @torch.no_grad()
    def update_codebook(self, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Projects the codes of the last update, and revives dead ones (see :class:`VectorQuantizer`)."""
        self._project()
        super().update_codebook(reduce_sum)

    def restart_like(self, current: VectorQuantizer) -> None:
        """Nothing: a copy with averaged weights gets ``projected`` as it is."""

    def _place(self, vectors: Tensor, where: Tensor) -> None:
        """Moves the projected codes marked in ``where`` (K,) close to ``vectors`` (K, D). A code that moves changes
        what the bridge adds to it, so this is repeated."""
        for _ in range(PLACEMENTS):
            added = self.projected - self.codebook
            self.codebook.copy_(torch.where(where[:, None], vectors - added, self.codebook))
            self._project()

    @torch.no_grad()
    def _project(self) -> None:
        with torch.autocast(self.codebook.device.type, enabled=False):
            self.projected.copy_(self.bridge(self.codebook))
