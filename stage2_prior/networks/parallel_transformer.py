"""The parallel transformer: autoregression over groups of cells (locality-aware parallel decoding, Zhang et al. 2025,
arXiv 2507.01957). It predicts the codes of a group together, from the codes of all earlier groups, in any order.

There are two tokens for each cell. A cell's *code* token sees the codes of earlier groups and of its own; its *query*
token holds no code, sees the codes of earlier groups and the other queries of its group, and predicts its cell's code.
No code token sees a query, so sampling caches the keys and values of true codes only.

Axes: B images, N = h w cells of a grid, G groups, D hidden size, H heads, E = D / H, P numbers of a prediction, see
`CodeHead`.
"""

import itertools
import math
from functools import lru_cache
from typing import Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.networks.autoregressive import Order, cell_order, images_at_once
from stage2_prior.networks.code_head import sample_codes
from stage2_prior.networks.network import OnProgress
from stage2_prior.networks.transformer import (
    Block,
    FastTransformer,
    Transformer,
    TransformerConfig,
    sequence_mask,
    turn,
)
from stage2_prior.sampling import Branches, CodeNoise, guidance_at
from stage2_prior.sampling_config import SamplingConfig, Weights
from twostage.core.conditions.context import Context, ContextForm
from twostage.core.config.sections import Count
from twostage.core.errors import InputError
from twostage.core.training.random import BatchRandom

__all__ = [
    "GroupOrder",
    "ParallelDecoder",
    "ParallelTransformer",
    "ParallelTransformerConfig",
    "group_mask",
    "group_sizes",
    "grouped_cells",
    "groups_of",
]

GroupOrder = Literal["locality", Order]
MIN_TRAINED_GROUPS = 3
"""The fewest groups into which training splits an image."""
REPULSION = 2.0
"""How much more a cell of the same group repels than a known cell attracts, at the same distance."""
ROWS = 8
"""Products have a multiple of this many rows, so that an image is the same to the last bit alone and in a batch."""


class ParallelTransformerConfig(TransformerConfig):
    """A transformer that predicts groups of codes, each group from the codes of all earlier groups."""

    sampling_settings = TransformerConfig.sampling_settings | {"num_steps"}
    draws_alone = True

    type: Literal["parallel_transformer"] = "parallel_transformer"
    num_steps: Count | None = None
    """The number of groups in which an image is written, unless sampling is asked for another one. null: 1.25 times the
    square root of the number of cells, so 10 for 8x8 and 20 for 16x16. The likelihood is that of these groups."""
    order: GroupOrder = "locality"
    """The order in which sampling and the likelihood write the cells. `locality`: each group lies close to earlier
    groups, but its cells far from each other. Training draws random groups, so it does not depend on this."""

    def build(self, codebook_size: int, grid: tuple[int, int], form: ContextForm) -> "ParallelTransformer":
        return ParallelTransformer(self, codebook_size, grid, form)

    def default_steps(self, grid: tuple[int, int]) -> int:
        """G, the number of groups.

        Raises:
            InputError: there are fewer cells.
        """
        cells = math.prod(grid)
        if self.num_steps is not None and self.num_steps > cells:
            raise InputError(
                f"model.num_steps {self.num_steps}: expected at most {cells}, the number of codes in a grid of "
                f"{grid[0]}x{grid[1]}. Lower or remove it"
            )
        return self.num_steps or min(cells, round(1.25 * math.sqrt(cells)))

    def likelihood(self, grid: tuple[int, int]) -> str:
        return (
            f"exact chain rule over {self.default_steps(grid)} groups of cells (order {self.order}): the codes of a "
            "group are independent of each other, given all earlier groups"
        )

    def codes_at_once(self, grid: tuple[int, int]) -> int:
        return math.prod(grid)


class ParallelTransformer(Transformer):
    """p(codes | conditions) as a product over groups of cells, in any order; within a group, the codes are independent
    of each other given all earlier groups.

    Args:
        form: that of the contexts.
    """

    exact_likelihood = True
    keeps = "any codes"
    groups: Tensor
    """(N,): the number of each cell's group, for the likelihood."""

    def __init__(
        self, config: ParallelTransformerConfig, codebook_size: int, grid: tuple[int, int], form: ContextForm
    ) -> None:
        super().__init__(config, codebook_size, codebook_size + 1, grid, form, causal=False)
        self.config = config
        self.query_id = codebook_size
        sizes = group_sizes(self.cells, config.default_steps(grid))
        ranks = grouped_cells(config.order, grid, (), sizes).argsort()
        self.register_buffer("groups", groups_of(ranks[None], torch.tensor([len(sizes)]))[0], persistent=False)

    def forward(self, inputs: Tensor, context: Context, groups: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Predictions (B, N, P) of the code of each cell, given the codes ``inputs`` (B, N) of all earlier groups
        that are not ``hidden`` (B, N).

        Args:
            groups: (B, N), or (1, N) if they are the same for all images: the number of each cell's group.
        """
        tokens = torch.stack([self.embed(inputs, hidden), self.embed(torch.full_like(inputs, self.query_id))], 1)
        x = tokens + self.added(context)[:, None]  # (B, 2, N, D)
        x = (x if self.positions is None else x + self.positions).flatten(1, 2)
        rotation = None if self.rotation is None else self.rotation.repeat(1, 2, 1)
        offsets = None if self.offsets is None else self.offsets.repeat(2, 2)
        return self.predict(
            self.run_blocks(x, context, rotation, offsets, group_mask(groups, x.dtype))[:, self.cells :]
        )

    def loss(self, codes: Tensor, context: Context, inputs: Tensor, random: BatchRandom) -> Tensor:
        """The training loss: nats per code, the mean over (B, N). Each image has its own random order, split into a
        random number of groups, whose logarithm is uniform. One pass trains all groups."""
        predictions = self(inputs, context, self._random_groups(codes, random), self.hide(codes, random))
        return self.code_head.nats(predictions, codes).mean()

    def _random_groups(self, codes: Tensor, random: BatchRandom) -> Tensor:
        """(B, N): the number of each cell's group."""
        least = min(MIN_TRAINED_GROUPS, self.cells)
        drawn = random.uniform("groups", (), codes.device)  # (B,)
        counts = (least * ((self.cells + 1) / least) ** drawn).long().clamp(max=self.cells)
        return groups_of(random.uniform("order", (self.cells,), codes.device).argsort(1).argsort(1), counts)

    def nats_per_image(self, codes: Tensor, context: Context, random: BatchRandom) -> Tensor:
        """-log p(codes | conditions), (B,), of the model that writes the config's groups:

            -log p(c) = sum_g sum_{i in g} -log p(c_i | codes of the groups before g)

        This is exactly the distribution that sampling draws from at temperature 1. Other groups are other models, with
        other likelihoods. Nothing is random. Many logits are computed a few images at a time.
        """
        images = images_at_once(2 * codes.shape[1], self.code_head.floats)
        parts = zip(codes.split(images), context.split(images), strict=True)
        head, groups = self.code_head, self.groups[None]
        return torch.cat([head.nats(self(part, given, groups), part).sum(1) for part, given in parts])

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
        """Codes (B, N), see `PriorNetwork.sample`. Images with known codes in the same cells are sampled together; the
        known codes are the first group."""
        if known is None:
            codes = torch.full((len(seeds), self.cells), -1, device=self.norm.weight.device)
            return self._fill(branches, sampling, seeds, codes, [], on_progress)
        codes = known.clone()
        masks, which = (known >= 0).cpu().unique(dim=0, return_inverse=True)
        for number, mask in enumerate(masks):
            rows = (which == number).nonzero()[:, 0]
            part = branches if len(masks) == 1 else branches.rows(rows.to(codes.device))
            chosen, cells = [seeds[row] for row in rows.tolist()], mask.nonzero()[:, 0].tolist()
            rows = rows.to(codes.device)
            codes[rows] = self._fill(part, sampling, chosen, codes[rows], cells, on_progress)
        return codes

    def _fill(
        self,
        branches: Branches,
        sampling: SamplingConfig,
        seeds: list[int],
        codes: Tensor,
        known: list[int],
        on_progress: OnProgress | None,
    ) -> Tensor:
        """Samples the codes (B, N) of all cells but the ``known`` ones."""
        head, unknown = self.code_head, self.cells - len(known)
        noise = CodeNoise(seeds, sum(head.choices), codes.device)
        if not unknown:
            return codes
        sizes = group_sizes(unknown, min(unknown, sampling.num_steps or self.config.default_steps(self.grid)))
        order = grouped_cells(self.config.order, self.grid, tuple(known), sizes).to(codes.device, non_blocking=True)
        decoder, written = ParallelDecoder(self, branches.context, order, sampling.weights), codes[:, order]
        first, unread = len(known), written[:, : len(known)]
        for step, size in enumerate(sizes):
            predictions = decoder.step(branches.repeat(unread), size).flatten(0, 1)  # (n B size, P)
            share, noise_here = guidance_at(step, len(sizes), sampling), noise.next(size)
            unread = sample_codes(head, predictions, branches, share, sampling, noise_here.flatten(0, 1))
            unread = unread.view(len(seeds), size)
            written[:, first : first + size] = unread
            first += size
            if on_progress:
                on_progress(unread.numel())
        return written[:, order.argsort()]


# --- groups ----------------------------------------------------------------------------------------------------------


def group_sizes(cells: int, groups: int) -> tuple[int, ...]:
    """How many cells each group has: at least one, and fewer at first, when little is known (a cosine schedule, as in
    MaskGIT)."""
    ends = [max(round(cells * (1 - math.cos(math.pi / 2 * group / groups))), group) for group in range(groups + 1)]
    return tuple(end - start for start, end in itertools.pairwise(ends))


def groups_of(ranks: Tensor, counts: Tensor) -> Tensor:
    """The numbers of the groups of cells, given their places ``ranks`` (B, N) in the order and how many groups each
    image has, ``counts`` (B,), with the sizes of :func:`group_sizes`: (B, N) int64."""
    cells = ranks.shape[1]
    numbers = torch.arange(1, cells + 1, device=ranks.device)
    progress = (numbers / counts[:, None].double()).clamp(max=1)
    ends = (cells * (1 - (math.pi / 2 * progress).cos())).round().long().maximum(numbers).clamp(max=cells)
    return torch.searchsorted(ends, ranks, right=True)


def grouped_cells(order: GroupOrder, grid: tuple[int, int], known: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """All cells of an (h, w) grid, numbered row by row: the ``known`` ones, then those of each group in turn.

    `locality` chooses one cell after another: that with the largest sum of 1 / distance^2 to the cells of earlier
    groups, minus `REPULSION` times that to the cells of its own group, so that a group's cells say much about what is
    next to them and little about each other. The first cell is the upper left one: from the centre outwards, samples
    were much worse (docs/results.md).
    """
    if order == "locality":
        return torch.tensor(_locality_order(grid, known, sizes))
    cells = cell_order(order, grid)
    later = torch.ones(len(cells), dtype=torch.bool)
    later[list(known)] = False
    return cells[later[cells].byte().argsort(stable=True)]


@lru_cache(maxsize=64)
def _locality_order(grid: tuple[int, int], known: tuple[int, ...], sizes: tuple[int, ...]) -> list[int]:
    places = np.argwhere(np.ones(grid)).astype(float)  # (N, 2)
    distances = ((places[:, None] - places) ** 2).sum(-1)  # squared, (N, N)
    closeness = 1 / (distances + np.eye(len(places)))
    written, score = list(known), closeness[list(known)].sum(0)
    for size in sizes:
        group, repelled = list[int](), np.zeros(len(places))
        for _ in range(size):
            left = score - REPULSION * repelled
            left[written + group] = -np.inf
            group.append(int(left.argmax()))
            repelled += closeness[group[-1]]
        score = score + closeness[group].sum(0)
        written += group
    return written


def group_mask(groups: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores from each of the 2 N tokens, codes and then queries, to each: 0 where a token sees
    another, else -inf: (B, N) -> (B, 1, 2 N, 2 N)."""
    earlier, same = groups[:, None] < groups[..., None], groups[:, None] == groups[..., None]  # (B, N, N)
    of_codes = torch.cat([earlier | same, torch.zeros_like(same)], 2)
    seen = torch.cat([of_codes, torch.cat([earlier, same], 2)], 1)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)[:, None]


# --- sampling --------------------------------------------------------------------------------------------------------


class ParallelDecoder(FastTransformer):
    """Predicts one group after another, with a preallocated cache of the keys and values of earlier codes. The weights
    are read now.

    Args:
        context: of B images.
        order: (N,) the cells in the order in which they are written.
        weights: their precision, see `fast_linear`.
    """

    @torch.no_grad()
    def __init__(
        self, model: ParallelTransformer, context: Context, order: Tensor, weights: Weights = "float32"
    ) -> None:
        super().__init__(model, weights)
        heads, cells = cast(Block, model.blocks[0]).num_heads, model.cells
        added = model.added(context.in_order(order)).expand(-1, cells, -1)
        self.base = added if model.positions is None else added + model.positions[order]  # (B, N, D)
        self.query = model.embed(torch.full((1,), model.query_id, device=order.device))
        self.codes_read, self.context, self.order = 0, context, order
        self.places = 0 if context.sequence is None else context.sequence.shape[1]
        if self.rotation is not None:
            self.rotation = self.rotation[order]
        self.biases = [None if bias is None else bias[:, order][:, :, order] for bias in self.biases]
        width = model.code_embedding.embedding_dim // heads
        shape = (len(self.blocks), 2, context.size, heads, self.places + cells, width)
        self.caches = self.base.new_empty(shape).unbind()
        if context.sequence is not None:
            for block, cache in zip(self.blocks, self.caches, strict=True):
                if (keys_values := block.sequence_kv(context.sequence)) is not None:
                    cache[:, :, :, : self.places] = keys_values

    @torch.no_grad()
    def step(self, codes: Tensor, count: int) -> Tensor:
        """Reads the ``codes`` (B, n) of the next n cells, as one group, and predicts the ``count`` cells after them:
        (B, count, P). Until their codes are read, the cells' places in the cache hold their queries."""
        start, read = self.codes_read, codes.shape[1]
        self.codes_read, here = start + read, slice(start, start + read + count)
        tokens = self.model.code_embedding(codes)
        tokens = torch.cat([tokens, self.query.expand(len(tokens), count, -1)], 1)
        shape = tokens.shape[:2]
        # Rows are added up to a multiple of 8.
        x = F.pad((tokens + self.base[:, here]).flatten(0, 1), (0, 0, 0, -shape.numel() % ROWS))  # (R, D)
        seen = None
        if read:  # codes do not see queries
            seen = x.new_zeros(read + count, here.stop)
            seen[:read, start + read :] = -torch.inf
        for number, block in enumerate(self.blocks):
            attended = self._attend(number, block.qkv(x)[: shape.numel()].unflatten(0, shape), here, seen)
            if block is self.blocks[-1]:  # from here on, no cell depends on another
                x = x[: shape.numel()].unflatten(0, shape)[:, read:].flatten(0, 1)
                x = F.pad(x, (0, 0, 0, -len(x) % ROWS))
                attended = attended[:, read:]
            attended = attended.flatten(0, 1)
            x = block.finish(x, F.pad(attended, (0, 0, 0, len(x) - len(attended))))
        return self.predictions(x)[: shape[0] * count].unflatten(0, (-1, count))

    def _attend(self, number: int, qkv: Tensor, here: slice, seen: Tensor | None) -> Tensor:
        """Writes keys and values to the places ``here`` of a block's cache: (B, n, 3, H, E) -> (B, n, D)."""
        if self.rotation is not None:
            turn(qkv, self.rotation[here, None, None])
        self.caches[number][:, :, :, self.places + here.start : self.places + here.stop] = qkv[:, :, 1:].permute(
            2, 0, 3, 1, 4
        )
        keys, values = self.caches[number][:, :, :, : self.places + here.stop]
        bias, mask = self.biases[number], seen
        if bias is not None:
            bias = bias[:, here, : here.stop]
            mask = bias if seen is None else bias + seen
        if self.context.present is not None:
            mask = keys.new_zeros(qkv.shape[1], here.stop) if mask is None else mask
            mask = sequence_mask(self.context.present, mask, qkv.shape[1], keys.dtype)
        attended = F.scaled_dot_product_attention(qkv[:, :, 0].transpose(1, 2), keys, values, mask, scale=1.0)
        return attended.transpose(1, 2).flatten(2)
