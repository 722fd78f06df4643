"""Perceptual distances: how far apart two images are in the features of a network that is not trained any further.

`lpips` compares in VGG-16 with heads fitted to human judgement (Zhang et al. 2018, arXiv 1801.03924); its weights are a
download. `features` compares in a feature network of one's own (`twostage train-features`), for small images.
"""

import pickle
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from stage1_tokenizer.autoencoder import PerceptualNetwork
from stage1_tokenizer.feature_network import FeatureNetwork
from twostage.core.config.sections import Number, PathName, Section
from twostage.core.errors import InputError
from twostage.core.machine.progress import on_terminal
from twostage.core.runs.model_folder import load_saved_tensors

__all__ = [
    "LPIPS",
    "FeaturePerceptual",
    "FeaturePerceptualConfig",
    "LPIPSConfig",
    "Perceptual",
    "PerceptualConfig",
    "build_perceptual",
    "describe_network",
    "find_trunk",
]

TRUNK = "vgg16-397923af.pth"
TRUNK_URL = f"https://download.pytorch.org/models/{TRUNK}"
SMALLEST_SIDE = 16  # pixels: VGG-16 halves its input four times before its last compared layer
ALTERNATIVE = (
    "Without it: train a feature network of one's own (twostage train-features DATA), then "
    "loss.perceptual={type: features, path: runs/features_NAME}"
)
EPSILON = 1e-8  # under the root of a feature vector's length, whose derivative is infinite at 0


class LPIPSConfig(Section):
    """The learned perceptual image patch similarity, in VGG-16."""

    type: Literal["lpips"] = "lpips"
    weight: Number = Field(default=1.0, ge=0)
    """Of the term in the loss."""


class FeaturePerceptualConfig(Section):
    """The distance in a feature network that `twostage train-features` trained."""

    type: Literal["features"] = "features"
    weight: Number = Field(default=1.0, ge=0)
    """Of the term in the loss."""
    path: PathName
    """The run folder of the feature network, or its model folder."""


PerceptualConfig = Annotated[LPIPSConfig | FeaturePerceptualConfig, Field(discriminator="type")]


class Perceptual(nn.Module, ABC):
    """Two batches of images -> their mean distance in the features of ``network``.

    The network moves with the module from device to device, but is no part of its parameters and state: nothing
    trains, averages or saves it.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._hidden = (network.eval().requires_grad_(False),)  # nn.Module does not look into a tuple
        self.eval()

    @property
    def network(self) -> nn.Module:
        """What the images are compared in."""
        return self._hidden[0]

    def forward(self, decoded: Tensor, images: Tensor) -> Tensor:
        """The mean distance of two batches (B, C, H, W) in [-1, 1], a float32 scalar >= 0; gradients reach ``decoded``
        alone. Values of ``decoded`` outside of [-1, 1] are compared as they are."""
        with torch.autocast(decoded.device.type, enabled=False):
            return self.distance(decoded.float(), images.detach().float())

    @abstractmethod
    def distance(self, decoded: Tensor, images: Tensor) -> Tensor:
        """:meth:`forward` of float32 batches."""

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:  # what .to() and .cuda() call
        self._hidden[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)


class FeaturePerceptual(Perceptual):
    """The mean over the stages s of a feature network, and over the cells h, w of each, of

        sum_c (f_s(x) / |f_s(x)| - f_s(y) / |f_s(y)|)^2

    with lengths |.| over the channels c: LPIPS (Zhang et al. 2018, eq. 1) with the same weight for every channel.
    """

    def distance(self, decoded: Tensor, images: Tensor) -> Tensor:
        network = self.network
        assert isinstance(network, FeatureNetwork)
        with torch.no_grad():
            targets = [_unit_length(features) for features in network.stages(images)]
        distances = [
            (_unit_length(features) - target).square().sum(dim=1).mean()
            for features, target in zip(network.stages(decoded), targets, strict=True)
        ]
        return torch.stack(distances).mean()


class LPIPS(Perceptual):
    """LPIPS of the package `lpips`. VGG-16 sees RGB: grey images are repeated over the colours, of RGBA images only the
    colours are compared."""

    def distance(self, decoded: Tensor, images: Tensor) -> Tensor:
        return self.network(_to_rgb(decoded), _to_rgb(images)).mean()


def build_perceptual(
    config: LPIPSConfig | FeaturePerceptualConfig,
    channels: int,
    image_size: tuple[int, int],
    weights_dir: Path | None = None,
) -> Perceptual:
    """The distance for images (B, channels, *image_size), on the CPU. Torch's random stream is left as it was.

    Args:
        weights_dir: where LPIPS's trunk `vgg16-397923af.pth` is looked for first; then in torch's cache; then it is
            downloaded into that.

    Raises:
        InputError: weights that are neither there nor to be had, or do not fit; images that the network cannot see.
    """
    with torch.random.fork_rng(devices=[]):  # layers draw initial weights before theirs are loaded
        if isinstance(config, FeaturePerceptualConfig):
            return _build_features(config, channels, image_size)
        return _build_lpips(channels, image_size, weights_dir)


def describe_network(config: LPIPSConfig | FeaturePerceptualConfig, perceptual: Perceptual) -> PerceptualNetwork:
    """What to remember of the network of ``perceptual``, which was built from ``config``."""
    if isinstance(config, LPIPSConfig):
        return PerceptualNetwork(type="lpips")
    assert isinstance(perceptual.network, FeatureNetwork)
    return PerceptualNetwork(type="features", path=config.path, hash=perceptual.network.features_hash())


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
            f"loss.perceptual.path {config.path}: the feature network sees images of {size[0]}x{size[1]} pixels and "
            f"{seen} channels, data.image_size is {image_size[0]}x{image_size[1]} and data.channels {channels}; train "
            "one of that form (twostage train-features DATA --image-size --channels)"
        )
    return FeaturePerceptual(network)


# --- the weights of LPIPS ---------------------------------------------------------------------------------------------


def _build_lpips(channels: int, image_size: tuple[int, int], weights_dir: Path | None) -> LPIPS:
    if channels not in (1, 3, 4):
        raise InputError(f"loss.perceptual lpips: compares images of 1, 3 or 4 channels, got data.channels {channels}")
    if min(image_size) < SMALLEST_SIDE:
        raise InputError(
            f"loss.perceptual lpips: images of {image_size[0]}x{image_size[1]} pixels are too small for VGG-16, which "
            f"needs at least {SMALLEST_SIDE} on each side. {ALTERNATIVE}"
        )
    try:
        import lpips  # takes seconds, so only who needs it imports it
    except ImportError:
        raise InputError(f"loss.perceptual lpips: needs the package lpips (pip install lpips). {ALTERNATIVE}") from None
    path = _fetch_trunk(weights_dir, heads=Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth")
    with warnings.catch_warnings():
        for message in ("The parameter 'pretrained' is", "Arguments other than a weight enum"):  # of torchvision
            warnings.filterwarnings("ignore", message, UserWarning)
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)  # fetches nothing; the trunk is filled here
    _fill_trunk(network.net, path)
    return LPIPS(network)


def find_trunk(weights_dir: str | Path | None) -> tuple[Path | None, list[Path]]:
    """LPIPS's trunk, None where it is not on this machine, and the folders that it is looked for in."""
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
    except (OSError, RuntimeError, ValueError, HTTPException) as error:  # no network, a proxy, another hash
        places = " nor at ".join(str(folder / TRUNK) for folder in folders)
        raise InputError(
            f"loss.perceptual lpips: needs two files. The heads vgg.pth are part of the package lpips ({heads}). The "
            f"trunk {TRUNK} (528 MB) is not at {places}, and {TRUNK_URL} could not be "
            f"had ({_one_line(error)}). Download it elsewhere, put it into a folder DIR and give --weights-dir DIR. "
            f"{ALTERNATIVE}"
        ) from None
    return cached


def _fill_trunk(trunk: nn.Module, path: Path) -> None:
    """Loads torchvision's VGG-16; a file with the convolutions alone will do."""
    wanted = f"expected the weights of torchvision's VGG-16, {TRUNK_URL}"
    try:
        stored = load_saved_tensors(path)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: not a file of weights ({_one_line(error)}); {wanted}") from None
    if not isinstance(stored, dict):
        raise InputError(f"{path}: holds a {type(stored).__name__}; {wanted}")
    # The package cuts the trunk into slices and keeps the layers' numbers: slice2.5.weight is features.5.weight.
    slices = {"features." + name.partition(".")[2]: name for name in trunk.state_dict()}
    given = {name: tensor for name, tensor in stored.items() if not str(name).startswith("classifier.")}
    if given.keys() != slices.keys():
        missing, unknown = sorted(slices.keys() - given.keys()), sorted(map(str, given.keys() - slices.keys()))
        found = [f"{what} {', '.join(names[:3])}" for what, names in (("lacks", missing), ("has", unknown)) if names]
        raise InputError(f"{path}: {' and '.join(found)}; {wanted}")
    try:
        trunk.load_state_dict({slices[name]: tensor for name, tensor in given.items()})
    except RuntimeError as error:
        raise InputError(f"{path}: {_one_line(error)}; {wanted}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
