"""Reconstruction losses, and the evidence lower bound of the variational families.

Images and reconstructions are in [-1, 1]; `bce` works on logits and on targets in [0, 1].
"""

import math
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from core.config import Number, Section

__all__ = ["LossConfig", "negative_log_likelihood", "reconstruction_loss"]


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
