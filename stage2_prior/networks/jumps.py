"""Exact jumps: an autoregressive prior draws several codes in one pass, and the same codes as one after another.

With its noise fixed, each code is a function of those before it. So the codes of the next cells can be guessed and
predicted together, from the guesses: those up to the first wrong guess are right, and the predictions behind it are
the next guesses (predictive sampling, Wiggers and Hoogeboom 2020, arXiv 2002.09928; the Jacobi iteration of Song et
al. 2021, arXiv 2002.03629).

Axes: n branches, W cells of a window, N cells of the grid, P numbers of a prediction.
"""

from typing import Protocol

import torch
from torch import Tensor

from stage2_prior.networks.code_head import CodeHead, sample_codes
from stage2_prior.networks.network import OnProgress
from stage2_prior.sampling import Branches, CodeNoise, guidance_at
from stage2_prior.sampling_config import SamplingConfig

__all__ = ["WINDOW", "Windows", "sample_in_jumps"]

WINDOW = 8
"""The cells that are predicted together. On a CPU, a product of 8 rows takes little longer than one of a single row,
and it is computed like that of 8 images, so that the codes are the same to the last bit."""


class Windows(Protocol):
    """Predicts several cells at once for sampling."""

    size: int
    """W: the cells of each window."""

    def begin(self, cell: int) -> int:
        """The first cell of the window in which ``cell`` is predicted. It never decreases from one cell to the next."""
        ...

    def predict(self, first: int, before: Tensor) -> Tensor:
        """Predictions (n, W, P) of the cells from ``first`` on, given the codes (n, W) before each of them; the one
        before cell 0 is ignored. The codes of all cells before ``first`` are certain."""
        ...


def sample_in_jumps(
    windows: Windows,
    head: CodeHead,
    branches: Branches,
    noise: CodeNoise,
    sampling: SamplingConfig,
    known: Tensor,
    on_progress: OnProgress | None,
) -> Tensor:
    """The codes (1, N) int64 of one image.

    Args:
        windows: predicts for all n ``branches`` at once.
        known: (1, N) int64: codes to keep, -1 where a code is to be sampled.
    """
    cells, size, unknown = known.shape[1], windows.size, known[0] < 0
    guesses = torch.cat([known.new_zeros(1), known[0].clamp(min=0)])  # guesses[i + 1] is that of cell i
    ahead = noise.next(size)[0]  # of the cells in the window, a row each
    guidance = torch.tensor([guidance_at(i, cells, sampling) for i in range(cells)], device=known.device)[:, None]
    cell, begin = 0, 0
    while cell < cells:
        here = slice(begin, begin + size)
        predictions = windows.predict(begin, branches.repeat(guesses[None, here]))
        shares = guidance[here].to(predictions.dtype)
        drawn = sample_codes(head, predictions.flatten(0, 1), branches, shares, sampling, ahead)
        drawn = torch.where(unknown[here], drawn, known[0, here])
        is_right = (drawn == guesses[begin + 1 : begin + 1 + size])[cell - begin :].tolist()
        # The first cell that is not certain. A wrong guess has only right ones before it, so its code is right now.
        right = cell + is_right.index(False) + 1 if False in is_right else begin + size
        guesses[begin + 1 : begin + 1 + size] = drawn
        if on_progress:
            on_progress(int(unknown[cell:right].sum()))
        cell = right
        if cell < cells and (moved := windows.begin(cell) - begin):
            entering = noise.next(moved)[0]
            begin, ahead = begin + moved, torch.cat([ahead[moved:], entering])
            # Their first guesses: what the last prediction makes of their noise.
            last = predictions[:, -1:].expand(-1, moved, -1).flatten(0, 1)
            guess = sample_codes(head, last, branches, shares[-1:], sampling, entering)
            there = slice(begin + size - moved, begin + size)
            guesses[1:][there] = torch.where(unknown[there], guess, known[0, there])
    return guesses[None, 1:]
