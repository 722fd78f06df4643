"""Reconstruction losses, the likelihood of the variational families, and the corruption of denoising autoencoders.

Images and reconstructions are in [-1, 1]; `bce` takes logits, and targets in [0, 1].
"""

import math
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from twostage.core.config.sections import Number, Section, Share
from twostage.core.training.random import BatchRandom

__all__ = ["CorruptionConfig", "ObjectiveConfig", "corrupt", "negative_log_likelihood", "reconstruction_loss"]

Reconstruction = Literal["bce", "l1", "l2"]


class CorruptionConfig(Section):
    """How the input of a denoising autoencoder (Vincent et al. 2008) is corrupted; the target stays clean."""

    masked_share: Share = 0.0
    """The share of each image's values that become black (-1)."""
    noise_std: Number = Field(default=0.0, ge=0)
    """Standard deviation of the Gaussian noise added before masking, in units of [-1, 1]."""


class ObjectiveConfig(Section):
    """The part of the loss that belongs to the autoencoder itself. A trained model keeps it, because it says what the
    decoder's output means: pixels or logits, and how likely an image is."""

    reconstruction: Reconstruction = "l2"
    """`bce`: Bernoulli, `l2`: Gaussian, `l1`: Laplace. A mean over pixels, but for the variational families a
    likelihood summed over the image, in nats."""
    kl_weight: Number = Field(default=1.0, ge=0)
    """Weight of the variational families' KL term (alias: beta); 1 is exactly the evidence lower bound."""
    likelihood_scale: Number = Field(default=0.1, gt=0)
    """Standard deviation (`l2`) or Laplace scale (`l1`) of a pixel's likelihood, in units of [-1, 1]; only for the
    variational families."""
    corruption: CorruptionConfig | None = None
    """Corrupts the input, which makes this a denoising autoencoder; null: no corruption."""


def corrupt(images: Tensor, config: CorruptionConfig, random: BatchRandom) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] with noise and masked values."""
    if config.noise_std:
        images = images + config.noise_std * random.normal("corruption noise", tuple(images.shape[1:]), images.device)
    if masked := round(config.masked_share * images[0].numel()):
        draws = random.uniform("corruption mask", (images[0].numel(),), images.device)
        chosen = draws.topk(masked, dim=1, sorted=False).indices
        images = images.flatten(1).scatter(1, chosen, -1.0).view_as(images)
    return images


def reconstruction_loss(decoded: Tensor, images: Tensor, kind: Reconstruction) -> Tensor:
    """The mean over all elements of the decoder's output (logits for `bce`) and images, both (B, C, H, W)."""
    match kind:
        case "bce":
            return F.binary_cross_entropy_with_logits(decoded.float(), (images + 1) / 2)
        case "l1":
            return F.l1_loss(decoded.float(), images)
        case "l2":
            return F.mse_loss(decoded.float(), images)


def negative_log_likelihood(
    decoded: Tensor, images: Tensor, config: ObjectiveConfig, bits: int = 8
) -> tuple[Tensor, float]:
    """-log p(image | z) in nats per image, mean over the batch, and the offset of its bits per dimension.

    The Gaussian and the Laplace are densities over [-1, 1], where a grey level is 2 / 255 wide (2 / 65535 for images of
    16 ``bits``): the offset turns bits of a density into bits of a grey level. It is 0 for the Bernoulli.
    """
    pixels = images[0].numel()
    mean = reconstruction_loss(decoded, images, config.reconstruction)
    level = math.log2((2**bits - 1) / 2)
    match config.reconstruction:
        case "bce":
            return mean * pixels, 0.0
        case "l1":
            return pixels * (mean / config.likelihood_scale + math.log(2 * config.likelihood_scale)), level
        case "l2":
            variance = config.likelihood_scale**2
            return pixels * 0.5 * (mean / variance + math.log(2 * math.pi * variance)), level
