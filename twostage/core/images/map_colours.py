"""Colours in which maps of classes are shown."""

import torch
from torch import Tensor

__all__ = ["coloured_classes"]


def _colours() -> Tensor:
    """(256, 3) uint8: the colours of PASCAL VOC's segmentations, in which bit b of a class goes to bit 7 - b // 3 of
    the channel b % 3. Class 0 is black."""
    classes, colours = torch.arange(256), torch.zeros(256, 3, dtype=torch.long)
    for bit in range(8):
        colours[:, bit % 3] |= ((classes >> bit) & 1) << (7 - bit // 3)
    return colours.to(torch.uint8)


def coloured_classes(maps: Tensor) -> Tensor:
    """Maps of classes (B, H, W) uint8 as RGB images (B, 3, H, W) uint8; a class always has the same colour."""
    return _colours()[maps.long()].permute(0, 3, 1, 2).contiguous()
