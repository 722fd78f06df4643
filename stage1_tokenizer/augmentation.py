"""Random changes to training images that do not change what they show.

Axes: B images, C channels, H and W pixels.
"""

import torch
from torch import Tensor

from twostage.core.training.random import BatchRandom

__all__ = ["crop", "flip_half", "shift"]

LANCZOS_LOBES = 3


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


def crop(images: Tensor, size: tuple[int, int], min_share: float, random: BatchRandom) -> Tensor:
    """Cuts a window out of each image (B, C, H, W) in [-1, 1] and resizes it to ``size`` (h, w).

    The sides of a window are a random share of the image's sides, at least ``min_share``, and its place is random. The
    filter is the one that images are loaded with: Lanczos, antialiased. All images share two matrix products. As when
    they are loaded, the colours of RGBA images are weighted by alpha, so that the colour of transparent pixels, which
    nobody sees, does not mix with the others.
    """
    draws = random.uniform("crop", (3,), images.device)
    share = min_share + (1 - min_share) * draws[:, 0]
    rows, columns = (
        _window_weights(wanted, full, share, draws[:, place])
        for wanted, full, place in zip(size, images.shape[2:], (1, 2), strict=True)
    )
    if images.shape[1] != 4:
        return (rows[:, None] @ images @ columns[:, None].mT).clamp_(-1, 1)
    colours, alpha = (images + 1).split([3, 1], 1)  # in [0, 2]
    weighted = torch.cat([colours * (alpha / 2), alpha], 1)
    colours, alpha = (rows[:, None] @ weighted @ columns[:, None].mT).split([3, 1], 1)
    return torch.cat([colours / (alpha / 2).clamp(1 / 255, 1), alpha], 1).sub_(1).clamp_(-1, 1)


def _window_weights(wanted: int, full: int, share: Tensor, place: Tensor) -> Tensor:
    """The weights (B, wanted, full) with which the pixels of a side make up those of its resized window.

    Args:
        share: (B,) of the side that the window covers.
        place: (B,) in [0, 1): 0 leaves the window at the beginning of the side.
    """
    scale = (full * share / wanted)[:, None, None]  # pixels of the image per pixel of the result
    start = (full * (1 - share) * place)[:, None, None]
    centres = start + (torch.arange(wanted, device=share.device)[:, None] + 0.5) * scale
    distance = (torch.arange(full, device=share.device) + 0.5 - centres) / scale.clamp(min=1)
    weights = torch.sinc(distance) * torch.sinc(distance / LANCZOS_LOBES) * (distance.abs() < LANCZOS_LOBES)
    return weights / weights.sum(2, keepdim=True)
