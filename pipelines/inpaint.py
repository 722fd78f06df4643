"""Redraws the masked part of an image with a prior over codes.

twostage inpaint runs/PRIOR photo.png mask.png --class-name cat --out completions
"""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.drawing.sampling_options import with_sampling_options
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.machine.command import run_command

__all__ = ["command"]


@with_sampling_options
def command(
    model: Annotated[str, typer.Argument(help="runs/NAME of a trained prior, a pipeline folder, or a hub id.")],
    image: Annotated[Path, typer.Argument(help="An image file, converted to the model's size and mode.")],
    mask: Annotated[
        str,
        typer.Argument(
            help="A half (left, right, top or bottom), center, or an image file of the same size as the image. The "
            "file is white (128 or more) where you want to redraw."
        ),
    ],
    out: Annotated[Path, typer.Option(help="A new folder for 000000.png ... and grid.png.")],
    num_images: Annotated[int, typer.Option(min=1, help="Number of completions.")] = 4,
    class_name: Annotated[str | None, typer.Option(help="Class to draw. If omitted, the model chooses.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to draw, for a prior with captions.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Completion i depends only on the seed and i.")] = 0,
    feather: Annotated[
        float, typer.Option(min=0, help="Blend kept pixels that are closer than this to the mask.")
    ] = 0.0,
    *,
    sampling: SamplingConfig,
    tokenizer: Annotated[str | None, typer.Option(help="runs/TOKENIZER, if it has moved.")] = None,
) -> None:
    """Redraw the masked part of an image; all other pixels stay as they are."""
    from pipelines.drawing.redraw import InpaintRequest
    from pipelines.drawing.redrawn_files import write_inpainted
    from pipelines.drawing.two_stage import TwoStagePipeline
    from pipelines.files.given_images import read_images
    from pipelines.files.image_files import check_new_folder
    from pipelines.files.masks import read_mask
    from twostage.core.machine.processes import join_processes

    pipeline = TwoStagePipeline.from_pretrained(model, tokenizer).to(join_processes().device or "cpu")
    check_new_folder(out)
    (original,) = read_images([image], pipeline.tokenizer.config)
    request = InpaintRequest(
        image=original, mask=read_mask(mask, image, pipeline.image_size), num_images=num_images,
        class_name=class_name, prompt=prompt, seed=seed, feather=feather, sampling=sampling,
    )  # fmt: skip
    write_inpainted(pipeline, request, out)
    print(f"{num_images} completions: {out}; overview: {out / 'grid.png'}")


if __name__ == "__main__":
    run_command(command)
