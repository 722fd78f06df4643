"""The actions of the page's buttons, on plain values: check uploads, generate and edit images, show codes.

Axes: C channels, H and W pixels, h and w codes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipelines.drawing.redraw import InpaintRequest, can_redraw, inpaint
from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.files.given_images import read_image
from pipelines.files.masks import MASK_NAMES, brushed_mask, named_mask
from pipelines.page.painted_maps import MapCanvas, number_colour
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.validation import psnr
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.config.sections import parse_config
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_float, to_pil
from twostage.core.scales import split_scales

__all__ = ["ALL_CLASSES", "BRUSHED", "NO_CLASS", "Handlers", "PageImage", "draw_all_codes", "draw_codes", "enlarge"]

ALL_CLASSES = "all classes"
NO_CLASS = "no class"
BRUSHED = "the brushed part"
SIDE = 384
"""Approximate side of enlarged images in pixels."""
MIN_NUMBERED_CELL = 20
"""Minimum side in pixels of a cell that shows the number of its code."""

OnProgress = Callable[[float], object]


@dataclass
class PageImage:
    """An image of the model's size that was uploaded or generated."""

    pixels: Tensor
    """(C, H, W) uint8 or uint16."""
    class_name: str | None = None
    """Its class, if it is known."""
    prompt: str | None = None
    """Its prompt, if it has one."""
    note: str = ""
    """How an upload was changed, in words."""


@dataclass
class Handlers:
    """The page's actions on a pipeline. Every mistake that a user can make raises an `InputError`."""

    pipeline: TwoStagePipeline

    def read(self, path: str) -> PageImage:
        """Reads an uploaded file.

        Raises:
            InputError: see `read_image`; the message names the file without the server's folder.
        """
        name = Path(path).name
        config = self.pipeline.tokenizer.config
        try:
            pixels, changes = read_image(path, config.image_size, config.channels, config.value_range, config.bits)
        except InputError as error:
            raise InputError(str(error).replace(path, name)) from None
        return PageImage(pixels, note=f"{name}: {changes or 'used as it is'}.")

    def reads(self, condition: str) -> bool:
        """Whether new images are conditioned on this."""
        return condition in self.pipeline.model.conditions

    @property
    def canvas(self) -> MapCanvas | None:
        """What maps are painted on; None: new images are not conditioned on maps."""
        config = self.pipeline.map_config
        return MapCanvas(config) if config else None

    def generate(
        self,
        num_images: int,
        class_name: str | None,
        seed: int | None,
        sampling: dict[str, Any],
        on_progress: OnProgress,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        map_given: np.ndarray | None = None,
    ) -> list[PageImage]:
        """Generates images of a class, a prompt and a map, see `MapCanvas`; None and `ALL_CLASSES` cycle through all
        classes, and None through the model's example prompts."""
        chosen = None if class_name in (None, ALL_CLASSES) else [class_name]
        if map_given is None and self.pipeline.model.needs("map"):
            raise InputError("no map: upload or paint one")
        output = self.pipeline(
            num_images, chosen, seed=_seed(seed), prompt=prompt, negative_prompt=negative_prompt,
            maps=None if map_given is None else [map_given], output_type="pt", on_progress=on_progress, **sampling,
        )  # fmt: skip
        known = self.pipeline.label_names
        names = [known[label] if known else None for label in output.labels or [0] * num_images]
        prompts = output.prompts or [None] * num_images
        return [PageImage(*each) for each in zip(output.images, names, prompts, strict=True)]

    def reconstruct(self, image: PageImage) -> tuple[Tensor, Tensor | None, str]:
        """The reconstruction (C, H, W), the codes (h, w) or None, and the PSNR in words."""
        pixels = self.pipeline.reconstruct(image.pixels[None])
        codes = self.pipeline.tokenizer.encode(to_float(image.pixels[None]).to(self.pipeline.device)).indices
        ratio = psnr(pixels, image.pixels[None]).item()
        return pixels[0], None if codes is None else codes[0].cpu(), f"PSNR of the reconstruction: {ratio:.1f} dB."

    def parts_to_redraw(self) -> tuple[list[str], str]:
        """The parts of an image that can be chosen for redrawing, and the one to begin with: what is brushed, unless
        the prior can redraw named parts only."""
        size = self.pipeline.image_size
        possible = [name for name in MASK_NAMES if can_redraw(self.pipeline, [named_mask(name, size)])]
        return [BRUSHED, *MASK_NAMES], possible[0] if 0 < len(possible) < len(MASK_NAMES) else BRUSHED

    def inpaint(
        self,
        image: PageImage | None,
        layers: list[np.ndarray],
        part: str,
        num_images: int,
        class_name: str | None,
        seed: int | None,
        feather: float,
        sampling: dict[str, Any],
        on_progress: OnProgress,
        prompt: str | None = None,
    ) -> Tensor:
        """Completions (num_images, C, H, W) uint8 of an image.

        Args:
            layers: what was brushed, see :func:`brushed_mask`.
            part: `BRUSHED`, or one of `MASK_NAMES`.
            class_name: None and `NO_CLASS` draw without a class; without a prompt, too, there is no guidance.
        """
        if image is None:
            raise InputError("no image: upload one, or use a generated one")
        size = self.pipeline.image_size
        mask = brushed_mask(layers, size) if part == BRUSHED else named_mask(part, size)
        if not mask.any():
            raise InputError("nothing is brushed: paint over what is to be redrawn")
        if class_name in (None, NO_CLASS):
            class_name = None
        if class_name is None and prompt is None:
            sampling = {name: value for name, value in sampling.items() if name != "guidance_scale"}
        request = InpaintRequest(
            image=image.pixels, mask=mask, num_images=num_images, class_name=class_name, prompt=prompt,
            seed=_seed(seed), feather=feather, sampling=parse_config(SamplingConfig, sampling, "the sampling settings"),
        )  # fmt: skip
        return inpaint(self.pipeline, request, on_progress).images

    def interpolate(self, first: PageImage | None, second: PageImage | None, num_images: int) -> Tensor:
        """Images (num_images, C, H, W) uint8 from the first to the second."""
        if first is None or second is None:
            raise InputError("two images are needed: upload them, or use generated ones")
        return self.pipeline.interpolate(first.pixels, second.pixels, num_images)


def enlarge(pixels: Tensor) -> Image.Image:
    """An image (C, H, W) uint8 with square pixels, about `SIDE` pixels a side; a larger one as it is."""
    scale = max(1, SIDE // max(pixels.shape[1:]))
    return to_pil(pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2))


def draw_all_codes(codes: Tensor, tokenizer: Autoencoder) -> Image.Image:
    """:func:`draw_codes` of each scale, side by side, for codes (1, N) of several scales."""
    scales, size = tokenizer.bottleneck.scales, tokenizer.codebook_size or 0
    if not scales:
        return draw_codes(codes, size)
    drawn = [draw_codes(grid, size) for grid in split_scales(codes[0], scales)]
    gap = SIDE // 16
    sheet = Image.new("RGB", (sum(image.width + gap for image in drawn) - gap, max(image.height for image in drawn)))
    left = 0
    for image in drawn:
        sheet.paste(image, (left, 0))
        left += image.width + gap
    return sheet


def draw_codes(codes: Tensor, codebook_size: int) -> Image.Image:
    """A grid of codes (h, w) as coloured cells: each code has its own colour, and shows its number if that fits."""
    height, width = codes.shape
    cell = max(4, SIDE // max(height, width))
    font = ImageFont.load_default(max(10, cell // 4))
    numbered = cell >= max(MIN_NUMBERED_CELL, font.getlength(str(codebook_size - 1)) + 4)
    sheet = Image.new("RGB", (width * cell, height * cell))
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(codes.tolist()):
        for x, code in enumerate(row):
            draw.rectangle((x * cell, y * cell, (x + 1) * cell - 1, (y + 1) * cell - 1), number_colour(code))
            if numbered:
                draw.text(((x + 0.5) * cell, (y + 0.5) * cell), str(code), fill="black", font=font, anchor="mm")
    return sheet


def _seed(seed: int | None) -> int:
    if seed is None or seed < 0:
        raise InputError(f"seed {seed}: expected a whole number, at least 0")
    return seed
