"""The nearest code of each vector, a neighbour of each code, and k-means, without a matrix of all pairs.

Axes: N vectors, D dimensions, K codes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from stage1_tokenizer.bottlenecks.shortlist import proven_nearest_codes
from twostage.core.machine.onednn import has_onednn, pack, product

__all__ = ["k_means", "nearest_codes", "neighbour"]

CPU_TILE = 1 << 20  # scores computed at a time on a CPU: 4 MiB, which stays in its cache
GPU_TILE = 1 << 26  # a GPU is faster with few large products than with many small ones
TOPK_MEMORY = 4  # a GPU sorts for `topk`, in about this many times the memory of the scores


@torch.no_grad()
def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The index of each vector's nearest code, (N, D) and (K, D) -> (N,) int64.

    Computes argmin |v - e|^2 = argmax v.e - |e|^2 / 2 in tiles. This needs no (N, K) matrix, and no |v|^2, whose
    rounding would hide the differences between close codes. On a CPU the codes are those of float64. An exported
    program (ONNX, torch.export) computes it in one product, because the size of its batch is unknown during tracing.
    """
    if torch.compiler.is_exporting():
        return torch.addmm(codebook.square().sum(1) * -0.5, vectors, codebook.t()).argmax(1)
    if vectors.device.type == "cpu":
        return proven_nearest_codes(vectors, codebook)
    score, size = _scorer(codebook), max(16, GPU_TILE // len(codebook))
    return torch.cat([score(part).argmax(1) for part in vectors.split(size)])


def _scorer(codes: Tensor) -> Callable[[Tensor], Tensor]:
    """Vectors (n, D) -> v.e - |e|^2 / 2 of every code, (n, K)."""
    bias = codes.square().sum(1).mul_(-0.5)
    if has_onednn(codes):
        packed = pack(codes.contiguous())
        return lambda x: product(x, packed, bias)
    return lambda x: torch.addmm(bias, x, codes.t())


@torch.no_grad()
def neighbour(codebook: Tensor, codes: Tensor, ranks: Tensor, count: int) -> Tensor:
    """One of the ``count`` nearest other codes of each of ``codes`` (N,) in a codebook (K, D): (N,) int64.

    Args:
        ranks: which one (N,): 0 is the nearest, ``count - 1`` the last.
    """
    tile = CPU_TILE if codebook.device.type == "cpu" else GPU_TILE
    size = max(16, tile // TOPK_MEMORY // len(codebook))
    score = _scorer(codebook)
    found = torch.empty_like(codes)
    for start in range(0, len(codes), size):
        part = slice(start, start + size)
        own = codes[part, None]
        scores = score(codebook[codes[part]]).scatter_(1, own, -torch.inf)  # a code is no neighbour of itself
        found[part] = scores.topk(count, dim=1).indices.gather(1, ranks[part, None])[:, 0]
    return found


@torch.no_grad()
def k_means(vectors: Tensor, num_centres: int, generator: torch.Generator, iterations: int = 10) -> Tensor:
    """Lloyd's algorithm, (N, D) -> centres (num_centres, D). It starts at random vectors; an empty cluster restarts at
    a random vector."""
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
