"""Shows what a tokenizer (or AE, VAE ...) decodes between two images."""

from pathlib import Path
from typing import Annotated

import typer

from twostage.core.machine.command import run_command

__all__ = ["command"]


def command(
    model: Annotated[
        str,
        typer.Argument(help="runs/NAME of a tokenizer (or AE, VAE ...) or prior, a pipeline folder, or a hub id."),
    ],
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Pass it twice for the two ends, or pass a folder, whose images are paired in order."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Another source of held-out images.")] = None,
    num_images: Annotated[int, typer.Option(min=2, help="Images per strip, including both ends.")] = 9,
    num_pairs: Annotated[int, typer.Option(min=1, help="Strips, between held-out images or images from a folder.")] = 4,
    out: Annotated[Path | None, typer.Option(help="A PNG; by default interpolations.png in the run folder.")] = None,
) -> None:
    """Blend between two images: held-out images, or your own."""
    from pipelines.drawing.tokenizer_sheets import draw_interpolations
    from pipelines.saved.saved_model import SavedModel
    from twostage.core.machine.processes import share_cores

    share_cores()
    saved = SavedModel.find(model)
    out = out or saved.default_output("interpolations.png")
    strips = draw_interpolations(saved, out, image, data, num_images, num_pairs)
    print(f"{out}: {strips} strip{'s' * (strips > 1)} of {num_images} images; both ends are reconstructions")


if __name__ == "__main__":
    run_command(command)
