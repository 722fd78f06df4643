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
from core.training import share_cores
from pipelines.encode_dataset import training_data
from stage1_tokenizer.autoencoder import Autoencoder

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
    error = (originals.float() - pictures.float()).square().flatten(1).mean(1)
    psnr = 10 * torch.log10(255**2 / error.clamp(min=1e-8))
    strips, titles = [], []
    for part in rows.split(COLUMNS):
        strips += (
            [_padded(originals[part]), _padded(pictures[part])]
            if len(rows) > COLUMNS
            else [originals[part], pictures[part]]
        )
        titles += ["original", "reconstruction"]
    save_picture(contact_sheet(torch.cat(strips), min(COLUMNS, len(rows)), row_titles=titles), out)
    return psnr.mean().item()


def _padded(strip: torch.Tensor) -> torch.Tensor:
    """A last row that is not full is filled with white."""
    missing = strip.new_full((COLUMNS - len(strip), *strip.shape[1:]), 255)
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
    psnr = reconstruct(tokenizer, out, data, num_images)
    print(f"{out}: PSNR {psnr:.2f} dB, the mean of the pictures shown")


if __name__ == "__main__":
    run_command(command)
