"""Shows what lies between two images, as a tokenizer (or AE, VAE ...) has it."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from pipelines.drawing import edits
from pipelines.files.given_images import find_images
from pipelines.reconstruct import check_out, read_images
from pipelines.saved.saved_model import SavedModel
from twostage.core.data.spread import spread_over_classes
from twostage.core.errors import InputError
from twostage.core.images.fonts import class_labels
from twostage.core.images.sheets import contact_sheet, save_image
from twostage.core.machine.command import run_command
from twostage.core.machine.processes import share_cores

__all__ = ["interpolate"]


def interpolate(
    model: SavedModel,
    out: Path,
    images: list[Path] | None = None,
    source: str | None = None,
    num_images: int = 9,
    num_pairs: int = 4,
) -> int:
    """Draws a strip of ``num_images`` pictures a pair into ``out``, from the reconstruction of the one to that of the
    other, by the rule of `edits.interpolate`; returns how many strips.

    Args:
        images: files and folders, of which each two images are a pair, instead of ``num_pairs`` of held-out images (of
            two classes each, where there are classes); of a folder at most ``num_pairs`` pairs.

    Raises:
        InputError: an odd number of pictures, fewer than two held-out ones.
    """
    images = find_images(images or [], 2 * num_pairs, "--num-pairs")
    if len(images) % 2:
        raise InputError(f"--image: got {len(images)} image{'s' * (len(images) > 1)}, expected two for each strip")
    check_out(out, images)
    saved, tokenizer = model.open_tokenizer()
    if images:
        ends, titles = read_images(images, tokenizer), [file.stem for file in images]
    else:
        held_out = saved.held_out_images(source)
        rows = pairs_of_rows(held_out.labels, len(held_out), num_pairs)
        ends, labels = held_out.read(rows), held_out.read_labels(rows)
        names = class_labels(tokenizer.config.class_names or []) if source is None else None
        titles = [names[label] for label in labels.tolist()] if names and labels is not None else None
    pairs = zip(ends[::2], ends[1::2], strict=True)
    strips = [edits.interpolate(tokenizer, first, second, num_images) for first, second in pairs]
    row_titles = [f"{a} to {b}" for a, b in zip(titles[::2], titles[1::2], strict=True)] if titles else None
    save_image(contact_sheet(torch.cat(strips), num_images, row_titles=row_titles), out)
    return len(strips)


def pairs_of_rows(labels: Tensor | None, count: int, num_pairs: int) -> Tensor:
    """Pairs of rows, one after the other: (2 pairs,), spread over the classes of ``labels`` (count,). The two rows of a
    pair are of different classes while there are such.

    Raises:
        InputError: fewer than two rows.
    """
    if count < 2:
        raise InputError(f"{count} held-out images, expected at least the two ends of a strip; give --image twice")
    left, pairs = spread_over_classes(labels, count, 2 * num_pairs).tolist(), []
    while len(left) > 1:
        first = left.pop(0)
        other = (row for row in left if labels is not None and labels[row] != labels[first])
        second = next(other, left[0])
        left.remove(second)
        pairs += [first, second]
    return torch.tensor(pairs)


def command(
    model: Annotated[
        str,
        typer.Argument(help="runs/NAME of a tokenizer (or AE, VAE ...) or of a prior, a pipeline folder, a hub id."),
    ],
    image: Annotated[
        list[Path] | None,
        typer.Option(help="An image, given twice: the two ends; or a folder of images, which are paired in order."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Another source than it was trained on.")] = None,
    num_images: Annotated[int, typer.Option(min=2, help="Of a strip, both ends included.")] = 9,
    num_pairs: Annotated[int, typer.Option(min=1, help="Strips between held-out images, or those of a folder.")] = 4,
    out: Annotated[Path | None, typer.Option(help="A PNG; interpolations.png in the run folder by default.")] = None,
) -> None:
    """Show what lies between two images: held-out ones, or your own."""
    share_cores()
    saved = SavedModel.find(model)
    out = out or saved.default_output("interpolations.png")
    strips = interpolate(saved, out, image, data, num_images, num_pairs)
    print(f"{out}: {strips} strip{'s' * (strips > 1)} of {num_images} pictures; both ends are reconstructions")


if __name__ == "__main__":
    run_command(command)
