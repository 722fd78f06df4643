"""The `vector` bottleneck: each cell of the latent grid becomes its nearest entry of a codebook.

VQ-VAE, van den Oord et al. 2017 (arXiv 1711.00937). Axes: N = B h w vectors, D dimensions, K codes.
"""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.bottleneck import (
    BottleneckConfig,
    BottleneckOutput,
    GradientRule,
    Quantizer,
    full_precision,
    pass_gradient,
)
from stage1_tokenizer.bottlenecks.nearest_codes import k_means, nearest_codes
from twostage.core.config.sections import Flag, Number, Share
from twostage.core.training.random import BatchRandom

__all__ = ["CodebookConfig", "LearnedCodebookConfig", "VectorConfig", "VectorQuantizer"]

MAX_CANDIDATES = 1024


class LearnedCodebookConfig(BottleneckConfig):
    """A codebook of ``codebook_size`` vectors, which the optimizer trains."""

    codebook_size: Annotated[int, Field(strict=True, ge=2, le=2**31 - 1)] = 512
    """The number of codes. On disk a code takes 16 bits up to 65,536 codes, 32 bits above."""
    ema_decay: Share = 0.95
    """Decay of the counts of the codes' usage. The optimizer moves codes slowly, so the encoder may leave some behind;
    a lower decay notices it sooner."""
    revive_below: Share = 0.05
    """A code used less than this share of the average moves onto a vector of the current batch; 0: never."""


class CodebookConfig(LearnedCodebookConfig):
    """A codebook for nearest-code lookup, and how it is trained."""

    codebook: Literal["ema", "learned", "simvq"] = "ema"
    """How codes are updated. `ema`: by a moving average of the vectors that chose them. `learned`: by the optimizer.
    `simvq`: by the optimizer, through one linear map of fixed random codes, so that all codes move (SimVQ, Zhu et al.
    2024, arXiv 2411.02038)."""
    ema_decay: Share = 0.99
    """Decay of the codes' statistics: their usage and, with `codebook: ema`, the codes themselves."""
    gradient: GradientRule = "straight_through"
    """How the decoder's gradient reaches the encoder: unchanged, or rotated with the vector (the rotation trick)."""
    commitment_weight: Number = Field(default=0.25, ge=0)
    """Weight of the loss that pulls the encoder towards the codes (alias: beta)."""


@BottleneckConfig.register
class VectorConfig(CodebookConfig):
    """One code per cell."""

    type: Literal["vector"] = "vector"
    l2_normalize: Flag = False
    """Compares and passes on vectors and codes at length 1 (Yu et al. 2021, arXiv 2110.04627); meant for few
    `latent_channels`, such as 8."""
    collapse_remedy: ClassVar[str] = (
        "model.bottleneck.revive_below=0.2, a smaller model.bottleneck.codebook_size, or "
        "model.bottleneck.l2_normalize=true with model.latent_channels=8"
    )

    def build(self, shape: tuple[int, int, int], num_classes: int) -> "VectorQuantizer":
        return VectorQuantizer(self, shape[0])


class VectorQuantizer(Quantizer):
    """Nearest-code lookup, in float32 at any mixed precision.

    ``forward`` collects statistics during training; ``update_codebook`` applies them once per update, after the
    optimizer. It sums them over all processes, so every process has the same codebook.

    A quantizer that trains its codebook in another way inherits from this one. It overrides ``choose``, ``losses`` or
    ``passed_on``, or ``quantize`` as a whole.
    """

    codebook: Tensor
    ema_sums: Tensor
    pending_sums: Tensor
    pending_candidates: Tensor
    restarted: Tensor
    starts_from_data = True

    def __init__(self, config: LearnedCodebookConfig, latent_channels: int) -> None:
        super().__init__(config.codebook_size, latent_channels, config.ema_decay)
        self.config = config
        self.kind = config.codebook if isinstance(config, CodebookConfig) else "learned"
        self.l2_normalize = isinstance(config, VectorConfig) and config.l2_normalize
        size, dim = config.codebook_size, latent_channels
        codes = self._normalized(nn.init.normal_(torch.empty(size, dim), std=dim**-0.5))
        if self.kind == "learned":
            self.codebook = nn.Parameter(codes)
        else:
            self.register_buffer("codebook", codes)
        self.projection = nn.Parameter(torch.eye(dim)) if self.kind == "simvq" else None
        # Statistics that the next update applies, besides the counts.
        if self.kind == "ema":
            self.register_buffer("ema_sums", codes.clone())
            self.register_buffer("pending_sums", torch.zeros(size, dim), persistent=False)
        # The codes that the last update has restarted: see `restart_like`.
        self.register_buffer("restarted", torch.zeros(size, dtype=torch.bool), persistent=False)
        candidates = min(size, MAX_CANDIDATES)
        self.register_buffer("pending_candidates", torch.zeros(candidates, dim), persistent=False)

    def forward(self, encoded: Tensor, labels: Tensor | None, random: BatchRandom) -> BottleneckOutput:
        """Quantizes (B, D, h, w). The losses are `commitment` (weighted) and, unless the codebook is `ema`, `codebook`
        (equation 3 of the paper, each a mean over all elements)."""
        with torch.autocast(encoded.device.type, enabled=False):
            batch, _, height, width = encoded.shape
            vectors = self._normalized(rearrange(encoded.float(), "b d h w -> (b h w) d"))
            indices, chosen, losses = self.quantize(vectors, random)
            z = self.passed_on(vectors, chosen, random)
            z = rearrange(z, "(b h w) d -> b d h w", h=height, w=width)
        return BottleneckOutput(z, indices.view(batch, height, width), losses=losses, metrics=self.usage_metrics())

    def passed_on(self, vectors: Tensor, chosen: Tensor, random: BatchRandom) -> Tensor:
        """What the decoder gets for vectors (N, D) whose codes have the vectors ``chosen`` (N, D), during training."""
        assert isinstance(self.config, CodebookConfig)
        return pass_gradient(vectors, chosen.detach(), self.config.gradient)

    def quantize(self, vectors: Tensor, random: BatchRandom) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Vectors (N, D) -> codes (N,), their vectors (N, D), losses by name; collects statistics during training."""
        indices = self.choose(vectors)
        chosen = self.embed(indices)
        if self.training:
            self._gather_statistics(vectors.detach(), indices, random)
        return indices, chosen, self.losses(vectors, chosen)

    def choose(self, vectors: Tensor) -> Tensor:
        """The codes (N,) of vectors (N, D): the nearest ones."""
        return nearest_codes(vectors, self.codes())

    def losses(self, vectors: Tensor, chosen: Tensor) -> dict[str, Tensor]:
        """The losses of vectors (N, D) and the vectors of their codes (N, D), by name."""
        assert isinstance(self.config, CodebookConfig)
        losses = {"commitment": self.config.commitment_weight * F.mse_loss(vectors, chosen.detach())}
        if self.kind != "ema":
            losses["codebook"] = F.mse_loss(chosen, vectors.detach())
        return losses

    def encode(self, encoded: Tensor) -> BottleneckOutput:
        """The codes of (B, D, h, w) and their vectors, without losses."""
        with full_precision(encoded.device):
            vectors = self._normalized(rearrange(encoded.float(), "b d h w -> (b h w) d"))
            indices = self.choose(vectors).view(-1, *encoded.shape[2:])
            return BottleneckOutput(self.lookup(indices), indices)

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes (B, h, w) -> their vectors (B, D, h, w)."""
        return rearrange(self.embed(indices), "b h w d -> b d h w")

    def embed(self, indices: Tensor) -> Tensor:
        """Codes (...) -> their vectors (..., D), differentiable unless the codebook is `ema`."""
        chosen = F.embedding(indices, self.codebook)
        return self._normalized(chosen if self.projection is None else chosen @ self.projection)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """All vectors (K, D) as ``quantize`` compares them."""
        return self._normalized(self.codebook if self.projection is None else self.codebook @ self.projection)

    @torch.no_grad()
    def initialize(self, encoded: Tensor, generator: torch.Generator) -> None:
        """Moves the codes onto the k-means centres of encoded images (B, D, h, w)."""
        vectors = self._normalized(rearrange(encoded.float(), "b d h w -> (b h w) d"))
        centres = self._normalized(k_means(vectors, self.codebook_size, generator))
        self.ema_counts.fill_(1.0)
        self._place(centres, torch.ones_like(self.ema_counts, dtype=torch.bool))

    @torch.no_grad()
    def update_codebook(self, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Applies the statistics collected since the last call.

        Counts and sums decay by ``ema_decay`` (appendix A.1 of the paper; Laplace smoothing as in sonnet). A dead code
        restarts: it moves onto a vector of the batch and gets fresh statistics, because the old ones would move it
        back. If the vectors leave it behind, it soon restarts again.
        """
        super().update_codebook(reduce_sum)
        size = self.codebook_size
        if self.kind == "ema":
            total = self.ema_counts.sum()
            self.ema_sums.lerp_(reduce_sum(self.pending_sums), 1 - self.config.ema_decay)
            smoothed = (self.ema_counts + 1e-5) / (total + size * 1e-5) * total
            self.codebook.copy_(self._normalized(self.ema_sums / smoothed[:, None]))
            self.pending_sums.zero_()
        candidates = reduce_sum(self.pending_candidates)
        fresh = candidates[torch.arange(size, device=candidates.device) % len(candidates)]
        dead = self.restart(self.config.revive_below, fresh.any(1))  # a candidate of zeros comes from a skipped batch
        self._place(fresh, dead)
        self.restarted.copy_(dead)
        self.pending_candidates.zero_()

    @torch.no_grad()
    def restart_like(self, current: "VectorQuantizer") -> None:
        """Restarts the codes that the last update of ``current`` has restarted, at the same places.

        A copy with averaged weights calls it before it averages: halfway between a code's old and new place there may
        be no vectors.
        """
        if self.kind != "ema":
            self._place(current.codes(), current.restarted)

    def _place(self, vectors: Tensor, where: Tensor) -> None:
        """Moves the codes marked in ``where`` (K,) onto ``vectors`` (K, D), each as if chosen as often as its count."""
        if self.projection is None:
            self.codebook.copy_(torch.where(where[:, None], vectors, self.codebook))
        else:
            # Fold the linear map into the codes and reset it: mapping the moved codes back through its inverse would
            # fail if it is nearly singular.
            some = where.any()
            moved = torch.where(where[:, None], vectors, self.codes())
            self.codebook.copy_(torch.where(some, moved, self.codebook))
            identity = torch.eye(len(self.projection), dtype=moved.dtype, device=moved.device)
            self.projection.copy_(torch.where(some, identity, self.projection))
        if self.kind == "ema":
            self.ema_sums.copy_(torch.where(where[:, None], vectors * self.ema_counts[:, None], self.ema_sums))

    @torch.no_grad()
    def _gather_statistics(self, vectors: Tensor, indices: Tensor, random: BatchRandom) -> None:
        finite = vectors.sum().isfinite()  # a batch whose update is skipped must leave no trace
        self.count(indices, finite)
        if self.kind == "ema":
            self.pending_sums.index_add_(0, indices, torch.where(finite, vectors, 0.0))
        # Candidates are positions in the global batch; each process fills in those of its own part.
        per_sample = len(vectors) // (random.rows.stop - random.rows.start)
        generator = random.generator("revival", vectors.device)
        places = torch.randint(
            random.batch_size * per_sample, (len(self.pending_candidates),), generator=generator, device=vectors.device
        )
        places -= random.rows.start * per_sample
        mine = (places >= 0) & (places < len(vectors))
        chosen = vectors.index_select(0, places.clamp(0, len(vectors) - 1))
        self.pending_candidates += torch.where((mine & finite)[:, None], chosen, 0.0)

    def _normalized(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.l2_normalize else vectors
