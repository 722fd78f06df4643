"""Label maps on the page: the colours of labels, and what is painted with these.

Axes: H and W pixels of a map.
"""

import colorsys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.conditions.map_condition import NO_LABEL

__all__ = ["BLANK", "LABEL_COLOURS", "draw_map", "hex_colour", "number_colour", "painted_map"]

BLANK = 255
"""The grey value of an editor that was cleared."""
OPAQUE = 128
"""The alpha value from which a pixel of a layer counts as painted."""


def number_colour(number: int) -> tuple[int, int, int]:
    """Light enough for a black number; consecutive numbers get very different colours (the golden angle)."""
    turn = number * 0.61803398875
    lightness, saturation = 0.62 + 0.2 * (turn * 7 % 1), 0.45 + 0.4 * (turn * 3 % 1)
    red, green, blue = colorsys.hls_to_rgb(turn % 1, lightness, saturation)
    return round(255 * red), round(255 * green), round(255 * blue)


LABEL_COLOURS = [(226, 232, 240), *map(number_colour, range(1, NO_LABEL)), (248, 250, 252)]
"""By label. 0 is often the ground, so it is grey; `NO_LABEL` is nearly white. None is `BLANK`."""


def hex_colour(label: int) -> str:
    """The colour of a label, as in `#e2e8f0`."""
    return "#{:02x}{:02x}{:02x}".format(*LABEL_COLOURS[label])


def draw_map(labels: np.ndarray) -> Tensor:
    """Labels (H, W) uint8 in their colours: (3, H, W) uint8."""
    return torch.tensor(LABEL_COLOURS, dtype=torch.uint8)[torch.from_numpy(labels.astype(np.int64))].permute(2, 0, 1)


def painted_map(ground: np.ndarray, layers: list[np.ndarray], labels: list[int]) -> np.ndarray:
    """The labels (H, W) uint8 of a map that was painted on: where at least half of a pixel is covered, the label that
    covers most of it.

    Args:
        ground: (H, W) uint8: the labels below.
        layers: (height, width, 4) uint8 RGBA each, an enlarged map: painted in the colours of ``labels`` where it is
            opaque. A stroke's edge has mixed colours and counts as the nearest of these.
        labels: those that can be painted.
    """
    (height, width), painted = ground.shape, torch.from_numpy(ground.astype(np.int64))
    colours = torch.tensor([LABEL_COLOURS[label] for label in labels]).float()
    for layer in layers:
        pixels = torch.from_numpy(layer)
        opaque = pixels[..., 3] >= OPAQUE
        if opaque.any():
            distinct, which = pixels[opaque][:, :3].unique(dim=0, return_inverse=True)
            numbers = torch.full(opaque.shape, -1)
            numbers[opaque] = torch.cdist(distinct.float(), colours).argmin(1)[which]
            shares = torch.stack([_shares(numbers == number, (height, width)) for number in range(len(labels))])
            covered = shares.sum(0) >= 0.5
            painted[covered] = torch.tensor(labels)[shares.argmax(0)][covered]
    return painted.numpy().astype(np.uint8)


def _shares(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    return F.adaptive_avg_pool2d(pixels[None].float(), size)[0]
