"""The nearest code of each vector, and k-means, without ever holding a matrix of all vectors by all codes.

Axes: N vectors, D dimensions, K codes.
"""

import torch
from torch import Tensor

__all__ = ["k_means", "nearest_codes"]

TILE = 1 << 20  # scores held at a time: 4 MiB, which stays in a CPU's cache


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
