"""Nearest codes on a CPU, proven: a fast product shortlists codes, and float64 decides between those that remain.

Axes: N vectors, D dimensions, K codes; a tile has n vectors, and its scores are (K, n).
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from twostage.core.machine.onednn import has_onednn, product
from twostage.core.machine.precision import reason_for_precision

__all__ = ["proven_nearest_codes"]

VECTORS = 1 << 13  # prepared at a time
TILE = 1 << 20  # scores computed at a time, which stay in the cache
CODES = 1 << 12  # prepared at a time
BLOCK = 32  # codes of which only the best score is looked at first
PAIRS = 1 << 10  # compared in float64 at a time

Search = Callable[[Tensor], Tensor | None]


def proven_nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The index of each vector's nearest code, (N, D) and (K, D) in float32 -> (N,) int64, as float64 finds it; the
    first of equal codes. It is the same on every processor: what a processor is fast at only changes the shortlist."""
    searches = _searches(codebook)
    search, found = next(searches), []
    for part in vectors.split(VECTORS):
        while (indices := search(part)) is None:
            search = next(searches)
        found.append(indices)
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.long)


def _searches(codebook: Tensor) -> Iterator[Search]:
    """Searches from the fastest to the one that always answers. The others return None if too many codes are closer to
    each other than the rounding of their scores."""
    fast = reason_for_precision(codebook.device)[0] == "bf16"
    dtypes = (torch.bfloat16, torch.float32) if fast else (torch.float32,)
    yield _shortlist(codebook, dtypes[0])
    distinct, places = codebook.unique(dim=0, return_inverse=True)
    first = torch.full((len(distinct),), len(codebook)).scatter_reduce_(0, places, torch.arange(len(codebook)), "amin")
    order = first.argsort()  # so that the first of equally near codes stays the first
    distinct, first = distinct[order], first[order]
    for dtype in dtypes:
        search = _shortlist(distinct, dtype)
        yield lambda x, search=search: None if (found := search(x)) is None else first[found]
    yield lambda x: first[_compare_all(x, distinct)]


def _shortlist(codebook: Tensor, dtype: torch.dtype) -> Search:
    """A search by scores v.e - |e|^2 / 2 rounded to ``dtype``, with v and e relative to the codebook's centre.

    The error of a score is at most (Cauchy-Schwarz; v' and e' are v and e rounded to ``dtype``)
    |v - v'| |e| + |v| |e - e'| + rounding of the float32 sum + rounding of the result. So the nearest code is among
    those whose score is at least the best score minus twice that.
    """
    size, dim = codebook.shape
    centre = codebook.mean(0)
    squares = torch.cat([(e - centre).square_().sum(1) for e in codebook.split(CODES)])
    nearest_to_centre = squares.argmin()
    shortest = codebook[nearest_to_centre] - centre
    bias = (squares - squares[nearest_to_centre]) / -2
    bias_high = bias.to(dtype)
    bias_low = (bias - bias_high.float()).to(dtype)
    # The rows beyond the last code have a score of 0, which is never the best.
    columns = F.pad(torch.stack([bias_high, bias_low, torch.ones_like(bias_high)], 1), (dim, 0, 0, -size % BLOCK))
    errors = []
    for start in range(0, size, CODES):
        e = codebook[start : start + CODES] - centre
        rounded = columns[start : start + len(e), :dim].copy_(e)
        errors.append(e.sub_(rounded).norm(dim=1).max())
    error, length = torch.stack(errors).max(), squares.max().sqrt()
    bias_error = (bias - bias_high.float() - bias_low.float()).abs().max()
    of_sum = (dim + 8) * 2.0**-22
    underflow = (dim + 8) * torch.finfo(torch.float32).tiny
    of_result = 1.01 * torch.finfo(dtype).eps  # twice the rounding of the best score
    limit = max(4, size // 256)  # candidates per vector, on average; more would cost more than the next search
    tile = max(64, TILE // size)
    # One piece of memory for all scores: new ones between many small tensors can scatter the heap.
    # oneDNN's product in float32 cannot use it.
    memory = None if has_onednn(columns) else torch.empty(len(columns) * tile, dtype=dtype)

    def search(vectors: Tensor) -> Tensor | None:
        v = vectors - centre
        rounded, lengths = v.to(dtype), v.norm(dim=1)
        slack = (v - rounded.float()).norm(dim=1) * length + lengths * (1.01 * error + 2 * of_sum * length + underflow)
        slack = 1.01 * (slack + bias_error + of_sum * length.square() + underflow * (1 + length))
        # Adding a number to all scores of a vector makes its best score positive: the bits of positive numbers have
        # their order as integers, which are compared several times as fast.
        offset = (v @ shortest).neg_().clamp_(min=0) + 4 * slack
        rounded = torch.cat([rounded, torch.ones_like(rounded[:, :1]).expand(-1, 2), offset.to(dtype)[:, None]], 1)
        pairs = []
        for start in range(0, len(v), tile):
            part = slice(start, start + tile)
            candidates = _candidates(_scores(columns, rounded[part], memory), slack[part], of_result, limit)
            if candidates is None:
                return None
            row, code = candidates
            pairs.append((row + start, code.clamp_(max=size - 1)))  # NaN alone can point beyond the last code
        rows, candidates = (torch.cat(column) for column in zip(*pairs, strict=True))
        return _decide(vectors, codebook, rows, candidates)

    return search


def _scores(columns: Tensor, rounded: Tensor, memory: Tensor | None) -> Tensor:
    """The scores (K, n), in ``memory`` if it is given."""
    if memory is None:
        return product(columns, rounded, None)
    return torch.mm(columns, rounded.t(), out=memory[: len(columns) * len(rounded)].view(len(columns), -1))


def _candidates(scores: Tensor, slack: Tensor, of_result: float, limit: int) -> tuple[Tensor, Tensor] | None:
    """Vector and code of each pair that can be the best of its vector, or None if there are too many."""
    count, integer = len(slack), torch.int16 if scores.dtype == torch.bfloat16 else torch.int32
    blocks = scores.view(integer).view(-1, BLOCK, count)
    maxima = blocks.amax(1)
    best = maxima.amax(0).view(scores.dtype).float()
    least = (best * (1 - of_result) - 2 * slack).view(torch.int32)
    if integer == torch.int16:
        least = (least >> 16).to(integer)  # rounds down
    place = (maxima >= least).flatten().nonzero()[:, 0]
    if len(place) > limit * count:
        return None
    block, row = place // count, place % count
    place = (blocks[block, :, row] >= least[row, None]).flatten().nonzero()[:, 0]
    if len(place) > limit * count:
        return None
    pair = place // BLOCK
    return row[pair], block[pair] * BLOCK + place % BLOCK


def _decide(vectors: Tensor, codebook: Tensor, rows: Tensor, codes: Tensor) -> Tensor:
    """The nearest of the candidates ``codes`` of the vectors ``rows`` (a pair each) in float64: (N,)."""
    found = torch.zeros(len(vectors), dtype=torch.long)
    found[rows] = codes
    several = (torch.bincount(rows, minlength=len(vectors)) > 1)[rows]
    rows, codes = rows[several], codes[several]
    distances = torch.empty(len(rows), dtype=torch.float64)
    for start in range(0, len(rows), PAIRS):
        pair = slice(start, start + PAIRS)
        v, e = vectors.index_select(0, rows[pair]).double(), codebook.index_select(0, codes[pair])
        distances[pair] = (v - e).square_().sum(1)
    least = torch.full((len(vectors),), math.inf, dtype=torch.float64).scatter_reduce_(0, rows, distances, "amin")
    nearest = distances == least[rows]
    return found.scatter_reduce_(0, rows[nearest], codes[nearest], "amin", include_self=False)


def _compare_all(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The nearest codes by scores in float64: (N,)."""
    centre = codebook.double().mean(0)
    codes = codebook.double() - centre
    bias = codes.square().sum(1) / -2
    return torch.cat([torch.addmm(bias, x.double() - centre, codes.t()).argmax(1) for x in vectors.split(16)])
