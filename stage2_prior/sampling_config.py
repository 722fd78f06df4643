"""Sampling settings, without torch: the command line reads their descriptions."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from twostage.core.config.sections import Number, Section

__all__ = ["CellChoice", "MaskSchedule", "SamplingConfig", "Weights"]

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
    "num_steps": (1, math.inf, "at least 1. Omit it for the default"),
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
        default=None,
        title="Steps",
        description="Masked and parallel transformers: parallel steps for each image. Default: 8 for masked ones, the "
        "model's for parallel ones.",
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
        default="float32",
        description="Transformers: precision of the weights. Lower precision is faster; int8 only works on a CPU.",
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
