"""Goes on with an image beyond its borders, with a prior over codes.

twostage outpaint runs/PRIOR photo.png --right 32 --left 32 --out wider
"""

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

from pipelines.drawing.edits import mark_masked
from pipelines.drawing.sampling_options import with_sampling_options
from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.inpaint import check_out, new_bar, write_images
from pipelines.reconstruct import read_images
from stage2_prior.sampling import SamplingConfig
from twostage.core.images.sheets import contact_sheet, save_image
from twostage.core.machine.command import run_command
from twostage.core.machine.processes import join_processes

__all__ = ["outpaint"]

MAX_COLUMNS = 5
LONGEST_SIDE = 200
"""Of a picture in the sheet, in pixels, about."""


def outpaint(
    pipeline: TwoStagePipeline,
    image: Path,
    out: Path,
    sides: dict[str, int],
    num_images: int,
    class_name: str | None,
    seed: int,
    sampling: SamplingConfig,
) -> None:
    """Writes ``out``/000000.png ..., and grid.png: the original in its place, the extended pictures.

    Args:
        sides: pixels to add at `left`, `right`, `top`, `bottom`.

    Raises:
        InputError: those of `TwoStagePipeline.outpaint` and of reading the picture; an ``out`` that is in use.
    """
    check_out(out)
    (original,) = read_images([image], pipeline.tokenizer)
    with new_bar() as bar:
        output = pipeline.outpaint(
            original,
            **sides,
            num_images=num_images,
            class_name=class_name,
            seed=seed,
            callback=lambda share: bar.update(share - bar.n),
            **sampling.model_dump(),
        )
    borders = [sides[side] for side in ("left", "right", "top", "bottom")]
    added = ~F.pad(torch.ones(original.shape[1:], dtype=torch.bool), borders)
    given = mark_masked(F.pad(original[None], borders), added)
    pictures = torch.cat([given, mark_masked(output.images, torch.zeros_like(added))])
    enlarged = max(1, LONGEST_SIDE // max(pictures.shape[-2:]))  # a wide picture needs more than a contact sheet's tile
    pictures = pictures.repeat_interleave(enlarged, -2).repeat_interleave(enlarged, -1)
    captions = ["given", *map(str, range(num_images))]
    write_images(out, output.images)
    save_image(contact_sheet(pictures, min(len(pictures), MAX_COLUMNS), captions), out / "grid.png")


def _side(name: str) -> typer.models.OptionInfo:
    return typer.Option(min=0, help=f"Pixels to add at the {name}.")


@with_sampling_options
def command(
    model: Annotated[str, typer.Argument(help="runs/NAME of a trained prior, a pipeline folder, or a hub id.")],
    image: Annotated[Path, typer.Argument(help="A picture; another size or mode is converted to the model's.")],
    out: Annotated[Path, typer.Option(help="A new folder for 000000.png ... and grid.png.")],
    left: Annotated[int, _side("left")] = 0,
    right: Annotated[int, _side("right")] = 0,
    top: Annotated[int, _side("top")] = 0,
    bottom: Annotated[int, _side("bottom")] = 0,
    num_images: Annotated[int, typer.Option(min=1)] = 4,
    class_name: Annotated[str | None, typer.Option(help="What to draw; without it, what the model sees fit.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Image i depends on the seed and i alone.")] = 0,
    *,
    sampling: SamplingConfig,
    tokenizer: Annotated[str | None, typer.Option(help="runs/TOKENIZER, where it has moved.")] = None,
) -> None:
    """Go on with an image beyond its borders; its own pixels stay as they are."""
    pipeline = TwoStagePipeline.from_pretrained(model, tokenizer).to(join_processes().device or "cpu")
    sides = {"left": left, "right": right, "top": top, "bottom": bottom}
    outpaint(pipeline, image, out, sides, num_images, class_name, seed, sampling)
    print(f"{num_images} pictures: {out}; at a glance: {out / 'grid.png'}")


if __name__ == "__main__":
    run_command(command)
