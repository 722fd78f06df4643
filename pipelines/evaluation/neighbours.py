"""Nearest neighbours among the features of images, block by block: how far, how many, and as a picture.

Axes: n points, m others, F features, k neighbours, C channels, H and W pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor

from pipelines.evaluation.measurements import total_over_processes
from twostage.core.images.fonts import class_labels
from twostage.core.images.sheets import contact_sheet

__all__ = ["Neighbours", "in_any_ball", "nearest", "neighbours_sheet", "num_shown"]

POINTS, OTHERS = 256, 4096
"""A block of distances: a whole (n, m) table is never kept."""
MAX_SHOWN = 16


@dataclass
class Neighbours:
    """Some samples and the training images that are nearest to them."""

    samples: Tensor
    """(n, C, H, W) uint8."""
    nearest: Tensor
    """(n, k, C, H, W) uint8, the nearest first."""
    distances: Tensor
    """(n, k); 1 is how far held-out images are from their nearest training image (the median)."""


def nearest(points: Tensor, others: Tensor, count: int, state: PartialState) -> tuple[Tensor, Tensor]:
    """The ``count`` nearest of ``others`` (m, F) to each of ``points`` (n, F), the points shared by the processes.

    Returns:
        Euclidean distances (n, count) float64, the nearest first, and the rows of ``others``, (n, count).
    """
    distances = torch.zeros(len(points), count, dtype=torch.float64)
    rows = torch.zeros(len(points), count, dtype=torch.long)
    for places, blocks in _distance_blocks(points, others, state):
        near = torch.empty(len(places), 0, dtype=torch.float64)
        near_rows = torch.empty(len(places), 0, dtype=torch.long)
        for start, block in blocks:
            near = torch.cat([near.to(block), block], 1)
            block_rows = torch.arange(start, start + block.shape[1], device=block.device).expand_as(block)
            near_rows = torch.cat([near_rows.to(block.device), block_rows], 1)
            near, kept = near.topk(min(count, near.shape[1]), largest=False)
            near_rows = near_rows.gather(1, kept)
        distances[places], rows[places] = near.cpu(), near_rows.cpu()
    return total_over_processes(state, distances), total_over_processes(state, rows)


def in_any_ball(points: Tensor, centres: Tensor, radii: Tensor, state: PartialState) -> float:
    """The share of ``points`` (n, F) within the radius (m,) of at least one of ``centres`` (m, F)."""
    inside = torch.zeros(len(points), dtype=torch.float64)
    for places, blocks in _distance_blocks(points, centres, state):
        for start, block in blocks:
            reached = (block <= radii[start : start + block.shape[1]].to(block)).any(1)
            inside[places] = torch.maximum(inside[places], reached.cpu().double())
    return total_over_processes(state, inside).mean().item()


def _distance_blocks(
    points: Tensor, others: Tensor, state: PartialState
) -> Iterator[tuple[Tensor, Iterator[tuple[int, Tensor]]]]:
    """This process's places among the points, and for them: the first row and the distances (float64) of each block of
    others."""
    device = torch.device(state.device or "cpu")
    device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    for places in torch.arange(len(points)).split(POINTS)[state.process_index :: state.num_processes]:
        some = points[places].to(device, torch.float64)
        starts = range(0, len(others), OTHERS)
        yield places, ((s, torch.cdist(some, others[s : s + OTHERS].to(device, torch.float64))) for s in starts)


def num_shown(num_samples: int, num_classes: int) -> int:
    """How many of the first samples, whose classes take turns, are shown: as many of each class, where that fits."""
    of_each = MAX_SHOWN // num_classes if num_classes else 0
    return min(num_samples, of_each * num_classes or MAX_SHOWN)


def neighbours_sheet(neighbours: Neighbours, names: list[str] | None, numbers: list[int] | None = None) -> Image.Image:
    """Two samples a row, each followed by its nearest training images with their distances.

    Args:
        names: sample i is of the class ``names[i % len(names)]``.
        numbers: of the classes, where ``names`` are not all of them.
    """
    tiles, captions, labels = [], [], class_labels(names or [], numbers)
    blank = torch.full_like(neighbours.samples[:1], 255)
    for i, (sample, near, distances) in enumerate(
        zip(neighbours.samples, neighbours.nearest, neighbours.distances.tolist(), strict=True)
    ):
        tiles += [sample[None], near, *([blank] if i % 2 == 0 else [])]
        captions += [f"sample: {labels[i % len(labels)]}" if labels else f"sample {i}"]
        captions += [f"{distance:.2f}" for distance in distances] + [""] * (i % 2 == 0)
    return contact_sheet(torch.cat(tiles), 2 * neighbours.nearest.shape[1] + 3, captions)
