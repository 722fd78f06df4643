"""Filling masked codes in a few parallel steps, as MaskGIT does (Chang et al. 2022, arXiv 2202.04200, section 3.2).

Each step draws a code for every masked cell, keeps those that the model is most confident of, and masks the others
again. Pure functions: predictions and noise in, codes out.

Axes: B images, T steps, N cells of a grid, M masked cells of a batch (image by image, row by row), K codes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.sampling import Progress, SamplingConfig, choose, filter_logits, guidance_at, guide
from stage2_prior.shares import MaskSchedule, masked_share

__all__ = ["Predict", "draw_in_parallel", "gumbel", "left_masked"]

ROWS_AT_ONCE = 1024

Predict = Callable[[Tensor], Tensor]
"""Given codes (B, N), of which some are masked, the logits (M, K) of those."""


def left_masked(step: int, steps: Tensor, unknown: Tensor, masked: Tensor, schedule: MaskSchedule) -> Tensor:
    """How many codes of each image are still masked after ``step``, from 1: (B,) int64.

    That is the share that the schedule gives, rounded down, but one fewer than before at least. The schedules are
    concave, so an image is filled at the last of its steps and not before.

    Args:
        steps: (B,) in how many an image is filled, at most ``unknown``.
        unknown: (B,) how many were masked at first.
        masked: (B,) how many were masked before this step.
    """
    progress = (step / steps.clamp(min=1).double()).clamp(max=1)
    left = (masked_share(progress, schedule) * unknown).floor().long()
    return torch.minimum(left, masked - 1).clamp(min=0)


def gumbel(noise: Tensor) -> Tensor:
    """Gumbel noise from uniform noise in [0, 1), of the same shape and finite."""
    return -(-noise.clamp(min=2.0**-54).log()).log()


def draw_in_parallel(
    predict: Predict,
    noise: Tensor,
    sampling: SamplingConfig,
    schedule: MaskSchedule,
    choice_temperature: float,
    mask_token_id: int,
    known: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Fills every image in T steps, or in as many as it has codes to draw, where those are fewer.

    The confidence in a drawn code is log p of it + temperature x Gumbel noise, with a temperature that falls linearly
    from ``choice_temperature`` to 0 at an image's last step. p is the (guided) model's own, before temperature, top-k
    and top-p: these say what may be drawn, and with `top_k: 1` they would make it equally sure of everything.

    Args:
        predict: with guidance its images are those of the conditional branch, then those of the unconditional one:
            (2 B, N) -> (2 M, K).
        noise: uniform, (B, T, 2, N) float64: of each step and cell, the draw's and the choice's.
        schedule: the share of the codes that were unknown which is masked after each step.
        known: (B, N) int64; codes that are kept, -1 where one is to be drawn.

    Returns:
        (B, N) int64.
    """
    images, num_steps, _, cells = noise.shape
    guided = sampling.guidance_scale != 1.0
    codes = torch.full((images, cells), -1, device=noise.device) if known is None else known
    codes = codes.masked_fill(codes < 0, mask_token_id)
    unknown = (codes == mask_token_id).sum(1)
    steps = unknown.clamp(max=num_steps)  # (B,)
    for step in range(int(steps.max())):
        masked = codes == mask_token_id
        image = masked.nonzero()[:, 0]  # (M,)
        logits = predict(codes.repeat(2, 1) if guided else codes)  # (M, K)
        if guided:
            scales = noise.new_tensor([guidance_at(step, count, sampling) for count in steps.tolist()])
            logits = guide(*logits.chunk(2), scales[image, None].to(logits))
        # Some rows at a time: a draw takes several numbers of double precision for each of K codes.
        parts = zip(logits.split(ROWS_AT_ONCE), noise[:, step, 0][masked].split(ROWS_AT_ONCE), strict=True)
        drawn = torch.cat([choose(filter_logits(part, sampling), draws) for part, draws in parts])
        surprise = F.cross_entropy(logits, drawn, reduction="none")
        temperature = choice_temperature * (1 - (step + 1) / steps)
        confidence = noise.new_full((images, cells), torch.inf)  # of what is filled
        confidence[masked] = temperature[image] * gumbel(noise[:, step, 1][masked]) - surprise
        left = left_masked(step + 1, steps, unknown, masked.sum(1), schedule)
        rank = confidence.argsort(stable=True, dim=1).argsort(1)
        codes[masked] = drawn
        codes.masked_fill_(rank < left[:, None], mask_token_id)
        if progress:
            progress(len(image) - int(left.sum()))
    return codes
