"""Schedules as pure functions of the step: nothing to save, and the same for any number of processes."""

import math
from typing import Literal

__all__ = ["Schedule", "lr_at"]

Schedule = Literal["constant", "cosine"]


def lr_at(step: int, *, lr: float, max_steps: int, warmup_steps: int = 0, schedule: Schedule = "constant") -> float:
    """The learning rate after ``step`` finished updates: a linear warm-up over ``warmup_steps`` updates, then ``lr``
    ("constant") or half a cosine from ``lr`` down to 0 at ``max_steps`` ("cosine")."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
