"""Shows images above their reconstructions by a tokenizer."""

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
        typer.Option(help="An image or a folder of images, instead of held-out images. Repeat to give several."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Another source of held-out images.")] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Images to show, held out or from a folder.")] = 12,
    out: Annotated[Path | None, typer.Option(help="A PNG; by default reconstructions.png in the run folder.")] = None,
    images_out: Annotated[
        Path | None,
        typer.Option(help="A new folder for the reconstructions themselves, with all their channels and bits."),
    ] = None,
) -> None:
    """Show images above their reconstructions: held-out images, or your own."""
    from pipelines.drawing.tokenizer_sheets import draw_reconstructions
    from pipelines.saved.saved_model import SavedModel
    from twostage.core.machine.processes import share_cores

    share_cores()
    saved = SavedModel.find(model)
    out = out or saved.default_output("reconstructions.png")
    ratio = draw_reconstructions(saved, out, data, num_images, image, images_out)
    print(f"{out}: PSNR {ratio:.2f} dB, the mean of the images shown")


if __name__ == "__main__":
    run_command(command)
