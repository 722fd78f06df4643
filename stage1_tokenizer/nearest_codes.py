"""The nearest code of each vector, and k-means, without ever holding a matrix of all vectors by all codes.

Axes: N vectors, D dimensions, K codes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from twostage.core.machine.onednn import has_onednn, pack, product

__all__ = ["k_means", "nearest_codes"]

TILE = 1 << 20  # scores held at a time on a CPU: 4 MiB, which stays in its cache
TILE_ELSEWHERE = 1 << 26  # on a GPU, where few large products are faster than many small ones
CODES = 1 << 13  # codes of a tile at most: 2 MiB of them at 64 dimensions, read again for every tile of vectors


@torch.no_grad()
def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The index of the nearest code of each vector, (N, D) and (K, D) -> (N,) int64.

    argmin |v - e|^2 = argmax v.e - |e|^2 / 2, worked on in tiles: no (N, K) matrix is ever held, and no |v|^2 drowns
    the differences between close codes. An exported program (ONNX, torch.export) does it in one product: its batch is
    not known while it is traced.
    """
    if torch.compiler.is_exporting():
        return torch.addmm(codebook.square().sum(1) * -0.5, vectors, codebook.t()).argmax(1)
    tile = TILE if vectors.device.type == "cpu" else TILE_ELSEWHERE
    best, indices = None, torch.zeros(len(vectors), dtype=torch.long, device=vectors.device)
    for first in range(0, len(codebook), CODES):
        codes = codebook[first : first + CODES]
        score = _scorer(codes)
        size = max(16, tile // len(codes))
        for start in range(0, len(vectors), size):
            part = slice(start, start + size)
            values, places = _row_maxima(score(vectors[part]))
            if len(codes) == len(codebook):
                indices[part] = places
                continue
            if best is None:
                best = vectors.new_full((len(vectors),), -torch.inf)
            better = values > best[part]
            indices[part] = torch.where(better, places + first, indices[part])
            best[part] = torch.maximum(values, best[part])
    return indices


def _scorer(codes: Tensor) -> Callable[[Tensor], Tensor]:
    """Vectors (n, D) -> v.e - |e|^2 / 2 of every code, (n, K)."""
    bias = codes.square().sum(1).mul_(-0.5)
    if has_onednn(codes):
        packed = pack(codes.contiguous())
        return lambda x: product(x, packed, bias)
    return lambda x: torch.addmm(bias, x, codes.t())


def _row_maxima(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row (n, K) and where it is; on a CPU `amax` is fifteen times as fast as `argmax`, so only one
    block of each row is searched."""
    rows, size = scores.shape
    block = 64
    if scores.device.type != "cpu" or size % block or size == block:
        values, places = scores.max(1)
        return values, places
    blocks = scores.view(rows, size // block, block)
    maxima = blocks.amax(2)
    values, chosen = maxima.max(1)
    within = blocks[torch.arange(rows), chosen].argmax(1)
    return values, chosen * block + within


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
