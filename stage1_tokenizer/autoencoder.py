"""The one autoencoder: backbone + bottleneck + losses. AE, VAE, beta-VAE and VQ-VAE are choices, not classes.

Axes: B images, C channels, H and W pixels, h and w cells of the latent grid.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.config import Count, Section, parse_config
from core.errors import InputError
from core.model_folder import fill, load_model_folder, save_model_folder
from core.random import BatchRandom
from stage1_tokenizer.backbones import BackboneConfig, ConvConfig, build_backbone, grid_of
from stage1_tokenizer.bottleneck_output import BottleneckOutput
from stage1_tokenizer.bottlenecks import BottleneckConfig, Gaussian, build_bottleneck
from stage1_tokenizer.losses import LossConfig, negative_log_likelihood, reconstruction_loss
from stage1_tokenizer.vector_quantizer import VectorConfig, VectorQuantizer

__all__ = ["Autoencoder", "AutoencoderConfig", "AutoencoderOutput", "ModelConfig"]


class ModelConfig(Section):
    """The architecture."""

    latent_channels: Count = 64
    """Channels of the latent grid (alias: `z_channels`); with the `mlp` backbone the latent's dimensions."""
    backbone: BackboneConfig = ConvConfig()
    bottleneck: BottleneckConfig = VectorConfig()


class AutoencoderConfig(Section):
    """All that a trained autoencoder needs to be built again: what its `config.json` holds."""

    image_size: tuple[Count, Count]
    channels: Count
    model: ModelConfig
    loss: LossConfig


@dataclass
class AutoencoderOutput:
    """What a training step needs."""

    loss: Tensor
    """Scalar, to be minimised."""
    decoded: Tensor
    """The decoder's output (B, C, H, W), detached; :meth:`Autoencoder.to_images` makes images of it."""
    bottleneck: BottleneckOutput
    metrics: dict[str, Tensor]
    """Scalars by name, `loss` among them, detached."""


class Autoencoder(nn.Module):
    """Images -> latent -> images.

    ``forward`` is what training (and DDP) calls; ``encode``, ``decode``, ``decode_indices``, ``reconstruct`` and
    ``sample`` are for use.

    Raises:
        InputError: an image size that the backbone cannot halve.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        model = config.model
        self.grid = grid_of(model.backbone, config.image_size)
        self.bottleneck = build_bottleneck(model.bottleneck, model.latent_channels)
        self.encoder, self.decoder = build_backbone(
            model.backbone, config.channels, config.image_size, self.bottleneck.encoded_channels, model.latent_channels
        )

    @property
    def codebook_size(self) -> int | None:
        """The number of codes, or None for a continuous latent."""
        return self.bottleneck.config.codebook_size if isinstance(self.bottleneck, VectorQuantizer) else None

    @property
    def variational(self) -> bool:
        """Whether the loss is an evidence lower bound."""
        return isinstance(self.bottleneck, Gaussian)

    def forward(self, images: Tensor, labels: Tensor | None, random: BatchRandom) -> AutoencoderOutput:
        """The loss of images (B, C, H, W) in [-1, 1]. ``labels`` (B,) are for the class-conditional families."""
        latent = self.bottleneck(self.encoder(images), random)
        decoded = self.decoder(latent.z)
        metrics: dict[str, Tensor] = {}
        if self.variational:
            distortion, level = negative_log_likelihood(decoded, images, self.config.loss)
            nats = distortion + latent.losses["kl"]
            loss = distortion + self.config.loss.kl_weight * latent.losses["kl"]
            bits = nats / (images[0].numel() * math.log(2)) + level
            metrics = {"nats_per_image": nats, "bits_per_dim": bits, "reconstruction": distortion}
        else:
            distortion = reconstruction_loss(decoded, images, self.config.loss.reconstruction)
            loss = distortion + sum(latent.losses.values())
            metrics = {"reconstruction": distortion}
        metrics = {"loss": loss, **metrics, **latent.losses, **latent.metrics}
        metrics = {name: value.detach() for name, value in metrics.items()}
        return AutoencoderOutput(loss, decoded.detach(), latent, metrics)

    @torch.no_grad()
    def encode(self, images: Tensor) -> BottleneckOutput:
        """The latent of images (B, C, H, W) in [-1, 1]: z, and the codes of the discrete families."""
        return self.bottleneck.encode(self.encoder(images))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """A latent (B, latent_channels, h, w) -> images (B, C, H, W) in [-1, 1]."""
        return self.to_images(self.decoder(z))

    @torch.no_grad()
    def decode_indices(self, indices: Tensor) -> Tensor:
        """Codes (B, h, w) int64 -> images (B, C, H, W) in [-1, 1]."""
        if not isinstance(self.bottleneck, VectorQuantizer):
            raise InputError(f"this autoencoder's bottleneck is {self.config.model.bottleneck.type!r}: it has no codes")
        return self.decode(self.bottleneck.lookup(indices))

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] there and back."""
        return self.decode(self.encode(images).z)

    @torch.no_grad()
    def sample(self, num_images: int, generator: torch.Generator | None = None) -> Tensor:
        """Images from the bottleneck's own prior, (num_images, C, H, W) in [-1, 1]; variational families have one."""
        if not isinstance(self.bottleneck, Gaussian):
            raise InputError(
                f"this autoencoder's bottleneck is {self.config.model.bottleneck.type!r}: it has no prior of its own "
                "to sample from; train one over its codes (twostage encode, twostage train-prior)"
            )
        device = next(self.parameters()).device
        shape = (num_images, self.config.model.latent_channels, *self.grid)
        return self.decode(self.bottleneck.sample(shape, generator, device))

    def content_hash(self) -> str:
        """A hash of all that decides the codes: the form of the images, the encoder, the codebook. The decoder is no
        part of it, so that a decoder trained further keeps its priors."""
        model = self.config.model.model_dump(mode="json")
        form = {"image_size": self.config.image_size, "channels": self.config.channels, "model": model}
        digest = hashlib.sha256(json.dumps(form, sort_keys=True).encode())
        deciding = {f"encoder.{name}": tensor for name, tensor in self.encoder.state_dict().items()}
        if isinstance(self.bottleneck, VectorQuantizer):
            deciding["codebook"] = self.bottleneck.codebook
        for name, tensor in sorted(deciding.items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors."""
        config: dict[str, Any] = self.config.model_dump(mode="json")
        save_model_folder(Path(folder), "tokenizer", config | {"hash": self.content_hash()}, self.state_dict())

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Autoencoder":
        """Reads a model folder, or a run folder's `model/`; in evaluation mode, on the CPU."""
        document, state = load_model_folder(path, "tokenizer")
        document.pop("hash", None)
        model = cls(parse_config(AutoencoderConfig, document, f"{path}: config.json"))
        fill(model, state, path)
        return model.eval()

    def to_images(self, decoded: Tensor) -> Tensor:
        """The decoder's output, pixels or logits, as images (B, C, H, W) in [-1, 1]."""
        if self.config.loss.reconstruction == "bce":
            return torch.sigmoid(decoded.float()) * 2 - 1
        return decoded.float().clamp(-1, 1)
