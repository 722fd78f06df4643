"""Redrawing parts of an image with a prior over its codes: inpainting and outpainting.

Axes: n images, C channels, H and W pixels, h and w cells of the code grid that a prior sees.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.drawing.asked import Asked, Cycle, check_needed, values_of
from pipelines.drawing.rebuilt_images import check_image, encode_in_parts
from pipelines.drawing.sampler import ImageSampler, PipelineOutput, in_shares
from pipelines.files.masks import MASK_NAMES, named_mask
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.errors import InputError
from twostage.core.scales import join_scales
from twostage.core.training.random import seed_for

__all__ = [
    "InpaintRequest",
    "OutpaintRequest",
    "Window",
    "can_redraw",
    "cells_to_redraw",
    "check_mask",
    "extension_windows",
    "fill_masked",
    "inpaint",
    "known_codes",
    "outpaint",
    "paste",
]


@dataclass(frozen=True, kw_only=True)
class RedrawRequest:
    """An image to draw parts of, and how."""

    image: Tensor
    """(C, H, W), uint8 or uint16 as the model's images are."""
    num_images: int = 1
    class_name: str | None = None
    """The class to draw; None: without a class."""
    prompt: str | None = None
    """The text to draw; None: without one."""
    seed: int = 0
    """Result i depends on the seed and i alone."""
    sampling: SamplingConfig = SamplingConfig()  # noqa: RUF009 (immutable)


@dataclass(frozen=True, kw_only=True)
class InpaintRequest(RedrawRequest):
    """A masked part to redraw."""

    mask: Tensor
    """(H, W) bool, True where the image is to be redrawn."""
    feather: float = 0
    """Kept pixels closer than this many pixels to the mask blend into what is drawn."""


@dataclass(frozen=True, kw_only=True)
class OutpaintRequest(RedrawRequest):
    """Pixels to add on each side."""

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0

    @property
    def sides(self) -> dict[str, int]:
        """The pixels to add, by side."""
        return {side: getattr(self, side) for side in ("left", "right", "top", "bottom")}


def inpaint(
    sampler: ImageSampler, request: InpaintRequest, on_progress: Callable[[float], object] | None = None
) -> PipelineOutput:
    """Redraws the masked part; see `TwoStagePipeline.inpaint`."""
    image, mask, num_images = request.image, request.mask, request.num_images
    check_image(sampler.tokenizer, image)
    check_mask(mask, sampler.image_size)
    if request.feather < 0:
        raise InputError(f"feather {request.feather}: expected a number of pixels, at least 0")
    cycle = _checked_cycle(sampler, request)
    if not can_redraw(sampler, [mask]):
        named = {name: named_mask(name, sampler.image_size) for name in MASK_NAMES}
        raise _cannot_keep_error(sampler, "mask", [name for name in named if can_redraw(sampler, [named[name]])])
    known = known_codes(sampler.tokenizer, image[None], mask).expand(num_images, -1, -1)
    advance = in_shares(on_progress, num_images)
    parts = sampler.draw(range(num_images), cycle, request.sampling, request.seed, on_progress=advance, known=known)
    drawn, codes = zip(*parts, strict=True)
    pixels = paste(image.cpu().expand(num_images, -1, -1, -1), torch.cat(drawn), mask, request.feather)
    return PipelineOutput(pixels, torch.cat(codes), cycle.labels_of(range(num_images)))


def outpaint(
    sampler: ImageSampler, request: OutpaintRequest, on_progress: Callable[[float], object] | None = None
) -> PipelineOutput:
    """Extends an image beyond its borders; see `TwoStagePipeline.outpaint`."""
    image, sides, num_images = request.image, request.sides, request.num_images
    check_image(sampler.tokenizer, image)
    if min(sides.values()) < 0 or not any(sides.values()):
        given = ", ".join(f"{side} {pixels}" for side, pixels in sides.items())
        raise InputError(f"{given}: expected a number of pixels above 0 for at least one side, and none below 0")
    cycle = _checked_cycle(sampler, request)
    windows = extension_windows(sampler.tokenizer, **sides)
    if not can_redraw(sampler, [window.mask for window in windows]):
        raise _cannot_keep_error(
            sampler, ", ".join(side for side in sides if sides[side]), _possible_sides(sampler, sides)
        )
    pixels = F.pad(image.cpu().expand(num_images, -1, -1, -1), list(sides.values()))
    advance = in_shares(on_progress, num_images * len(windows))
    for number, (rows, columns, mask) in enumerate(windows):
        seen, seed = pixels[..., rows, columns], seed_for(request.seed, "window", number)
        known = known_codes(sampler.tokenizer, seen, mask)
        parts = sampler.draw(range(num_images), cycle, request.sampling, seed, on_progress=advance, known=known)
        pixels[..., rows, columns] = paste(seen, torch.cat([drawn for drawn, _ in parts]), mask)
    return PipelineOutput(pixels, None, cycle.labels_of(range(num_images)))


def can_redraw(sampler: ImageSampler, masks: list[Tensor]) -> bool:
    """Whether the prior can keep all codes outside these masks (H, W)."""
    assert sampler.prior
    return sampler.prior.can_keep(torch.stack([~cells_to_redraw(sampler.tokenizer, mask) for mask in masks]))


@torch.no_grad()
def known_codes(tokenizer: Autoencoder, images: Tensor, mask: Tensor) -> Tensor:
    """The codes (n, h, w) of images (n, C, H, W) to keep when ``mask`` (H, W) is redrawn; -1 in all other cells.
    The masked pixels do not influence them."""
    latents = [tokenizer.bottleneck.encode(part) for part in encode_in_parts(tokenizer, fill_masked(images, mask))]
    codes = torch.cat([latent.indices for latent in latents if latent.indices is not None])[: len(images)]
    return codes.masked_fill(cells_to_redraw(tokenizer, mask).to(codes.device), -1)


def fill_masked(images: Tensor, mask: Tensor) -> Tensor:
    """Replace masked pixels of images (n, C, H, W) by the nearest kept one (arbitrary if ``mask`` keeps none)."""
    from scipy.ndimage import distance_transform_edt  # takes half a second

    nearest = np.asarray(distance_transform_edt(mask.cpu().numpy(), return_distances=False, return_indices=True))
    rows, columns = torch.from_numpy(nearest).long()
    return images[:, :, rows, columns]


def cells_to_redraw(tokenizer: Autoencoder, mask: Tensor) -> Tensor:
    """Which codes to redraw, (h, w) bool: those of cells with any pixel that is True in ``mask`` (H, W), at every
    scale."""
    masked = F.max_pool2d(mask[None].float(), _cell(tokenizer), ceil_mode=True)
    if scales := tokenizer.bottleneck.scales:
        return join_scales([F.adaptive_max_pool2d(masked, scale) for scale in scales]).bool()
    masked = masked[0].bool()
    return masked.repeat_interleave(tokenizer.code_grid[1] // tokenizer.grid[1], 1)


def paste(images: Tensor, drawn: Tensor, mask: Tensor, feather: float = 0) -> Tensor:
    """``images`` with ``drawn`` where ``mask`` (H, W) is True; both (n, C, H, W) of one type.

    Args:
        feather: a distance in pixels. A kept pixel that is closer than this to a masked one becomes a blend; the share
            of the drawn pixel falls linearly from 1 in the mask to 0 at this distance. All other kept pixels, and all
            of them at 0 and 1, stay exactly as they were.
    """
    from scipy.ndimage import distance_transform_edt

    distance = torch.from_numpy(distance_transform_edt(~mask.cpu().numpy()))  # 0 in the mask, 1 beside it
    share = (1 - distance / max(feather, 1)).clamp(min=0).float()
    return torch.lerp(images.float(), drawn.float(), share).round().to(images.dtype)


class Window(NamedTuple):
    """A part of an extended image, of the model's size."""

    rows: slice
    columns: slice
    mask: Tensor
    """(H, W) bool: True for what is missing before this window is drawn."""


def extension_windows(tokenizer: Autoencoder, left: int, right: int, top: int, bottom: int) -> list[Window]:
    """The windows that extend an image by these numbers of pixels, in drawing order.

    Each is about half a window (whole cells) farther out than the one before it and overlaps its outer half.
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


def _checked_cycle(sampler: ImageSampler, request: RedrawRequest) -> Cycle:
    """Refuses impossible requests; returns what is to be drawn."""
    if sampler.prior is None:
        raise InputError(
            "pipeline: a variational autoencoder, which has no codes to redraw. To inpaint or outpaint, use a "
            "tokenizer with a prior over its codes"
        )
    if request.num_images < 1:
        raise InputError(f"num_images {request.num_images}: expected at least 1")
    sampler.check_sampling(request.sampling)
    prior, asked = sampler.prior, Asked(prompts=None if request.prompt is None else [request.prompt])
    cycle = Cycle() if request.prompt is None else values_of(asked, prior)
    if request.class_name is not None:
        cycle = replace(cycle, labels=sampler.labels_for([request.class_name]))
    named = {"class": request.class_name, "text": request.prompt}
    given = {name for name, value in named.items() if value is not None}
    check_needed(prior, given)
    if request.sampling.is_guided and not given:
        raise InputError(
            f"guidance_scale {request.sampling.guidance_scale}: guidance needs a class or a prompt, and none is given. "
            "Give --class-name or --prompt too, or set guidance_scale to 1"
        )
    return cycle


def check_mask(mask: Tensor, size: tuple[int, int]) -> None:
    """Refuses anything but a mask for an image of ``size`` (H, W) in which something is True.

    Raises:
        InputError: another size or type, or nothing is True.
    """
    if mask.dtype != torch.bool or tuple(mask.shape) != tuple(size):
        raise InputError(
            f"mask: expected bool with the image's (height, width) {tuple(size)}, got {mask.dtype} with "
            f"{tuple(mask.shape)}. Set True where the image is to be redrawn"
        )
    if not mask.any():
        raise InputError("mask: masks no pixel, expected at least one. Set True where the image is to be redrawn")


def _cannot_keep_error(sampler: ImageSampler, what: str, possible: Iterable[str]) -> InputError:
    """The error for a prior that cannot redraw ``what`` and keep the rest; names what is ``possible``."""
    assert sampler.prior
    names = ", ".join(possible)
    return InputError(
        f"{what}: this prior is a {sampler.prior.config.model.type}, which can only keep "
        f"{sampler.prior.network.keeps}. "
        + (f"Give one that it can redraw ({names}), or use" if names else "Use")
        + " a masked or parallel transformer, which redraws any part"
    )


def _possible_sides(sampler: ImageSampler, sides: Iterable[str]) -> Iterable[str]:
    """The sides that can be extended alone."""
    for side in sides:
        windows = extension_windows(sampler.tokenizer, **dict.fromkeys(sides, 0) | {side: 1})
        if can_redraw(sampler, [window.mask for window in windows]):
            yield side


def _starts(before: int, after: int, step: int) -> list[tuple[int, int]]:
    """The windows along an axis, each with its number of steps from the image and its first pixel."""
    outwards = [(k, before - min(k * step, before)) for k in range(1, -(-before // step) + 1)]
    onwards = [(k, before + min(k * step, after)) for k in range(1, -(-after // step) + 1)]
    return [(0, before), *outwards, *onwards]


def _cell(tokenizer: Autoencoder) -> tuple[int, int]:
    """The pixels (height, width) of a cell."""
    return tokenizer.config.image_size if tokenizer.grid == (1, 1) else (tokenizer.factor, tokenizer.factor)
