"""Bottlenecks: what stands between encoder and decoder. Each returns the same small result.

The continuous ones are here, the quantizers in files of their own. Axes: B images, C latent channels, h and w cells of
the latent grid.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stage1_tokenizer.bottleneck_output import BottleneckOutput
from stage1_tokenizer.finite_scalar import FiniteScalar, FiniteScalarConfig
from stage1_tokenizer.lookup_free import LookupFree, LookupFreeConfig
from stage1_tokenizer.residual_quantizer import ResidualConfig, ResidualQuantizer
from stage1_tokenizer.vector_quantizer import VectorConfig, VectorQuantizer
from twostage.core.config.sections import Section
from twostage.core.errors import InputError
from twostage.core.training.random import BatchRandom

__all__ = [
    "Bottleneck",
    "BottleneckConfig",
    "ClassGaussianConfig",
    "Gaussian",
    "GaussianConfig",
    "IdentityConfig",
    "build_bottleneck",
]


class IdentityConfig(Section):
    """A plain autoencoder."""

    type: Literal["identity"] = "identity"


class GaussianConfig(Section):
    """A variational autoencoder: a diagonal Gaussian posterior and a standard normal prior."""

    type: Literal["gaussian"] = "gaussian"


class ClassGaussianConfig(Section):
    """A class-conditional variational autoencoder: the prior of a class is a unit Gaussian around its learned mean."""

    type: Literal["class_gaussian"] = "class_gaussian"


BottleneckConfig = Annotated[
    IdentityConfig
    | GaussianConfig
    | ClassGaussianConfig
    | VectorConfig
    | FiniteScalarConfig
    | LookupFreeConfig
    | ResidualConfig,
    Field(discriminator="type"),
]


class Identity(nn.Module):
    """The latent as it is."""

    codebook_size = None

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.encoded_channels = latent_channels

    def forward(self, encoded: Tensor, labels: Tensor | None, random: BatchRandom) -> BottleneckOutput:
        return BottleneckOutput(encoded)

    def encode(self, encoded: Tensor) -> BottleneckOutput:
        return BottleneckOutput(encoded)


class Gaussian(nn.Module):
    """z ~ N(mean, diag(std^2)) by reparameterisation (Kingma and Welling 2014, arXiv 1312.6114).

    Args:
        num_classes: None: the prior is N(0, 1); else it is N(mean of the image's class, 1), the means learned, and
            KL = 1/2 sum[(mean - class mean)^2 + std^2 - log std^2 - 1].
        shape: of the latent, (C, h, w).
    """

    codebook_size = None

    def __init__(self, shape: tuple[int, int, int], num_classes: int | None = None) -> None:
        super().__init__()
        self.shape, self.encoded_channels = shape, 2 * shape[0]
        self.class_means = nn.Parameter(torch.zeros(num_classes, *shape)) if num_classes else None

    def forward(self, encoded: Tensor, labels: Tensor | None, random: BatchRandom) -> BottleneckOutput:
        """Samples z; the loss `kl` is KL(posterior || prior) in nats per image, mean over the batch (appendix B)."""
        mean, log_variance = self._moments(encoded)
        noise = random.normal("posterior", tuple(mean.shape[1:]), mean.device)
        z = torch.addcmul(mean, torch.exp(0.5 * log_variance), noise)
        centred = mean if self.class_means is None else mean - self.prior_mean(labels, len(mean))
        kl = 0.5 * (centred.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1).mean()
        return BottleneckOutput(z, mean=mean, losses={"kl": kl})

    def encode(self, encoded: Tensor) -> BottleneckOutput:
        """The posterior's mean."""
        return BottleneckOutput(self._moments(encoded)[0])

    def prior_mean(self, labels: Tensor | None, num_images: int) -> Tensor:
        """The prior's mean of each image, (num_images, C, h, w); zeros where there are no classes."""
        if self.class_means is None:
            return torch.zeros(num_images, *self.shape)
        if labels is None:
            raise InputError("model.bottleneck.type 'class_gaussian': needs the class of every image, got no labels")
        return self.class_means[labels.to(self.class_means.device)]

    def sample(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """z of the prior, for standard normal noise of its form (B, C, h, w); ``labels`` (B,) where there are
        classes."""
        return self.prior_mean(labels, len(noise)).to(noise.device) + noise

    def _moments(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = encoded.float().chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)  # exp() of an untrained encoder's output stays finite


Bottleneck = Identity | Gaussian | VectorQuantizer | FiniteScalar | LookupFree | ResidualQuantizer


def build_bottleneck(
    config: BottleneckConfig, latent_channels: int, grid: tuple[int, int], class_names: list[str] | None
) -> Bottleneck:
    """The bottleneck that ``config`` names.

    Raises:
        InputError: a class bottleneck for data without classes.
    """
    match config:
        case IdentityConfig():
            return Identity(latent_channels)
        case GaussianConfig():
            return Gaussian((latent_channels, *grid))
        case ClassGaussianConfig():
            if not class_names:
                raise InputError(
                    "model.bottleneck.type 'class_gaussian': the data has no classes to learn a mean for; give "
                    "labelled data (one folder a class, or a `label` column), or use the type 'gaussian'"
                )
            return Gaussian((latent_channels, *grid), len(class_names))
        case VectorConfig():
            return VectorQuantizer(config, latent_channels)
        case ResidualConfig():
            return ResidualQuantizer(config, latent_channels)
        case FiniteScalarConfig():
            return FiniteScalar(config)
        case LookupFreeConfig():
            return LookupFree(config, latent_channels)
