"""Choose the number of images that a pipeline samples at a time: as many as fit in the free memory."""

import os

import psutil
import torch

from stage2_prior.prior import Prior
from stage2_prior.sampling_config import SamplingConfig

__all__ = ["ROWS", "ROWS_DECODED_ON_GPU", "fitting_batch_size", "sampling_bytes"]

ROWS = 8
"""Batches are padded to a multiple of this, so that an image does not depend on the others in its batch: for other row
counts, matrix products may use other kernels, whose last bits differ."""
MAX_ON_CPU = 32
"""Larger batches are no faster: the cores are busy. On a GPU, the memory decides."""
LATENTS = 256
"""Images at a time without a prior."""
ROWS_DECODED_ON_GPU = 32
"""Images that a GPU decodes at a time; a CPU decodes `ROWS`."""
MEMORY_SHARE = 0.5
"""Share of the free memory to use."""


def sampling_bytes(prior: Prior, sampling: SamplingConfig) -> int:
    """About how much memory one image takes while its codes are sampled, without the weights: caches, activations, and
    the probabilities of all codes (float64, a few copies). An upper estimate."""
    model, grid = prior.config.model, prior.config.grid
    branches = 1 + len(sampling.scales_of(list(prior.conditions)))
    logits = model.codes_at_once(grid) * model.floats_per_code(prior.config.codebook_size)
    return branches * (model.sampling_floats(grid, prior.form) + logits) * 4 + 5 * logits * 8


def fitting_batch_size(prior: Prior | None, sampling: SamplingConfig, device: torch.device) -> int:
    """The number of images to sample at a time, a multiple of 8 and at least 8. Without a prior, images are small."""
    if prior is None:
        return MAX_ON_CPU if device.type == "cpu" else LATENTS
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:  # shared by this machine's processes
        free = psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    fitting = int(MEMORY_SHARE * free / sampling_bytes(prior, sampling))
    fitting = min(MAX_ON_CPU, fitting) if device.type == "cpu" else fitting
    return max(ROWS, fitting // ROWS * ROWS)
