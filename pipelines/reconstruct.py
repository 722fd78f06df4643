"""Sends images through a tokenizer and back, and shows both."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from pipelines.drawing import edits
from pipelines.files.given_images import find_images, read_image
from pipelines.saved.saved_model import SavedModel
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.validation import psnr
from twostage.core.data.spread import spread_over_classes
from twostage.core.errors import InputError
from twostage.core.images.sheets import contact_sheet, save_image
from twostage.core.machine.command import run_command
from twostage.core.machine.processes import share_cores

__all__ = ["check_out", "read_images", "reconstruct"]

COLUMNS = 12


def reconstruct(
    model: SavedModel,
    out: Path,
    source: str | None = None,
    num_images: int = 12,
    images: list[Path] | None = None,
) -> float:
    """Draws originals over their reconstructions into ``out``; returns the mean PSNR in dB of those pictured (8-bit
    pixels).

    Args:
        source: of held-out images, other than it was trained on.
        images: files and folders to show instead of ``num_images`` held-out images; of a folder at most ``num_images``.
    """
    images = find_images(images or [], num_images, "--num-images")
    check_out(out, images)
    saved, tokenizer = model.open_tokenizer()
    if images:
        originals = read_images(images, tokenizer)
    else:
        held_out = saved.held_out_images(source)
        originals = held_out.read(spread_over_classes(held_out.labels, len(held_out), num_images))
    pictures = edits.reconstruct(tokenizer, originals)
    columns, strips = min(COLUMNS, len(originals)), []
    for part in torch.arange(len(originals)).split(columns):
        strips += [_padded(originals[part], columns), _padded(pictures[part], columns)]
    titles = ["original", "reconstruction"] * (len(strips) // 2)
    save_image(contact_sheet(torch.cat(strips), columns, row_titles=titles), out)
    return psnr(pictures, originals).mean().item()


def check_out(out: Path, images: list[Path] | None) -> None:
    """Refuses to write a picture over a folder or over one of the ``images`` that it is made of.

    Raises:
        InputError: either.
    """
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; give a file, such as {out / 'pictures.png'}")
    if any(image.resolve() == out.resolve() for image in images or []):
        raise InputError(f"--out {out}: is one of the pictures given by --image; give another file")


def read_images(files: list[Path], tokenizer: Autoencoder) -> Tensor:
    """Pictures in the tokenizer's form, (n, C, H, W) uint8; it is printed what was changed about them."""
    images = []
    for file in files:
        config = tokenizer.config
        image, changed = read_image(file, config.image_size, config.channels, config.value_range)
        images.append(image)
        if changed:
            print(f"{file}: {changed}")
    return torch.stack(images)


def _padded(strip: Tensor, columns: int) -> Tensor:
    """A row that is not full is filled with white."""
    missing = strip.new_full((columns - len(strip), *strip.shape[1:]), 255)
    return torch.cat([strip, missing])


def command(
    model: Annotated[
        str,
        typer.Argument(help="runs/NAME of a tokenizer (or AE, VAE ...) or of a prior, a pipeline folder, a hub id."),
    ],
    image: Annotated[
        list[Path] | None,
        typer.Option(help="An image, or a folder of images, instead of held-out ones; repeat for several."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Another source than it was trained on.")] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Images shown: held-out ones, or those of a folder.")] = 12,
    out: Annotated[Path | None, typer.Option(help="A PNG; reconstructions.png in the run folder by default.")] = None,
) -> None:
    """Show images over their reconstructions: held-out ones, or your own."""
    share_cores()
    saved = SavedModel.find(model)
    out = out or saved.default_output("reconstructions.png")
    ratio = reconstruct(saved, out, data, num_images, image)
    print(f"{out}: PSNR {ratio:.2f} dB, the mean of the pictures shown")


if __name__ == "__main__":
    run_command(command)
