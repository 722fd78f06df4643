"""Edits of given images as pure functions over a tokenizer and tensors: there and back, what lies between two, which
codes a mask asks to draw again, how drawn pixels are laid over kept ones, which windows an extension is drawn in.

Axes: n images, C channels, H and W pixels, h and w codes of the grid that a prior sees.
"""

import itertools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from pipelines.drawing.batch_size import ROWS
from stage1_tokenizer.autoencoder import Autoencoder
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_float, to_uint8

__all__ = [
    "MASK_NAMES",
    "Window",
    "cells_to_redraw",
    "check_image",
    "check_mask",
    "extension_windows",
    "fill_masked",
    "interpolate",
    "known_codes",
    "mark_masked",
    "named_mask",
    "paste",
    "reconstruct",
]

MASK_NAMES = ("left", "right", "top", "bottom", "center")
"""Halves of an image; `center`: half its height and half its width."""
MASK_COLOUR = (235, 60, 130, 255)


@torch.no_grad()
def reconstruct(tokenizer: Autoencoder, images: Tensor) -> Tensor:
    """Images (n, C, H, W) uint8 there and back, each the same whatever stands beside it."""
    latents = [tokenizer.bottleneck.encode(part).z for part in _encoded(tokenizer, images)]
    return _decoded(tokenizer, latents, len(images))


@torch.no_grad()
def interpolate(tokenizer: Autoencoder, first: Tensor, second: Tensor, num_images: int) -> Tensor:
    """Pictures from ``first`` to ``second``, both (C, H, W) uint8: (num_images, C, H, W) uint8, from the reconstruction
    of the one to that of the other.

    What the encoder says of both is blended linearly, and the bottleneck does with it what it does with every image. So
    a plain autoencoder's latents, and the posterior means of a variational one, are blended as they are, and of a
    quantizer every cell takes the code nearest to its blend: all pictures between are ones that codes can say.

    Raises:
        InputError: fewer than 2 images.
    """
    if num_images < 2:
        raise InputError(f"num_images {num_images}: expected at least 2, the ends are two of them")
    (both,) = _encoded(tokenizer, torch.stack([first, second]))
    shares = torch.linspace(0, 1, num_images, device=both.device).view(-1, 1, 1, 1)
    blends = _in_parts(torch.lerp(both[:1], both[1:2], shares))
    return _decoded(tokenizer, [tokenizer.bottleneck.encode(part).z for part in blends], num_images)


@torch.no_grad()
def known_codes(tokenizer: Autoencoder, images: Tensor, mask: Tensor) -> Tensor:
    """The codes (n, h, w) of images (n, C, H, W) uint8 that are kept when what is True in ``mask`` (H, W) is drawn
    again, and -1 elsewhere. What the images show below the mask has no influence on them."""
    latents = [tokenizer.bottleneck.encode(part) for part in _encoded(tokenizer, fill_masked(images, mask))]
    codes = torch.cat([latent.indices for latent in latents if latent.indices is not None])[: len(images)]
    return codes.masked_fill(cells_to_redraw(tokenizer, mask).to(codes.device), -1)


def fill_masked(images: Tensor, mask: Tensor) -> Tensor:
    """Images (n, C, H, W) with the nearest kept pixel in place of each one that is True in ``mask`` (H, W). Of a mask
    that keeps nothing, something."""
    nearest = np.asarray(distance_transform_edt(mask.cpu().numpy(), return_distances=False, return_indices=True))
    rows, columns = torch.from_numpy(nearest).long()
    return images[:, :, rows, columns]


def cells_to_redraw(tokenizer: Autoencoder, mask: Tensor) -> Tensor:
    """The codes (h, w) of cells in which any pixel is True in ``mask`` (H, W)."""
    cell = _cell(tokenizer)
    masked = F.max_pool2d(mask[None].float(), cell, ceil_mode=True)[0].bool()
    return masked.repeat_interleave(tokenizer.code_grid[1] // tokenizer.grid[1], 1)


def paste(images: Tensor, drawn: Tensor, mask: Tensor, feather: float = 0) -> Tensor:
    """``drawn`` where ``mask`` (H, W) is True, over ``images``; both (n, C, H, W) uint8.

    Args:
        feather: pixels. A kept pixel that is nearer than this to a masked one is a blend, with the drawn one's share
            falling linearly from 1 in the mask to 0 at this distance. All others, at 0 and 1 all, stay exactly as they
            were.
    """
    distance = torch.from_numpy(distance_transform_edt(~mask.cpu().numpy()))  # 0 in the mask, 1 beside it
    share = (1 - distance / max(feather, 1)).clamp(min=0).float()
    return torch.lerp(images.float(), drawn.float(), share).round().to(torch.uint8)


def mark_masked(images: Tensor, mask: Tensor) -> Tensor:
    """Images (n, C, H, W) uint8 in colour, with 3 channels at least, and what is True in ``mask`` (H, W) in pink."""
    pictures = images.expand(-1, max(3, images.shape[1]), -1, -1).clone()
    pictures[:, :, mask] = torch.tensor(MASK_COLOUR[: pictures.shape[1]], dtype=torch.uint8)[:, None]
    return pictures


def named_mask(name: str, size: tuple[int, int]) -> Tensor:
    """One of `MASK_NAMES` for images of ``size`` (H, W): (H, W) bool."""
    height, width = size
    mask = torch.zeros(size, dtype=torch.bool)
    match name:
        case "left":
            mask[:, : width // 2] = True
        case "right":
            mask[:, width // 2 :] = True
        case "top":
            mask[: height // 2] = True
        case "bottom":
            mask[height // 2 :] = True
        case _:
            mask[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    return mask


class Window(NamedTuple):
    """A part of an extended picture, of the model's size."""

    rows: slice
    columns: slice
    mask: Tensor
    """(H, W) bool: what of it is not there before this window is drawn."""


def extension_windows(tokenizer: Autoencoder, left: int, right: int, top: int, bottom: int) -> list[Window]:
    """The windows in which an image of the model's size is extended by so many pixels, those at the image first.

    Each lies half a window, in whole cells, farther out than the one before it, whose other half it knows.
    """
    height, width = tokenizer.config.image_size
    steps = [max(cell, side // 2 // cell * cell) for cell, side in zip(_cell(tokenizer), (height, width), strict=True)]
    missing = torch.ones(top + height + bottom, left + width + right, dtype=torch.bool)
    missing[top : top + height, left : left + width] = False
    windows = []
    rows, columns = _starts(top, bottom, steps[0]), _starts(left, right, steps[1])
    for (_, y), (_, x) in sorted(itertools.product(rows, columns), key=lambda pair: pair[0][0] + pair[1][0]):
        window = (slice(y, y + height), slice(x, x + width))
        if missing[window].any():
            windows.append(Window(*window, missing[window].clone()))
            missing[window] = False
    return windows


def check_image(tokenizer: Autoencoder, image: Tensor, name: str = "image", batch: bool = False) -> None:
    """Refuses what is no uint8 image (C, H, W), or ``batch`` of images (n, C, H, W), of the model's form.

    Raises:
        InputError: another form or type.
    """
    expected = (tokenizer.config.channels, *tokenizer.config.image_size)
    if image.dtype != torch.uint8 or tuple(image.shape[-3:]) != expected or image.ndim != 3 + batch:
        axes = "(channels, height, width)" + " each" * batch
        raise InputError(
            f"{name}: expected uint8 of the form {expected}, {axes}, got {image.dtype} of {tuple(image.shape)}; "
            "given_images.read_image brings a picture file to that form"
        )


def check_mask(mask: Tensor, size: tuple[int, int]) -> None:
    """Refuses what is no mask for an image of ``size`` (H, W).

    Raises:
        InputError: another size or type, or nothing that is True.
    """
    if mask.dtype != torch.bool or tuple(mask.shape) != tuple(size):
        raise InputError(
            f"mask: expected bool of the image's (height, width) {tuple(size)}, got {mask.dtype} of "
            f"{tuple(mask.shape)}; True is where the image is to be drawn again"
        )
    if not mask.any():
        raise InputError("mask: masks no pixel, so that there is nothing to redraw; mask what is to be drawn again")


def _starts(before: int, after: int, step: int) -> list[tuple[int, int]]:
    """Of the windows along a side that is extended by so many pixels: how many steps from the image, and the start."""
    outwards = [(k, before - min(k * step, before)) for k in range(1, -(-before // step) + 1)]
    onwards = [(k, before + min(k * step, after)) for k in range(1, -(-after // step) + 1)]
    return [(0, before), *outwards, *onwards]


def _cell(tokenizer: Autoencoder) -> tuple[int, int]:
    """Pixels (height, width) that a cell stands for."""
    return tokenizer.config.image_size if tokenizer.grid == (1, 1) else (tokenizer.factor, tokenizer.factor)


def _in_parts(rows: Tensor) -> tuple[Tensor, ...]:
    """Batches of `ROWS` rows, the last one filled up: so that a row's result does not depend on their number."""
    return rows[torch.arange(-(-len(rows) // ROWS) * ROWS).clamp(max=len(rows) - 1)].split(ROWS)


def _encoded(tokenizer: Autoencoder, images: Tensor) -> list[Tensor]:
    """The encoder's output for images (n, C, H, W) uint8, in parts."""
    device = next(tokenizer.parameters()).device
    return [tokenizer.run_encoder(to_float(part.to(device))) for part in _in_parts(images)]


def _decoded(tokenizer: Autoencoder, latents: list[Tensor], count: int) -> Tensor:
    """The first ``count`` images (count, C, H, W) uint8 on the CPU of latents in parts."""
    return torch.cat([to_uint8(tokenizer.decode(z)).cpu() for z in latents])[:count]
