"""Networks that judge images by features, and a check that the judged model was not trained against the same network.

Axes: B images, C channels, H and W pixels, F features, K classes.
"""

import pickle
import shlex
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.autoencoder import AutoencoderConfig, PerceptualNetwork
from stage1_tokenizer.feature_network import FeatureNetwork
from twostage.core.errors import InputError
from twostage.core.files import file_sha256
from twostage.core.images.conversion import to_float
from twostage.core.runs.model_folder import find_model_folder, load_saved_tensors
from twostage.core.wording import one_line

__all__ = ["NO_NETWORK", "InceptionFeatures", "Judge", "OwnFeatures", "class_mismatch", "not_evidence", "open_judge"]

NO_NETWORK = "needs --features runs/NAME (twostage train-features) or --inception FILE"
PUBLISHED_HASH = "6726825d"
"""The first digits of the sha256 of torch-fidelity's Inception weights."""
PROPOSED_WIDTHS = (48, 32)
"""A message proposes a network of the first width that differs from the judging network's."""


class OwnFeatures(nn.Module):
    """uint8 images (B, C, H, W) -> features (B, F) float64 of a network trained with `twostage train-features`."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self.network = FeatureNetwork.from_pretrained(path).eval()
        self.num_features = self.network.num_features
        self.channels, self.size = self.network.config.channels, self.network.config.image_size
        self.class_names: list[str] | None = self.network.config.class_names
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
    """uint8 images (B, C, H, W) -> the 2048 pooled features (B, F) float64 of the Inception network of published FIDs.

    Raises:
        InputError: the file is missing or holds other weights. Only tensors are read from it, never code.
    """

    num_features, channels = 2048, 3
    class_names: list[str] | None = None  # ImageNet's and more, which no prior here was trained on

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
        return self.network(_with_channels(pixels, self.channels)).double()

    def logits(self, features: Tensor) -> Tensor:
        """Features (B, F) -> logits (B, 1008) without the bias, as the Inception score is published."""
        head = self.network.fc
        assert isinstance(head, nn.Linear)
        return F.linear(features.float(), head.weight)


Judge = OwnFeatures | InceptionFeatures
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
    network = InceptionFeatures(inception) if inception else OwnFeatures(features or "")
    if channels not in (1, network.channels):
        option = f"--inception {inception}" if inception else f"--features {features}"
        raise InputError(
            f"{option}: the network takes images with {network.channels} channels, but the model's images have "
            f"{channels}. Use --features with a network trained with data.channels={channels}."
        )
    return network


def class_mismatch(network: Judge, class_names: list[str] | None, owner: str) -> str | None:
    """Why the network cannot check the classes of the ``owner``, `model` or `data`; None: it can."""
    if not class_names:
        return f"the {owner} has no classes"
    if network.class_names is None:
        return "the Inception network knows other classes; use --features runs/NAME"
    if network.class_names != class_names:
        return (
            f"the feature network knows the classes {', '.join(network.class_names)}, but the {owner} has the classes "
            f"{', '.join(class_names)}"
        )
    return None


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
                f"lowers distances in it. Use another one: {command}, then --features runs/judge; or use "
                "--inception FILE"
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
