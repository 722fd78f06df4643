"""Sampling settings, and sampling as pure functions: logits and noise in, codes out. Nothing here draws random numbers
from a global generator.

Axes: B images, N cells of a grid, K codes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from stage2_prior.conditions.context import Context
from twostage.core.config.sections import Number, Section
from twostage.core.training.random import seed_for

__all__ = [
    "Branches",
    "CellChoice",
    "MaskSchedule",
    "SamplingConfig",
    "Weights",
    "choose",
    "filter_logits",
    "guidance_at",
    "image_seeds",
    "uniform_noise",
]

CellChoice = Literal["confidence", "halton"]
MaskSchedule = Literal["cosine", "arccos"]
Weights = Literal["float32", "bfloat16", "int8"]

MAX_SCALE = 1e6
"""The largest temperature and guidance scale; beyond it, and below 1 / `MAX_SCALE`, float32 logits overflow."""
SMALLEST = math.nextafter(0, 1)
RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (1 / MAX_SCALE, MAX_SCALE, f"more than 0 (at least {1 / MAX_SCALE:g}, at most {MAX_SCALE:g})"),
    "top_k": (1, math.inf, "at least 1. Omit it to sample from all codes"),
    "top_p": (SMALLEST, 1, "a share above 0 and at most 1, such as 0.9"),
    "guidance_scale": (0, MAX_SCALE, f"0 (ignores the class) to {MAX_SCALE:g}; 1 follows it as trained"),
    "num_steps": (1, math.inf, "at least 1. Omit it for the default, 8"),
    "choice_temperature": (0, MAX_SCALE, f"0 (no randomness) to {MAX_SCALE:g}. Omit it for the default, 4.5"),
}
"""For each setting: its minimum, its maximum, and the text after `expected` in a message."""

_Integer = Annotated[int, Field(strict=True)]


class SamplingConfig(Section):
    """Settings for sampling codes from predictions. The command line and the page show the descriptions."""

    temperature: Number = Field(default=1.0, description="Below 1: more typical images; above 1: more varied.")
    top_k: _Integer | None = Field(
        default=None, title="Top-k", description="Sample only from the k most likely codes. Default: all codes."
    )
    top_p: Number | None = Field(
        default=None,
        title="Top-p",
        description="Sample only from the likeliest codes that add up to this probability. Default: all codes.",
    )
    guidance_scale: Number | dict[str, Number] = Field(
        default=1.0,
        description="Values above 1 follow the class or prompt more strongly; 0 ignores it (also called cfg_scale). A "
        "scale for each condition: class=1.5,text=4.",
    )
    guidance_schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="How the guidance scale grows from 1 to its value while an image is sampled."
    )
    num_steps: _Integer | None = Field(
        default=None, title="Steps", description="Masked transformers: parallel steps for each image. Default: 8."
    )
    mask_schedule: MaskSchedule | None = Field(
        default=None,
        description="Masked transformers: the share of codes still masked after each step. Default: as in training.",
    )
    cell_choice: CellChoice = Field(
        default="confidence",
        description="Masked transformers: each step fills the cells with the most confident codes, or cells that lie "
        "far apart, in a fixed order (halton).",
    )
    choice_temperature: Number | None = Field(
        default=None,
        description="Masked transformers: randomness in choosing which codes each step keeps. Default: 4.5.",
    )
    weights: Weights = Field(
        default="float32", description="Transformers on a CPU: precision of the weights. Lower precision is faster."
    )

    @field_validator("guidance_scale", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        parts = value.split(",") if isinstance(value, str) else []
        found = dict(part.split("=", 1) for part in parts) if parts and all("=" in part for part in parts) else value
        numbers = found.values() if isinstance(found, dict) else [found]
        try:
            if any(isinstance(number, bool) for number in numbers):
                raise ValueError
            numbers = [float(number) for number in numbers]
            if not all(map(math.isfinite, numbers)):
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(
                f"expected a number, or one for each condition such as class=1.5,text=4, got {value!r}"
            ) from None
        return (
            dict(zip((name.strip() for name in found), numbers, strict=True)) if isinstance(found, dict) else numbers[0]
        )

    @field_validator(*RANGES)
    @classmethod
    def _is_in_range(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name or ""
        low, high, expected = RANGES[name]
        if isinstance(value, dict):
            for scale in value.values():
                cls._is_in_range(scale, info)
            return value
        if value is None or low <= value <= high:
            return value
        hint = ""
        if name == "top_p" and 5 <= value <= 100:
            hint = f". For {value:g} percent, use {value / 100:g}"
        elif name in ("temperature", "top_k", "top_p") and value < low:
            hint = "; top_k=1 (--top-k 1) always picks the most likely code"
        raise ValueError(f"got {value:g}, expected {expected}{hint}")

    @property
    def is_guided(self) -> bool:
        """Whether any condition has a guidance scale other than 1."""
        scales = self.guidance_scale.values() if isinstance(self.guidance_scale, dict) else [self.guidance_scale]
        return any(scale != 1 for scale in scales)

    def scales_of(self, conditions: Sequence[str]) -> list[tuple[float, list[str]]]:
        """The branches beyond that of all conditions: each hides some more of them, from the last to the first, with
        the guidance scale of what it hides. Conditions with the same scale are hidden together; a scale of 1 at the end
        needs no branch."""
        given, steps = self.guidance_scale, list[tuple[float, list[str]]]()
        for name in reversed(conditions):
            scale = given.get(name, 1.0) if isinstance(given, dict) else given
            if steps and steps[-1][0] == scale:
                steps[-1][1].append(name)
            else:
                steps.append((scale, [name]))
        return steps[:-1] if steps and steps[-1][0] == 1 else steps

    @model_validator(mode="after")
    def _choice_is_random(self) -> "SamplingConfig":
        if self.cell_choice == "halton" and self.choice_temperature is not None:
            raise ValueError(
                f"choice_temperature {self.choice_temperature:g}: has no effect with cell_choice 'halton', which fills "
                "cells in a fixed order. Remove choice_temperature, or set cell_choice=confidence"
            )
        return self


def image_seeds(seed: int, first: int, count: int) -> list[int]:
    """The seeds of images ``first`` to ``first + count - 1``. Image i's seed depends on ``seed`` and i only."""
    return [seed_for(seed, "image", i) for i in range(first, first + count)]


def uniform_noise(seeds: list[int], count: int) -> Tensor:
    """``count`` uniform numbers in [0, 1) for each seed, (len(seeds), count) float64."""
    return torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(key=s)).random(count) for s in seeds]))


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
