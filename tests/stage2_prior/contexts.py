"""The contexts of images with a class, for tests of the networks alone. `Prior` makes the same ones."""

from typing import Protocol

import torch
from torch import Tensor

from stage2_prior.networks.network import OnProgress, PriorNetwork
from stage2_prior.sampling import Branches
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.conditions.context import Context


class ClassNetwork(PriorNetwork, Protocol):
    """A network whose contexts have a class."""

    num_classes: int


def of(labels: Tensor) -> Context:
    """The context of images with these labels (B,)."""
    return Context(len(labels), labels)


def branches(labels: Tensor, no_class: int, sampling: SamplingConfig) -> Branches:
    """Those of images with these labels (B,): with guidance, first with their class, then without."""
    if sampling.guidance_scale == 1.0:
        return Branches(of(labels))
    without = torch.full_like(labels, no_class)
    return Branches(of(torch.cat([labels, without])), (sampling.guidance_scale,))


def sample(
    model: ClassNetwork,
    labels: Tensor,
    sampling: SamplingConfig,
    seeds: list[int],
    known: Tensor | None = None,
    on_progress: OnProgress | None = None,
) -> Tensor:
    """Codes (B, N) of images with these labels (B,)."""
    return model.sample(branches(labels, model.num_classes, sampling), sampling, seeds, known, on_progress)
