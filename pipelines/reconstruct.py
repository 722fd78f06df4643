"""Sends images through a tokenizer and back, and shows both."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from core.command import run_command
from core.data import load_images
from core.images import to_float, to_uint8
from core.model_folder import find_model_folder
from core.pictures import contact_sheet, save_picture
from core.processes import share_cores
from pipelines.encode_dataset import training_data
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.metrics import psnr

__all__ = ["reconstruct"]

COLUMNS = 12


def reconstruct(tokenizer: str | Path, out: Path, source: str | None = None, num_images: int = 12) -> float:
    """Draws held-out originals over their reconstructions into ``out``; returns the mean PSNR in dB of those pictured
    (8-bit pixels)."""
    model = Autoencoder.from_pretrained(tokenizer)
    data = load_images(training_data(tokenizer, source))
    rows = torch.arange(min(num_images, len(data.validation)))
    originals = data.validation.read(rows)
    pictures = to_uint8(model.reconstruct(to_float(originals)))
    columns, strips = min(COLUMNS, len(rows)), []
    for part in rows.split(columns):
        strips += [_padded(originals[part], columns), _padded(pictures[part], columns)]
    titles = ["original", "reconstruction"] * (len(strips) // 2)
    save_picture(contact_sheet(torch.cat(strips), columns, row_titles=titles), out)
    return psnr(pictures, originals).mean().item()


def _padded(strip: torch.Tensor, columns: int) -> torch.Tensor:
    """A row that is not full is filled with white."""
    missing = strip.new_full((columns - len(strip), *strip.shape[1:]), 255)
    return torch.cat([strip, missing])


def command(
    tokenizer: Annotated[str, typer.Argument(help="runs/NAME of a trained tokenizer (or AE, VAE ...).")],
    data: Annotated[str | None, typer.Option(help="Another source than it was trained on.")] = None,
    num_images: Annotated[int, typer.Option(min=1)] = 12,
    out: Annotated[Path | None, typer.Option(help="A PNG; reconstructions.png in the run folder by default.")] = None,
) -> None:
    """Show held-out images over their reconstructions."""
    share_cores()
    out = out or find_model_folder(tokenizer).parent / "reconstructions.png"
    ratio = reconstruct(tokenizer, out, data, num_images)
    print(f"{out}: PSNR {ratio:.2f} dB, the mean of the pictures shown")


if __name__ == "__main__":
    run_command(command)
