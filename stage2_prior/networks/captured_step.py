"""Sampling on a GPU: the step of one cell as a CUDA graph, for priors that write one code after another.

A host takes longer to launch a step's few hundred kernels one by one than a GPU takes to run them. A CUDA graph is
launched at once. It repeats the same kernels on the same memory, so no shape and no address may depend on the cell:
the cell's number is a tensor.

Axes: B images, n branches, N cells of the grid, P numbers of a prediction.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.networks.code_head import CodeHead, sample_codes
from stage2_prior.networks.network import OnProgress
from stage2_prior.sampling import Branches, CodeNoise, guidance_at
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.machine.command import print_once

__all__ = ["FixedDecoder", "repeat_captured", "sample_with_fixed_shapes"]

EAGER_CALLS = 2
"""The calls before a function is captured. Libraries allocate memory in their first calls, which a graph cannot."""


class FixedDecoder(Protocol):
    """Predicts one cell after another, with shapes and addresses that do not depend on the cell, or only on its place
    among the cells of a call."""

    first: int
    """The first cell whose code is not known. The first call is the one with this cell."""
    cells_per_call: int
    """The cells that are predicted in one captured call; it divides N."""
    cells_per_graph: int
    """The cells after which another graph is captured, for another ``end``."""

    def predict(self, cell: Tensor, before: Tensor, end: int) -> Tensor:
        """The prediction (n B, P) of a cell, whose number (1,) is below ``end``, from the codes (n B,) of the cell
        before it, which cell 0 ignores. All cells before it have been predicted, or are known."""
        ...


@torch.no_grad()
def sample_with_fixed_shapes(
    decoder: FixedDecoder,
    head: CodeHead,
    branches: Branches,
    noise: CodeNoise,
    sampling: SamplingConfig,
    known: Tensor,
    on_progress: OnProgress | None,
) -> Tensor:
    """The codes (B, N) int64 of `sample_in_order`, which describes the arguments. On a CPU, nothing is captured."""
    images, cells = known.shape
    written = F.pad(known, (1, 0))  # the code of cell i is in column i + 1
    done = decoder.first - decoder.first % decoder.cells_per_call
    cell = torch.full((1,), done, device=known.device)
    grown = torch.tensor([guidance_at(number, cells, sampling) for number in range(cells)], dtype=torch.float64)
    grown = grown.to(known.device, non_blocking=True)

    def call(end: int) -> None:
        for _ in range(decoder.cells_per_call):
            before, here = written.index_select(1, cell)[:, 0], known.index_select(1, cell)[:, 0]
            predictions = decoder.predict(cell, branches.repeat(before), end)
            share = grown.index_select(0, cell).to(predictions.dtype)
            drawn = sample_codes(head, predictions, branches, share, sampling, noise.at(cell)[:, 0])
            written.index_copy_(1, cell + 1, torch.where(here < 0, drawn, here)[:, None])
            cell.add_(1)

    each = decoder.cells_per_graph
    borders = [done, *range(done - done % each + each, cells, each), cells]
    for start, end in itertools.pairwise(borders):
        calls = (end - start) // decoder.cells_per_call
        for _ in repeat_captured(lambda end=end: call(end), calls, known.device):
            before, done = max(done, decoder.first), done + decoder.cells_per_call
            if on_progress:
                on_progress(images * (done - before))
    return written[:, 1:]


def repeat_captured(function: Callable[[], None], times: int, device: torch.device) -> Iterator[None]:
    """Calls a function, and yields after each call. On a GPU, the calls after the first few are those of a CUDA graph.

    Args:
        function: reads and writes the same tensors in each call, whose shapes depend on no value.
    """
    call, eager = function, EAGER_CALLS if device.type == "cuda" else times
    for number in range(times):
        if number == eager:
            call = _captured(function) or function
        call()
        yield


def _captured(function: Callable[[], None]) -> Callable[[], None] | None:
    """The function as a CUDA graph; None, and a sentence the first time, if there is no such graph."""
    if _FAILED:
        return None
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may read and write images
            function()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        _FAILED.append(error)
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        print_once(f"Sampling continues without CUDA graphs, with the same codes but more slowly: {reason}.")
        return None
    return graph.replay


_FAILED: list[Exception] = []
"""Why this process captures nothing any more."""
