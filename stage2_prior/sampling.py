"""Sampling as pure functions: logits and noise in, codes out. Nothing here draws random numbers
from a global generator.

Axes: B images, N cells of a grid, K codes.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stage2_prior.sampling_config import SamplingConfig
from twostage.core.conditions.context import Context
from twostage.core.training.random import seed_for

__all__ = [
    "Branches",
    "CodeNoise",
    "choose",
    "filter_logits",
    "guidance_at",
    "gumbel_noise",
    "image_seeds",
    "uniform_noise",
]


GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
FIRST_MIXES, LAST_SHIFT = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)), 31
"""The constants of SplitMix64, as int64 holds them."""
NOISE_BLOCK = 2**15
"""The numbers that :class:`CodeNoise` computes at a time, or those of one cell: many small operations take longer."""


def image_seeds(seed: int, first: int, count: int) -> list[int]:
    """The seeds of images ``first`` to ``first + count - 1``. Image i's seed depends on ``seed`` and i only."""
    return [seed_for(seed, "image", i) for i in range(first, first + count)]


def uniform_noise(seeds: list[int], count: int) -> Tensor:
    """``count`` uniform numbers in [0, 1) for each seed, (len(seeds), count) float64."""
    return torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(key=s)).random(count) for s in seeds]))


class CodeNoise:
    """Gumbel noise for the codes of each cell: the code with the largest sum of logit and noise is a sample (the
    Gumbel-max trick). Unlike a code that inverts its cumulative distribution, it mostly stays the same if the logits
    change a little, which :mod:`stage2_prior.networks.jumps` needs.

    Each number is a hash of its seed, its cell and its code, namely an output of SplitMix64 (Steele, Lea and Flood
    2014, figure 13), which can be computed in any order and on the device that needs it. Its bits are the same on all
    devices. (A GPU would wait for a processor: 64 images and 16,384 codes are a million numbers for each cell.)

    Args:
        seeds: of the B images, at least 0.
        device: where the noise is needed; None: the CPU.
    """

    def __init__(self, seeds: list[int], codebook_size: int, device: torch.device | None = None) -> None:
        self.codebook_size, self.cell = codebook_size, 0
        hashes = -(-codebook_size // 2)  # each gives the numbers of two codes
        self.block = max(1, NOISE_BLOCK // (len(seeds) * codebook_size))
        self._starts = torch.tensor([_signed(seed) for seed in seeds]).to(device, non_blocking=True)[:, None, None]
        self._of_codes = torch.arange(1, hashes + 1, device=device) * GOLDEN_GAMMA
        self._per_cell = _signed(hashes * GOLDEN_GAMMA)
        self._ahead = self._starts.new_empty(len(seeds), 0, codebook_size, dtype=torch.float32)

    def at(self, cells: Tensor) -> Tensor:
        """The noise of some cells, (n,) int64 on the device: (B, n, K) float32, finite."""
        hashed = self._starts + (cells * self._per_cell)[:, None] + self._of_codes
        for shift, factor in FIRST_MIXES:
            _xor_shifted(hashed, shift).mul_(factor)
        return gumbel_noise(_xor_shifted(hashed, LAST_SHIFT).view(torch.int32)[..., : self.codebook_size])

    def next(self, cells: int) -> Tensor:
        """The noise of the next cells, (B, cells, K) float32."""
        if cells > self._ahead.shape[1]:
            ready = self._ahead.shape[1]
            numbers = torch.arange(self.cell + ready, self.cell + max(cells, self.block), device=self._of_codes.device)
            self._ahead = torch.cat([self._ahead, self.at(numbers)], 1)
        noise, self._ahead = self._ahead[:, :cells], self._ahead[:, cells:]
        self.cell += cells
        return noise

    def skip(self, cells: int) -> None:
        """Continues after the next cells, whose noise is never computed."""
        self.cell, self._ahead = self.cell + cells, self._ahead[:, cells:]


def gumbel_noise(bits: Tensor) -> Tensor:
    """Gumbel noise, float32 and finite, from random bits, int32, of which it uses 23: as odd multiples of 2^-24, which
    are neither 0 nor 1."""
    uniform = bits.bitwise_and(2**23 - 1).float().mul_(2.0**-23).add_(2.0**-24)
    return uniform.log_().neg_().log_().neg_()


def _xor_shifted(x: Tensor, shift: int) -> Tensor:
    """x ^ (x >> shift) in place, with x as an unsigned number."""
    return x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (64 - shift) - 1))


def _signed(number: int) -> int:
    """An integer modulo 2^64, as int64 holds it."""
    return (number + 2**63) % 2**64 - 2**63


@dataclass(frozen=True)
class Branches:
    """The contexts with which each code is predicted. With guidance there are several: that of all conditions first,
    then those of fewer and fewer conditions, and last that of none."""

    context: Context
    """Of n B images: the B images of the first branch, then those of the second ..."""
    scales: tuple[float, ...] = ()
    """The n - 1 guidance scales: the first is that of what the first branch knows beyond the second, and so on."""

    @property
    def count(self) -> int:
        """n."""
        return len(self.scales) + 1

    @property
    def images(self) -> int:
        """B."""
        return self.context.size // self.count

    def rows(self, rows: Tensor) -> "Branches":
        """The branches of some of the B images, by their numbers."""
        return replace(self, context=self.context.rows(torch.cat([rows + i * self.images for i in range(self.count)])))

    def repeat(self, codes: Tensor) -> Tensor:
        """Codes (B, ...) for all branches: (n B, ...)."""
        return codes if self.count == 1 else codes.repeat(self.count, *[1] * (codes.ndim - 1))

    def combine(self, logits: Tensor, share: float | Tensor = 1.0) -> Tensor:
        """The guided logits (R, K) from those of all branches (n R, K); ``share`` is that of :func:`guidance_at`.

        Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): each branch is the one with fewer conditions
        plus scale x difference. With several conditions the differences are added up (Brooks et al. 2022, arXiv
        2211.09800, equation 3).
        """
        if self.count == 1:
            return logits
        parts = logits.chunk(self.count)
        total = parts[-1]
        for scale, more, fewer in zip(self.scales[::-1], parts[-2::-1], parts[:0:-1], strict=True):
            grown = 1 + (scale - 1) * share
            total = torch.lerp(fewer, more, grown) if total is fewer else total + grown * (more - fewer)
        return total


def guidance_at(step: int, steps: int, sampling: SamplingConfig) -> float:
    """How far guidance has grown at ``step``, from 0, of ``steps``: a guidance scale is then 1 + (scale - 1) f(x),
    where x goes from 0 at the first step to 1 at the last, and f is the schedule. Returns f(x)."""
    progress = step / (steps - 1) if steps > 1 else 1.0
    match sampling.guidance_schedule:
        case "constant":
            return 1.0
        case "linear":
            return progress
        case "cosine":
            return (1 - math.cos(math.pi * progress)) / 2


def filter_logits(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Applies temperature, then top-k (at most K), then top-p to logits (..., K). Excluded codes become -inf."""
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if sampling.top_k is not None:
        likely = logits.topk(sampling.top_k, dim=-1).indices  # exactly k, even if others tie with the last one
        logits = torch.full_like(logits, -torch.inf).scatter(-1, likely, logits.gather(-1, likely))
    if sampling.top_p is not None and sampling.top_p < 1:  # at 1, rounding would exclude the rarest codes
        ordered, order = logits.sort(dim=-1, descending=True)
        shares = ordered.softmax(-1)
        beyond = shares.cumsum(-1) - shares >= sampling.top_p  # the first code is never beyond
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits


def choose(logits: Tensor, noise: Tensor) -> Tensor:
    """Samples a code for each row by inverting its cumulative distribution: (..., K) and uniform noise (...) -> (...)
    int64. Each code depends on its own row and its own noise only."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    wanted = noise.to(cumulative).unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
