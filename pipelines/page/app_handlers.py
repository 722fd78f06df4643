"""What the buttons of the page do, on plain values: checked uploads, generated and edited pictures, brushed masks.

Axes: C channels, H and W pixels, h and w codes.
"""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipelines.drawing.edits import named_mask
from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.files.given_images import read_image
from stage1_tokenizer.validation import psnr
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_float, to_pil

__all__ = [
    "ALL_CLASSES",
    "BRUSHED",
    "NO_CLASS",
    "Handlers",
    "Picture",
    "brushed_mask",
    "draw_codes",
    "enlarge",
]

ALL_CLASSES = "all classes in turn"
NO_CLASS = "no class"
BRUSHED = "what is brushed"
SIDE = 384
"""Pixels a side, about, of pictures that people brush on or read numbers in."""
SMALLEST_CELL = 20
"""Pixels a side from which on a code's cell holds its number."""

Callback = Callable[[float], object]


@dataclass
class Picture:
    """A picture of the model's size that a person uploaded or took from the generated ones."""

    pixels: Tensor
    """(C, H, W) uint8."""
    class_name: str | None = None
    """Its class, where it is known."""
    note: str = ""
    """What was changed about an upload, in words."""


@dataclass
class Handlers:
    """What the page does with a pipeline. Whatever a person can get wrong is an `InputError`."""

    pipeline: TwoStagePipeline

    def read(self, path: str) -> Picture:
        """An uploaded file.

        Raises:
            InputError: those of `read_image`, with the file's name in place of where the server keeps it.
        """
        name = Path(path).name
        try:
            config = self.pipeline.tokenizer.config
            pixels, changed = read_image(path, config.image_size, config.channels, config.value_range)
        except InputError as error:
            raise InputError(str(error).replace(path, name)) from None
        return Picture(pixels, note=f"{name}: {changed or 'taken as it is'}.")

    def generate(
        self, num_images: int, class_name: str | None, seed: int | None, sampling: dict[str, Any], callback: Callback
    ) -> list[Picture]:
        """Pictures of a class, or of `ALL_CLASSES` in turn (so does None)."""
        chosen = None if class_name in (None, ALL_CLASSES) else [class_name]
        output = self.pipeline(num_images, chosen, seed=_seed(seed), output_type="pt", callback=callback, **sampling)
        known = self.pipeline.label_names
        names = [known[label] if known else None for label in output.labels or [0] * num_images]
        return [Picture(*pair) for pair in zip(output.images, names, strict=True)]

    def reconstruct(self, picture: Picture) -> tuple[Tensor, Tensor | None, str]:
        """The reconstruction (C, H, W) uint8, the codes (h, w) or None, and the PSNR in words."""
        tokenizer = self.pipeline.tokenizer
        pixels = self.pipeline.reconstruct(picture.pixels[None])
        codes = tokenizer.encode(to_float(picture.pixels[None]).to(self.pipeline.device)).indices
        ratio = psnr(pixels, picture.pixels[None]).item()
        return pixels[0], None if codes is None else codes[0].cpu(), f"PSNR of the reconstruction: {ratio:.1f} dB."

    def inpaint(
        self,
        picture: Picture | None,
        layers: list[np.ndarray],
        part: str,
        num_images: int,
        class_name: str | None,
        seed: int | None,
        feather: float,
        sampling: dict[str, Any],
        callback: Callback,
    ) -> Tensor:
        """Completions (num_images, C, H, W) uint8 of a picture.

        Args:
            layers: what was brushed, see :func:`brushed_mask`.
            part: `BRUSHED`, or one of `edits.MASK_NAMES`.
            class_name: None and `NO_CLASS` draw without a class, and so without guidance.
        """
        if picture is None:
            raise InputError("no picture: upload one, or take a generated one, before its part is drawn again")
        size = self.pipeline.image_size
        mask = brushed_mask(layers, size) if part == BRUSHED else named_mask(part, size)
        if not mask.any():
            raise InputError("nothing is brushed: paint over what is to be drawn again, with the brush")
        if class_name in (None, NO_CLASS):
            class_name = None
            sampling = {name: value for name, value in sampling.items() if name != "guidance_scale"}
        return self.pipeline.inpaint(
            picture.pixels, mask, num_images, class_name, _seed(seed), feather, callback, **sampling
        ).images

    def interpolate(self, first: Picture | None, second: Picture | None, num_images: int) -> Tensor:
        """Pictures (num_images, C, H, W) uint8 from the one to the other."""
        if first is None or second is None:
            raise InputError("two pictures are needed: upload them, or take generated ones")
        return self.pipeline.interpolate(first.pixels, second.pixels, num_images)


def enlarge(pixels: Tensor) -> Image.Image:
    """A picture (C, H, W) uint8 with square pixels, about `SIDE` pixels a side; a larger one as it is."""
    scale = max(1, SIDE // max(pixels.shape[1:]))
    return to_pil(pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2))


def brushed_mask(layers: list[np.ndarray], size: tuple[int, int]) -> Tensor:
    """What was brushed on a picture that was shown enlarged, as a mask (H, W) bool: a pixel is masked if any of what
    showed it is.

    Args:
        layers: (height, width, 4) uint8 RGBA each, transparent where nothing is brushed.
        size: (H, W) of the picture.
    """
    mask = torch.zeros(size, dtype=torch.bool)
    for layer in layers:
        brushed = torch.from_numpy(layer[..., 3] > 0)
        mask |= F.adaptive_max_pool2d(brushed[None].float(), size)[0].bool()
    return mask


def draw_codes(codes: Tensor, codebook_size: int) -> Image.Image:
    """A grid of codes (h, w) as coloured cells: each code has a colour of its own, and its number where that fits."""
    height, width = codes.shape
    cell = max(4, SIDE // max(height, width))
    font = ImageFont.load_default(max(10, cell // 4))
    numbered = cell >= max(SMALLEST_CELL, font.getlength(str(codebook_size - 1)) + 4)
    sheet = Image.new("RGB", (width * cell, height * cell))
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(codes.tolist()):
        for x, code in enumerate(row):
            draw.rectangle((x * cell, y * cell, (x + 1) * cell - 1, (y + 1) * cell - 1), _colour(code))
            if numbered:
                draw.text(((x + 0.5) * cell, (y + 0.5) * cell), str(code), fill="black", font=font, anchor="mm")
    return sheet


def _colour(code: int) -> tuple[int, ...]:
    """Light, so that a black number can be read on it; neighbouring codes are far apart (the golden angle)."""
    turn = code * 0.61803398875
    lightness, saturation = 0.62 + 0.2 * (turn * 7 % 1), 0.45 + 0.4 * (turn * 3 % 1)
    return tuple(round(255 * part) for part in colorsys.hls_to_rgb(turn % 1, lightness, saturation))


def _seed(seed: int | None) -> int:
    if seed is None or seed < 0:
        raise InputError(f"seed: got {'nothing' if seed is None else seed}, expected a whole number, at least 0")
    return seed
