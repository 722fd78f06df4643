"""Random changes to training images that do not change what they show.

Axes: B images, C channels, H and W pixels.
"""

import torch
from torch import Tensor

from twostage.core.training.random import BatchRandom

__all__ = ["flip_half", "shift"]


def flip_half(images: Tensor, random: BatchRandom) -> Tensor:
    """Mirrors each image (B, C, H, W) with probability 1/2."""
    mirrored = random.uniform("horizontal flip", (1, 1, 1), images.device) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def shift(images: Tensor, max_shift: int, random: BatchRandom) -> Tensor:
    """Shifts each image (B, C, H, W) by up to ``max_shift`` pixels along each side, repeating its border."""
    if max_shift == 0:
        return images
    batch, _, height, width = images.shape
    moves = (random.uniform("shift", (2, 1), images.device) * (2 * max_shift + 1)).long() - max_shift
    rows = (torch.arange(height, device=images.device) + moves[:, 0]).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width, device=images.device) + moves[:, 1]).clamp(0, width - 1)  # (B, W)
    sample = torch.arange(batch, device=images.device)[:, None, None]
    return images[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
