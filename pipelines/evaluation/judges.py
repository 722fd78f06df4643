"""Networks that judge images by features, and a check that the judged model was not trained against the same network.

Axes: B images, C channels, H and W pixels, F features, K classes.
"""

import pickle
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.evaluation.linear_probe import PROBE_DESCRIPTION, fit_linear_probe
from stage1_tokenizer.autoencoder_config import AutoencoderConfig, PerceptualNetwork
from stage1_tokenizer.features.feature_network import FeatureNetwork
from stage1_tokenizer.features.imagenet_network import JUDGE_WEIGHTS, ImageNetNetwork, enlarge_small, to_rgb
from twostage.core.errors import InputError
from twostage.core.files import file_sha256
from twostage.core.images.conversion import MODES, to_float, to_shown
from twostage.core.runs.model_folder import find_model_folder, load_saved_tensors
from twostage.core.wording import one_line

__all__ = [
    "NO_NETWORK",
    "ImageNetFeatures",
    "InceptionFeatures",
    "Judge",
    "OwnFeatures",
    "class_mismatch",
    "distance_note",
    "not_evidence",
    "open_judge",
]

NO_NETWORK = "needs --features imagenet, --features runs/NAME (twostage train-features) or --inception FILE"
IMAGENET = "imagenet"
"""The value of --features that means the ImageNet network and no folder."""
IMAGENET_MIN_SIDE = 112
"""Smaller images are enlarged to this side in pixels. On 64-pixel photographs of clothes, a linear probe in features of
EfficientNet-lite0 was right on 81% without it, 85% at 112 and 88% at 160 pixels, which costs twice as much."""
MAX_TRAINING_IMAGES, MAX_IMAGENET_TRAINING_IMAGES = 50_000, 20_000
"""Training images that others are compared with. The ImageNet network takes longer for each."""
PUBLISHED_HASH = "6726825d"
"""The first digits of the sha256 of torch-fidelity's Inception weights."""
PROPOSED_WIDTHS = (48, 32)
"""A message proposes a network of the first width that differs from the judging network's."""


class OwnFeatures(nn.Module):
    """Images (B, C, H, W) uint8 or uint16 -> features (B, F) float64 of a network of
    `twostage train-features`."""

    max_training_images, has_logits = MAX_TRAINING_IMAGES, True

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self.network = FeatureNetwork.from_pretrained(path).eval()
        self.num_features = self.network.num_features
        self.channels, self.size = self.network.config.channels, self.network.config.image_size
        self.class_names: list[str] | None = self.network.config.class_names
        self.no_classes = ""
        self.protocol = {
            "network": f"the feature network {path}",
            "hash": self.network.content_hash(),
            "resize": f"bilinear, antialiased, to {self.size[0]}x{self.size[1]}; no resize for images of that size",
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
    """Images (B, C, H, W) uint8 or uint16 -> the 2048 pooled features (B, F) float64 of the Inception network
    of published FIDs.

    Raises:
        InputError: the file is missing or holds other weights. Only tensors are read from it, never code.
    """

    num_features, channels = 2048, 3
    max_training_images, has_logits = MAX_TRAINING_IMAGES, True
    class_names: list[str] | None = None  # ImageNet's and more, which no prior here was trained on
    no_classes = "the Inception network knows other classes; use --features imagenet or --features runs/NAME"

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        path = Path(path)
        expected = "expected torch-fidelity's pt_inception-2015-12-05-6726825d.pth. Use it, or --features runs/NAME"
        if not path.is_file():
            raise InputError(f"--inception {path}: no such file; {expected}.")
        try:
            load_saved_tensors(path)  # torchmetrics itself would run code that is in the file
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise InputError(f"--inception {path}: not a file of weights ({one_line(error)}); {expected}.") from None
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            # Without antialiasing, like TensorFlow 1, because published distances were measured that way.
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path), antialias=False)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise InputError(f"--inception {path}: other weights ({one_line(error)}); {expected}.") from None
        digest = file_sha256(path)
        known = "as published" if digest.startswith(PUBLISHED_HASH) else "NOT the published weights: compare with care"
        self.protocol = {
            "network": f"Inception v3, pool features ({known})",
            "hash": digest,
            "resize": "bilinear to 299x299 without antialiasing, as TensorFlow 1 (torch-fidelity)",
        }

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(_with_channels(to_shown(pixels), self.channels)).double()

    def logits(self, features: Tensor) -> Tensor:
        """Features (B, F) -> logits (B, 1008) without the bias, as the Inception score is published."""
        head = self.network.fc
        assert isinstance(head, nn.Linear)
        return F.linear(features.float(), head.weight)


class ImageNetFeatures(nn.Module):
    """Images (B, C, H, W) uint8 or uint16, grey, RGB or RGBA -> pooled features (B, F) float64 of EfficientNet-lite2,
    which was trained on ImageNet. No tokenizer is trained against it: `loss.perceptual` has a smaller network. A linear
    probe learns the classes of training images: see :meth:`fit`.

    Raises:
        InputError: the extra `imagenet` is not installed, or its weights are not the expected ones.
    """

    max_training_images = MAX_IMAGENET_TRAINING_IMAGES
    background = 0.0  # mid-grey, on which white and black drawings can be told apart

    def __init__(self) -> None:
        super().__init__()
        try:
            self.network = ImageNetNetwork(JUDGE_WEIGHTS)
        except InputError as error:
            raise InputError(f"--features {error}") from None
        self.num_features = self.network.num_features
        self.probe: tuple[Tensor, Tensor] | None = None
        self.class_names: list[str] | None = None
        self.no_classes = "no training images were found, from which a linear probe could learn the classes"
        self.protocol: dict[str, Any] = {
            "network": f"ImageNet features ({JUDGE_WEIGHTS.name}, pooled after the sixth of its seven stages)",
            "hash": JUDGE_WEIGHTS.sha256,
            "resize": f"bilinear, to a shorter side of {IMAGENET_MIN_SIDE} pixels; no resize for larger images",
            "background": "transparent images are shown on mid-grey",
        }

    @property
    def has_logits(self) -> bool:
        """Whether the probe was fitted."""
        return self.probe is not None

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        images = to_rgb(to_float(pixels), self.background)
        return self.network.features(enlarge_small(images, IMAGENET_MIN_SIDE)).double()

    def fit(self, features: Tensor, labels: Tensor | None, class_names: list[str] | None) -> None:
        """Fits the linear probe to the features (n, F) and labels (n,) of training images, unless fewer than two
        classes are among them; `no_classes` then says so."""
        seen = [] if labels is None or not class_names else labels.unique().tolist()
        if labels is None or not class_names or len(seen) < 2:
            found = f"1 ({class_names[seen[0]]})" if class_names and seen else "none"
            self.no_classes = f"a linear probe needs training images of at least 2 classes, and found {found}"
            return
        self.probe = fit_linear_probe(features, labels, len(class_names))
        self.class_names = class_names
        self.protocol["classes"] = f"{PROBE_DESCRIPTION}, fitted to {len(labels):,} training images"

    def logits(self, features: Tensor) -> Tensor:
        """Features (B, F) -> logits (B, K) of the classes that the probe learned."""
        assert self.probe is not None
        weight, bias = (each.to(features.device) for each in self.probe)
        return F.linear(features.float(), weight, bias)


Judge = OwnFeatures | InceptionFeatures | ImageNetFeatures
"""A network that judges images."""


def open_judge(inception: str | Path | None, features: str | Path | None, channels: int) -> Judge | None:
    """Reads the network that the options name, to judge images with ``channels``; None: they name none.

    Raises:
        InputError: both options are given, or the network takes images with other channels.
    """
    if inception and features:
        raise InputError(
            f"--inception {inception} and --features {features}: distances in two networks cannot be compared. "
            "Give only one of the two options."
        )
    if not inception and not features:
        return None
    if features == IMAGENET:
        if channels not in MODES:
            raise InputError(
                f"--features imagenet: the network takes images with 1, 3 or 4 channels, but the model's images have "
                f"{channels}. Use --features runs/NAME (twostage train-features DATA --channels {channels})."
            )
        return ImageNetFeatures()
    network = InceptionFeatures(inception) if inception else OwnFeatures(features or "")
    if channels not in (1, network.channels):
        option = f"--inception {inception}" if inception else f"--features {features}"
        other = " or --features imagenet" if channels in MODES else ""
        raise InputError(
            f"{option}: the network takes images with {network.channels} channels, but the model's images have "
            f"{channels}. Use a network trained with --channels {channels}{other}."
        )
    return network


def class_mismatch(network: Judge, class_names: list[str] | None, owner: str) -> str | None:
    """Why the network cannot check the classes of the ``owner``, `model` or `data`; None: it can."""
    if not class_names:
        return f"the {owner} has no classes"
    if network.class_names is None:
        return network.no_classes
    if network.class_names != class_names:
        return (
            f"the feature network knows the classes {', '.join(network.class_names)}, but the {owner} has the classes "
            f"{', '.join(class_names)}"
        )
    return None


def distance_note(network: Judge) -> str:
    """What Frechet distances in the network are, in a sentence."""
    measured = f"Frechet distances are measured with {network.protocol['network']} ({network.protocol['hash'][:12]})"
    if isinstance(network, InceptionFeatures):
        return f"{measured}, so they are FIDs."
    return f"{measured}. They are not FIDs: compare them only with distances in the same features."


def not_evidence(
    config: AutoencoderConfig, run: str | Path, network: Judge | None, source: str, names: Iterable[str]
) -> dict[str, str]:
    """Why figures of ``network`` are not evidence of the tokenizer's quality: a reason for each of the keys ``names``.

    Training against a network (loss.perceptual) lowers distances in it whether or not the images get better. So the
    result is empty unless the judging network is one that the tokenizer was trained against.

    Args:
        config: the tokenizer's config.
        run: the tokenizer's folder. A feature network that its config names by a relative path is searched around it.
        source: the images, for the proposed command that trains another network.
    """
    if not isinstance(network, OwnFeatures):
        return {}
    for trained in config.trained_against:
        if trained.type == "features" and _is_same(trained, Path(run), network):
            width = next(width for width in PROPOSED_WIDTHS if width != network.network.config.widths[0])
            command = f"twostage train-features {shlex.quote(source)} --seed 1 --width {width} --out runs/judge"
            reason = (
                f"the tokenizer was trained against this feature network, {network.path} (loss.perceptual), which "
                f"lowers distances in it. Use another one: {command}, then --features runs/judge; or use --features "
                "imagenet or --inception FILE"
            )
            return dict.fromkeys(names, reason)
    return {}


def _is_same(trained: PerceptualNetwork, run: Path, judge: OwnFeatures) -> bool:
    """Whether ``judge`` is the network that the model in ``run`` was trained against: by the hash of the weights, else
    by the weights in the recorded folder, else by the folder's name."""
    if trained.hash is not None:
        return trained.hash == judge.network.features_hash()
    if trained.path is None:
        return False
    for folder in (Path(trained.path), *(above / trained.path for above in run.resolve().parents)):
        try:
            return FeatureNetwork.from_pretrained(folder).features_hash() == judge.network.features_hash()
        except InputError:
            continue
    return _run_name(Path(trained.path)) == _run_name(find_model_folder(judge.path))


def _run_name(folder: Path) -> str:
    return (folder.parent if folder.name == "model" else folder).resolve().name


def _with_channels(pixels: Tensor, channels: int) -> Tensor:
    return pixels.expand(-1, channels, -1, -1) if pixels.shape[1] == 1 else pixels
