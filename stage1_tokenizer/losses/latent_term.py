"""Loss terms on the encoder's output, with small networks that only training needs.

The networks have an optimizer of their own, as a discriminator does. Each term is differentiated with respect to a
detached copy of the encoder's output, and the autoencoder gets this gradient. Plugins can register terms too.
Axes: B images, C encoded channels, h and w cells, H and W pixels.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from twostage.core.config.registry import OpenUnion
from twostage.core.config.sections import Number, Section, Share
from twostage.core.training.optimizer import TrainedNetwork

__all__ = ["LatentTermConfig", "LatentTerms", "latent_gradient"]


class LatentTermConfig(OpenUnion, Section):
    """One term of `loss.latents`; its `type` selects it."""

    weight: Number = Field(default=1.0, ge=0)
    """What the term's gradient to the encoder is multiplied by."""
    ramp: Share = 0.0
    """The share of the run over which the weight rises from 0."""

    def build(self, encoded_shape: tuple[int, int, int], image_shape: tuple[int, int, int]) -> nn.Module:
        """A module: the encoder's output (B, C, h, w) and images (B, channels, H, W) in [-1, 1] -> a scalar.

        Args:
            encoded_shape: (C, h, w).
            image_shape: (channels, H, W).
        """
        raise NotImplementedError

    def weight_at(self, progress: float) -> float:
        """The weight when the share ``progress`` of a run is done."""
        return self.weight * (min(1.0, progress / self.ramp) if self.ramp else 1.0)


class LatentTerms(nn.Module):
    """All terms of `loss.latents`, as one network."""

    def __init__(
        self,
        configs: Sequence[LatentTermConfig],
        encoded_shape: tuple[int, int, int],
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.configs = {config.type: config for config in configs}
        self.terms = nn.ModuleDict({config.type: config.build(encoded_shape, image_shape) for config in configs})

    def forward(self, encoded: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Each term's loss by its type, a scalar without its weight."""
        return {name: term(encoded, images) for name, term in self.terms.items()}

    if TYPE_CHECKING:  # torch says that a call returns anything

        def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]: ...


def latent_gradient(
    network: TrainedNetwork[LatentTerms], encoded: Tensor, images: Tensor, progress: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What training needs of the terms on the encoder's output (B, C, h, w) and its images (B, channels, H, W).

    Args:
        progress: how much of the run is done, in [0, 1].

    Returns:
        d(weighted terms) / d(encoded), (B, C, h, w); the loss that trains the terms' own networks; metrics by name.
    """
    encoded = encoded.detach().float().requires_grad_()
    losses, configs = network.wrapped(encoded, images), network.module.configs
    weighted = torch.stack([configs[name].weight_at(progress) * loss for name, loss in losses.items()]).sum()
    (gradient,) = torch.autograd.grad(weighted, encoded, retain_graph=True)
    return gradient, torch.stack(list(losses.values())).sum(), {name: loss.detach() for name, loss in losses.items()}
