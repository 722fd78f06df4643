"""What both the validation while training and the evaluation afterwards measure by."""

import torch
from torch import Tensor

__all__ = ["ACTIVE_VARIANCE", "psnr"]

ACTIVE_VARIANCE = 0.01
"""A posterior's unit is active when the variance of its mean over the images is above (Burda et al. 2016, arXiv
1509.00519)."""


def psnr(pictures: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each of (B, C, H, W) uint8 pictures, (B,) in dB; the peak is 255."""
    error = (pictures.float() - originals.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error.clamp(min=1e-8))
