"""Which config of `configs/` fits images: one recipe, a tokenizer and its prior, per kind of image.

To change what `inspect` suggests and what `train-tokenizer FOLDER` and `train-prior CODES` write, edit `RECIPES` or the
files that it names.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import twostage
from twostage.core.data.drawn_sources import DRAWN_SOURCES
from twostage.core.data.survey import Survey

__all__ = ["Recipe", "recipe_for", "training_size"]

ICON_SIDE = 40
"""Images up to this side, in pixels, are trained on at their own size."""
SMALL_SIDE, LARGE_SIDE = 64, 128
"""The side of a square with as many pixels as larger images are reduced to: without a GPU, and with one."""
ROUNDED = 8
"""The sides of reduced images are multiples of this, so that they divide into whole cells."""
LEAST_SHARE = 4
"""No side of reduced images is below that of the square divided by this: discriminators need 12 or 24 pixels."""


@dataclass(frozen=True)
class Recipe:
    """A pair of configs for one kind of image."""

    images: str
    """The kind, in words."""
    tokenizer: str
    """A file of `configs/tokenizer/`."""
    prior: str
    """A file of `configs/prior/`."""

    def document(self, stage: str) -> dict[str, Any]:
        """The config of ``stage`` (`tokenizer` or `prior`)."""
        file = _config_folder() / stage / getattr(self, stage)
        return yaml.safe_load(file.read_text(encoding="utf-8"))


RECIPES = {
    "shapes": Recipe("drawn shapes", "vqvae_shapes.yaml", "gpt_shapes.yaml"),
    "captioned_shapes": Recipe("drawn shapes", "vqvae_captioned_shapes.yaml", "gpt_captioned_shapes.yaml"),
    "grey": Recipe("small grey images", "vqvae_mnist.yaml", "pixelcnn_mnist.yaml"),
    "colour": Recipe("small images", "vqvae_cifar10.yaml", "pixelcnn_cifar10.yaml"),
    "transparent": Recipe("icons with transparency", "emoji_64.yaml", "gpt_emoji_64.yaml"),
    "photos": Recipe("photographs", "photos_64.yaml", "gpt_photos_64.yaml"),
    "large photos": Recipe("photographs", "photos_128.yaml", "gpt_photos_128.yaml"),
}


def recipe_for(source: str, size: tuple[int, int], channels: int) -> Recipe:
    """The recipe for images of a training ``size`` (height, width)."""
    side = math.sqrt(size[0] * size[1])
    if source in DRAWN_SOURCES:
        return RECIPES[source]
    if channels == 4:
        return RECIPES["transparent"]
    if side <= ICON_SIDE:
        return RECIPES["grey" if channels == 1 else "colour"]
    return RECIPES["photos" if side < (SMALL_SIDE + LARGE_SIDE) / 2 else "large photos"]


def training_size(found: Survey) -> tuple[int, int]:
    """The (height, width) to train on. Small images keep their size; larger ones keep their shape, and are reduced to
    what this machine can train on."""
    height, width = found.size
    side = math.sqrt(height * width)
    if side <= ICON_SIDE:
        return height, width
    has_gpu = torch.accelerator.is_available()
    wanted = LARGE_SIDE if has_gpu and found.channels != 4 and side >= LARGE_SIDE else SMALL_SIDE
    scale = min(1.0, wanted / side)
    height, width = (max(wanted // LEAST_SHARE, round(edge * scale / ROUNDED) * ROUNDED) for edge in found.size)
    return height, width


def _config_folder() -> Path:
    """`configs/` of the installed package, or of the checkout."""
    package = Path(twostage.__file__).parent
    return next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())
