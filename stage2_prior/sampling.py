"""Sampling as pure functions: logits and noise in, codes out. Nothing here draws a random number by itself.

Axes: B images, N cells of a grid, K codes.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from stage2_prior.shares import MaskSchedule
from twostage.core.config.sections import Number, Section
from twostage.core.training.random import seed_for

__all__ = [
    "Progress",
    "SamplingConfig",
    "Weights",
    "choose",
    "filter_logits",
    "guidance_at",
    "guide",
    "image_seeds",
    "uniform_noise",
]

Weights = Literal["float32", "bfloat16", "int8"]
Progress = Callable[[int], object]
"""Told how many codes were drawn since it was told last."""


MAX_SCALE = 1e6
"""Of temperatures and of guidance: beyond it, and below 1 / `MAX_SCALE`, logits in float32 are no numbers any more."""
GREEDY = "top_k=1 (--top-k 1) draws the most likely code every time"


def _within(holds: Callable[[float], bool], expected: Callable[[float], str]) -> AfterValidator:
    """Refuses the values for which ``holds`` is false, with what is expected instead and what to give."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(f"got {value:g}, {expected(value)}")
        return value

    return AfterValidator(check)


def _percent(value: float) -> str:
    return f"; for {value:g} percent give {value / 100:g}" if 5 <= value <= 100 else ""


_Integer = Annotated[int, Field(strict=True)]
Temperature = Annotated[
    Number,
    _within(
        lambda value: 1 / MAX_SCALE <= value <= MAX_SCALE,
        lambda value: (
            f"expected at most {MAX_SCALE:g}; all codes are equally likely long before"
            if value > 1
            else f"expected more than 0 (at least {1 / MAX_SCALE:g}); {GREEDY} (a VAE has no codes: give 0.01)"
        ),
    ),
]
TopK = Annotated[
    _Integer,
    _within(
        lambda value: value >= 1,
        lambda _: (
            "expected at least 1, which draws the most likely code every time; leave it out to draw from all codes"
        ),
    ),
]
TopP = Annotated[
    Number,
    _within(
        lambda value: 0 < value <= 1,
        lambda value: (
            f"expected a share above 0 and at most 1, such as 0.9{_percent(value)}"
            if value > 0
            else f"expected a share above 0 and at most 1, such as 0.9; {GREEDY}"
        ),
    ),
]
GuidanceScale = Annotated[
    Number,
    _within(
        lambda value: 0 <= value <= MAX_SCALE,
        lambda _: f"expected from 0 to {MAX_SCALE:g}: 0 ignores the class, 1 follows it as trained, 2 more strongly",
    ),
]
NumSteps = Annotated[
    _Integer, _within(lambda value: value >= 1, lambda _: "expected at least 1; leave it out for the usual 8")
]
ChoiceTemperature = Annotated[
    Number,
    _within(
        lambda value: 0 <= value <= MAX_SCALE,
        lambda _: f"expected from 0 (no chance: the most confident codes stay) to {MAX_SCALE:g}; leave it out for 4.5",
    ),
]


class SamplingConfig(Section):
    """How codes are drawn from a prior's predictions."""

    temperature: Temperature = 1.0
    """Above 0; logits are divided by it: below 1 is safer, above 1 is more varied."""
    top_k: TopK | None = None
    """Only the k most likely codes can be drawn, at least 1; None: all."""
    top_p: TopP | None = None
    """Only the most likely codes that together hold this probability, above 0 to 1, can be drawn; None: all."""
    guidance_scale: GuidanceScale = 1.0
    """1: the class-conditional model as it is; above 1 pushes away from the unconditional one (alias: `cfg_scale`)."""
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the scale goes from 1 at an image's first codes to `guidance_scale` at its last; `constant`: it is the same
    for all."""
    num_steps: NumSteps | None = None
    """Of masked transformers: the parallel steps in which an image is filled; None: 8."""
    mask_schedule: MaskSchedule | None = None
    """Of masked transformers: what share of the codes is still masked after each step; None: as in its training."""
    choice_temperature: ChoiceTemperature | None = None
    """Of masked transformers: how much chance decides which of a step's codes stay, falling to none at the last step;
    0: the most confident ones stay. None: 4.5."""
    weights: Weights = "float32"
    """Of transformers on a CPU: what the weights of the linear layers are rounded to. Coarser ones are faster."""


def image_seeds(seed: int, first: int, count: int) -> list[int]:
    """The seeds of images ``first`` ... of a run with ``seed``: image i's depends on ``seed`` and i alone."""
    return [seed_for(seed, "image", i) for i in range(first, first + count)]


def uniform_noise(seeds: list[int], count: int) -> Tensor:
    """``count`` uniform draws in [0, 1) for each image, (len(seeds), count) float64, each row from its own seed."""
    return torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(key=s)).random(count) for s in seeds]))


def guidance_at(step: int, steps: int, sampling: SamplingConfig) -> float:
    """The guidance scale at ``step``, from 0, of ``steps`` in which an image's codes are drawn: 1 + (scale - 1) f(x),
    with x = 0 at the first and 1 at the last step."""
    progress = step / (steps - 1) if steps > 1 else 1.0
    match sampling.guidance_schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = progress
        case "cosine":
            share = (1 - math.cos(math.pi * progress)) / 2
    return 1 + (sampling.guidance_scale - 1) * share


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): unconditional + scale x difference."""
    return torch.lerp(unconditional, conditional, scale)


def filter_logits(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Applies temperature, then top-k (at most K), then top-p to (..., K); what cannot be drawn becomes -inf."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        likely = logits.topk(sampling.top_k, dim=-1).indices  # and no ties with the last of them
        logits = torch.full_like(logits, -torch.inf).scatter(-1, likely, logits.gather(-1, likely))
    if sampling.top_p is not None and sampling.top_p < 1:  # at 1 rounding would cut off the rarest codes
        ordered, order = logits.sort(dim=-1, descending=True)
        shares = ordered.softmax(-1)
        beyond = shares.cumsum(-1) - shares >= sampling.top_p  # the first code is never beyond
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits


def choose(logits: Tensor, noise: Tensor) -> Tensor:
    """Draws a code for each row by inverting its distribution, (..., K) and uniform (...) -> (...) int64.

    One number of noise a draw, so that a row's code depends on its own noise alone.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    wanted = noise.to(cumulative).unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
