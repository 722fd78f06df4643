"""The base of all priors that write one code after another: the order of the cells, the likelihood, and sampling.

Axes: B images, N cells of a grid, K codes, P numbers of a prediction: K logits for a softmax, see `CodeHead`.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from stage2_prior.networks.captured_step import FixedDecoder, sample_with_fixed_shapes
from stage2_prior.networks.code_head import CodeHead, Softmax, sample_codes
from stage2_prior.networks.jumps import Windows, sample_in_jumps
from stage2_prior.networks.network import OnProgress
from stage2_prior.sampling import Branches, CodeNoise, guidance_at
from stage2_prior.sampling_config import SamplingConfig, Weights
from twostage.core.conditions.context import Context
from twostage.core.training.random import BatchRandom

__all__ = ["ORDERS", "Autoregressive", "Order", "Step", "cell_order", "images_at_once", "sample_in_order"]

MAX_LOGITS = 2**26
"""The number of logits, or of a head's other numbers, that a likelihood computes at once."""

Step = Callable[[Tensor | None], Tensor]
"""Takes the codes (B,) of the cell before, or None at the first cell; returns the prediction (B, P) of the next."""
Order = Literal["raster", "columns", "snake", "spiral", "z_curve"]
ORDERS: tuple[Order, ...] = get_args(Order)


def cell_order(order: Order, grid: tuple[int, int]) -> Tensor:
    """The cells of an (h, w) grid, numbered row by row, in the order in which they are written: (h w,) int64.

    `raster`: row by row; `columns`: column by column; `snake`: row by row, every other row backwards; `spiral`: from
    the centre outwards; `z_curve`: Morton order, one quarter after another, recursively.
    """
    height, width = grid
    cells = torch.arange(height * width).view(height, width)
    match order:
        case "raster":
            return cells.flatten()
        case "columns":
            return cells.T.flatten()
        case "snake":
            cells[1::2] = cells[1::2].flip(1)
            return cells.flatten()
        case "spiral":
            rings = []
            while cells.numel():  # remove the first row, then rotate the rest
                rings.append(cells[0])
                cells = cells[1:].T.flip(0)
            return torch.cat(rings).flip(0)
        case "z_curve":
            rows, columns = cells.flatten() // width, cells.flatten() % width
            bits = range(max(height, width).bit_length())
            morton = sum((columns >> b & 1) << 2 * b | (rows >> b & 1) << 2 * b + 1 for b in bits)
            assert isinstance(morton, Tensor)
            return morton.argsort()


class Autoregressive(nn.Module):
    """A network that predicts each code from the codes before it. A subclass registers the buffer ``order``, sets
    ``codebook_size``, and defines ``forward`` and :meth:`decoder`."""

    exact_likelihood = True
    order_name: Order = "raster"
    codebook_size: int
    order: Tensor
    """(N,): the cells in the order in which they are written, see :func:`cell_order`."""

    def forward(self, inputs: Tensor, context: Context) -> Tensor:
        """Predictions (B, N, P) of each of the codes ``inputs`` (B, N), given the conditions and the codes before it.
        All are in the order in which they are written."""
        raise NotImplementedError

    def decoder(self, context: Context, weights: Weights) -> Step:
        """The function that predicts one cell after another when codes are sampled."""
        raise NotImplementedError

    def continued(self, context: Context, weights: Weights, codes: Tensor) -> Step:
        """:meth:`decoder` after the ``codes`` (B, n) of the first n cells: it predicts the cell after them next."""
        step = self.decoder(context, weights)
        for cell in range(codes.shape[1]):
            step(codes[:, cell - 1] if cell else None)
        return step

    def window_decoder(self, context: Context, weights: Weights) -> "Windows | None":
        """What predicts several cells at once, for exact jumps; None: there is no such thing."""
        return None

    def fixed_decoder(self, context: Context, weights: Weights, codes: Tensor) -> "FixedDecoder | None":
        """:meth:`continued` with fixed shapes, for a GPU; None: there is no such thing."""
        return None

    @property
    def code_head(self) -> CodeHead:
        """What its predictions mean. By default they are logits."""
        return Softmax(self.codebook_size)

    @property
    def keeps(self) -> str:
        return f"codes that come before all others in the order {self.order_name!r}"

    def can_keep(self, known: Tensor) -> bool:
        ordered = known[:, self.order.to(known.device)]
        return bool((ordered[:, :-1] >= ordered[:, 1:]).all())

    def nats(self, codes: Tensor, context: Context, inputs: Tensor) -> Tensor:
        """-log p of each true code given ``inputs``, in which some may be replaced: (B, N), in the order in which they
        are written."""
        predictions = self(inputs[:, self.order], context.in_order(self.order))
        return self.code_head.nats(predictions, codes[:, self.order])

    def loss(self, codes: Tensor, context: Context, inputs: Tensor, random: BatchRandom) -> Tensor:
        """The training loss: nats per code, the mean over (B, N)."""
        return self.nats(codes, context, inputs).mean()

    def nats_per_image(self, codes: Tensor, context: Context, random: BatchRandom) -> Tensor:
        """-log p(codes | conditions), (B,). Nothing is random. Many logits are computed a few images at a time."""
        images = images_at_once(codes.shape[1], self.code_head.floats)
        parts = zip(codes.split(images), context.split(images), strict=True)
        return torch.cat([self.nats(part, given, part).sum(1) for part, given in parts])

    @torch.no_grad()
    def sample(
        self,
        branches: Branches,
        sampling: SamplingConfig,
        seeds: list[int],
        known: Tensor | None = None,
        on_progress: OnProgress | None = None,
    ) -> Tensor:
        """Codes (B, N), see `PriorNetwork.sample`. With guidance, all branches are predicted as one batch."""
        head = self.code_head
        context = branches.context.in_order(self.order)
        noise = CodeNoise(seeds, sum(head.choices), self.order.device)
        codes = torch.full((len(seeds), len(self.order)), -1, device=self.order.device) if known is None else known
        codes, on_gpu = codes[:, self.order], codes.device.type == "cuda"
        if len(seeds) == 1 and not on_gpu and (windows := self.window_decoder(context, sampling.weights)):
            found = sample_in_jumps(windows, head, branches, noise, sampling, codes, on_progress)
        else:
            first = 0 if known is None else int((codes >= 0).all(0).cumprod(0).sum())
            start = context, sampling.weights, branches.repeat(codes[:, :first])
            rest = head, branches, noise, sampling, codes, on_progress
            if on_gpu and (fixed := self.fixed_decoder(*start)):
                found = sample_with_fixed_shapes(fixed, *rest)
            else:
                found = sample_in_order(self.continued(*start), *rest, first)
        return found[:, self.order.argsort()]


def images_at_once(cells: int, floats: int) -> int:
    """The number of images of so many cells whose likelihood is computed at once, with ``floats`` numbers per code."""
    return max(1, MAX_LOGITS // (cells * floats))


def sample_in_order(
    step: Step,
    head: CodeHead,
    branches: Branches,
    noise: CodeNoise,
    sampling: SamplingConfig,
    known: Tensor,
    on_progress: OnProgress | None,
    first: int = 0,
) -> Tensor:
    """Samples one cell after another. Nothing makes the host wait for a GPU.

    Args:
        step: predicts for all n ``branches`` at once: (n B,) -> (n B, P).
        known: (B, N) int64 in the same order: codes to keep, -1 where a code is to be sampled.
        first: the cell that ``step`` predicts first. The codes before it are known.

    Returns:
        (B, N) int64.
    """
    codes, unknown = known.clone(), known < 0
    images, cells = codes.shape
    noise.skip(first)
    for cell in range(first, cells):
        before = codes[:, cell - 1] if cell else None
        predictions = step(None if before is None else branches.repeat(before))
        share = guidance_at(cell, cells, sampling)
        sampled = sample_codes(head, predictions, branches, share, sampling, noise.next(1)[:, 0])
        codes[:, cell] = torch.where(unknown[:, cell], sampled, known[:, cell])
        if on_progress:
            on_progress(images)
    return codes
