"""Masks: which pixels of an image are to be redrawn, as (H, W) bool that is True there. H and W are pixels."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from pipelines.files.given_images import open_given_image
from twostage.core.errors import InputError
from twostage.core.images.conversion import image_to_pixels

__all__ = ["MASK_NAMES", "brushed_mask", "mark_masked", "named_mask", "read_mask"]

MASK_NAMES = ("left", "right", "top", "bottom", "center")
"""Halves of an image; `center` has half its height and half its width."""
MASK_COLOUR = (235, 60, 130, 255)
WHITE = 128
"""The smallest grey value that counts as white in a mask."""


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


def read_mask(mask: str | Path, image: str | Path, size: tuple[int, int]) -> Tensor:
    """The mask for the file ``image``, as a model of images of ``size`` (H, W) sees it: (H, W) bool.

    Args:
        mask: one of `MASK_NAMES`; or an image file of the same width and height, white (`WHITE` or more; transparent
            pixels count as black) where ``image`` is to be redrawn. It is cropped and resized as ``image`` is; a pixel
            is masked if any pixel that contributes to it is.

    Raises:
        InputError: see :func:`open_given_image`; a mask of another size; one that masks nothing.
    """
    if mask in MASK_NAMES:
        return named_mask(str(mask), size)
    drawn, original = (ImageOps.exif_transpose(open_given_image(file)) for file in (mask, image))
    if drawn.size != original.size:
        raise InputError(
            f"{mask}: has {drawn.width}x{drawn.height} pixels, expected {original.width}x{original.height} as in "
            f"{image}. Draw the mask over the image itself, or give one of: {', '.join(MASK_NAMES)}"
        )
    *colours, alpha = image_to_pixels(drawn, (drawn.height, drawn.width), 4).astype(np.float32)
    white = sum(colours) / 3 * alpha / 255 >= WHITE
    # The mean over the area of each pixel is above 0 if any of it is masked.
    shares = ImageOps.fit(Image.fromarray(white.astype(np.float32)), (size[1], size[0]), Image.Resampling.BOX)
    masked = torch.from_numpy(np.array(shares) > 0)
    if not masked.any():
        where = "" if not white.any() else " within the part of the image that the model sees (its centre)"
        raise InputError(f"{mask}: masks nothing{where}. Paint white what is to be redrawn")
    return masked


def brushed_mask(layers: list[np.ndarray], size: tuple[int, int]) -> Tensor:
    """The mask (H, W) bool brushed on an enlarged image: a pixel is masked if any part of it was brushed.

    Args:
        layers: (height, width, 4) uint8 RGBA each, transparent where nothing is brushed.
        size: (H, W) of the image.
    """
    mask = torch.zeros(size, dtype=torch.bool)
    for layer in layers:
        brushed = torch.from_numpy(layer[..., 3] > 0)
        mask |= F.adaptive_max_pool2d(brushed[None].float(), size)[0].bool()
    return mask


def mark_masked(images: Tensor, mask: Tensor) -> Tensor:
    """Images (n, C, H, W) uint8 in colour, with at least 3 channels, and pink where ``mask`` (H, W) is True."""
    marked = images.expand(-1, max(3, images.shape[1]), -1, -1).clone()
    marked[:, :, mask] = torch.tensor(MASK_COLOUR[: marked.shape[1]], dtype=torch.uint8)[:, None]
    return marked
