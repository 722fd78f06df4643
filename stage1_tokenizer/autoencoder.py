"""The one autoencoder: backbone + bottleneck + losses. AE, VAE, CVAE, VQ-VAE, VQ-GAN are choices, not classes.

Axes: B images, C channels, H and W pixels, h and w cells of the latent grid.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from stage1_tokenizer.backbones import BackboneConfig, ConvConfig, build_backbone, factor_of, grid_of
from stage1_tokenizer.bottleneck_output import BottleneckOutput
from stage1_tokenizer.bottlenecks import BottleneckConfig, Gaussian, Identity, build_bottleneck
from stage1_tokenizer.finite_scalar import FiniteScalarConfig
from stage1_tokenizer.lookup_free import LookupFreeConfig
from stage1_tokenizer.losses import LossConfig, corrupt, negative_log_likelihood, reconstruction_loss
from stage1_tokenizer.perceptual import FeaturePerceptualConfig, PerceptualNetwork
from stage1_tokenizer.vector_quantizer import VectorConfig
from twostage.core.config.sections import Count, Section, Width, parse_config
from twostage.core.errors import InputError
from twostage.core.runs.model_folder import filled, hash_tensors, load_model_folder, save_model_folder
from twostage.core.training.random import BatchRandom

__all__ = ["Autoencoder", "AutoencoderConfig", "AutoencoderOutput", "ModelConfig"]

MAX_BITS = 20  # the usage of 2^20 codes is 4 MiB of counts
TOLERANCE = 1e-3  # of pixels outside of [-1, 1]


class ModelConfig(Section):
    """The architecture."""

    latent_channels: Width = 64
    """Channels of the latent grid (alias: `z_channels`); with the `mlp` backbone the latent's dimensions."""
    backbone: BackboneConfig = ConvConfig()
    bottleneck: BottleneckConfig = VectorConfig()

    @model_validator(mode="after")
    def _channels_of_the_codes(self) -> "ModelConfig":
        bottleneck, channels = self.bottleneck, self.latent_channels
        if isinstance(bottleneck, FiniteScalarConfig) and len(bottleneck.levels) != channels:
            raise ValueError(
                f"latent_channels {channels}: finite_scalar has a channel for each of its levels {bottleneck.levels}; "
                f"set latent_channels to {len(bottleneck.levels)}"
            )
        if isinstance(bottleneck, LookupFreeConfig) and channels > MAX_BITS:
            raise ValueError(
                f"latent_channels {channels}: lookup_free has 2^latent_channels codes; expected at most {MAX_BITS}"
            )
        return self


class AutoencoderConfig(Section):
    """All that a trained autoencoder needs to be built again: what its `config.json` holds."""

    image_size: tuple[Count, Count]
    channels: Count
    class_names: list[str] | None = None
    """Of the data that it was trained on."""
    untrained_classes: tuple[str, ...] = ()
    """Those of them that had no training image."""
    value_range: tuple[float, float] | None = None
    """The values in image files that became black and white (`data.value_range`)."""
    model: ModelConfig
    loss: LossConfig
    trained_against: list[PerceptualNetwork] | None = None
    """The networks of perceptual losses that its weights were trained with, those of `init_from` first; None: none, or
    not recorded (see :meth:`perceptual_networks`)."""

    def perceptual_networks(self) -> list[PerceptualNetwork]:
        """The networks that it was trained against. A model that was saved before they were recorded has the one that
        its loss names, without a hash."""
        if self.trained_against is not None:
            return self.trained_against
        perceptual = self.loss.perceptual
        if perceptual is None or not perceptual.weight:
            return []
        path = perceptual.path if isinstance(perceptual, FeaturePerceptualConfig) else None
        return [PerceptualNetwork(type=perceptual.type, path=path)]


LATER_KEYS = {"untrained_classes", "value_range", "trained_against"}
"""Keys that earlier versions do not know, so they are written only where they say something."""


@dataclass
class AutoencoderOutput:
    """What a training step needs."""

    loss: Tensor
    """Scalar, to be minimised: reconstruction and the bottleneck's terms."""
    reconstruction: Tensor
    """Scalar, the first of these."""
    decoded: Tensor
    """The decoder's output (B, C, H, W); :meth:`Autoencoder.to_images` makes images of it."""
    bottleneck: BottleneckOutput
    metrics: dict[str, Tensor]
    """Scalars by name, `loss` among them, detached."""


class Autoencoder(nn.Module):
    """Images -> latent -> images.

    ``forward`` is what training (and DDP) calls; ``encode``, ``decode``, ``decode_indices``, ``reconstruct`` and
    ``sample`` are for use. Images whose sides the backbone cannot halve are padded at the right and at the bottom, and
    cropped back.

    Raises:
        InputError: a class bottleneck without class names.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        model = config.model
        self.grid = grid_of(model.backbone, config.image_size)
        self.factor = factor_of(model.backbone)
        self._range_known = config.loss.reconstruction != "bce"
        self.bottleneck = build_bottleneck(model.bottleneck, model.latent_channels, self.grid, config.class_names)
        self.encoder, self.decoder = build_backbone(
            model.backbone, config.channels, config.image_size, self.bottleneck.encoded_channels, model.latent_channels
        )

    @property
    def codebook_size(self) -> int | None:
        """The number of codes, or None for a continuous latent."""
        return self.bottleneck.codebook_size

    @property
    def code_grid(self) -> tuple[int, int]:
        """The grid of codes (h, w) that a prior sees; wider than :attr:`grid` where a cell has several codes."""
        depth = 1 if isinstance(self.bottleneck, Identity | Gaussian) else self.bottleneck.depth
        return (self.grid[0], self.grid[1] * depth)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(latent_channels, h, w) of an image's z."""
        return (self.config.model.latent_channels, *self.grid)

    @property
    def variational(self) -> bool:
        """Whether the loss is an evidence lower bound."""
        return isinstance(self.bottleneck, Gaussian)

    @property
    def class_conditional(self) -> bool:
        """Whether samples are of a class."""
        return isinstance(self.bottleneck, Gaussian) and self.bottleneck.class_means is not None

    @property
    def last_layer(self) -> nn.Parameter:
        """The weights of the decoder's last layer."""
        layers = [layer for layer in self.decoder.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        assert isinstance(layers[-1].weight, nn.Parameter)
        return layers[-1].weight

    def forward(self, images: Tensor, labels: Tensor | None, random: BatchRandom) -> AutoencoderOutput:
        """The loss of images (B, C, H, W) in [-1, 1]. ``labels`` (B,) are for the class-conditional families."""
        if not self._range_known:
            check_range(images)
            self._range_known = True  # once: looking at values makes a GPU wait
        corruption = self.config.loss.corruption
        inputs = corrupt(images, corruption, random) if corruption else images
        latent = self.bottleneck(self.encoded(inputs), labels, random)
        decoded = self.decoded(latent.z)
        metrics: dict[str, Tensor] = {}
        if self.variational:
            distortion, level = negative_log_likelihood(decoded, images, self.config.loss)
            nats = distortion + latent.losses["kl"]
            loss = distortion + self.config.loss.kl_weight * latent.losses["kl"]
            bits = nats / (images[0].numel() * math.log(2)) + level
            metrics = {"nats_per_image": nats, "bits_per_dim": bits}
        else:
            distortion = reconstruction_loss(decoded, images, self.config.loss.reconstruction)
            loss = distortion + sum(latent.losses.values())
        metrics = {"loss": loss, **metrics, "reconstruction": distortion, **latent.losses, **latent.metrics}
        metrics = {name: value.detach() for name, value in metrics.items()}
        return AutoencoderOutput(loss, distortion, decoded, latent, metrics)

    def encoded(self, images: Tensor) -> Tensor:
        """The encoder's output for images (B, C, H, W) of any size, padded to what the backbone needs."""
        below, right = (-side % self.factor for side in images.shape[2:])
        return self.encoder(F.pad(images, (0, right, 0, below), mode="replicate") if below or right else images)

    def decoded(self, z: Tensor) -> Tensor:
        """The decoder's output for a latent (B, latent_channels, h, w), cropped where images are padded."""
        height, width = self.config.image_size
        decoded = self.decoder(z)
        return decoded[..., :height, :width] if z.shape[2:] == self.grid else decoded

    @torch.no_grad()
    def encode(self, images: Tensor) -> BottleneckOutput:
        """The latent of images (B, C, H, W) in [-1, 1]: z, and the codes of the discrete families."""
        return self.bottleneck.encode(self.encoded(images))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """A latent (B, latent_channels, h, w) -> images (B, C, H, W) in [-1, 1]."""
        return self.to_images(self.decoded(z))

    @torch.no_grad()
    def decode_indices(self, indices: Tensor) -> Tensor:
        """Codes (B, h, w) int64, a grid as :attr:`code_grid` -> images (B, C, H, W) in [-1, 1]."""
        if isinstance(self.bottleneck, Identity | Gaussian):
            raise InputError(f"this autoencoder's bottleneck is {self.config.model.bottleneck.type!r}: it has no codes")
        return self.decode(self.bottleneck.lookup(indices))

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] there and back."""
        return self.decode(self.encode(images).z)

    @torch.no_grad()
    def sample(self, num_images: int, labels: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Images from the bottleneck's own prior, (num_images, C, H, W) in [-1, 1]; variational families have one.

        Args:
            labels: (num_images,) classes of a class-conditional family; None: all classes in turn.
        """
        device = next(self.parameters()).device
        noise = torch.randn(num_images, *self.latent_shape, generator=generator, device=device)
        if self.class_conditional and labels is None:
            labels = torch.arange(num_images) % len(self.config.class_names or [])
        return self.sample_from(noise, labels)

    @torch.no_grad()
    def sample_from(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """The same for given standard normal noise (B, *:attr:`latent_shape`).

        Args:
            labels: (B,) classes of a class-conditional family.
        """
        if not isinstance(self.bottleneck, Gaussian):
            raise InputError(
                f"this autoencoder's bottleneck is {self.config.model.bottleneck.type!r}: it has no prior of its own "
                "to sample from; train one over its codes (twostage encode, twostage train-prior)"
            )
        return self.decode(self.bottleneck.sample(noise, labels))

    def content_hash(self) -> str:
        """A hash of all that decides the codes: the form of the images, the encoder, the codebook. The decoder is no
        part of it, so that a decoder trained further keeps its priors."""
        model = self.config.model
        form = {"image_size": self.config.image_size, "channels": self.config.channels}
        for name, part in {"backbone": model.backbone, "bottleneck": model.bottleneck}.items():
            # Without the defaults, so that a new setting does not change the hash of what was trained before it.
            form[name] = {"type": part.type} | part.model_dump(mode="json", exclude_defaults=True)
        deciding = {f"encoder.{name}": tensor for name, tensor in self.encoder.state_dict().items()}
        deciding |= {f"bottleneck.{name}": tensor for name, tensor in self.bottleneck.state_dict().items()}
        labelled = [
            (f"{name} {tuple(tensor.shape)} {tensor.dtype}", tensor)
            for name, tensor in sorted(deciding.items())
            if "ema_" not in name  # statistics of the training
        ]
        return hash_tensors(labelled, json.dumps(form, sort_keys=True))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors."""
        written = self.config.model_dump(mode="json").items()
        config: dict[str, Any] = {key: value for key, value in written if value or key not in LATER_KEYS}
        save_model_folder(Path(folder), "tokenizer", config | {"hash": self.content_hash()}, self.state_dict())

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Autoencoder":
        """Reads a model folder, or a run folder's `model/`; in evaluation mode, on the CPU."""
        document, state = load_model_folder(path, "tokenizer")
        document.pop("hash", None)
        config = parse_config(AutoencoderConfig, document, f"{path}: config.json")
        return filled(lambda: cls(config), state, path)

    def to_pixels(self, decoded: Tensor) -> Tensor:
        """The decoder's output, pixels or logits, as pixels: in [-1, 1] from logits, else about so; differentiable."""
        if self.config.loss.reconstruction == "bce":
            return torch.sigmoid(decoded.float()) * 2 - 1
        return decoded.float()

    def to_images(self, decoded: Tensor) -> Tensor:
        """The decoder's output as images (B, C, H, W) in [-1, 1]."""
        return self.to_pixels(decoded).clamp(-1, 1)


def check_range(images: Tensor) -> None:
    """Refuses images that the Bernoulli likelihood has no meaning for."""
    low, high = images.min().item(), images.max().item()
    if low < -1 - TOLERANCE or high > 1 + TOLERANCE:
        raise InputError(
            f"loss.reconstruction 'bce': needs images in [-1, 1], got values from {low:.3g} to {high:.3g}; scale them, "
            "or use 'l2'"
        )
