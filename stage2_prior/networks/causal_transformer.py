"""The causal transformer (GPT) over a flattened code grid, one cell after another, given its conditions.

Axes: B images, N = h w codes of a grid, D hidden size, H heads, E = D / H, P numbers of
a prediction, see `CodeHead`.
"""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.networks.autoregressive import Autoregressive, Order, Step, cell_order
from stage2_prior.networks.captured_step import FixedDecoder
from stage2_prior.networks.code_head import CodeHead
from stage2_prior.networks.digits import head_for_codes
from stage2_prior.networks.jumps import WINDOW, Windows
from stage2_prior.networks.transformer import (
    Block,
    FastTransformer,
    Transformer,
    TransformerConfig,
    sequence_mask,
    turn,
)
from stage2_prior.sampling_config import Weights
from twostage.core.conditions.context import Context, ContextForm
from twostage.core.training.random import BatchRandom

__all__ = ["CausalTransformer", "CausalTransformerConfig", "CausalTransformerDecoder", "FixedTransformerDecoder"]


class CausalTransformerConfig(TransformerConfig):
    """A GPT: predicts each code from those before it."""

    draws_alone = True

    type: Literal["causal_transformer"] = "causal_transformer"
    order: Order = "raster"
    """The order in which cells are written."""

    def build(self, codebook_size: int, grid: tuple[int, int], form: ContextForm) -> "CausalTransformer":
        return CausalTransformer(self, codebook_size, grid, form)


class CausalTransformer(Autoregressive, Transformer):
    """p(codes | conditions) as a product over the grid's cells, in a fixed order.

    Args:
        form: that of the contexts.
    """

    def __init__(
        self, config: CausalTransformerConfig, codebook_size: int, grid: tuple[int, int], form: ContextForm
    ) -> None:
        order = cell_order(config.order, grid)
        super().__init__(config, codebook_size, codebook_size, grid, form, causal=True, order=order)
        self.config, self.order_name = config, config.order
        self.register_buffer("order", order, persistent=False)

    @property
    def code_head(self) -> CodeHead:
        return head_for_codes(self.head, self.codebook_size)

    def forward(self, inputs: Tensor, context: Context, hidden: Tensor | None = None) -> Tensor:
        """Predictions (B, N, P) of the code at each place, from the codes ``inputs`` (B, N) before it that are not
        ``hidden`` (B, N). All are in the order in which they are written."""
        before = self.embed(inputs[:, :-1], None if hidden is None else hidden[:, :-1])
        x = F.pad(before, (0, 0, 1, 0))  # the first place sees only the conditions
        return self.predict(self.run(x, context))

    def loss(self, codes: Tensor, context: Context, inputs: Tensor, random: BatchRandom) -> Tensor:
        """The training loss: nats per code, the mean over (B, N)."""
        predictions = self(inputs[:, self.order], context.in_order(self.order), self.hide(codes, random))
        return self.code_head.nats(predictions, codes[:, self.order]).mean()

    def decoder(self, context: Context, weights: Weights) -> Step:
        return CausalTransformerDecoder(self, context, weights).step

    def continued(self, context: Context, weights: Weights, codes: Tensor) -> Step:
        decoder, count = CausalTransformerDecoder(self, context, weights), codes.shape[1]
        if count and codes.device.type != "cpu":
            decoder.read(codes)
        else:  # in windows, so that an image is the same to the last bit as when it is drawn alone
            before = F.pad(codes, (1, 0))[:, :count]
            for first in range(0, count, WINDOW):
                decoder.predict(first, before[:, first : first + WINDOW])
            decoder.cell = count
        return decoder.step

    def window_decoder(self, context: Context, weights: Weights) -> Windows:
        return CausalTransformerDecoder(self, context, weights)

    def fixed_decoder(self, context: Context, weights: Weights, codes: Tensor) -> FixedDecoder:
        return FixedTransformerDecoder(self, context, weights, codes)

    @torch.no_grad()
    def decoded_nats(self, codes: Tensor, context: Context, weights: Weights = "float32") -> Tensor:
        """-log p(codes | conditions), (B,), from the sampling decoder, so it includes the cost of rounded weights."""
        step, ordered = self.decoder(context.in_order(self.order), weights), codes[:, self.order]
        predictions = [step(ordered[:, cell - 1] if cell else None) for cell in range(self.cells)]
        return self.code_head.nats(torch.stack(predictions, 1), ordered).sum(1)


class CausalTransformerDecoder(FastTransformer):
    """Predicts one cell after another with a preallocated key/value cache. The weights are read now.

    Args:
        context: of B images, with its cells in the order in which they are written.
        weights: their precision, see `fast_linear`.
    """

    @torch.no_grad()
    def __init__(self, model: CausalTransformer, context: Context, weights: Weights = "float32") -> None:
        super().__init__(model, weights)
        heads, cells = cast(Block, model.blocks[0]).num_heads, model.cells
        width = model.code_embedding.embedding_dim // heads
        self.cell, self.size = 0, min(WINDOW, cells)
        added = model.added(context)
        self.added = added.expand(-1, cells, -1)
        self.places = 0 if context.sequence is None else context.sequence.shape[1]
        shape = (len(model.blocks), 2, context.size, heads, self.places + cells, width)
        self.caches = added.new_empty(shape).unbind()
        self.absent, self.present = None, context.present
        if context.sequence is not None and context.present is not None:
            absent = added.new_zeros(context.present.shape).masked_fill_(~context.present, -torch.inf)
            self.absent = absent.repeat_interleave(heads, 0)[:, None]  # (B H, 1, L): added to scores
            for block, cache in zip(self.blocks, self.caches, strict=True):
                if (keys_values := block.sequence_kv(context.sequence)) is not None:
                    cache[:, :, :, : self.places] = keys_values
        # The same memory in the shapes of the products: keys (B H, E, L + N), values (B H, L + N, E).
        self.keys = [cache[0].flatten(0, 1).transpose(1, 2) for cache in self.caches]
        self.values = [cache[1].flatten(0, 1) for cache in self.caches]

    @torch.no_grad()
    def step(self, codes: Tensor | None) -> Tensor:
        """The prediction (B, P) of the next cell; ``codes`` (B,) are those of the cell before, None at the first."""
        before = self.added.new_zeros(len(self.added), dtype=torch.long) if codes is None else codes
        self.cell += 1
        return self.predict(self.cell - 1, before[:, None])[:, 0]

    @torch.no_grad()
    def read(self, codes: Tensor) -> None:
        """Reads the codes (B, n) of the first n cells in one pass; then :meth:`step` predicts the cell after them."""
        count = self.cell = codes.shape[1]
        x = self._embedded(0, F.pad(codes[:, :-1], (1, 0))).flatten(0, 1)  # (B n, D)
        later, here = x.new_full((count, count), -torch.inf).triu(1), slice(0, count)
        for number, block in enumerate(self.blocks):
            qkv = self._cached(number, block.qkv(x), here, self._rotation(here))
            if block is self.blocks[-1]:  # only its keys and values are needed
                return
            bias = self.biases[number]
            mask = later if bias is None else later + bias[:, :count, :count]
            if self.present is not None:
                mask = sequence_mask(self.present, mask, count, x.dtype)
            keys, values = self.caches[number][:, :, :, : self.places + count]
            attended = F.scaled_dot_product_attention(qkv[:, :, 0].transpose(1, 2), keys, values, mask, scale=1.0)
            x = block.finish(x, attended.transpose(1, 2).reshape(x.shape))

    def begin(self, cell: int) -> int:
        return min(cell, self.model.cells - self.size)

    @torch.inference_mode()
    def predict(self, first: int, before: Tensor) -> Tensor:
        """Predictions (B, W, P) of the cells from ``first`` on, given the codes (B, W) before each of them. What it
        writes to the caches for uncertain cells is written again when they are predicted again."""
        x, here = self._embedded(first, before).flatten(0, 1), slice(first, first + before.shape[1])
        rotation = self._rotation(here)
        for number, block in enumerate(self.blocks):
            qkv = self._cached(number, block.qkv(x), here, rotation)
            x = block.finish(x, self._attend(number, qkv, first))
        return self.predictions(x).view(*before.shape, -1)

    def _embedded(self, first: int, before: Tensor) -> Tensor:
        """The input of the first block at the cells from ``first`` on, for the codes (B, W) before them: (B, W, D)."""
        model, here = self.model, slice(first, first + before.shape[1])
        x = self.added[:, here]
        if model.positions is not None:
            x = x + model.positions[here]
        embedded = model.code_embedding(before)
        if first == 0:
            embedded[:, 0] = 0  # the first cell sees only the conditions
        return x + embedded

    def _rotation(self, cells: slice) -> Tensor | None:
        return None if self.rotation is None else self.rotation[cells, None, None]

    def _cached(self, number: int, qkv: Tensor, cells: slice, rotation: Tensor | None) -> Tensor:
        """Writes the keys and values of these cells, (B W, 3, H, E), to the block's cache; returns (B, W, 3, H, E),
        rotated."""
        qkv = qkv.view(self.added.shape[0], -1, *qkv.shape[1:])
        if rotation is not None:
            turn(qkv, rotation)
        written = self.caches[number][:, :, :, self.places + cells.start : self.places + cells.stop]
        written.copy_(qkv[:, :, 1:].permute(2, 0, 3, 1, 4))
        return qkv

    def _attend(self, number: int, qkv: Tensor, first: int) -> Tensor:
        """Each of the cells from ``first`` on attends to itself and all before it: (B, W, 3, H, E) -> (B W, D).

        In float32 on a CPU, two products for each cell are faster than torch's fused kernel, if the query is a row:
        with the keys on the left they take four times as long.
        """
        images, count = qkv.shape[:2]
        keys, values, bias = self.keys[number], self.values[number], self.biases[number]
        queries = qkv[:, :, 0].transpose(0, 1).reshape(count, keys.shape[0], 1, -1)  # (W, B H, 1, E)
        attended = qkv.new_empty(queries.shape)
        rows = [None] * count if bias is None else bias[:, first : first + count].unbind(1)  # each (H, N)
        cells = zip(range(first, first + count), queries.unbind(), rows, attended.unbind(), strict=True)
        for cell, query, row, result in cells:
            seen = self.places + cell + 1
            scores = torch.bmm(query, keys.narrow(2, 0, seen))  # (B H, 1, L + n)
            if self.absent is not None:
                scores[:, :, : self.places].add_(self.absent)
            if row is not None:
                of_cells = scores[:, :, self.places :] if self.places else scores
                of_cells.view(images, -1, cell + 1).add_(row.narrow(1, 0, cell + 1))
            torch.bmm(scores.softmax(-1), values.narrow(1, 0, seen), out=result)
        return attended.view(count, images, -1).transpose(0, 1).flatten(0, 1)


class FixedTransformerDecoder(FastTransformer):
    """A `FixedDecoder` after the ``codes`` (B, n) of the first n cells. Each cell attends to all up to an ``end``, of
    which a mask hides the later ones. Rounded weights also round the keys and values that are kept."""

    cells_per_call = 1
    cells_per_graph = 64
    """A graph reads the keys and values up to its last cell, so several short graphs read less than a long one."""

    @torch.no_grad()
    def __init__(self, model: CausalTransformer, context: Context, weights: Weights, codes: Tensor) -> None:
        super().__init__(model, weights)
        decoder, self.first = CausalTransformerDecoder(model, context, weights), codes.shape[1]
        if self.first:
            decoder.read(codes)
        self.places = places = decoder.places
        self.base = decoder.added if model.positions is None else decoder.added + model.positions  # (B, N, D)
        kept = torch.bfloat16 if weights == "bfloat16" else self.base.dtype
        self.caches = [cache.to(kept) for cache in decoder.caches]
        for cache in self.caches:
            cache[:, :, :, places + self.first :] = 0  # a mask does not hide NaN
        self.biases = [None if bias is None else F.pad(bias, (places, 0)) for bias in self.biases]
        self.numbers = torch.arange(model.cells, device=self.base.device)
        present = decoder.present if places else None
        self.present = self.numbers.new_ones(1, places, dtype=torch.bool) if present is None else present

    @torch.no_grad()
    def predict(self, cell: Tensor, before: Tensor, end: int) -> Tensor:
        """See `FixedDecoder.predict`."""
        x = self.base.index_select(1, cell)[:, 0] + self.model.code_embedding(before) * (cell > 0)  # (B, D)
        visible = F.pad(self.present, (0, end), value=True)  # (1 or B, L + end)
        visible[:, self.places :] = self.numbers[:end] <= cell
        hidden = x.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)[:, None, None]
        angles = None if self.rotation is None else self.rotation.index_select(0, cell)
        place, seen = cell + self.places, self.places + end
        for block, cache, bias in zip(self.blocks, self.caches, self.biases, strict=True):
            qkv = block.qkv(x)  # (B, 3, H, E)
            if angles is not None:
                turn(qkv, angles)
            cache.index_copy_(3, place, qkv[:, 1:].transpose(0, 1).unsqueeze(3).to(cache.dtype))
            mask = hidden if bias is None else hidden + bias.index_select(1, cell)[:, :, :seen]
            query, (keys, values) = qkv[:, 0].unsqueeze(2).to(cache.dtype), cache[:, :, :, :seen]
            attended = F.scaled_dot_product_attention(query, keys, values, mask.to(cache.dtype), scale=1.0)
            x = block.finish(x, attended.flatten(1).to(x.dtype))
        return self.predictions(x)
