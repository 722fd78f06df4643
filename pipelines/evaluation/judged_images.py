"""Sets of images for a judging network: their features and their digests.

Axes: n images, B of them in a batch, F features, K classes, C channels, H and W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.evaluation.judges import ImageNetFeatures, Judge
from pipelines.evaluation.measurement import HeldOutImages
from pipelines.evaluation.shared_work import RowDigests, SharedWork
from twostage.core.data.image_data import ImageSplit
from twostage.core.data.spread import spread
from twostage.core.machine.placement import copy_to

__all__ = ["JudgedImages", "RealImages", "judge_training_images"]


class JudgedImages:
    """The features and the digests of ``count`` images, over all processes, collected batch by batch."""

    def __init__(self, network: Judge, count: int, work: SharedWork) -> None:
        self.network, self._work = network.to(work.device), work
        self.features = torch.zeros(count, network.num_features)
        """(n, F) float32, on the CPU."""
        self.digests = RowDigests(count)

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def read(cls, network: Judge, split: ImageSplit, rows: Tensor, work: SharedWork, name: str) -> "JudgedImages":
        """The images ``rows`` of a split, under a progress bar called ``name``."""
        judged = cls(network, len(rows), work)
        for places, pixels in work.read(split, rows, name):
            judged.update(places, pixels)
        judged.gather()
        return judged

    def update(self, places: Tensor, pixels: Tensor) -> None:
        """Adds uint8 or uint16 images (B, C, H, W) at the ``places`` (B,) that they have among all images."""
        self.digests.update(places, pixels)
        self.features[places] = self.network(copy_to(self._work.device, pixels)).float().cpu()

    def gather(self) -> None:
        """Combines what the processes collected."""
        self.features = self._work.total(self.features)
        self.digests.gather(self._work)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """The network's logits, (n, K) float32."""
        return self.network.logits(self.features.to(self._work.device)).float().cpu()


def judge_training_images(network: Judge, source: HeldOutImages, work: SharedWork) -> tuple[JudgedImages, Tensor]:
    """Training images, spread evenly, and their rows in the split. The ImageNet network learns their classes, unless it
    is to judge the training split itself."""
    rows = spread(len(source.train), network.max_training_images)
    training = JudgedImages.read(network, source.train, rows, work, "training images")
    if isinstance(network, ImageNetFeatures) and source.split_name == "train":
        network.no_classes = "a linear probe would judge the images that it was fitted to; use a held-out --split"
    elif isinstance(network, ImageNetFeatures):
        network.fit(training.features, source.train.read_labels(rows), source.data.class_names)
    return training, rows


@dataclass(frozen=True)
class RealImages:
    """The real images that ``num_samples`` samples are compared with."""

    source: HeldOutImages
    num_samples: int
    training: JudgedImages
    training_rows: Tensor
    """The rows of the training split that ``training`` holds."""
    held_out: JudgedImages
    """As many held-out images as samples, if the split has as many."""
    held_out_rows: Tensor

    @classmethod
    def judge(cls, network: Judge, source: HeldOutImages, num_samples: int, work: SharedWork) -> "RealImages":
        """Computes the features of training images and held-out images."""
        training, rows = judge_training_images(network, source, work)
        held_out_rows = spread(len(source.split), num_samples)
        held_out = JudgedImages.read(network, source.split, held_out_rows, work, "held-out images")
        return cls(source, num_samples, training, rows, held_out, held_out_rows)

    @property
    def num_compared(self) -> int:
        """The size of the smallest set."""
        return min(self.num_samples, len(self.held_out), len(self.training))

    @property
    def ball_rows(self) -> Tensor:
        """Places in ``training`` for precision and recall: as many as samples, because more images shrink balls."""
        return spread(len(self.training), self.num_samples)

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of images, for the protocol."""
        return {"training_images": len(self.training), "held_out_images": len(self.held_out)}
