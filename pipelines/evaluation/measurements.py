"""What is measured of a tokenizer on some images: one pass, the batches shared by the processes.

Axes: n images, B of them in a batch, C channels, H and W pixels, K codes in a codebook.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from pipelines.evaluation.frechet import ReconstructionJudge
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.validation import ACTIVE_VARIANCE, psnr
from twostage.core.data.dataset import ImageSplit
from twostage.core.images.conversion import to_float, to_uint8
from twostage.core.machine.progress import ProgressBar
from twostage.core.training.random import BatchRandom, seed_for

__all__ = [
    "Measurements",
    "RowRandom",
    "count_distinct",
    "hash_of",
    "measure",
    "row_digests",
    "ssim",
    "ssim_window",
    "total_over_processes",
]

WINDOW, SIGMA = 11, 1.5  # of SSIM
ELBO = ("nats_per_image", "bits_per_dim", "kl")


class RowRandom(BatchRandom):
    """Draws that belong to the rows of a split, whatever batch or process they fall to; drawn on the CPU, so that they
    are the same on every device.

    Args:
        rows: (B,) int64.
    """

    def __init__(self, seed: int, rows: Tensor) -> None:
        super().__init__(seed, slice(0, len(rows)), len(rows))
        self._rows = rows.tolist()

    def uniform(self, purpose: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Uniform draws in [0, 1), (rows, *shape) float32."""
        return self._stack(torch.rand, purpose, shape, device)

    def normal(self, purpose: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Standard normal draws, (rows, *shape) float32."""
        return self._stack(torch.randn, purpose, shape, device)

    def _stack(self, draw: Callable[..., Tensor], purpose: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        seeds = [seed_for(self.seed, purpose, row) for row in self._rows]
        return torch.stack([draw(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(device)


@dataclass
class Measurements:
    """The result of :func:`measure`, the same in every process."""

    figures: dict[str, float]
    psnr: Tensor
    """(n,) dB, of each image."""
    sha256: str
    """Of the images' own sha256 digests (each of its uint8 bytes, C x H x W), in their order."""
    duplicates: int
    """Images that are a copy of another one among them."""
    missing: dict[str, str]
    """Why the judging network gave no such figure."""
    judged: dict[str, Any] | None
    """What to know about the judging network's figures; None: there was none."""


@torch.no_grad()
def measure(
    model: Autoencoder,
    split: ImageSplit,
    rows: Tensor,
    batch_size: int,
    seed: int,
    state: PartialState,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    judge: ReconstructionJudge | None = None,
) -> Measurements:
    """Sends the images of ``rows`` through ``model`` and back, and measures.

    Args:
        seed: of the posterior's noise, which the evidence lower bound needs, and of a denoising one's corruption.
        perceptual: (decoded, images) in [-1, 1] -> LPIPS, the mean over the batch.
    """
    corrupts = model.config.loss.corruption is not None
    names = ["psnr", "ssim", *(["psnr_corrupted"] if corrupts else []), *(["lpips"] if perceptual else [])]
    names += ELBO if model.variational else ()
    # One line an image; each process fills in its own, so that means do not depend on who measured what.
    table = torch.zeros(len(rows), len(names), dtype=torch.float64)
    digests = torch.zeros(len(rows), 32, dtype=torch.uint8)
    counts = torch.zeros(model.bottleneck.depth, model.codebook_size or 0, dtype=torch.long)
    moments: Tensor | None = None  # of the posterior's mean: its sum and the sum of its squares, (2, units)
    parts = torch.arange(len(rows)).split(batch_size)[state.process_index :: state.num_processes]
    for places in ProgressBar(parts, desc="evaluate", unit="batch", disable=not state.is_main_process, leave=False):
        originals, labels = split.read(rows[places]), split.read_labels(rows[places])
        digests[places] = row_digests(originals)
        originals = originals.to(state.device)
        images, labels = to_float(originals), None if labels is None else labels.to(state.device)
        latent = model.encode(images)
        pictures = to_uint8(model.decode(latent.z))
        values = {"psnr": psnr(pictures, originals), "ssim": ssim(pictures, originals)}
        if perceptual:
            values["lpips"] = perceptual(to_float(pictures), images)
        if model.variational or corrupts:
            output = model(images, labels, RowRandom(seed, rows[places]))
            values |= output.metrics | {"psnr_corrupted": psnr(to_uint8(model.to_images(output.decoded)), originals)}
        if model.variational:
            means = latent.z.flatten(1).cpu().double()
            sums = torch.stack([means.sum(0), means.square().sum(0)])
            moments = sums if moments is None else moments + sums
        if latent.indices is not None:
            for codes, part in zip(
                counts, latent.indices.cpu().unflatten(-1, (-1, len(counts))).unbind(-1), strict=True
            ):
                codes += torch.bincount(part.flatten(), minlength=len(codes))
        if judge:
            judge.update(originals, pictures, places, labels)
        for column, name in enumerate(names):
            table[places, column] = values[name].cpu().double()

    total = partial(total_over_processes, state)
    table, digests = total(table), total(digests)
    figures = {"images": len(rows)} | dict(zip(names, table.mean(0).tolist(), strict=True))
    if model.codebook_size:
        figures |= code_figures(total(counts), len(rows), model.config.image_size, model.config.channels)
    if model.variational:
        units = math.prod(model.latent_shape)
        sums = total(torch.zeros(2, units, dtype=torch.float64) if moments is None else moments) / len(rows)
        variance = sums[1] - sums[0].square()
        figures |= {"active_units": int((variance > ACTIVE_VARIANCE).sum()), "latent_units": units}
    distinct = count_distinct(digests)
    seen, missing, about = judge.compute(distinct, total) if judge else ({}, {}, None)
    return Measurements(figures | seen, table[:, 0], hash_of(digests), len(rows) - distinct, missing, about)


def row_digests(rows: Tensor) -> Tensor:
    """The sha256 of each row's bytes, (B, ...) on the CPU -> (B, 32) uint8."""
    digests = [hashlib.sha256(row.numpy().tobytes()).digest() for row in rows]
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, 32)


def hash_of(digests: Tensor) -> str:
    """The sha256 of (n, 32) digests, one after another, in hexadecimal."""
    return hashlib.sha256(digests.numpy().tobytes()).hexdigest()


def count_distinct(digests: Tensor) -> int:
    """How many different ones there are among (n, 32) digests."""
    return len({bytes(digest) for digest in digests.numpy()})


def total_over_processes(state: PartialState, tensor: Tensor) -> Tensor:
    """The sum of a tensor over the processes, on its own device."""
    if state.num_processes == 1:
        return tensor
    summed = reduce(tensor.to(state.device), "sum")
    assert isinstance(summed, Tensor)
    return summed.to(tensor.device)


def code_figures(counts: Tensor, num_images: int, image_size: tuple[int, int], channels: int) -> dict[str, float]:
    """The figures of codes that occur ``counts`` (codebooks, K) times; a codebook of its own for each code of a cell.
    Entropy and perplexity are of one code, on average."""
    shares = counts.double() / counts.sum(1, keepdim=True)
    entropy = torch.special.entr(shares).sum(1).mean().item()
    used, cells = int((counts > 0).sum()), int(counts.sum()) // num_images
    bits_per_pixel = math.log2(counts.shape[1]) * cells / math.prod(image_size)
    return {
        "codebook_size": counts.shape[1],
        "codebooks": len(counts),
        "codes_used": used,
        "dead_codes": counts.numel() - used,
        "codebook_usage": used / counts.numel(),
        "perplexity": math.exp(entropy),
        "entropy_nats_per_code": entropy,
        "cells": cells,
        "code_bits_per_pixel": bits_per_pixel,
        "code_bits_per_dim": bits_per_pixel / channels,
    }


def ssim_window(size: tuple[int, int]) -> int:
    """The side of SSIM's window: 11 pixels, or the largest odd number that images of ``size`` have room for."""
    side = min(size)
    return min(WINDOW, side - 1 + side % 2)


def ssim(pictures: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each of (B, C, H, W) uint8 pictures, (B,), at most 1.

    A Gaussian window of sigma 1.5 (scaled with the window, where that has to be smaller), borders reflected.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    sigma = SIGMA * ssim_window((originals.shape[-2], originals.shape[-1])) / WINDOW  # which decides the window's side
    similarity = structural_similarity_index_measure(
        pictures.float(), originals.float(), sigma=sigma, data_range=255.0, reduction="none"
    )
    assert isinstance(similarity, Tensor)
    return similarity.reshape(len(originals))
