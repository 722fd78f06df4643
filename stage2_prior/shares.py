"""Shares of codes that change in the course of a training or of a sampling, as pure functions of how far it is."""

import math
from typing import Literal

from torch import Tensor

from twostage.core.config.sections import Section, Share

__all__ = ["MEAN_MASKED_SHARE", "MaskSchedule", "ReplaceSchedule", "masked_share", "replace_prob_at"]

MaskSchedule = Literal["cosine", "arccos"]
MEAN_MASKED_SHARE = 2 / math.pi  # of both schedules, over progress in [0, 1]


class ReplaceSchedule(Section):
    """A share that goes from `start` at the first step of a run towards `end` at its end."""

    start: Share
    end: Share
    shape: Literal["linear", "cosine"] = "linear"


def replace_prob_at(progress: float, replace_prob: float | ReplaceSchedule) -> float:
    """The share of codes that are replaced where ``progress``, in [0, 1], of a run is done."""
    if not isinstance(replace_prob, ReplaceSchedule):
        return replace_prob
    done = progress if replace_prob.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return replace_prob.start + (replace_prob.end - replace_prob.start) * done


def masked_share(progress: Tensor, schedule: MaskSchedule) -> Tensor:
    """The share of codes that is masked at each ``progress`` in [0, 1]: 1 at 0, and 0 at 1.

    `cosine`: cos(pi / 2 x), of MaskGIT (Chang et al. 2022, arXiv 2202.04200); `arccos`: arccos(x) / (pi / 2) (Besnier
    and Chen 2023, arXiv 2310.14400), which fills more in its first steps and less in its last.
    """
    return (math.pi / 2 * progress).cos() if schedule == "cosine" else progress.acos() / (math.pi / 2)
