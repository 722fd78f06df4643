"""Reconstruction losses, the evidence lower bound of the variational families, and the denoising ones' corruption.

Images and reconstructions are in [-1, 1]; `bce` works on logits and on targets in [0, 1].
"""

import math
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from stage1_tokenizer.discriminator import AdversarialConfig
from stage1_tokenizer.perceptual import PerceptualConfig
from twostage.core.config.sections import Number, Section, Share
from twostage.core.training.random import BatchRandom

__all__ = ["CorruptionConfig", "LossConfig", "corrupt", "negative_log_likelihood", "reconstruction_loss"]


class CorruptionConfig(Section):
    """What is done to the input of a denoising autoencoder (Vincent et al. 2008); the target stays clean."""

    masked_share: Share = 0.0
    """Of the values of each image, exactly this share is set to 0 on the scale [0, 1], that is to black."""
    noise_std: Number = Field(default=0.0, ge=0)
    """Standard deviation of the Gaussian noise added before that, in units of [-1, 1]."""


class LossConfig(Section):
    """What training minimises."""

    reconstruction: Literal["bce", "l1", "l2"] = "l2"
    """`bce`: Bernoulli, `l2`: Gaussian, `l1`: Laplace. A mean over pixels, except for the variational families: there
    the likelihood is summed over the image, in nats."""
    kl_weight: Number = Field(default=1.0, ge=0)
    """Of the KL term of the variational families (alias: beta); 1 is exactly the evidence lower bound."""
    likelihood_scale: Number = Field(default=0.1, gt=0)
    """Standard deviation (`l2`) or Laplace scale (`l1`) of a pixel's likelihood, in units of [-1, 1], for the
    variational families."""
    corruption: CorruptionConfig | None = None
    """Makes it a denoising autoencoder."""
    perceptual: PerceptualConfig | None = None
    """A distance in the features of a frozen network, added to the reconstruction loss."""
    adversarial: AdversarialConfig | None = None
    """A discriminator trained beside the autoencoder: VQ-GAN."""


def corrupt(images: Tensor, config: CorruptionConfig, random: BatchRandom) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] with noise and masked values."""
    if config.noise_std:
        images = images + config.noise_std * random.normal("corruption noise", tuple(images.shape[1:]), images.device)
    if masked := round(config.masked_share * images[0].numel()):
        draws = random.uniform("corruption mask", (images[0].numel(),), images.device)
        chosen = draws.topk(masked, dim=1, sorted=False).indices
        images = images.flatten(1).scatter(1, chosen, -1.0).view_as(images)
    return images


def reconstruction_loss(decoded: Tensor, images: Tensor, kind: Literal["bce", "l1", "l2"]) -> Tensor:
    """Mean over all elements; ``decoded`` is the decoder's output (logits for `bce`)."""
    match kind:
        case "bce":
            return F.binary_cross_entropy_with_logits(decoded.float(), (images + 1) / 2)
        case "l1":
            return F.l1_loss(decoded.float(), images)
        case "l2":
            return F.mse_loss(decoded.float(), images)


def negative_log_likelihood(decoded: Tensor, images: Tensor, config: LossConfig) -> tuple[Tensor, float]:
    """-log p(image | z) in nats per image, mean over the batch, and what to add per dimension for bits.

    The Gaussian and the Laplace are densities over [-1, 1]; a grey level is 2 / 255 wide there, which the second number
    (bits per dimension) accounts for. The Bernoulli's is 0.
    """
    pixels = images[0].numel()
    mean = reconstruction_loss(decoded, images, config.reconstruction)
    level = math.log2(255 / 2)
    match config.reconstruction:
        case "bce":
            return mean * pixels, 0.0
        case "l1":
            return pixels * (mean / config.likelihood_scale + math.log(2 * config.likelihood_scale)), level
        case "l2":
            variance = config.likelihood_scale**2
            return pixels * 0.5 * (mean / variance + math.log(2 * math.pi * variance)), level
