"""Extends an image beyond its borders with a prior over codes.

twostage outpaint runs/PRIOR photo.png --right 32 --left 32 --out wider
"""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.drawing.sampling_options import with_sampling_options
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.machine.command import run_command

__all__ = ["command"]


def _side(name: str) -> typer.models.OptionInfo:
    return typer.Option(min=0, help=f"Pixels to add at the {name}.")


@with_sampling_options
def command(
    model: Annotated[str, typer.Argument(help="runs/NAME of a trained prior, a pipeline folder, or a hub id.")],
    image: Annotated[Path, typer.Argument(help="An image file, converted to the model's size and mode.")],
    out: Annotated[Path, typer.Option(help="A new folder for 000000.png ... and grid.png.")],
    left: Annotated[int, _side("left")] = 0,
    right: Annotated[int, _side("right")] = 0,
    top: Annotated[int, _side("top")] = 0,
    bottom: Annotated[int, _side("bottom")] = 0,
    num_images: Annotated[int, typer.Option(min=1, help="Number of completions.")] = 4,
    class_name: Annotated[str | None, typer.Option(help="Class to draw. If omitted, the model chooses.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to draw, for a prior with captions.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Image i depends only on the seed and i.")] = 0,
    *,
    sampling: SamplingConfig,
    tokenizer: Annotated[str | None, typer.Option(help="runs/TOKENIZER, if it has moved.")] = None,
) -> None:
    """Extend an image beyond its borders; its own pixels stay as they are."""
    from pipelines.drawing.redraw import OutpaintRequest
    from pipelines.drawing.redrawn_files import write_outpainted
    from pipelines.drawing.two_stage import TwoStagePipeline
    from pipelines.files.given_images import read_images
    from pipelines.files.image_files import check_new_folder
    from twostage.core.machine.processes import join_processes

    pipeline = TwoStagePipeline.from_pretrained(model, tokenizer).to(join_processes().device or "cpu")
    check_new_folder(out)
    (original,) = read_images([image], pipeline.tokenizer.config)
    request = OutpaintRequest(
        image=original, left=left, right=right, top=top, bottom=bottom, num_images=num_images, class_name=class_name,
        prompt=prompt, seed=seed, sampling=sampling,
    )  # fmt: skip
    write_outpainted(pipeline, request, out)
    print(f"{num_images} images: {out}; overview: {out / 'grid.png'}")


if __name__ == "__main__":
    run_command(command)
