"""The masked transformer (MaskGIT, Chang et al. 2022, arXiv 2202.04200). It predicts all masked codes of a grid at once
from the other codes, in both directions, and so samples an image in a few parallel steps (the paper's section 3.2).

Axes: B images, T steps, N = h w codes of a grid, M masked codes of a batch (image by image, row by row), D hidden size,
H heads, E = D / H, K codes, P numbers of a prediction, see `CodeHead`.
"""

import itertools
import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.networks.code_head import CodeHead
from stage2_prior.networks.network import OnProgress
from stage2_prior.networks.transformer import FastTransformer, Transformer, TransformerConfig, sequence_mask, turn
from stage2_prior.sampling import Branches, choose, filter_logits, guidance_at, uniform_noise
from stage2_prior.sampling_config import MaskSchedule, SamplingConfig, Weights
from twostage.core.conditions.context import Context, ContextForm
from twostage.core.config.sections import Flag
from twostage.core.training.random import BatchRandom

__all__ = [
    "MEAN_MASKED_SHARE",
    "MaskedPredictor",
    "MaskedTransformer",
    "MaskedTransformerConfig",
    "Predict",
    "gumbel",
    "halton_order",
    "masked_share",
    "num_left_masked",
    "sample_in_parallel",
]

NUM_STEPS, CHOICE_TEMPERATURE = 8, 4.5
"""The defaults for sampling."""
MEAN_MASKED_SHARE = 2 / math.pi
"""The mean of both mask schedules over progress in [0, 1]."""
PREDICTED_ROWS = 2048
"""Rows that a block computes at a time on a CPU: they stay in its cache."""
SAMPLED_ROWS = 1024
"""Rows whose codes are chosen at a time: each takes a few float64 numbers for each of the K codes."""

Predict = Callable[[Tensor, Tensor], Tensor]
"""Takes codes (B, N), and the masked ones among the B N as numbers (M,); returns the predictions (M, P) of these."""


class MaskedTransformerConfig(TransformerConfig):
    """A bidirectional transformer that fills masked codes."""

    sampling_settings = TransformerConfig.sampling_settings | {
        "num_steps",
        "mask_schedule",
        "cell_choice",
        "choice_temperature",
    }

    type: Literal["masked_transformer"] = "masked_transformer"
    mask_schedule: MaskSchedule = "cosine"
    """The share of an image's codes that a training step masks: the schedule's value at a uniformly random point."""
    predict_replaced: Flag = False
    """Whether the loss includes codes that are not masked but were replaced by random ones (`loss.replace_prob`)."""

    def build(self, codebook_size: int, grid: tuple[int, int], form: ContextForm) -> "MaskedTransformer":
        return MaskedTransformer(self, codebook_size, grid, form)

    def default_steps(self, grid: tuple[int, int]) -> int:
        return min(NUM_STEPS, math.prod(grid))

    def codes_at_once(self, grid: tuple[int, int]) -> int:
        return math.prod(grid)


class MaskedTransformer(Transformer):
    """p(masked codes | other codes, conditions), each masked code independent of the other masked ones.

    Args:
        form: that of the contexts.
    """

    exact_likelihood = False
    keeps = "any codes"

    def __init__(
        self, config: MaskedTransformerConfig, codebook_size: int, grid: tuple[int, int], form: ContextForm
    ) -> None:
        super().__init__(config, codebook_size, codebook_size + 1, grid, form, causal=False)
        self.config = config
        self.mask_token_id = codebook_size

    def forward(self, inputs: Tensor, context: Context) -> Tensor:
        """Predictions (B, N, P) of codes (B, N), of which some are ``mask_token_id``."""
        return self.predict(self.run(self.embed(inputs), context))

    def loss(self, codes: Tensor, context: Context, inputs: Tensor, random: BatchRandom) -> Tensor:
        """The training loss, a scalar in nats per code: MaskGIT's cross-entropy of the masked codes, summed and divided
        by (B N x the mean masked share).

        MaskGIT divides by the number of masked codes in the batch, whose expectation is that constant. With the
        constant, the loss is a mean over images, so two processes give the same loss as one. The masked shares of a
        global batch are evenly spaced on the schedule from a random start, so their mean varies little.
        `predict_replaced` adds the replaced codes to the sum.
        """
        counts = _num_masked(random, self.cells, self.config.mask_schedule)
        masked = _random_cells(counts, codes, random)
        hidden = self.hide(codes, random)
        hidden = None if hidden is None else hidden & ~masked
        inputs = inputs.masked_fill(masked, self.mask_token_id)
        if self.config.predict_replaced:  # only the device knows how many codes were replaced, so all are predicted
            predictions = self.predict(self.run(self.embed(inputs, hidden), context))
            nats = self.code_head.nats(predictions, codes) * (inputs != codes)
        else:
            nats = self._nats(codes, context, inputs, masked, sum(counts.tolist()), hidden)
        return nats.sum() / (codes.numel() * MEAN_MASKED_SHARE)

    def nats_per_image(self, codes: Tensor, context: Context, random: BatchRandom) -> Tensor:
        """An unbiased estimate of an upper bound on -log p(codes | conditions), (B,), from one random mask for each
        image.

        Seen as a model that writes single codes in a uniformly random order s (Uria et al. 2014, arXiv 1310.1757;
        Hoogeboom et al. 2022, arXiv 2110.02037), it has p(x) = E_s prod_t p(x_s(t) | x_s(<t)), and by Jensen

            -log p(x) <= E_s sum_t -log p(x_s(t) | x_s(<t)) = N E_k E_m 1/k sum_{i in m} -log p(x_i | x_not m)

        with k uniform in 1 ... N and m uniform among the sets of k cells. Each image gets one k, evenly spaced over the
        batch.
        """
        counts = _num_masked(random, self.cells)
        masked = _random_cells(counts, codes, random)
        inputs = codes.masked_fill(masked, self.mask_token_id)
        nats = self._nats(codes, context, inputs, masked, sum(counts.tolist()))
        sums = nats.new_zeros(codes.shape).masked_scatter(masked, nats).sum(1)
        return sums * (self.cells / counts.to(sums))

    def _nats(
        self, codes: Tensor, context: Context, inputs: Tensor, masked: Tensor, count: int, hidden: Tensor | None = None
    ) -> Tensor:
        """-log p of the M = ``count`` codes that are ``masked`` (B, N), given ``inputs``: (M,). Nothing else is
        predicted. The caller knows the count, because a GPU would have to wait for it."""
        cells = masked.flatten().nonzero_static(size=count).squeeze(1)
        output = self.run(self.embed(inputs, hidden), context).flatten(0, 1)[cells]
        return self.code_head.nats(self.predict(output), codes.flatten()[cells])

    def can_keep(self, known: Tensor) -> bool:
        return True

    @torch.no_grad()
    def sample(
        self,
        branches: Branches,
        sampling: SamplingConfig,
        seeds: list[int],
        known: Tensor | None = None,
        on_progress: OnProgress | None = None,
    ) -> Tensor:
        """Codes (B, N), see `PriorNetwork.sample`. With guidance, all branches are predicted as one batch. Only the
        number of known codes makes the host wait for a GPU."""
        device = self.norm.weight.device
        steps = min(sampling.num_steps or self.config.default_steps(self.grid), self.cells)
        numbers = len(self.code_head.choices) + 1
        noise = uniform_noise(seeds, steps * numbers * self.cells).view(len(seeds), steps, numbers, self.cells)
        return sample_in_parallel(
            MaskedPredictor(self, branches.context, sampling.weights),
            self.code_head,
            branches,
            noise.to(device, non_blocking=True),
            sampling,
            sampling.mask_schedule or self.config.mask_schedule,
            CHOICE_TEMPERATURE if sampling.choice_temperature is None else sampling.choice_temperature,
            self.mask_token_id,
            halton_order(self.grid).to(device, non_blocking=True) if sampling.cell_choice == "halton" else None,
            known,
            on_progress,
        )


def masked_share(progress: Tensor, schedule: MaskSchedule) -> Tensor:
    """The share of codes that is masked at each ``progress`` in [0, 1]: it falls from 1 to 0.

    `cosine`: cos(pi / 2 x), as in MaskGIT; `arccos`: arccos(x) / (pi / 2) (Besnier and Chen 2023, arXiv 2310.14400),
    which fills more codes in its first steps and fewer in its last.
    """
    return (math.pi / 2 * progress).cos() if schedule == "cosine" else progress.acos() / (math.pi / 2)


def _num_masked(random: BatchRandom, cells: int, schedule: MaskSchedule | None = None) -> Tensor:
    """The number of codes to mask in each image: (B,) int64, on the CPU. None: uniform in 1 ... N.

    The points on the schedule are evenly spaced over the global batch from a random start.
    """
    start = torch.rand((), generator=random.generator("mask start", torch.device("cpu")), dtype=torch.double)
    points = (start + torch.arange(random.batch_size)[random.rows] / random.batch_size) % 1
    if schedule is None:
        return (points * cells).long() + 1
    return (masked_share(points, schedule) * cells).round().long().clamp(min=1)


def _random_cells(counts: Tensor, codes: Tensor, random: BatchRandom) -> Tensor:
    """``counts`` (B,) random cells of each image of ``codes`` (B, N): (B, N) bool."""
    ranks = random.uniform("mask", (codes.shape[1],), codes.device).argsort(1).argsort(1)
    return ranks < counts.to(codes.device, non_blocking=True)[:, None]


# --- sampling --------------------------------------------------------------------------------------------------------


class MaskedPredictor(FastTransformer):
    """Predicts the masked codes in sampling, without redundant computation. The weights are read now.

    Args:
        context: of B images.
        weights: their precision, see `fast_linear`.
    """

    @torch.no_grad()
    def __init__(self, model: MaskedTransformer, context: Context, weights: Weights = "float32") -> None:
        super().__init__(model, weights)
        self.context, self.mask_token_id = context, model.mask_token_id
        self.images = max(1, PREDICTED_ROWS // model.cells)
        self.kind = same_context(context) if model.norm.weight.device.type == "cpu" else None
        self.memory = [
            None if context.sequence is None else block.sequence_kv(context.sequence) for block in self.blocks
        ]
        """The keys and values of the sequence in each block, (2, B, H, L, E)."""

    @torch.no_grad()
    def __call__(self, codes: Tensor, cells: Tensor) -> Tensor:
        """See `Predict`. On a CPU, it skips images without masked codes and computes equal images once: in the first
        step all images with the same conditions are equal. For that, the host would have to wait for a GPU."""
        if self.kind is None:
            return self._predictions(codes, cells, None)
        masked = codes == self.mask_token_id
        unfilled = masked.any(1)
        images = torch.cat([self.kind[:, None], codes], 1)[unfilled]
        distinct, which = images.unique(dim=0, return_inverse=True)
        predicted = distinct[:, 1:] == self.mask_token_id
        parts = [
            self._predictions(part[:, 1:], masked_here.flatten().nonzero()[:, 0], part[:, 0])
            for part, masked_here in zip(distinct.split(self.images), predicted.split(self.images), strict=True)
        ]
        place = predicted.flatten().cumsum(0).view_as(predicted) - 1  # of each masked code among those predicted
        return torch.cat(parts)[place[which][masked[unfilled]]]

    def _predictions(self, codes: Tensor, cells: Tensor, rows: Tensor | None) -> Tensor:
        """Predictions of some ``cells`` (M,) of codes (b, N) with the contexts of the images ``rows`` (b,), or of
        all."""
        model, batch = self.model, len(codes)
        context = self.context if rows is None else self.context.rows(rows)
        x = model.code_embedding(codes) + model.added(context)
        x = (x if model.positions is None else x + model.positions).flatten(0, 1)  # (B N, D)
        for block, bias, memory in zip(self.blocks, self.biases, self.memory, strict=True):
            qkv = block.qkv(x).unflatten(0, (batch, -1))  # (B, N, 3, H, E)
            if self.rotation is not None:
                turn(qkv, self.rotation[:, None, None])
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, E)
            mask = bias
            if memory is not None and context.present is not None:
                memory = memory if rows is None else memory[:, rows]
                k, v = (torch.cat(pair, 2) for pair in zip(memory, (k, v), strict=True))
                mask = sequence_mask(context.present, bias, model.cells, x.dtype)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
            attended = attended.transpose(1, 2).reshape(x.shape)  # (B N, D)
            if block is self.blocks[-1]:  # from here on, no cell depends on another
                x, attended = x[cells], attended[cells]  # (M, D)
            x = block.finish(x, attended)
        return self.predictions(x)


def same_context(context: Context) -> Tensor:
    """For each image, the number of the first image with the same context: (B,) int64."""
    all_parts = context.labels, context.pooled, context.cells, context.sequence, context.present
    parts = [part.reshape(context.size, -1).float() for part in all_parts if part is not None]
    if not parts:
        return torch.zeros(context.size, dtype=torch.long)
    rows = torch.cat(parts, 1)
    _, which = rows.unique(dim=0, return_inverse=True)
    first = torch.full_like(which, context.size).scatter_reduce(
        0, which, torch.arange(context.size, device=which.device), "amin"
    )
    return first[which]


def num_left_masked(step: int, steps: Tensor, unknown: Tensor, masked: Tensor, schedule: MaskSchedule) -> Tensor:
    """The number of codes of each image still masked after ``step`` (counted from 1): (B,) int64.

    The schedule's share, rounded down, but at least one fewer than before. The schedules are concave, so an image is
    filled in exactly its last step.

    Args:
        steps: (B,) the number of steps of each image, at most ``unknown``.
        unknown: (B,) how many codes were masked at first.
        masked: (B,) how many codes were masked before this step.
    """
    progress = (step / steps.clamp(min=1).double()).clamp(max=1)
    left = (masked_share(progress, schedule) * unknown).floor().long()
    return torch.minimum(left, masked - 1).clamp(min=0)


def halton_order(grid: tuple[int, int]) -> Tensor:
    """The cells of an (h, w) grid in the order in which a Halton sequence (bases 2 and 3) first reaches them, so that
    consecutive cells lie far apart (Besnier et al. 2025, arXiv 2503.17076): (N,) int64."""
    height, width = grid
    reached: dict[int, None] = {}
    points = itertools.count()
    while len(reached) < height * width:
        point = next(points)
        row, column = (int(radical_inverse(point, base) * side) for base, side in ((2, height), (3, width)))
        reached[row * width + column] = None
    return torch.tensor(list(reached))


def radical_inverse(number: int, base: int) -> float:
    """The digits of ``number``, mirrored at the point: 6 = 110 in base 2 becomes 0.011 = 0.375."""
    value, unit = 0.0, 1.0
    while number:
        number, digit = divmod(number, base)
        unit /= base
        value += digit * unit
    return value


def gumbel(noise: Tensor) -> Tensor:
    """Gumbel noise from uniform noise in [0, 1), of the same shape and finite."""
    return -(-noise.clamp(min=2.0**-54).log()).log()


def _fill(
    head: CodeHead, predictions: Tensor, branches: Branches, share: Tensor, sampling: SamplingConfig, numbers: Tensor
) -> tuple[Tensor, Tensor]:
    """A code for each of M cells, (M,), and the model's -log p of it, (M,).

    Args:
        predictions: (n M, P), of all branches.
        share: (M,) how far guidance has grown.
        numbers: (M, J + 1) uniform: one for each choice.
    """
    found: list[tuple[Tensor, Tensor]] = []
    parts = predictions.unflatten(0, (branches.count, -1)).split(SAMPLED_ROWS, 1)
    for part, grown, uniform in zip(parts, share.split(SAMPLED_ROWS), numbers.split(SAMPLED_ROWS), strict=True):
        surprises: list[Tensor] = []

        def pick(logits: Tensor, choice: int, grown=grown, uniform=uniform, surprises=surprises) -> Tensor:
            logits = branches.combine(logits, grown[:, None].to(logits))
            values = choose(filter_logits(logits, sampling), uniform[:, choice])
            surprises.append(F.cross_entropy(logits, values, reduction="none"))
            return values

        codes = head.sample(part.flatten(0, 1), branches, pick)
        found.append((codes, torch.stack(surprises).sum(0)))
    codes, surprise = zip(*found, strict=True)
    return torch.cat(codes), torch.cat(surprise)


def sample_in_parallel(
    predict: Predict,
    head: CodeHead,
    branches: Branches,
    noise: Tensor,
    sampling: SamplingConfig,
    schedule: MaskSchedule,
    choice_temperature: float,
    mask_token_id: int,
    order: Tensor | None,
    known: Tensor | None,
    on_progress: OnProgress | None,
) -> Tensor:
    """Fills every image in T steps, or in as many as it has codes to sample, if those are fewer. Each step samples a
    code for every masked cell, keeps the codes with the highest confidence, and masks the others again.

    The confidence in a sampled code is its log p + temperature x Gumbel noise, with a temperature that falls linearly
    from ``choice_temperature`` to 0 at an image's last step. p is the (guided) model's own, before temperature, top-k
    and top-p: with `top_k: 1`, for example, filtered probabilities would all be 1.

    Args:
        predict: predicts for all n ``branches`` at once: (n B, N) and (n M,) -> (n M, P).
        noise: uniform, (B, T, J + 1, N) float64: for each step and cell, a number for each of the J choices of a code,
            and one to choose the cell.
        schedule: the share of the unknown codes that is masked after each step.
        order: (N,) the cells in the order in which they are filled; None: the most confident first.
        known: (B, N) int64: codes to keep, -1 where a code is to be sampled.

    Returns:
        (B, N) int64.
    """
    images, num_steps, _, cells = noise.shape
    codes = torch.full((images, cells), -1, device=noise.device) if known is None else known
    codes = codes.masked_fill(codes < 0, mask_token_id).flatten()
    # The CPU knows how many codes each step fills, and so all shapes: a GPU need not be waited for.
    left = _plan([cells] * images if known is None else (known < 0).sum(1).tolist(), num_steps, schedule)
    steps = [min(unknown, num_steps) for unknown in left[0]]
    turns = None if order is None else order.argsort().double()  # (N,): when each cell is filled
    for step, (before, after) in enumerate(itertools.pairwise(left)):
        masked = (codes == mask_token_id).nonzero_static(size=sum(before)).squeeze(1)  # (M,)
        predictions = predict(branches.repeat(codes.view(images, cells)), _in_branches(masked, len(codes), branches))
        numbers = noise[:, step].transpose(1, 2).flatten(0, 1)[masked]  # (M, J + 1)
        grown = [guidance_at(step, count, sampling) for count in steps]
        heat = [choice_temperature * (1 - (step + 1) / max(1, count)) for count in steps]
        of_images = torch.tensor([grown, heat, after], dtype=noise.dtype).to(noise.device, non_blocking=True)
        of_cells = of_images[:, masked // cells]
        sampled, surprise = _fill(head, predictions, branches, of_cells[0], sampling, numbers)
        confident = of_cells[1] * gumbel(numbers[:, -1]) - surprise if turns is None else -turns[masked % cells]
        confidence = noise.new_full(codes.shape, torch.inf)  # of codes that are filled already
        confidence = confidence.index_copy(0, masked, confident.to(noise)).view(images, cells)
        rank = confidence.argsort(stable=True, dim=1).argsort(1)
        hidden = (rank < of_images[2, :, None]).flatten()
        codes = codes.index_copy(0, masked, sampled).masked_fill(hidden, mask_token_id)
        if on_progress:
            on_progress(sum(before) - sum(after))
    return codes.view(images, cells)


def _plan(unknown: list[int], num_steps: int, schedule: MaskSchedule) -> list[list[int]]:
    """How many codes of each image are masked at first, and after each step."""
    masked = [torch.tensor(unknown)]
    steps = masked[0].clamp(max=num_steps)
    for step in range(max(steps.tolist(), default=0)):
        masked.append(num_left_masked(step + 1, steps, masked[0], masked[-1], schedule))
    return [left.tolist() for left in masked]


def _in_branches(masked: Tensor, codes: int, branches: Branches) -> Tensor:
    """The numbers (M,) of masked ``codes`` as those of all branches, (n M,)."""
    return (masked + codes * torch.arange(branches.count, device=masked.device)[:, None]).flatten()
