"""The sample sheets of a training: the same held-out images of all classes each time, and views of the latent space."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.objective import corrupt
from twostage.core.data.image_data import ImageData, ImageSplit
from twostage.core.data.spread import spread_over_classes
from twostage.core.images.conversion import to_float, to_uint8
from twostage.core.images.fonts import class_labels, figure_families
from twostage.core.images.sheets import contact_sheet, figure_canvas, to_image
from twostage.core.training.random import BatchRandom, seed_for

__all__ = ["draw_images"]

COLUMNS = 12
INTERPOLATIONS = 2
STYLES = 4  # rows of the sheet of classes
MANIFOLD_SIDE = 20
LEGEND_WIDTH = 160  # pixels of a class name in the legend
MAX_POINTS = 5000  # in the scatter plot


@torch.no_grad()
def draw_images(model: Autoencoder, data: ImageData, seed: int) -> dict[str, Image.Image]:
    """Sheets of a model by name.

    "": originals, corrupted originals and reconstructions; samples, if the model is variational; interpolations, if the
    latent is continuous. "classes": samples, one column per class and one noise per row. "manifold" and "scatter": a
    two-dimensional latent. A model that sees the class has no interpolations and no manifold, which would need a class.
    """
    model.eval()
    sheets = {"": _overview(model, data, seed)}
    if model.class_conditional and data.class_names:
        sheets["classes"] = _classes(model, data, seed)
    if model.codebook_size is None and model.config.model.latent_channels == 2 and model.grid == (1, 1):
        if not model.sees_class:
            sheets["manifold"] = _manifold(model)
        sheets["scatter"] = _scatter(model, data.validation, data.class_names)
    return sheets


def _overview(model: Autoencoder, data: ImageData, seed: int) -> Image.Image:
    rows = spread_over_classes(data.validation.labels, len(data.validation), COLUMNS)
    device = model.device
    originals, labels = data.validation.read(rows), data.validation.read_labels(rows)
    images = to_float(originals.to(device))
    strips, titles = [originals], ["original"]
    inputs = images
    if model.config.loss.corruption:
        random = BatchRandom(seed_for(seed, "pictures"), slice(0, len(rows)), len(rows))
        inputs = corrupt(images, model.config.loss.corruption, random)
        strips.append(to_uint8(inputs))
        titles.append("corrupted")
    strips.append(to_uint8(model.reconstruct(inputs, labels)))
    titles.append("reconstruction")
    if model.variational:
        strips.append(to_uint8(model.sample(len(rows), generator=_generator(seed, device))))
        titles.append("sample")
    if model.codebook_size is None and not model.sees_class and len(rows) >= 2 * INTERPOLATIONS:
        z = model.encode(inputs[: 2 * INTERPOLATIONS]).z
        shares = torch.linspace(0, 1, len(rows), device=device).view(-1, 1, 1, 1)
        for first, second in zip(z[::2], z[1::2], strict=True):
            strips.append(to_uint8(model.decode(torch.lerp(first, second, shares))))
            titles.append("interpolation")
    return contact_sheet(torch.cat([strip.cpu() for strip in strips]), columns=len(rows), row_titles=titles)


def _classes(model: Autoencoder, data: ImageData, seed: int) -> Image.Image:
    device, names = model.device, data.class_names or []
    trained = [label for label, name in enumerate(names) if name not in data.untrained_classes][:COLUMNS]
    labels, captions = torch.tensor(trained).repeat(STYLES), class_labels(names)
    noise = torch.randn(STYLES, *model.latent_shape, generator=_generator(seed, device), device=device)
    samples = to_uint8(model.sample_from(noise.repeat_interleave(len(trained), 0), labels)).cpu()
    return contact_sheet(samples, columns=len(trained), captions=[captions[i] for i in labels.tolist()])


def _manifold(model: Autoencoder) -> Image.Image:
    """Decodes a lattice of the plane with even steps in probability under N(0, 1) (Kingma and Welling 2014)."""
    shares = torch.linspace(0.02, 0.98, MANIFOLD_SIDE)
    steps = torch.special.ndtri(shares)
    lattice = torch.cartesian_prod(-steps, steps).flip(1)[..., None, None]  # the second dimension grows upwards
    return contact_sheet(to_uint8(model.decode(lattice.to(model.device))).cpu(), columns=MANIFOLD_SIDE)


def _scatter(model: Autoencoder, split: ImageSplit, class_names: list[str] | None) -> Image.Image:
    rows = spread_over_classes(split.labels, len(split), MAX_POINTS)
    device = model.device
    labels = split.read_labels(rows)
    z = torch.cat(
        [
            model.encode(to_float(split.read(part).to(device)), split.read_labels(part)).z.flatten(1).cpu()
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


def _generator(seed: int, device: Any) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed_for(seed, "samples"))
