"""How many images a pipeline draws at a time: what fits the memory that is free."""

import math
import os

import psutil
import torch

from stage2_prior.pixelcnn import PixelCNNConfig
from stage2_prior.prior import Prior
from stage2_prior.sampling import SamplingConfig

__all__ = ["ROWS", "fitting_batch_size", "sampling_bytes"]

ROWS = 8
"""What batches are padded to a multiple of: matrix products of other row counts may take other kernels, whose last bits
differ. So an image is the same whatever stands beside it in a batch."""
MAX_ON_CPU, MAX_ON_GPU = 32, 256
"""Beyond it nothing is gained: the cores, or the GPU, are busy."""
SHARE = 0.5
"""Of the free memory."""


def sampling_bytes(prior: Prior, sampling: SamplingConfig) -> int:
    """About what drawing one image's codes takes beside the weights: caches, activations, and the chances of all codes
    (float64, a few times over). An upper estimate."""
    config, cells = prior.config, math.prod(prior.config.grid)
    branches = 1 if sampling.guidance_scale == 1 else 2
    drawn = cells if config.model.type == "masked_transformer" else 1  # at a time
    match config.model:
        case PixelCNNConfig():
            width, computed = 4 * config.model.channels, config.grid[1]
        case _:
            width, computed = 2 * config.model.hidden_size, drawn
    hidden = cells * config.model.depth * width + computed * 8 * width
    logits = drawn * config.codebook_size
    return branches * (hidden + logits) * 4 + 5 * logits * 8


def fitting_batch_size(prior: Prior | None, sampling: SamplingConfig, device: torch.device) -> int:
    """Images at a time, a multiple of 8; at least 8. Without a prior there is little to keep."""
    most = MAX_ON_CPU if device.type == "cpu" else MAX_ON_GPU
    if prior is None:
        return most
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:  # which this machine's processes share
        free = psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    fitting = int(SHARE * free / sampling_bytes(prior, sampling))
    return max(ROWS, min(most, fitting // ROWS * ROWS))
