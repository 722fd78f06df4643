"""Bottlenecks: what stands between encoder and decoder. Each returns the same small result.

Axes: B images, C latent channels, h and w cells of the latent grid.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from core.config import Section
from core.random import BatchRandom
from stage1_tokenizer.bottleneck_output import BottleneckOutput
from stage1_tokenizer.vector_quantizer import VectorConfig, VectorQuantizer

__all__ = ["BottleneckConfig", "GaussianConfig", "IdentityConfig", "build_bottleneck"]


class IdentityConfig(Section):
    """A plain autoencoder."""

    type: Literal["identity"] = "identity"


class GaussianConfig(Section):
    """A variational autoencoder: a diagonal Gaussian posterior and a standard normal prior."""

    type: Literal["gaussian"] = "gaussian"


BottleneckConfig = Annotated[IdentityConfig | GaussianConfig | VectorConfig, Field(discriminator="type")]


class Identity(nn.Module):
    """The latent as it is."""

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.encoded_channels = latent_channels

    def forward(self, encoded: Tensor, random: BatchRandom) -> BottleneckOutput:
        return BottleneckOutput(encoded)

    def encode(self, encoded: Tensor) -> BottleneckOutput:
        return BottleneckOutput(encoded)


class Gaussian(nn.Module):
    """z ~ N(mean, diag(std^2)) by reparameterisation (Kingma and Welling 2014, arXiv 1312.6114)."""

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.latent_channels, self.encoded_channels = latent_channels, 2 * latent_channels

    def forward(self, encoded: Tensor, random: BatchRandom) -> BottleneckOutput:
        """Samples z; the loss `kl` is KL(posterior || N(0, 1)) in nats per image, mean over the batch (appendix B)."""
        mean, log_variance = self._moments(encoded)
        noise = random.normal("posterior", tuple(mean.shape[1:]), mean.device)
        z = torch.addcmul(mean, torch.exp(0.5 * log_variance), noise)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1).mean()
        return BottleneckOutput(z, losses={"kl": kl})

    def encode(self, encoded: Tensor) -> BottleneckOutput:
        """The posterior's mean."""
        return BottleneckOutput(self._moments(encoded)[0])

    def sample(self, shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
        """z ~ N(0, 1) of ``shape`` (B, C, h, w)."""
        return torch.randn(shape, generator=generator, device=device)

    def _moments(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = encoded.float().chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)  # exp() of an untrained encoder's output stays finite


def build_bottleneck(
    config: IdentityConfig | GaussianConfig | VectorConfig, latent_channels: int
) -> Identity | Gaussian | VectorQuantizer:
    """The bottleneck that ``config`` names."""
    match config:
        case IdentityConfig():
            return Identity(latent_channels)
        case GaussianConfig():
            return Gaussian(latent_channels)
        case VectorConfig():
            return VectorQuantizer(config, latent_channels)
