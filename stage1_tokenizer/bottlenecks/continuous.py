"""The continuous bottlenecks: `identity`, `gaussian`, `class_gaussian`.

Axes: B images, C latent channels, h and w cells of the latent grid.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.bottleneck import Bottleneck, BottleneckConfig, BottleneckOutput
from twostage.core.errors import InputError
from twostage.core.training.random import BatchRandom

__all__ = ["ClassGaussianConfig", "Gaussian", "GaussianConfig", "Identity", "IdentityConfig"]


@BottleneckConfig.register
class IdentityConfig(BottleneckConfig):
    """A plain autoencoder."""

    type: Literal["identity"] = "identity"

    def build(self, shape: tuple[int, int, int], num_classes: int) -> "Identity":
        return Identity(shape[0])


@BottleneckConfig.register
class GaussianConfig(BottleneckConfig):
    """A variational autoencoder: a diagonal Gaussian posterior and a standard normal prior."""

    type: Literal["gaussian"] = "gaussian"

    def build(self, shape: tuple[int, int, int], num_classes: int) -> "Gaussian":
        return Gaussian(shape)


@BottleneckConfig.register
class ClassGaussianConfig(BottleneckConfig):
    """A class-conditional variational autoencoder: each class has a unit Gaussian prior around a learned mean."""

    type: Literal["class_gaussian"] = "class_gaussian"

    def build(self, shape: tuple[int, int, int], num_classes: int) -> "Gaussian":
        if not num_classes:
            raise InputError(
                "model.bottleneck.type 'class_gaussian': needs labelled data, and this data has no classes. Use one "
                "folder per class or a table with a `label` column, or set model.bottleneck.type=gaussian."
            )
        return Gaussian(shape, num_classes)


class Identity(Bottleneck):
    """Passes the latent on unchanged."""

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.encoded_channels = latent_channels

    def forward(self, encoded: Tensor, labels: Tensor | None, random: BatchRandom) -> BottleneckOutput:
        return BottleneckOutput(encoded)

    def encode(self, encoded: Tensor) -> BottleneckOutput:
        return BottleneckOutput(encoded)


class Gaussian(Bottleneck):
    """z ~ N(mean, diag(std^2)) by reparameterisation (Kingma and Welling 2014, arXiv 1312.6114).

    Args:
        shape: (C, h, w) of the latent.
        num_classes: 0: the prior is N(0, 1). Otherwise it is N(mean of the image's class, 1) with learned means, and
            KL = 1/2 sum[(mean - class mean)^2 + std^2 - log std^2 - 1].
    """

    variational = True

    def __init__(self, shape: tuple[int, int, int], num_classes: int = 0) -> None:
        super().__init__()
        self.shape, self.encoded_channels, self.num_classes = shape, 2 * shape[0], num_classes
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
        """The mean of each image's prior, (num_images, C, h, w); zeros without classes.

        Raises:
            InputError: the prior depends on classes, and ``labels`` is None.
        """
        if self.class_means is None:
            return torch.zeros(num_images, *self.shape)
        if labels is None:
            raise InputError(
                "model.bottleneck.type 'class_gaussian': got no labels, expected the class of every image. Use "
                "labelled data, or set model.bottleneck.type=gaussian."
            )
        return self.class_means[labels.to(self.class_means.device)]

    def sample(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """z from the prior, for standard normal noise (B, C, h, w) and, with classes, ``labels`` (B,)."""
        return self.prior_mean(labels, len(noise)).to(noise.device) + noise

    def _moments(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = encoded.float().chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)  # keeps exp() finite for the output of an untrained encoder
