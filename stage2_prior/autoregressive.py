"""What the priors that write one code after another share: the likelihood, known codes, the loop over the cells.

Axes: B images, N cells of a grid, K codes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.sampling import (
    Progress,
    SamplingConfig,
    choose,
    filter_logits,
    guidance_at,
    guide,
    uniform_noise,
)

__all__ = ["Step", "code_nats", "come_first", "draw_in_order", "images_at_once", "sample_in_order", "sum_nats"]

LOGITS_AT_ONCE = 2**26

Step = Callable[[Tensor | None], Tensor]
"""Given the codes (B,) of the cell before (None at the first), the logits (B, K) of the next cell."""


def code_nats(logits: Tensor, codes: Tensor) -> Tensor:
    """-log p of each code, (B, N, K) and (B, N) -> (B, N) float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten(), reduction="none").view_as(codes)


def images_at_once(cells: int, codebook_size: int) -> int:
    """How many images' logits :func:`sum_nats` computes at once."""
    return max(1, LOGITS_AT_ONCE // (cells * codebook_size))


def sum_nats(
    nats: Callable[[Tensor, Tensor, Tensor], Tensor], codes: Tensor, labels: Tensor, codebook_size: int
) -> Tensor:
    """``nats(codes, labels, inputs)`` of unchanged codes (B, N), summed over each image: (B,). Where the logits of all
    would be large, some images at a time."""
    images = images_at_once(codes.shape[1], codebook_size)
    parts = zip(codes.split(images), labels.split(images), strict=True)
    return torch.cat([nats(part, classes, part).sum(1) for part, classes in parts])


def come_first(known: Tensor, order: Tensor) -> bool:
    """Whether the cells that are True in ``known`` (B, N) come before all others in ``order`` (N,), in every image."""
    ordered = known[:, order.to(known.device)]
    return bool((ordered[:, :-1] >= ordered[:, 1:]).all())


def draw_in_order(
    step: Step, noise: Tensor, sampling: SamplingConfig, known: Tensor | None = None, progress: Progress | None = None
) -> Tensor:
    """Draws one cell after another.

    Args:
        step: with guidance its rows are those of the conditional branch, then those of the unconditional one:
            (2 B,) -> (2 B, K).
        noise: uniform, (B, N).
        known: (B, N) int64 in the same order; codes that are kept, -1 where one is to be drawn.

    Returns:
        (B, N) int64.
    """
    images, cells = noise.shape
    guided = sampling.guidance_scale != 1.0
    codes = torch.full_like(noise, -1, dtype=torch.long) if known is None else known.clone()
    to_draw = (codes < 0).any(0).tolist()
    for cell in range(cells):
        before = codes[:, cell - 1] if cell else None
        logits = step(before.repeat(2) if guided and before is not None else before)
        if to_draw[cell]:
            if guided:
                logits = guide(*logits.chunk(2), guidance_at(cell, cells, sampling))
            drawn = choose(filter_logits(logits, sampling), noise[:, cell])
            codes[:, cell] = torch.where(codes[:, cell] < 0, drawn, codes[:, cell])
            if progress:
                progress(images)
    return codes


@torch.no_grad()
def sample_in_order(
    decoder: Callable[[Tensor], Step],
    labels: Tensor,
    no_class: int,
    order: Tensor,
    sampling: SamplingConfig,
    seeds: list[int],
    known: Tensor | None,
    progress: Progress | None,
) -> Tensor:
    """Codes (B, N), row by row, for labels (B,), image i from ``seeds[i]`` alone.

    With guidance the conditional and the unconditional branch are worked on as one batch.

    Args:
        decoder: given the labels of its rows, the function that goes from cell to cell.
        order: (N,), the cells as they are written.
        known: (B, N) int64, row by row; -1 where a code is to be drawn.
    """
    guided = sampling.guidance_scale != 1.0
    branches = torch.cat([labels, torch.full_like(labels, no_class)]) if guided else labels
    noise = uniform_noise(seeds, len(order)).to(labels.device)
    known = None if known is None else known[:, order]
    return draw_in_order(decoder(branches), noise, sampling, known, progress)[:, order.argsort()]
