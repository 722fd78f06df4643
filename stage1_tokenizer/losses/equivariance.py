"""Latents that are scaled and turned, which must decode to scaled and turned images.

EQ-VAE, Kouzelis et al. 2025 (arXiv 2502.09509). A prior learns a latent more easily if it changes as its image does.
Axes: B images, C channels, h and w cells, H and W pixels.
"""

import random as python_random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from twostage.core.config.sections import Section, Share
from twostage.core.errors import InputError
from twostage.core.training.random import BatchRandom, seed_for

__all__ = ["EquivarianceConfig", "Transform", "draw_transform"]


class EquivarianceConfig(Section):
    """How often, and how much, latents are scaled and turned in training."""

    probability: Share = 0.5
    """The share of steps whose whole batch is transformed; the others train as usual."""
    min_scale: Share = Field(default=0.25, gt=0)
    """The smallest scale of the sides; each transformed batch draws one from here to 1."""

    def smallest(self, sides: tuple[int, int]) -> tuple[int, int]:
        """The smallest sides that a batch of these ``sides`` can get."""
        height, width = (max(1, round(self.min_scale * side)) for side in sides)
        return height, width

    def check(
        self, image_size: tuple[int, int], grid: tuple[int, int], factor: int, fixed_grid: bool, sees_map: bool
    ) -> None:
        """Checks that latents of a ``grid`` (h, w) for images of ``image_size`` can be scaled.

        Args:
            factor: pixels of a cell along each side.
            fixed_grid: whether the bottleneck only works on grids of one size.
            sees_map: whether the decoder sees a map of the image, which is not transformed.

        Raises:
            InputError: they cannot.
        """
        height, width = grid
        if (height * factor, width * factor) != tuple(image_size) or min(grid) < 2:
            raise InputError(
                "loss.equivariance: needs a backbone that works on images of any size, and a data.image_size that is a "
                f"multiple of its {factor} pixels per cell, got {image_size[0]}x{image_size[1]} pixels and a grid of "
                f"{height}x{width}. Set model.backbone.type=conv and such a size, or loss.equivariance=null"
            )
        if sees_map:
            raise InputError(
                "loss.equivariance: got model.condition 'map', whose maps are not scaled and turned, expected another "
                "condition. Set model.condition=null or loss.equivariance=null"
            )
        if fixed_grid:
            raise InputError(
                "loss.equivariance: got a bottleneck for grids of one size (class_gaussian or multi_scale), expected "
                "one for any size. Set model.bottleneck={type: vector} or loss.equivariance=null"
            )


@dataclass(frozen=True)
class Transform:
    """A scaling, then quarter turns."""

    grid: tuple[int, int]
    """(h, w) of the scaled latent, before it is turned."""
    turns: int
    """Quarter turns, counter-clockwise."""

    def of_latent(self, latent: Tensor) -> Tensor:
        """A latent (B, C, h, w) -> the transformed one."""
        if tuple(latent.shape[2:]) != self.grid:
            latent = F.interpolate(latent, self.grid, mode="bilinear", align_corners=False)
        return torch.rot90(latent, self.turns, (2, 3))

    def of_images(self, images: Tensor, factor: int) -> Tensor:
        """Images (B, C, H, W) -> the transformed ones, ``factor`` pixels for each cell."""
        size = (factor * self.grid[0], factor * self.grid[1])
        if tuple(images.shape[2:]) != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        return torch.rot90(images, self.turns, (2, 3))


def draw_transform(grid: tuple[int, int], config: EquivarianceConfig, random: BatchRandom) -> Transform | None:
    """The transform of a step, the same in every process; None for a step without.

    The scale is uniform over the numbers of rows that it can give, the turn over 90, 180 and 270 degrees.
    """
    draw = python_random.Random(seed_for(random.seed, "equivariance"))  # on the host: it decides on shapes
    if draw.random() >= config.probability:
        return None
    height, width = grid
    rows = draw.randint(config.smallest(grid)[0], height)
    return Transform((rows, max(1, round(width * rows / height))), draw.randint(1, 3))
