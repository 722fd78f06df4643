"""The output of `inpaint` and `outpaint`: the redrawn images, and a sheet of them next to the original."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from pipelines.drawing.redraw import InpaintRequest, OutpaintRequest, inpaint, outpaint
from pipelines.drawing.sampler import ImageSampler
from pipelines.files.image_files import write_images
from pipelines.files.masks import mark_masked
from twostage.core.images.sheets import contact_sheet, save_image
from twostage.core.machine.progress import ProgressBar

__all__ = ["write_inpainted", "write_outpainted"]

INPAINT_COLUMNS, OUTPAINT_COLUMNS = 10, 5
MAX_SIDE = 200
"""Extended images are enlarged in the sheet up to about this many pixels a side."""


def write_inpainted(sampler: ImageSampler, request: InpaintRequest, out: Path) -> None:
    """Writes the completions ``out``/000000.png ..., and grid.png: the original, what is kept of it, the completions.

    Raises:
        InputError: see :func:`inpaint`.
    """
    with _bar() as on_progress:
        images = inpaint(sampler, request, on_progress).images
    original, nothing = request.image[None], torch.zeros_like(request.mask)
    shown = [(original, nothing), (original, request.mask), (images, nothing)]
    tiles = torch.cat([mark_masked(sampler.to_shown(part), mask) for part, mask in shown])
    captions = ["original", "kept", *map(str, range(len(images)))]
    write_images(out, images)
    save_image(contact_sheet(tiles, min(len(tiles), INPAINT_COLUMNS), captions), out / "grid.png")


def write_outpainted(sampler: ImageSampler, request: OutpaintRequest, out: Path) -> None:
    """Writes the extended images ``out``/000000.png ..., and grid.png: the original in its place, the extended images.

    Raises:
        InputError: see :func:`outpaint`.
    """
    with _bar() as on_progress:
        images = outpaint(sampler, request, on_progress).images
    borders = list(request.sides.values())
    added = ~F.pad(torch.ones(request.image.shape[1:], dtype=torch.bool), borders)
    original = mark_masked(F.pad(sampler.to_shown(request.image[None]), borders), added)
    tiles = torch.cat([original, mark_masked(sampler.to_shown(images), torch.zeros_like(added))])
    scale = max(1, MAX_SIDE // max(tiles.shape[-2:]))  # a wide image needs more than a contact sheet's tile
    tiles = tiles.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    captions = ["given", *map(str, range(len(images)))]
    write_images(out, images)
    save_image(contact_sheet(tiles, min(len(tiles), OUTPAINT_COLUMNS), captions), out / "grid.png")


@contextmanager
def _bar() -> Iterator[Callable[[float], object]]:
    """A progress bar, as a callback for the share of the work that is done."""
    with ProgressBar(total=1.0, bar_format="{l_bar}{bar}| {elapsed} so far, {remaining} left") as bar:
        yield lambda share: bar.update(share - bar.n)
