"""The sheets of `reconstruct` and `interpolate`: images through a tokenizer and back."""

from pathlib import Path

import torch
from torch import Tensor

from pipelines.drawing.rebuilt_images import blend_images, rebuild_images
from pipelines.files.given_images import find_images, read_images
from pipelines.files.image_files import check_new_folder, check_output_file, write_images
from pipelines.saved.saved_model import SavedModel
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.validation import psnr
from twostage.core.data.spread import spread, spread_over_classes
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_shown
from twostage.core.images.fonts import class_labels
from twostage.core.images.sheets import contact_sheet, save_image

__all__ = ["draw_interpolations", "draw_reconstructions", "pairs_of_rows"]

COLUMNS = 12


def draw_reconstructions(
    model: SavedModel,
    out: Path,
    source: str | None = None,
    num_images: int = 12,
    images: list[Path] | None = None,
    images_out: Path | None = None,
) -> float:
    """Draws originals above their reconstructions into ``out``; returns the mean PSNR in dB of the images shown, with
    the bits of their files.

    Args:
        source: a source of held-out images to use instead of the training source.
        images: files and folders to show instead of ``num_images`` held-out images; at most ``num_images`` per folder.
        images_out: a new folder for the reconstructions, without loss; None: only the sheet is written.

    Raises:
        InputError: no tokenizer, no images, or an ``out`` that would overwrite one.
    """
    images = find_images(images or [], num_images, "--num-images")
    check_output_file(out, images)
    if images_out:
        check_new_folder(images_out, "--images-out")
    saved, tokenizer = model.open_tokenizer()
    given = None
    if images:
        _check_files(tokenizer, images)
        originals = read_images(images, tokenizer.config)
    else:
        held_out = saved.held_out_images(source, _needed_classes(tokenizer))
        rows = spread_over_classes(held_out.labels, len(held_out), num_images)
        originals, given = held_out.read(rows), tokenizer.read_given(held_out, rows)
    reconstructions, shown = rebuild_images(tokenizer, originals, given), tokenizer.config.shown_channels
    if images_out:
        write_images(images_out, reconstructions)
    columns, strips = min(COLUMNS, len(originals)), []
    for part in torch.arange(len(originals)).split(columns):
        strips += [_padded(to_shown(each[part], shown), columns) for each in (originals, reconstructions)]
    titles = ["original", "reconstruction"] * (len(strips) // 2)
    save_image(contact_sheet(torch.cat(strips), columns, row_titles=titles), out)
    return psnr(reconstructions, originals).mean().item()


def draw_interpolations(
    model: SavedModel,
    out: Path,
    images: list[Path] | None = None,
    source: str | None = None,
    num_images: int = 9,
    num_pairs: int = 4,
) -> int:
    """Draws one strip of ``num_images`` images for each pair into ``out``, see :func:`blend_images`; returns the number
    of strips.

    Args:
        images: files and folders; each two images are a pair. At most ``num_pairs`` pairs per folder. None:
            ``num_pairs`` pairs of held-out images, of two classes each if there are classes; for a tokenizer that sees
            the class, of the same class each.

    Raises:
        InputError: an odd number of images, fewer than two held-out images, a tokenizer that sees the caption, the map
            or the vector of an image, and what :func:`draw_reconstructions` refuses.
    """
    images = find_images(images or [], 2 * num_pairs, "--num-pairs")
    if len(images) % 2:
        raise InputError(f"--image: got {len(images)} image{'s' * (len(images) > 1)}, expected two for each strip")
    check_output_file(out, images)
    saved, tokenizer = model.open_tokenizer()
    for condition in tokenizer.config.conditions:
        if condition.type != "class":
            raise InputError(
                f"{model.path}: sees the {condition.plural} of images (model.condition {condition.type!r}), and two "
                "images share none. Use twostage reconstruct, or TwoStagePipeline.interpolate with one for both"
            )
    labels = None
    if images:
        _check_files(tokenizer, images)
        ends, titles = read_images(images, tokenizer.config), [file.stem for file in images]
    else:
        held_out = saved.held_out_images(source, _needed_classes(tokenizer))
        rows = pairs_of_rows(held_out.labels, len(held_out), num_pairs, same_class="class" in tokenizer.conditions)
        ends, labels = held_out.read(rows), held_out.read_labels(rows)
        names = class_labels(tokenizer.config.class_names or []) if source is None else None
        titles = [names[label] for label in labels.tolist()] if names and labels is not None else None
    classes = labels[::2].split(1) if labels is not None else [None] * (len(ends) // 2)
    pairs = zip(ends[::2], ends[1::2], classes, strict=True)
    strips = [blend_images(tokenizer, first, second, num_images, label) for first, second, label in pairs]
    row_titles = [f"{a} to {b}" for a, b in zip(titles[::2], titles[1::2], strict=True)] if titles else None
    shown = to_shown(torch.cat(strips), tokenizer.config.shown_channels)
    save_image(contact_sheet(shown, num_images, row_titles=row_titles), out)
    return len(strips)


def pairs_of_rows(labels: Tensor | None, count: int, num_pairs: int, same_class: bool = False) -> Tensor:
    """Pairs of rows, one after the other: (2 pairs,), spread over the classes of ``labels`` (count,). The two rows of a
    pair have different classes where possible; or, for ``same_class``, always the same.

    Raises:
        InputError: fewer than two rows, or no two of the same class.
    """
    rows = torch.arange(count)
    if same_class and labels is not None:
        classes = labels.unique()
        rows = rows[torch.isin(labels, classes[spread(len(classes), num_pairs)])]
    chosen = spread_over_classes(None if labels is None else labels[rows], len(rows), 2 * num_pairs)
    left, pairs = rows[chosen].tolist(), []
    while len(left) > 1:
        first = left.pop(0)
        fitting = (row for row in left if labels is not None and (labels[row] == labels[first]) == same_class)
        second = next(fitting, None if same_class else left[0])
        if second is not None:
            left.remove(second)
            pairs += [first, second]
    if not pairs:
        of_class = " of the same class" * same_class
        raise InputError(
            f"{count} held-out images, expected at least 2{of_class}, the ends of a strip. "
            + ("Use --data with more images" if same_class else "Give --image twice")
        )
    return torch.tensor(pairs)


def _needed_classes(tokenizer: Autoencoder) -> list[str] | None:
    """The classes that held-out images must have; None: any."""
    return tokenizer.config.class_names if "class" in tokenizer.conditions else None


def _check_files(tokenizer: Autoencoder, files: list[Path]) -> None:
    for condition in tokenizer.config.conditions:
        raise InputError(
            f"--image {files[0]}: this model sees the {condition.plural} of images (model.condition "
            f"{condition.type!r}), and files have none. Omit --image to use held-out images, or choose others with "
            "--data"
        )


def _padded(strip: Tensor, columns: int) -> Tensor:
    """A row filled up with white images."""
    return torch.cat([strip, strip.new_full((columns - len(strip), *strip.shape[1:]), 255)])
