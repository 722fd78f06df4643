"""Time a few steps of a training on this machine to find how many fit a time budget."""

import math
import time
from collections.abc import Callable
from typing import Any

from twostage.core.training.base_run import BaseRun

__all__ = ["TIMED_STEPS", "seconds_per_step"]

TIMED_STEPS = 12


def seconds_per_step(train: Callable[[], BaseRun[Any]], clock: Callable[[], float] = time.perf_counter) -> float:
    """The time of a step by ``clock``; ``train`` runs `TIMED_STEPS` of them in their own folder.

    `time.perf_counter` measures wall time; `time.process_time` excludes the time of other programs.
    """
    before = BaseRun.clock
    BaseRun.clock = staticmethod(clock)
    try:
        seconds = train().seconds_per_step
    finally:
        BaseRun.clock = staticmethod(before)
    assert math.isfinite(seconds), "a finished run takes no step that could be timed"
    return seconds
