"""Checks whether samples are copies of training images: the distances to the nearest ones, and a sheet of them.

Axes: n samples, F features, k neighbours, C channels, H and W pixels.
"""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from pipelines.evaluation.distances import NUM_NEIGHBOURS, nearest
from pipelines.evaluation.judged_images import JudgedImages, RealImages
from pipelines.evaluation.measurement import Measurement
from pipelines.evaluation.shared_work import SharedWork
from pipelines.saved.evaluation_figures import SampleNovelty
from twostage.core.images.fonts import class_labels
from twostage.core.images.sheets import contact_sheet

__all__ = ["Neighbours", "measure_novelty", "memorisation_warning", "neighbours_sheet", "num_shown"]

MAX_SHOWN = 16
"""Samples on the sheet of neighbours."""
MAX_COPIES = 0.01
"""The largest share of the samples that may equal training images without a warning."""
MIN_NEIGHBOUR_RATIO = 0.5
"""Samples that are closer to training images than this, compared with held-out images, look like copies."""


@dataclass(frozen=True)
class Neighbours:
    """Some samples and their nearest training images."""

    samples: Tensor
    """(n, C, H, W) uint8 or uint16."""
    nearest: Tensor
    """(n, k, C, H, W), the nearest first."""
    distances: Tensor
    """(n, k); 1 is the median distance of held-out images to their nearest training image."""


def measure_novelty(
    samples: JudgedImages, images: Tensor, real: RealImages, num_classes: int, work: SharedWork
) -> tuple[Measurement[SampleNovelty], Neighbours]:
    """Measures whether samples are copies of training images, and finds the neighbours of the first ones.

    Args:
        images: the first samples, (at least `MAX_SHOWN` if there are as many, C, H, W).
        num_classes: the classes that the samples cycle through.
    """
    training, name = real.training, real.source.split_name
    distances, rows = nearest(samples.features, training.features, min(NUM_NEIGHBOURS, len(training)), work)
    usual = nearest(real.held_out.features, training.features, 1, work)[0].median()
    known = set(training.digests.values)
    copies = sum(digest in known for digest in samples.digests.values)
    figures = SampleNovelty((distances[:, 0].median() / usual).item(), copies)
    protocol = {
        "network": samples.network.protocol["network"],
        **real.counts,
        "distance": "Euclidean, between features",
        "neighbour_distance_ratio": (
            f"median distance of samples to their nearest training image, divided by that of images of `{name}`: about "
            "1 for new images, far below 1 for copies"
        ),
        "training_copies": "samples whose pixels all equal those of a training image",
    }
    shown = num_shown(len(samples), num_classes)
    pixels = real.source.train.read(real.training_rows[rows[:shown].flatten()]).unflatten(0, (shown, -1))
    warning = memorisation_warning(figures, len(samples))
    found = Measurement(figures, {}, {"neighbours": protocol}, (), [warning] if warning else [])
    return found, Neighbours(images[:shown], pixels, distances[:shown] / usual)


def memorisation_warning(figures: SampleNovelty, num_samples: int) -> str | None:
    """A warning if samples look like copies of training images."""
    ratio, copies, reasons = figures.neighbour_distance_ratio, figures.training_copies, []
    if ratio is not None and ratio < MIN_NEIGHBOUR_RATIO:
        reasons.append(f"samples are {ratio:.2f} times as far from training images as held-out images are")
    if copies is not None and copies > MAX_COPIES * num_samples:
        reasons.append(f"{copies} of them equal training images, pixel by pixel")
    if not reasons:
        return None
    return (
        f"Warning: the model may have memorised its training images: {' and '.join(reasons)}. Look at neighbours.png, "
        "and train on more data, a smaller model, with more dropout, or for fewer steps."
    )


def num_shown(num_samples: int, num_classes: int) -> int:
    """The number of first samples to show (their classes cycle): equally many of each class if that fits."""
    of_each = MAX_SHOWN // num_classes if num_classes else 0
    return min(num_samples, of_each * num_classes or MAX_SHOWN)


def neighbours_sheet(neighbours: Neighbours, names: list[str] | None, numbers: list[int] | None = None) -> Image.Image:
    """Two samples per row, each followed by its nearest training images with their distances.

    Args:
        names: sample i has the class ``names[i % len(names)]``.
        numbers: the labels of the classes, if ``names`` are not all of them.
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
