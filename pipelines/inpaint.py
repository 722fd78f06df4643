"""Redraws the masked part of an image with a prior over codes.

twostage inpaint runs/PRIOR photo.png mask.png --class-name cat --out completions
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from pipelines.drawing.edits import mark_masked
from pipelines.drawing.sampling_options import with_sampling_options
from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.files.given_images import read_mask
from pipelines.reconstruct import read_images
from stage2_prior.sampling import SamplingConfig
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_pil
from twostage.core.images.sheets import contact_sheet, save_image
from twostage.core.machine.command import run_command
from twostage.core.machine.processes import join_processes
from twostage.core.machine.progress import ProgressBar

__all__ = ["check_out", "inpaint", "new_bar", "write_images"]

MAX_COLUMNS = 10


def inpaint(
    pipeline: TwoStagePipeline,
    image: Path,
    mask: str | Path,
    out: Path,
    num_images: int,
    class_name: str | None,
    seed: int,
    feather: float,
    sampling: SamplingConfig,
) -> None:
    """Writes the completions ``out``/000000.png ..., and grid.png: the original, what is kept of it, the completions.

    Raises:
        InputError: those of `TwoStagePipeline.inpaint` and of reading the two pictures; an ``out`` that is in use.
    """
    check_out(out)
    (original,) = read_images([image], pipeline.tokenizer)
    masked = read_mask(mask, image, pipeline.image_size)
    with new_bar() as bar:
        output = pipeline.inpaint(
            original,
            masked,
            num_images,
            class_name,
            seed,
            feather,
            lambda share: bar.update(share - bar.n),
            **sampling.model_dump(),
        )
    nothing = torch.zeros_like(masked)
    shown = [(original[None], nothing), (original[None], masked), (output.images, nothing)]
    pictures = torch.cat([mark_masked(images, part) for images, part in shown])
    captions = ["original", "kept", *map(str, range(num_images))]
    write_images(out, output.images)
    save_image(contact_sheet(pictures, min(len(pictures), MAX_COLUMNS), captions), out / "grid.png")


def check_out(out: Path) -> None:
    """Refuses a folder for images in which something is already, so that nothing is overwritten."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: holds something already; give a new folder, or remove this one")


def new_bar() -> ProgressBar:
    """A progress bar of the share done, from 0 to 1."""
    return ProgressBar(total=1.0, bar_format="{l_bar}{bar}| {elapsed} so far, {remaining} left")


def write_images(out: Path, images: Tensor) -> None:
    """Images (n, C, H, W) uint8 as ``out``/000000.png ..."""
    for number, image in enumerate(images):
        save_image(to_pil(image), out / f"{number:06d}.png")


@with_sampling_options
def command(
    model: Annotated[str, typer.Argument(help="runs/NAME of a trained prior, a pipeline folder, or a hub id.")],
    image: Annotated[Path, typer.Argument(help="A picture; another size or mode is converted to the model's.")],
    mask: Annotated[
        str,
        typer.Argument(
            help="A picture of the image's own width and height, white (128 or more) where it is to be drawn again; or "
            "left, right, top, bottom (a half) or center."
        ),
    ],
    out: Annotated[Path, typer.Option(help="A new folder for 000000.png ... and grid.png.")],
    num_images: Annotated[int, typer.Option(min=1, help="Completions.")] = 4,
    class_name: Annotated[str | None, typer.Option(help="What to draw; without it, what the model sees fit.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Completion i depends on the seed and i alone.")] = 0,
    feather: Annotated[
        float, typer.Option(min=0, help="Kept pixels nearer than so many to the mask blend into what is drawn.")
    ] = 0.0,
    *,
    sampling: SamplingConfig,
    tokenizer: Annotated[str | None, typer.Option(help="runs/TOKENIZER, where it has moved.")] = None,
) -> None:
    """Redraw the masked part of an image; the other pixels stay as they are."""
    pipeline = TwoStagePipeline.from_pretrained(model, tokenizer).to(join_processes().device or "cpu")
    inpaint(pipeline, image, mask, out, num_images, class_name, seed, feather, sampling)
    print(f"{num_images} completions: {out}; at a glance: {out / 'grid.png'}")


if __name__ == "__main__":
    run_command(command)
