"""Drawing parts of images again with a prior over their codes: what `TwoStagePipeline.inpaint` and `outpaint` do."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.drawing.edits import (
    MASK_NAMES,
    cells_to_redraw,
    check_image,
    check_mask,
    extension_windows,
    known_codes,
    named_mask,
    paste,
)
from stage2_prior.sampling import SamplingConfig
from twostage.core.config.sections import parse_config
from twostage.core.errors import InputError
from twostage.core.training.random import seed_for

if TYPE_CHECKING:
    from pipelines.drawing.two_stage import TwoStagePipeline

__all__ = ["inpaint", "outpaint", "share_of"]


def inpaint(
    pipeline: "TwoStagePipeline",
    image: Tensor,
    mask: Tensor,
    num_images: int,
    class_name: str | None,
    seed: int,
    feather: float,
    callback: Callable[[float], object] | None,
    sampling: dict[str, Any],
) -> tuple[Tensor, Tensor, list[int] | None]:
    """`TwoStagePipeline.inpaint`: images, codes, labels."""
    check_image(pipeline.tokenizer, image)
    check_mask(mask, pipeline.image_size)
    if feather < 0:
        raise InputError(f"feather {feather}: expected a number of pixels, at least 0")
    cycle, settings = _settings(pipeline, num_images, class_name, sampling)
    named = {name: [named_mask(name, pipeline.image_size)] for name in MASK_NAMES}
    _check_order(pipeline, "mask", [mask], named)
    known = known_codes(pipeline.tokenizer, image[None], mask).expand(num_images, -1, -1)
    advance = share_of(callback, num_images)
    parts = pipeline.generate(range(num_images), cycle, settings, seed, progress=advance, known=known)
    drawn, codes = zip(*parts, strict=True)
    pixels = paste(image.cpu().expand(num_images, -1, -1, -1), torch.cat(drawn), mask, feather)
    return pixels, torch.cat(codes), cycle and cycle * num_images


def outpaint(
    pipeline: "TwoStagePipeline",
    image: Tensor,
    sides: dict[str, int],
    num_images: int,
    class_name: str | None,
    seed: int,
    callback: Callable[[float], object] | None,
    sampling: dict[str, Any],
) -> tuple[Tensor, list[int] | None]:
    """`TwoStagePipeline.outpaint`: images, labels. ``sides``: pixels to add at `left`, `right`, `top`, `bottom`."""
    check_image(pipeline.tokenizer, image)
    if min(sides.values()) < 0 or not any(sides.values()):
        given = ", ".join(f"{side} {pixels}" for side, pixels in sides.items())
        raise InputError(
            f"{given}: nothing to add; expected a number of pixels for one side at least, and none below 0"
        )
    cycle, settings = _settings(pipeline, num_images, class_name, sampling)
    windows = extension_windows(pipeline.tokenizer, **sides)
    each = {side: extension_windows(pipeline.tokenizer, **dict.fromkeys(sides, 0) | {side: 1}) for side in sides}
    masks = {side: [window.mask for window in needed] for side, needed in each.items()}
    _check_order(pipeline, ", ".join(filter(sides.get, sides)), [window.mask for window in windows], masks)
    pixels = F.pad(
        image.cpu().expand(num_images, -1, -1, -1), [sides[side] for side in ("left", "right", "top", "bottom")]
    )
    advance = share_of(callback, num_images * len(windows))
    for number, (rows, columns, mask) in enumerate(windows):
        seen, own_seed = pixels[..., rows, columns], seed_for(seed, "window", number)
        known = known_codes(pipeline.tokenizer, seen, mask)
        parts = pipeline.generate(range(num_images), cycle, settings, own_seed, progress=advance, known=known)
        pixels[..., rows, columns] = paste(seen, torch.cat([drawn for drawn, _ in parts]), mask)
    return pixels, cycle and cycle * num_images


def share_of(callback: Callable[[float], object] | None, total: int) -> Callable[[float], None]:
    """A function that adds up what it is told was done and tells ``callback`` the share of ``total``."""
    done = 0.0

    def advance(more: float) -> None:
        nonlocal done
        done += more
        if callback:
            callback(min(1.0, done / total))

    return advance


def _settings(
    pipeline: "TwoStagePipeline", num_images: int, class_name: str | None, sampling: dict[str, Any]
) -> tuple[list[int] | None, SamplingConfig]:
    """The class, as ``cycle`` of `TwoStagePipeline.generate`, and the settings to redraw codes with."""
    if pipeline.prior is None:
        raise InputError(
            "this pipeline is a variational autoencoder, which has no codes of which some could be drawn again; "
            "inpainting and outpainting need a tokenizer with a prior over its codes"
        )
    if num_images < 1:
        raise InputError(f"num_images {num_images}: expected at least 1")
    settings = parse_config(SamplingConfig, sampling, "the sampling settings")
    pipeline.check_sampling(settings)
    if class_name is not None:
        return pipeline.labels_for([class_name]), settings
    if pipeline.class_names and not pipeline.prior.config.loss.class_dropout_prob:
        raise InputError(
            "class name: none given, but this prior was trained with loss.class_dropout_prob=0 and draws nothing "
            f"without one; give --class-name, one of: {', '.join(pipeline.class_names)}"
        )
    if settings.guidance_scale != 1:
        raise InputError(
            f"guidance_scale {settings.guidance_scale}: presses for a class, and none is given; give --class-name too, "
            "or leave the scale at 1"
        )
    return None, settings


def _check_order(
    pipeline: "TwoStagePipeline", what: str, masks: list[Tensor], alternatives: dict[str, list[Tensor]]
) -> None:
    """Refuses masks that the prior cannot redraw; of the ``alternatives`` those that it can are named."""
    if not _can_redraw(pipeline, masks):
        assert pipeline.prior
        model = pipeline.prior.config.model
        possible = [name for name, needed in alternatives.items() if _can_redraw(pipeline, needed)]
        raise InputError(
            f"{what}: this prior is a {model.type}, which writes one code after another in the order "
            f"{getattr(model, 'order', 'raster')!r} and can redraw only all that comes after some cell"
            + (f", such as: {', '.join(possible)}" if possible else "")
            + "; give that, or use a masked transformer, which redraws any part"
        )


def _can_redraw(pipeline: "TwoStagePipeline", masks: list[Tensor]) -> bool:
    """Whether the prior can keep all that these masks (H, W) keep."""
    assert pipeline.prior
    cells = torch.stack([cells_to_redraw(pipeline.tokenizer, mask) for mask in masks])
    return pipeline.prior.can_keep(~cells)
