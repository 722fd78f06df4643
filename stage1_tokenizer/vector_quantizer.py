"""The `vector` bottleneck: each cell of the latent grid becomes its nearest entry of a codebook.

VQ-VAE, van den Oord et al. 2017 (arXiv 1711.00937). Axes: N = B h w vectors, D dimensions, K codes.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from core.config import Number, Section, Share
from core.random import BatchRandom
from stage1_tokenizer.bottleneck_output import BottleneckOutput

__all__ = ["VectorConfig", "VectorQuantizer", "k_means", "nearest_codes"]

TILE = 1 << 20  # scores held at a time: 4 MiB, which stays in a CPU's cache
MAX_CANDIDATES = 1024


class VectorConfig(Section):
    """A codebook of ``codebook_size`` vectors."""

    type: Literal["vector"] = "vector"
    codebook_size: Annotated[int, Field(strict=True, ge=2, le=2**31)] = 512
    codebook: Literal["ema", "learned"] = "ema"
    """Who moves the codes: a moving average of the vectors that chose them, or the optimizer."""
    ema_decay: Share = 0.99
    """Of the codes' statistics (usage, and with `ema` the codes themselves)."""
    commitment_weight: Number = Field(default=0.25, ge=0)
    """Scales the pull of the encoder towards the codes, and that alone (alias: beta)."""
    revive_below: Share = 0.05
    """A code used less than this share of the average is put onto a vector of the current batch; 0: never."""


class VectorQuantizer(nn.Module):
    """Nearest-code lookup with straight-through gradients, in float32 whatever the mixed precision.

    ``forward`` gathers statistics while training; ``update_codebook`` uses them, once an update, after the optimizer.
    The statistics of all processes are summed, so every process has the same codebook.
    """

    codebook: Tensor
    ema_counts: Tensor
    ema_sums: Tensor
    pending_counts: Tensor
    pending_sums: Tensor
    pending_candidates: Tensor

    def __init__(self, config: VectorConfig, latent_channels: int) -> None:
        super().__init__()
        self.config, self.encoded_channels = config, latent_channels
        size, dim = config.codebook_size, latent_channels
        codes = torch.randn(size, dim) * dim**-0.5
        if config.codebook == "learned":
            self.codebook = nn.Parameter(codes)
        else:
            self.register_buffer("codebook", codes)
            self.register_buffer("ema_sums", codes.clone())
        self.register_buffer("ema_counts", torch.ones(size))
        # What an update still has to take in: counts | sums | candidates, in one tensor for one reduction.
        candidates = min(size, MAX_CANDIDATES)
        self.register_buffer("pending_counts", torch.zeros(size), persistent=False)
        self.register_buffer("pending_sums", torch.zeros(size, dim), persistent=False)
        self.register_buffer("pending_candidates", torch.zeros(candidates, dim), persistent=False)

    def forward(self, encoded: Tensor, random: BatchRandom) -> BottleneckOutput:
        """Quantizes (B, D, h, w); the losses are `commitment` (weighted) and, for a learned codebook, `codebook`
        (equation 3 of the paper, each a mean over all elements)."""
        with torch.autocast(encoded.device.type, enabled=False):
            encoded = encoded.float()
            vectors = rearrange(encoded, "b d h w -> (b h w) d")
            indices = nearest_codes(vectors, self.codebook)
            chosen = F.embedding(indices, self.codebook)  # (N, D)
            losses = {"commitment": self.config.commitment_weight * F.mse_loss(vectors, chosen.detach())}
            if self.config.codebook == "learned":
                losses["codebook"] = F.mse_loss(chosen, vectors.detach())
            if self.training:
                self._gather_statistics(vectors.detach(), indices, random)
            batch, _, height, width = encoded.shape
            z_q = rearrange(chosen, "(b h w) d -> b d h w", h=height, w=width)
            z = encoded + (z_q - encoded).detach()  # the decoder's gradient goes straight to the encoder
            grid = indices.view(batch, height, width)
        return BottleneckOutput(z, grid, losses, self._usage_metrics())

    def encode(self, encoded: Tensor) -> BottleneckOutput:
        """The codes and their vectors, no losses."""
        vectors = rearrange(encoded.float(), "b d h w -> b h w d")
        indices = nearest_codes(vectors.reshape(-1, vectors.shape[-1]), self.codebook).view(vectors.shape[:-1])
        return BottleneckOutput(self.lookup(indices), indices)

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes (B, h, w) -> their vectors (B, D, h, w)."""
        return rearrange(F.embedding(indices, self.codebook), "b h w d -> b d h w")

    @torch.no_grad()
    def initialize(self, encoded: Tensor, generator: torch.Generator) -> None:
        """Puts the codes onto the k-means centres of encoded images (B, D, h, w)."""
        vectors = rearrange(encoded.float(), "b d h w -> (b h w) d")
        centres = k_means(vectors, self.config.codebook_size, generator)
        self.codebook.copy_(centres)
        if self.config.codebook == "ema":
            self.ema_sums.copy_(centres)
        self.ema_counts.fill_(1.0)

    @torch.no_grad()
    def update_codebook(self, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Takes in the statistics since the last call, summed over the processes by ``reduce_sum``.

        Counts and sums decay by ``ema_decay`` (appendix A.1 of the paper; Laplace smoothing as in sonnet). A code that
        has fallen out of use gets a vector of the batch and, or the next update would undo it, fresh statistics.
        """
        pending = torch.cat([self.pending_sums, self.pending_candidates])
        counts, pending = reduce_sum(self.pending_counts), reduce_sum(pending)
        sums, candidates = pending.split([len(self.pending_sums), len(self.pending_candidates)])
        keep, size = self.config.ema_decay, self.config.codebook_size
        self.ema_counts.lerp_(counts, 1 - keep)
        total = self.ema_counts.sum()
        average = total / size
        if self.config.codebook == "ema":
            self.ema_sums.lerp_(sums, 1 - keep)
            smoothed = (self.ema_counts + 1e-5) / (total + size * 1e-5) * total
            self.codebook.copy_(self.ema_sums / smoothed[:, None])
        dead = self.ema_counts < self.config.revive_below * average
        fresh = candidates[torch.arange(size, device=candidates.device) % len(candidates)]
        self.codebook.copy_(torch.where(dead[:, None], fresh, self.codebook))
        if self.config.codebook == "ema":
            self.ema_sums.copy_(torch.where(dead[:, None], fresh * average, self.ema_sums))
        self.ema_counts.copy_(torch.where(dead, average, self.ema_counts))
        for buffer in (self.pending_counts, self.pending_sums, self.pending_candidates):
            buffer.zero_()

    @torch.no_grad()
    def _gather_statistics(self, vectors: Tensor, indices: Tensor, random: BatchRandom) -> None:
        self.pending_counts.index_add_(0, indices, torch.ones_like(vectors[:, 0]))
        if self.config.codebook == "ema":
            self.pending_sums.index_add_(0, indices, vectors)
        # Candidates are places in the global batch; each process fills in those that are its own.
        per_sample = len(vectors) // (random.rows.stop - random.rows.start)
        generator = random.generator("revival", vectors.device)
        places = torch.randint(
            random.batch_size * per_sample, (len(self.pending_candidates),), generator=generator, device=vectors.device
        )
        places -= random.rows.start * per_sample
        mine = (places >= 0) & (places < len(vectors))
        self.pending_candidates += vectors[places.clamp(0, len(vectors) - 1)] * mine[:, None]

    def _usage_metrics(self) -> dict[str, Tensor]:
        shares = self.ema_counts / self.ema_counts.sum()
        return {"perplexity": torch.special.entr(shares).sum().exp()}


@torch.no_grad()
def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The index of the nearest code of each vector, (N, D) and (K, D) -> (N,) int64.

    argmin |v - e|^2 = argmax v.e - |e|^2 / 2, worked on in tiles: no (N, K) matrix is ever held, and no |v|^2 drowns
    the differences between close codes.
    """
    bias = codebook.square().sum(1).mul_(-0.5)
    rows = min(len(vectors), max(16, TILE // len(codebook)))
    scores = vectors.new_empty(rows, len(codebook))
    indices = torch.empty(len(vectors), dtype=torch.long, device=vectors.device)
    transposed = codebook.t()
    for start in range(0, len(vectors), rows):
        tile = vectors[start : start + rows]
        torch.argmax(torch.addmm(bias, tile, transposed, out=scores[: len(tile)]), 1, out=indices[start : start + rows])
    return indices


@torch.no_grad()
def k_means(vectors: Tensor, num_centres: int, generator: torch.Generator, iterations: int = 10) -> Tensor:
    """Lloyd's algorithm from random vectors, (N, D) -> (num_centres, D); an empty cluster starts again at a vector."""
    device = vectors.device
    order = torch.randperm(len(vectors), generator=generator, device=generator.device).to(device)
    centres = vectors[order[torch.arange(num_centres, device=device) % len(vectors)]].clone()
    for _ in range(iterations):
        indices = nearest_codes(vectors, centres)
        counts = torch.zeros(num_centres, device=device).index_add_(0, indices, torch.ones_like(vectors[:, 0]))
        sums = torch.zeros_like(centres).index_add_(0, indices, vectors)
        draws = torch.randint(len(vectors), (num_centres,), generator=generator, device=generator.device).to(device)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], vectors[draws])
    return centres
