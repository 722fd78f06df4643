"""The Frechet distance between two sets of images, in the features of one of two networks.

d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), Heusel et al. 2017 (arXiv 1706.08500). Axes: B images, F features.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.feature_network import FeatureNetwork
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_float
from twostage.core.runs.model_folder import file_sha256, load_saved_tensors
from twostage.core.training.random import seed_for
from twostage.core.wording import one_line

__all__ = [
    "FeatureDistance",
    "InceptionFeatures",
    "OwnFeatures",
    "ReconstructionJudge",
    "bias_warning",
    "class_problem",
    "frechet_distance",
    "open_features",
    "too_few",
]

PUBLISHED = "6726825d"  # how the hash of torch-fidelity's Inception weights begins
IMAGES_PER_FEATURE = 10  # with fewer the distance of a set to itself is far from 0: 2048 features want 20,480 images


class OwnFeatures(nn.Module):
    """uint8 images (B, C, H, W) -> features (B, F) float64 of a network that this project trained."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.network = FeatureNetwork.from_pretrained(path).eval()
        self.num_features = self.network.num_features
        self.channels, self.size = self.network.config.channels, self.network.config.image_size
        self.class_names: list[str] | None = self.network.config.class_names
        self.protocol = {
            "network": f"the feature network {path}",
            "hash": self.network.content_hash(),
            "resize": f"bilinear, antialiased, to {self.size[0]}x{self.size[1]}; images of that size as they are",
        }

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        images = to_float(_with_channels(pixels, self.channels))
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", align_corners=False, antialias=True)
        return self.network.features(images).double()

    def logits(self, features: Tensor) -> Tensor:
        """Features (B, F) -> logits (B, K) of the network's own classes."""
        return self.network.head(features.float())


class InceptionFeatures(nn.Module):
    """uint8 images (B, C, H, W) -> the 2048 pooled features (B, F) float64 of the Inception network of published FIDs.

    Raises:
        InputError: the file is missing or holds other weights. Only tensors are read from it, never code.
    """

    num_features, channels = 2048, 3
    class_names: list[str] | None = None  # of ImageNet and more, which nobody asks a prior for

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        path = Path(path)
        wanted = "pt_inception-2015-12-05-6726825d.pth of torch-fidelity"
        if not path.is_file():
            raise InputError(f"--inception {path}: no such file; expected {wanted}, or give --features runs/NAME")
        try:
            load_saved_tensors(path)  # the library itself would run what is in it
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise InputError(f"--inception {path}: no file of weights ({one_line(error)}); expected {wanted}") from None
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            # Without antialiasing, as TensorFlow 1 resizes: published distances are so.
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path), antialias=False)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise InputError(f"--inception {path}: other weights ({one_line(error)}); expected {wanted}") from None
        digest = file_sha256(path)
        known = "as published" if digest.startswith(PUBLISHED) else "NOT the published weights: compare with care"
        self.protocol = {
            "network": f"Inception v3, pool features ({known})",
            "hash": digest,
            "resize": "bilinear to 299x299 without antialiasing, as TensorFlow 1 (torch-fidelity)",
        }

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(_with_channels(pixels, self.channels)).double()

    def logits(self, features: Tensor) -> Tensor:
        """Features (B, F) -> logits (B, 1008), without the bias, as the Inception score is published."""
        head = self.network.fc
        assert isinstance(head, nn.Linear)
        return F.linear(features.float(), head.weight)


def open_features(
    inception: str | Path | None, features: str | Path | None, channels: int
) -> OwnFeatures | InceptionFeatures | None:
    """The network that is asked for, or None.

    Raises:
        InputError: both are asked for, or the network cannot see images of so many ``channels``.
    """
    if inception and features:
        raise InputError(f"--inception {inception} and --features {features}: give one of them; distances do not mix")
    if not inception and not features:
        return None
    network = InceptionFeatures(inception) if inception else OwnFeatures(features or "")
    if channels not in (1, network.channels):
        option = f"--inception {inception}" if inception else f"--features {features}"
        raise InputError(
            f"{option}: sees images of {network.channels} channels, the tokenizer's have {channels}; give --features "
            f"of a network that was trained with data.channels={channels}"
        )
    return network


class FeatureDistance:
    """The distance between two sets of images, of which it is given the features, batch by batch.

    Args:
        device: of the sums (float64).
    """

    def __init__(self, num_features: int, device: torch.device) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        self._metric = FrechetInceptionDistance(feature=_Given(num_features), sync_on_compute=False).to(device)
        for real in (True, False):  # a process may have no images of its own
            self.update(torch.empty(0, num_features, dtype=torch.float64), real)

    def update(self, features: Tensor, real: bool) -> None:
        """Takes in features (B, F) float64 of one of the sets."""
        self._metric.update(features.to(self._metric.device), real)

    def compute(self, total: Callable[[Tensor], Tensor]) -> float:
        """The distance; ``total`` sums a tensor over the processes."""
        for name, value in self._metric.metric_state.items():
            assert isinstance(value, Tensor)
            setattr(self._metric, name, total(value))
        return max(0.0, self._metric.compute().item())  # rounding may leave -1e-9 of a zero


def frechet_distance(first: Tensor, second: Tensor, device: torch.device) -> float:
    """The distance between features (n, F) and (m, F) of whole sets."""
    distance = FeatureDistance(first.shape[1], device)
    for features, real in ((first, True), (second, False)):
        for part in features.split(4096):
            distance.update(part.double(), real)
    return distance.compute(lambda tensor: tensor)


def too_few(distinct: int, num_features: int) -> str | None:
    """Why so many different images make no distance: F + 1 at least make a covariance of full rank."""
    if distinct > num_features:
        return None
    return f"{distinct} different images, at least {num_features + 1} are needed for {num_features} features"


def bias_warning(num_images: int, num_features: int) -> str | None:
    """What to know about a distance of so few images."""
    if num_images >= IMAGES_PER_FEATURE * num_features:
        return None
    return (
        f"{num_images} images for {num_features} features: fewer than {IMAGES_PER_FEATURE} each, so it is biased "
        "upwards; compare equal numbers of images only"
    )


def class_problem(network: OwnFeatures | InceptionFeatures, class_names: list[str] | None, of: str) -> str | None:
    """Why the network cannot tell whether images are of their class, or None.

    Args:
        of: what has the ``class_names``: `model` or `data`.
    """
    if not class_names:
        return f"the {of} has no classes"
    if network.class_names is None:
        return "the Inception network knows other classes; give --features runs/NAME"
    if network.class_names != class_names:
        return (
            f"the feature network knows the classes {', '.join(network.class_names)}; those of the {of} are "
            f"{', '.join(class_names)}"
        )
    return None


class ReconstructionJudge:
    """Looks at originals and at their reconstructions with a network, batch by batch.

    Args:
        num_images: over all processes.
        device: of the network and of the sums (float64).
        class_names: of the images; None: whether they are recognised is not measured.
    """

    def __init__(
        self,
        network: OwnFeatures | InceptionFeatures,
        num_images: int,
        device: torch.device,
        class_names: list[str] | None = None,
    ) -> None:
        self.network, self.num_images = network.to(device), num_images
        self.problem = class_problem(network, class_names, "data") if class_names else None
        self._knows_classes = bool(class_names) and self.problem is None
        self._recognised = torch.zeros(3, dtype=torch.long)  # originals, reconstructions; images that were looked at
        self.reconstructions, self.halves = (FeatureDistance(network.num_features, device) for _ in range(2))
        # Not every second image: classes often take turns.
        generator = torch.Generator().manual_seed(seed_for("halves"))
        self._first_half = torch.randperm(num_images, generator=generator) < num_images // 2

    def update(self, originals: Tensor, pictures: Tensor, places: Tensor, labels: Tensor | None = None) -> None:
        """Takes in uint8 images (B, C, H, W), their 8-bit reconstructions, which of the images they are, (B,), and
        their classes (B,) int64, where they have any."""
        features, of_pictures = self.network(originals), self.network(pictures)
        self.reconstructions.update(features, real=True)
        self.reconstructions.update(of_pictures, real=False)
        if self._knows_classes and labels is not None:
            correct = [(self.network.logits(each).argmax(1) == labels).sum() for each in (features, of_pictures)]
            self._recognised += torch.stack([*correct, torch.full_like(correct[0], len(labels))]).cpu()
        first = self._first_half[places].to(features.device)
        self.halves.update(features[first], real=True)
        self.halves.update(features[~first], real=False)

    def compute(
        self, distinct: int, total: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, float], dict[str, str], dict[str, Any]]:
        """The figures, why there are no others, and what to know about them.

        Args:
            distinct: different images among the originals.
            total: sums a tensor over the processes.
        """
        width, protocol = self.network.num_features, dict(self.network.protocol)
        missing = {"recognised": self.problem} if self.problem else {}
        originals, reconstructions, seen = total(self._recognised).tolist()
        figures = {"recognised": reconstructions / seen, "recognised_originals": originals / seen} if seen else {}
        if reason := too_few(distinct, width):
            return figures, missing | {"rfid": reason}, protocol
        if warning := bias_warning(self.num_images, width):
            protocol["warning"] = warning
        figures["rfid"] = self.reconstructions.compute(total)
        if self.num_images // 2 > width:
            figures["rfid_of_halves"] = self.halves.compute(total)
            protocol["halves"] = (
                "rfid_of_halves: a random half of the originals against the other, so of half as many images"
            )
        return figures, missing, protocol


class _Given(nn.Module):
    """Passes features through."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _with_channels(pixels: Tensor, channels: int) -> Tensor:
    return pixels.expand(-1, channels, -1, -1) if pixels.shape[1] == 1 else pixels
