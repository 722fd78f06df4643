"""The sample sheets of a training: the same held-out images of all classes each time, and views of the latent space."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.losses.objective import corrupt
from twostage.core.data.image_data import ImageData, ImageSplit
from twostage.core.data.spread import spread_over_classes
from twostage.core.images.conversion import to_float, to_shown, to_uint8
from twostage.core.images.fonts import class_labels, figure_families
from twostage.core.images.sheets import contact_sheet, figure_canvas, prompt_sheet, to_image
from twostage.core.training.random import BatchRandom, seed_for

__all__ = ["draw_images"]

COLUMNS = 12
INTERPOLATIONS = 2
STYLES = 4  # rows of the sheets of classes and of prompts
PROMPTS = 8  # columns
MANIFOLD_SIDE = 20
LEGEND_WIDTH = 160  # pixels of a class name in the legend
MAX_POINTS = 5000  # in the scatter plot


@torch.no_grad()
def draw_images(model: Autoencoder, data: ImageData, seed: int) -> dict[str, Image.Image]:
    """Sheets of a model by name.

    "": originals, corrupted originals and reconstructions; samples, if the model is variational; interpolations, if the
    latent is continuous. "classes": samples, one column per class and one noise per row. "prompts": the same for
    held-out captions, if the model sees captions. "manifold" and "scatter": a two-dimensional latent. A model that sees
    a condition has no interpolations and no manifold, which would need one.
    """
    model.eval()
    sheets = {"": _overview(model, data, seed)}
    if model.class_conditional and data.class_names:
        sheets["classes"] = _classes(model, data, seed)
    if prompts := model.example_prompts():
        sheets["prompts"] = _prompts(model, prompts, seed)
    if model.codebook_size is None and model.config.model.latent_channels == 2 and model.grid == (1, 1):
        if not model.condition:
            sheets["manifold"] = _manifold(model)
        sheets["scatter"] = _scatter(model, data.validation, data.class_names)
    return sheets


def _overview(model: Autoencoder, data: ImageData, seed: int) -> Image.Image:
    rows = spread_over_classes(data.validation.labels, len(data.validation), COLUMNS)
    device = model.device
    originals, given = data.validation.read(rows), model.read_given(data.validation, rows)
    images = to_float(originals.to(device))
    strips, titles = [_shown(model, images)], ["original"]
    inputs = images
    if model.config.loss.corruption:
        random = BatchRandom(seed_for(seed, "pictures"), slice(0, len(rows)), len(rows))
        inputs = corrupt(images, model.config.loss.corruption, random)
        strips.append(_shown(model, inputs))
        titles.append("corrupted")
    strips.append(_shown(model, model.reconstruct(inputs, given)))
    titles.append("reconstruction")
    if model.variational:
        of_columns = None if model.class_conditional else given  # samples cycle through the classes
        strips.append(_shown(model, model.sample(len(rows), of_columns, _generator(seed, device))))
        titles.append("sample")
    if model.codebook_size is None and not model.condition and len(rows) >= 2 * INTERPOLATIONS:
        z = model.encode(inputs[: 2 * INTERPOLATIONS]).z
        shares = torch.linspace(0, 1, len(rows), device=device).view(-1, 1, 1, 1)
        for first, second in zip(z[::2], z[1::2], strict=True):
            strips.append(_shown(model, model.decode(torch.lerp(first, second, shares))))
            titles.append("interpolation")
    return contact_sheet(torch.cat(strips), columns=len(rows), row_titles=titles)


def _classes(model: Autoencoder, data: ImageData, seed: int) -> Image.Image:
    device, names = model.device, data.class_names or []
    trained = [label for label, name in enumerate(names) if name not in data.untrained_classes][:COLUMNS]
    labels, captions = torch.tensor(trained).repeat(STYLES), class_labels(names)
    noise = torch.randn(STYLES, *model.latent_shape, generator=_generator(seed, device), device=device)
    samples = _shown(model, model.sample_from(noise.repeat_interleave(len(trained), 0), labels))
    return contact_sheet(samples, columns=len(trained), captions=[captions[i] for i in labels.tolist()])


def _prompts(model: Autoencoder, prompts: Sequence[str], seed: int) -> Image.Image:
    shown, device = prompts[:PROMPTS], model.device
    noise = torch.randn(STYLES, *model.latent_shape, generator=_generator(seed, device), device=device)
    given = model.parse("text", shown).repeat(STYLES, 1, 1)
    samples = model.sample_from(noise.repeat_interleave(len(shown), 0), given)
    return prompt_sheet(_shown(model, samples), shown)


def _manifold(model: Autoencoder) -> Image.Image:
    """Decodes a lattice of the plane with even steps in probability under N(0, 1) (Kingma and Welling 2014)."""
    shares = torch.linspace(0.02, 0.98, MANIFOLD_SIDE)
    steps = torch.special.ndtri(shares)
    lattice = torch.cartesian_prod(-steps, steps).flip(1)[..., None, None]  # the second dimension grows upwards
    return contact_sheet(_shown(model, model.decode(lattice.to(model.device))), columns=MANIFOLD_SIDE)


def _scatter(model: Autoencoder, split: ImageSplit, class_names: list[str] | None) -> Image.Image:
    rows = spread_over_classes(split.labels, len(split), MAX_POINTS)
    device = model.device
    labels = split.read_labels(rows)
    z = torch.cat(
        [
            model.encode(to_float(split.read(part).to(device)), model.read_given(split, part)).z.flatten(1).cpu()
            for part in rows.split(500)
        ]
    )
    canvas, figure = figure_canvas((6.4, 6.0))
    axes = figure.subplots()
    groups: list[tuple[str | None, Tensor]] = [(None, z)]
    if labels is not None and class_names:
        names = class_labels(class_names, max_width=LEGEND_WIDTH, complex_scripts=False)
        groups = [(name, z[labels == i]) for i, name in enumerate(names)]
    for i, (name, points) in enumerate(groups):
        axes.scatter(points[:, 0], points[:, 1], s=3, alpha=0.6, label=name, color=f"C{i % 10}")
    axes.set(xlabel="first latent dimension", ylabel="second", title=f"{len(z):,} held-out images in the latent plane")
    if len(groups) > 1:
        families = figure_families(name for name, _ in groups if name)
        place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        legend = axes.legend(markerscale=4, title="class", prop={"family": families}, **place)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return to_image(canvas)


def _shown(model: Autoencoder, images: Tensor) -> Tensor:
    """Images (n, C, H, W) in [-1, 1] as a sheet shows them."""
    return to_shown(to_uint8(images), model.config.shown_channels).cpu()


def _generator(seed: int, device: Any) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed_for(seed, "samples"))
