"""What a network or a tokenizer makes of each image of a dataset, in a file: features, latents or codes.

Axes: n images, B of them in a batch, F features, C channels, h and w cells.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.evaluation.judges import Judge, OwnFeatures
from stage1_tokenizer.autoencoder import Autoencoder
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.drawn_sources import DRAWN_SOURCES
from twostage.core.data.image_data import ImageSplit
from twostage.core.data.vectors import TABLE_FILE, VECTOR_FILE, write_embeddings
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_float
from twostage.core.machine.processes import join_processes
from twostage.core.machine.progress import ProgressBar

__all__ = ["Embedder", "codes_of", "embed", "features_of", "latents_of"]

BATCH = 100
IMAGENET_SIDE = 128
"""The side in pixels of the images that the ImageNet network sees."""


@dataclass(frozen=True)
class Embedder:
    """Computes something of each image."""

    name: str
    """The array or column: `vectors`, `latents` or `codes`."""
    data: dict[str, Any]
    """The `data` settings of the images that it sees."""
    network: Judge | Autoencoder
    compute: Callable[[Tensor, Tensor | None], Tensor]
    """Images (B, C, H, W) uint8 or uint16 and labels (B,) or None -> (B, ...)."""


def features_of(network: Judge) -> Embedder:
    """The pooled features (B, F) of a network."""
    data: dict[str, Any] = {"image_size": IMAGENET_SIDE, "channels": 3}
    if isinstance(network, OwnFeatures):
        data = {"image_size": network.size, "channels": network.channels}
    return Embedder("vectors", data, network, lambda pixels, _: network(pixels).float())


def latents_of(model: Autoencoder) -> Embedder:
    """The latents (B, C, h, w) that the decoder of an autoencoder sees; of a VAE, the means."""
    return Embedder("latents", _form_of(model), model, lambda pixels, labels: model.encode(to_float(pixels), labels).z)


def codes_of(model: Autoencoder) -> Embedder:
    """The codes (B, h, w) of a tokenizer.

    Raises:
        InputError: it has none.
    """
    if not model.codebook_size:
        raise InputError(
            f"--codes: the bottleneck {model.config.model.bottleneck.type!r} has no codes. Use --latents instead"
        )
    return Embedder("codes", _form_of(model), model, lambda pixels, _: model.encode_indices(to_float(pixels)))


def _form_of(model: Autoencoder) -> dict[str, Any]:
    form = model.config
    return {
        "image_size": form.image_size,
        "channels": form.channels,
        "value_range": form.value_range,
        "bits": form.bits,
    }


def embed(source: str, embedder: Embedder, out: Path, **settings: object) -> tuple[int, tuple[int, ...]]:
    """Writes what ``embedder`` makes of all images of ``source`` to ``out``, see :func:`write_embeddings`.

    Args:
        settings: of `data`, such as ``label_column``.

    Returns:
        The number of images, and the shape of what is written of each.

    Raises:
        InputError: a drawn source, whose images have no names; ``out`` has another ending; see :func:`load_images`.
    """
    if source in DRAWN_SOURCES:
        raise InputError(
            f"source {source}: expected images in files, whose names identify them. Give a folder or table"
        )
    if out.suffix not in (VECTOR_FILE, TABLE_FILE) or out.is_dir():
        raise InputError(
            f"--out {out}: expected a file that ends in {VECTOR_FILE} or {TABLE_FILE}. Use --out "
            f"{out.with_suffix(VECTOR_FILE)}"
        )
    group = {"source": source, "caption_column": None, **embedder.data, **settings}
    data = load_images(DataConfig.model_validate(group))
    print(data.description, *data.notices, sep="\n")
    records = {name: split.records for name, split in data.splits.items() if split.records is not None}
    arrays = {name: _compute(embedder, split, name) for name, split in data.splits.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_embeddings(out, records, embedder.name, arrays, data.class_names)
    return sum(map(len, arrays.values())), arrays["train"].shape[1:]


@torch.no_grad()
def _compute(embedder: Embedder, split: ImageSplit, name: str) -> np.ndarray:
    """(n, ...)."""
    device = join_processes().device
    embedder.network.to(device)
    found = []
    for rows in ProgressBar(torch.arange(len(split)).split(BATCH), desc=name, unit="batch", leave=False):
        labels = split.read_labels(rows)
        found.append(embedder.compute(split.read(rows).to(device), None if labels is None else labels.to(device)).cpu())
    return torch.cat(found).numpy()
