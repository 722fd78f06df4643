"""Colours in which maps of classes are shown."""

import torch
from torch import Tensor

from twostage.core.errors import InputError

__all__ = ["coloured_classes", "maps_as_images"]


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


def maps_as_images(maps: Tensor, channels: int) -> Tensor:
    """Maps of classes (B, H, W) uint8 in their colours, or maps that are images (B, C, H, W) uint8, as images (B,
    channels, H, W) uint8.

    Raises:
        InputError: classes without colours, or colours as one channel.
    """
    images = coloured_classes(maps) if maps.ndim == 3 else maps
    if images.shape[1] == channels:
        return images
    if images.shape[1] == 1 and channels == 3:
        return images.expand(-1, 3, -1, -1)
    raise InputError(
        f"data.channels {channels}: maps {'of classes ' * (maps.ndim == 3)}have {images.shape[1]} as images. Set "
        f"data.channels={images.shape[1]}"
    )
