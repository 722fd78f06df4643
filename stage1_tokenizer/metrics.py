"""How good a reconstruction is."""

import torch
from torch import Tensor

__all__ = ["psnr"]


def psnr(pictures: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each of (B, C, H, W) uint8 pictures, (B,) in dB; the peak is 255."""
    error = (pictures.float() - originals.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error.clamp(min=1e-8))
