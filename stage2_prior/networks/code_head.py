"""What a network's predictions say about codes: how likely a code is, and which code is sampled.

A code is made by one choice or by several: a softmax chooses among all codes at once, a head of digits
(:mod:`stage2_prior.networks.digits`) chooses one digit after another. The priors only know this interface.

Axes: n branches, R cells to predict, P numbers of a prediction, K codes, V values of a choice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from stage2_prior.sampling import Branches, filter_logits
from stage2_prior.sampling_config import SamplingConfig

__all__ = ["CodeHead", "Pick", "Softmax", "sample_codes"]

Pick = Callable[[Tensor, int], Tensor]
"""Takes the logits (n R, V) of a choice and the number of that choice, from 0; returns the chosen values (R,)."""


class CodeHead(Protocol):
    """Predictions -> the likelihood of codes, and samples."""

    @property
    def choices(self) -> tuple[int, ...]:
        """The number of values of each choice, in the order in which they are made. Their product is K."""
        ...

    @property
    def floats(self) -> int:
        """The numbers that :meth:`nats` computes for each code."""
        ...

    def nats(self, predictions: Tensor, codes: Tensor) -> Tensor:
        """-log p of each code: (..., P) and (...) -> (...) float32."""
        ...

    def sample(self, predictions: Tensor, branches: Branches, pick: Pick) -> Tensor:
        """Codes (R,) int64 from the predictions (n R, P) of all branches; ``pick`` makes each choice."""
        ...


@dataclass(frozen=True)
class Softmax:
    """A single choice: a prediction is a logit for each of the K codes."""

    codebook_size: int

    @property
    def choices(self) -> tuple[int, ...]:
        return (self.codebook_size,)

    @property
    def floats(self) -> int:
        return self.codebook_size

    def nats(self, predictions: Tensor, codes: Tensor) -> Tensor:
        logits = predictions.flatten(0, -2).float()
        return F.cross_entropy(logits, codes.flatten(), reduction="none").view_as(codes)

    def sample(self, predictions: Tensor, branches: Branches, pick: Pick) -> Tensor:
        return pick(predictions, 0)


def sample_codes(
    head: CodeHead,
    predictions: Tensor,
    branches: Branches,
    share: float | Tensor,
    sampling: SamplingConfig,
    noise: Tensor,
) -> Tensor:
    """Samples a code for each cell by the Gumbel-max trick, choice by choice: (R,) int64.

    Guidance, temperature, top-k and top-p apply to the logits of each choice.

    Args:
        predictions: (n R, P), of all branches.
        share: how far guidance has grown, see `guidance_at`; a number, or (R, 1).
        noise: Gumbel noise for each value of each choice, (R, sum of the choices).
    """
    of_choices = noise.split_with_sizes(head.choices, -1)

    def pick(logits: Tensor, choice: int) -> Tensor:
        logits = filter_logits(branches.combine(logits, share), sampling)
        return (logits + of_choices[choice]).argmax(-1)

    return head.sample(predictions, branches, pick)
