"""Measures of image sets by a network's features: the distance between two sets, and the quality of one.

Frechet distance, kernel distance, Inception score, precision and recall, nearest neighbours. Every function gives the
same result in every process. Axes: B images of a batch, n images, m others, F features, K classes, k neighbours.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pipelines.evaluation.shared_work import SharedWork
from twostage.core.training.random import seed_for

__all__ = [
    "NUM_NEIGHBOURS",
    "NUM_SUBSETS",
    "FrechetDistance",
    "bias_warning",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "nearest",
    "num_splits",
    "precision_recall",
    "subset_size",
    "too_few",
]

MIN_IMAGES_PER_FEATURE = 10
"""With fewer images, a Frechet distance is biased: 2048 features need 20,480 images."""
NUM_SUBSETS = 100
MAX_SUBSET_SIZE = 1000
"""The usual number and size of the kernel distance's subsets."""
MAX_SPLITS, MIN_IMAGES_PER_SPLIT = 10, 50
"""The splits of the Inception score: their maximum number and minimum size."""
NUM_NEIGHBOURS = 3
"""The distance to this neighbour is the radius of an image's ball in precision and recall."""
BLOCK_POINTS, BLOCK_OTHERS = 256, 4096
"""Distances are computed block by block: a whole (n, m) table might not fit in memory."""


# --- Frechet distance -----------------------------------------------------------------------------------------------


class FrechetDistance:
    """The Frechet distance between two sets of images, whose features it takes batch by batch. Its sums are float64.

    d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), Heusel et al. 2017 (arXiv 1706.08500).
    """

    def __init__(self, num_features: int, device: torch.device) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        self._metric = FrechetInceptionDistance(feature=_Identity(num_features), sync_on_compute=False).to(device)
        for real in (True, False):  # a process may get no images
            self.update(torch.empty(0, num_features, dtype=torch.float64), real)

    def update(self, features: Tensor, real: bool) -> None:
        """Adds features (B, F) float64 to one of the sets."""
        self._metric.update(features.to(self._metric.device), real)

    def compute(self, work: SharedWork | None = None) -> float:
        """The distance; ``work`` combines what the processes added (None: each has added everything)."""
        if work:
            for name, value in self._metric.metric_state.items():
                assert isinstance(value, Tensor)
                setattr(self._metric, name, work.total(value))
        return max(0.0, self._metric.compute().item())  # rounding can turn 0 into -1e-9


class _Identity(nn.Identity):
    """A "feature extractor" whose input is features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_distance(first: Tensor, second: Tensor, device: torch.device) -> float:
    """The distance between the features (n, F) and (m, F) of two whole sets."""
    distance = FrechetDistance(first.shape[1], device)
    for features, real in ((first, True), (second, False)):
        for part in features.split(4096):
            distance.update(part.double(), real)
    return distance.compute()


def too_few(distinct: int, num_features: int) -> str | None:
    """Why there is no Frechet distance of ``distinct`` different images: a covariance of full rank needs F + 1."""
    if distinct > num_features:
        return None
    return f"{distinct} different images, but {num_features} features need at least {num_features + 1}"


def bias_warning(num_images: int, num_features: int) -> str | None:
    """A warning about the Frechet distance of ``num_images`` images; None: there are enough of them."""
    if num_images >= MIN_IMAGES_PER_FEATURE * num_features:
        return None
    return (
        f"{num_images} images for {num_features} features, fewer than {MIN_IMAGES_PER_FEATURE} images per feature: the "
        "distance is biased upwards, so only compare it with distances of equally many images"
    )


# --- other figures --------------------------------------------------------------------------------------------------


def subset_size(num_images: int) -> int:
    """The images in a subset for the kernel distance: at most half of the smaller set, so that subsets differ."""
    return min(MAX_SUBSET_SIZE, num_images // 2)


def kernel_distance(images: Tensor, real: Tensor, size: int, work: SharedWork) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018, arXiv 1801.01401) of features (n, F) and (m, F): the unbiased estimate of the squared
    maximum mean discrepancy with the kernel (x.y / F + 1)^3, over `NUM_SUBSETS` random subsets.

    Args:
        size: images of each set in a subset, at least 2.

    Returns:
        The mean over the subsets, which can be slightly below 0 for similar sets, and their standard deviation.
    """
    from torchmetrics.image.kid import poly_mmd

    distances = torch.zeros(NUM_SUBSETS, dtype=torch.float64)
    for subset in work.share(range(NUM_SUBSETS)):
        generator = torch.Generator().manual_seed(seed_for("kernel distance", subset))
        some_real, some = (
            features[torch.randperm(len(features), generator=generator)[:size]].to(work.float64_device, torch.float64)
            for features in (real, images)
        )
        distances[subset] = poly_mmd(some_real, some).cpu()
    return _mean_and_deviation(work.total(distances))


def num_splits(num_images: int) -> int:
    """The splits for the Inception score: fewer for few images."""
    return max(1, min(MAX_SPLITS, num_images // MIN_IMAGES_PER_SPLIT))


def inception_score(logits: Tensor) -> tuple[float, float]:
    """exp of the mean of KL(p(class | image) || p(class)) (Salimans et al. 2016, arXiv 1606.03498) from logits (n, K):
    between 1 (all images look alike to the network) and K.

    Returns:
        The mean over random splits, and their standard deviation.
    """
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed_for("inception score")))
    scores = []
    for part in logits[order].double().tensor_split(num_splits(len(logits))):
        chances = part.softmax(1)
        each = (chances * (part.log_softmax(1) - chances.mean(0).log())).nansum(1)  # a class of chance 0: 0 log 0
        scores.append(each.mean().exp())
    return _mean_and_deviation(torch.stack(scores))


def precision_recall(images: Tensor, real: Tensor, work: SharedWork) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991) of features (n, F) and (m, F).

    A set covers a ball around each of its images, up to its `NUM_NEIGHBOURS`-th neighbour. Both sets need more images
    than that.

    Returns:
        The share of the images that the real set covers, and the share of real images that the images cover.
    """
    # An image is its own nearest neighbour.
    radii = [nearest(features, features, NUM_NEIGHBOURS + 1, work)[0][:, -1] for features in (images, real)]
    return share_in_balls(images, real, radii[1], work), share_in_balls(real, images, radii[0], work)


def _mean_and_deviation(values: Tensor) -> tuple[float, float]:
    return values.mean().item(), values.std(unbiased=False).item()


# --- nearest neighbours ---------------------------------------------------------------------------------------------


def nearest(points: Tensor, others: Tensor, count: int, work: SharedWork) -> tuple[Tensor, Tensor]:
    """The ``count`` nearest of ``others`` (m, F) to each of ``points`` (n, F).

    Returns:
        Euclidean distances (n, count) float64, the nearest first, and the rows of ``others``, (n, count).
    """
    distances = torch.zeros(len(points), count, dtype=torch.float64)
    rows = torch.zeros(len(points), count, dtype=torch.long)
    for places, blocks in _distance_blocks(points, others, work):
        near = torch.empty(len(places), 0, dtype=torch.float64)
        near_rows = torch.empty(len(places), 0, dtype=torch.long)
        for start, block in blocks:
            near = torch.cat([near.to(block), block], 1)
            block_rows = torch.arange(start, start + block.shape[1], device=block.device).expand_as(block)
            near_rows = torch.cat([near_rows.to(block.device), block_rows], 1)
            near, kept = near.topk(min(count, near.shape[1]), largest=False)
            near_rows = near_rows.gather(1, kept)
        distances[places], rows[places] = near.cpu(), near_rows.cpu()
    return work.total(distances), work.total(rows)


def share_in_balls(points: Tensor, centres: Tensor, radii: Tensor, work: SharedWork) -> float:
    """The share of ``points`` (n, F) within the radius (m,) of at least one of ``centres`` (m, F)."""
    inside = torch.zeros(len(points), dtype=torch.float64)
    for places, blocks in _distance_blocks(points, centres, work):
        for start, block in blocks:
            reached = (block <= radii[start : start + block.shape[1]].to(block)).any(1)
            inside[places] = torch.maximum(inside[places], reached.cpu().double())
    return work.total(inside).mean().item()


def _distance_blocks(
    points: Tensor, others: Tensor, work: SharedWork
) -> Iterator[tuple[Tensor, Iterator[tuple[int, Tensor]]]]:
    """Yield this process's points with the first row and the distances (float64) of each block of others."""
    device = work.float64_device
    for places in work.share(torch.arange(len(points)).split(BLOCK_POINTS)):
        some = points[places].to(device, torch.float64)
        starts = range(0, len(others), BLOCK_OTHERS)
        blocks = (others[start : start + BLOCK_OTHERS].to(device, torch.float64) for start in starts)
        yield places, ((start, torch.cdist(some, block)) for start, block in zip(starts, blocks, strict=True))
