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
    "image_seeds",
    "uniform_noise",
]


def image_seeds(seed: int, first: int, count: int) -> list[int]:
    """The seeds of images ``first`` to ``first + count - 1``. Image i's seed depends on ``seed`` and i only."""
    return [seed_for(seed, "image", i) for i in range(first, first + count)]


def uniform_noise(seeds: list[int], count: int) -> Tensor:
    """``count`` uniform numbers in [0, 1) for each seed, (len(seeds), count) float64."""
    return torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(key=s)).random(count) for s in seeds]))


class CodeNoise:
    """Gumbel noise for the codes of each cell, for each seed from its own generator: the code with the largest sum of
    logit and noise is a sample (the Gumbel-max trick). Unlike a code that inverts its cumulative distribution, it
    mostly stays the same if the logits change a little, which :mod:`stage2_prior.jumps` needs.
    """

    def __init__(self, seeds: list[int], codebook_size: int) -> None:
        self.generators = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]
        self.codebook_size = codebook_size

    def next(self, cells: int) -> Tensor:
        """The noise of the next cells, (len(seeds), cells, K) float32."""
        shape = cells, self.codebook_size
        uniform = torch.from_numpy(np.stack([each.random(shape, dtype=np.float32) for each in self.generators]))
        return uniform.add_(2**-25).log_().neg_().log_().neg_()  # numbers are multiples of 2^-24, and 0 is one


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
