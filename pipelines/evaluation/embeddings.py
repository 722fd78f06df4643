"""A vector for each image of a dataset: the features of a network."""

from pathlib import Path

import numpy as np
import torch

from pipelines.evaluation.judges import Judge, OwnFeatures
from twostage.core.data.dataset import DataConfig, ImageSplit, load_images
from twostage.core.data.drawn_sources import DRAWN_SOURCES
from twostage.core.data.vectors import VECTOR_FILE, write_vectors
from twostage.core.errors import InputError
from twostage.core.machine.processes import join_processes
from twostage.core.machine.progress import ProgressBar

__all__ = ["embed"]

BATCH = 100
IMAGENET_SIDE = 128
"""The side in pixels of the images that the ImageNet network sees."""


def embed(source: str, network: Judge, out: Path, **settings: object) -> tuple[int, int]:
    """Writes the features of all images of ``source`` to ``out``, see :func:`write_vectors`.

    Args:
        settings: of `data`, such as ``label_column``.

    Returns:
        The numbers of images and of features.

    Raises:
        InputError: a drawn source, whose images have no names; ``out`` is no `.npz`; see :func:`load_images`.
    """
    if source in DRAWN_SOURCES:
        raise InputError(
            f"source {source}: expected images in files, whose names identify them. Give a folder or table"
        )
    if out.suffix != VECTOR_FILE or out.is_dir():
        raise InputError(
            f"--out {out}: expected a file that ends in {VECTOR_FILE}. Use --out {out.with_suffix(VECTOR_FILE)}"
        )
    data = load_images(
        DataConfig.model_validate({"source": source, "caption_column": None, **_form(network), **settings})
    )
    print(data.description, *data.notices, sep="\n")
    records = {name: split.records for name, split in data.splits.items() if split.records is not None}
    vectors = {name: _features(network, split, name) for name, split in data.splits.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_vectors(out, records, vectors)
    return sum(map(len, vectors.values())), network.num_features


def _form(network: Judge) -> dict[str, object]:
    """The size and channels of the images that the network sees."""
    if isinstance(network, OwnFeatures):
        return {"image_size": network.size, "channels": network.channels}
    return {"image_size": IMAGENET_SIDE, "channels": 3}


def _features(network: Judge, split: ImageSplit, name: str) -> np.ndarray:
    """(n, F) float32."""
    device = join_processes().device
    network.to(device)
    rows = torch.arange(len(split)).split(BATCH)
    found = [
        network(split.read(part).to(device)).float().cpu()
        for part in ProgressBar(rows, desc=name, unit="batch", leave=False)
    ]
    return torch.cat(found).numpy()
