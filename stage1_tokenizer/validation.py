"""Measurements on held-out images during training."""

import torch
from accelerate import Accelerator
from torch import Tensor

from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.bottlenecks.bottleneck import code_counts
from twostage.core.data.image_data import ImageSplit
from twostage.core.images.conversion import to_float, to_integers, white_level
from twostage.core.training.random import BatchRandom, seed_for

__all__ = ["ACTIVE_VARIANCE", "psnr", "validate"]

ACTIVE_VARIANCE = 0.01
"""A unit of the posterior is active if the variance of its mean over the images is above this (Burda et al. 2016, arXiv
1509.00519)."""
OF_TRAINING = ("perplexity", "codebook_usage")
"""Metrics of the training's own window. Here they are counted over the whole split instead."""


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each of (B, C, H, W) uint8 or uint16 images against its original of
    the same type, (B,)."""
    error = (images.float() - originals.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(white_level(originals) ** 2 / error.clamp(min=1e-8))


@torch.no_grad()
def validate(
    model: Autoencoder, split: ImageSplit, batch_size: int, seed: int, accelerator: Accelerator
) -> dict[str, float]:
    """Mean metrics over a split; the processes share the batches.

    Adds PSNR in dB of images rounded as their files are, the share of the codebook in use and its perplexity (for
    codes), and the share of active units (for a posterior), each over the whole split.
    """
    model.eval()
    device = accelerator.device
    parts = list(torch.arange(len(split)).split(batch_size))
    own = parts[accelerator.process_index :: accelerator.num_processes]
    counts = code_counts(model.bottleneck, torch.zeros(0, *model.code_grid, dtype=torch.long)).to(device)
    moments: Tensor | None = None
    sums: dict[str, Tensor] = {}
    # A process without a batch must still take part in the sums: it processes one with weight 0.
    for rows, weight in [(rows, 1) for rows in own] or [(parts[0], 0)]:
        pixels = split.read(rows).to(device)
        given = model.read_given(split, rows)
        random = BatchRandom(seed_for(seed, "validation", int(rows[0]) // batch_size), slice(0, len(rows)), len(rows))
        output = model(to_float(pixels), None if given is None else given.to(device), random)
        values = {name: value for name, value in output.metrics.items() if not name.startswith(OF_TRAINING)}
        values["psnr"] = psnr(to_integers(model.to_images(output.decoded), split.bits), pixels).mean()
        for name in [*output.metrics, "psnr"]:
            if name in values:
                sums[name] = sums.get(name, 0) + weight * len(rows) * values[name]
        if output.bottleneck.indices is not None and model.codebook_size:
            counts += weight * code_counts(model.bottleneck, output.bottleneck.indices)
        if output.bottleneck.mean is not None:
            mean = output.bottleneck.mean.flatten(1)
            own_moments = weight * torch.stack([mean.sum(0), mean.square().sum(0)])
            moments = own_moments if moments is None else moments + own_moments
    totals = accelerator.reduce(torch.stack(list(sums.values())), "sum") / len(split)  # type: ignore[operator]
    metrics: dict[str, float] = dict(zip(sums, totals.tolist(), strict=True))
    if model.codebook_size:
        counts = accelerator.reduce(counts, "sum")  # type: ignore[assignment]
        assert isinstance(counts, Tensor)
        metrics["codebook_usage"] = (counts > 0).float().mean().item()
        shares = counts / counts.sum(1, keepdim=True)
        metrics["perplexity"] = torch.special.entr(shares).sum(1).exp().mean().item()
    if moments is not None:
        first, second = accelerator.reduce(moments, "sum") / len(split)  # type: ignore[operator]
        metrics["active_share"] = (second - first.square() > ACTIVE_VARIANCE).float().mean().item()
    return metrics
