"""How good a set of images is, by the features of a network: kernel distance, Inception score, precision and recall.

Axes: n images, m real ones, F features, K classes, C channels, H and W pixels. All of it is the same in every process.
"""

import torch
from accelerate import PartialState
from torch import Tensor

from pipelines.evaluation.frechet import InceptionFeatures, OwnFeatures
from pipelines.evaluation.measurements import count_distinct, row_digests, total_over_processes
from pipelines.evaluation.neighbours import in_any_ball, nearest
from twostage.core.training.random import seed_for

__all__ = [
    "NEIGHBOURS",
    "SUBSETS",
    "ImageFeatures",
    "inception_score",
    "kernel_distance",
    "num_splits",
    "precision_recall",
    "subset_size",
]

SUBSETS = 100
SUBSET_SIZE = 1000
"""Of the kernel distance, as is usual."""
SPLITS, IMAGES_PER_SPLIT = 10, 50
"""Of the Inception score; fewer splits where there are few images."""
NEIGHBOURS = 3
"""Whose distance is the radius of an image's ball in precision and recall."""


class ImageFeatures:
    """Gathers the features and the digests of a set of images, batch by batch.

    Args:
        count: images, over all processes.
    """

    def __init__(self, network: OwnFeatures | InceptionFeatures, count: int, state: PartialState) -> None:
        self._network, self._state = network, state
        self.features = torch.zeros(count, network.num_features)
        """(count, F) float32, on the CPU."""
        self.digests = torch.zeros(count, 32, dtype=torch.uint8)
        """(count, 32), the sha256 of each image."""

    def update(self, places: Tensor, pixels: Tensor) -> None:
        """Takes in uint8 images (B, C, H, W), and which of the images they are, (B,)."""
        self.digests[places] = row_digests(pixels)
        self.features[places] = self._network(pixels.to(self._state.device or "cpu")).float().cpu()

    def gather(self) -> "ImageFeatures":
        """Brings together what the processes took in."""
        self.features = total_over_processes(self._state, self.features)
        self.digests = total_over_processes(self._state, self.digests)
        return self

    @property
    def distinct(self) -> int:
        """How many different images there are."""
        return count_distinct(self.digests)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """What the network makes of them, (count, K) float32."""
        return self._network.logits(self.features.to(self._state.device or "cpu")).float().cpu()


def subset_size(images: int) -> int:
    """Of the kernel distance between sets of at least so many images: half of them at most, so that subsets differ."""
    return min(SUBSET_SIZE, images // 2)


def kernel_distance(images: Tensor, real: Tensor, size: int, state: PartialState) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018, arXiv 1801.01401) of features (n, F) and (m, F): the unbiased estimate of the squared
    maximum mean discrepancy with the kernel (x.y / F + 1)^3, over `SUBSETS` random subsets shared by the processes.

    Args:
        size: of a subset: images of each set, at least 2.

    Returns:
        The mean over the subsets, which may be a little below 0 for sets that are alike, and their standard deviation.
    """
    from torchmetrics.image.kid import poly_mmd

    device = torch.device(state.device or "cpu")
    device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    found = torch.zeros(SUBSETS, dtype=torch.float64)
    for subset in range(state.process_index, SUBSETS, state.num_processes):
        generator = torch.Generator().manual_seed(seed_for("kernel distance", subset))
        some_real, some = (
            features[torch.randperm(len(features), generator=generator)[:size]].to(device, torch.float64)
            for features in (real, images)
        )
        found[subset] = poly_mmd(some_real, some).cpu()
    found = total_over_processes(state, found)
    return found.mean().item(), found.std(unbiased=False).item()


def num_splits(images: int) -> int:
    """Of the Inception score of so many images."""
    return max(1, min(SPLITS, images // IMAGES_PER_SPLIT))


def inception_score(logits: Tensor) -> tuple[float, float]:
    """exp of the mean of KL(p(class | image) || p(class)) (Salimans et al. 2016, arXiv 1606.03498) by logits (n, K):
    from 1, all images alike to the network, to K.

    Returns:
        The mean over random splits, and their standard deviation.
    """
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed_for("inception score")))
    scores = []
    for part in logits[order].double().tensor_split(num_splits(len(logits))):
        chances = part.softmax(1)
        each = (chances * (part.log_softmax(1) - chances.mean(0).log())).nansum(1)  # a class that none has: 0 log 0
        scores.append(each.mean().exp())
    found = torch.stack(scores)
    return found.mean().item(), found.std(unbiased=False).item()


def precision_recall(images: Tensor, real: Tensor, state: PartialState) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991) of features (n, F) and (m, F).

    A set is taken for the union of balls around its images, each reaching to its `NEIGHBOURS`-th neighbour; both sets
    need more images than that.

    Returns:
        The share of the images that lie in the real set, and of the real ones that lie in the images' set.
    """
    # An image is the nearest to itself.
    radii = [nearest(features, features, NEIGHBOURS + 1, state)[0][:, -1] for features in (images, real)]
    return in_any_ball(images, real, radii[1], state), in_any_ball(real, images, radii[0], state)
