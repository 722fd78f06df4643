"""The causal transformer (GPT) over a flattened code grid, one cell after another, given a class.

Axes: B images, N = h w codes of a grid, D hidden size, H heads, E = D / H, K codes.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.autoregressive import Autoregressive, Order, Step, cell_order, code_nats
from stage2_prior.sampling import Weights
from stage2_prior.transformer import FastTransformer, Transformer, TransformerConfig, turn
from twostage.core.training.random import BatchRandom

__all__ = ["CausalTransformer", "CausalTransformerConfig", "CausalTransformerDecoder"]


class CausalTransformerConfig(TransformerConfig):
    """A GPT: predicts each code from those before it."""

    type: Literal["causal_transformer"] = "causal_transformer"
    order: Order = "raster"
    """The order in which cells are written."""

    def build(self, codebook_size: int, grid: tuple[int, int], num_classes: int) -> "CausalTransformer":
        return CausalTransformer(self, codebook_size, grid, num_classes)


class CausalTransformer(Autoregressive, Transformer):
    """p(codes | class) as a product over the grid's cells, in a fixed order.

    Args:
        num_classes: 0 for a prior without classes. The label ``num_classes`` means "no class".
    """

    def __init__(
        self, config: CausalTransformerConfig, codebook_size: int, grid: tuple[int, int], num_classes: int
    ) -> None:
        order = cell_order(config.order, grid)
        super().__init__(config, codebook_size, codebook_size, grid, num_classes, causal=True, order=order)
        self.config, self.order_name = config, config.order
        self.register_buffer("order", order, persistent=False)

    def forward(self, inputs: Tensor, labels: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Logits (B, N, K) for the code at each place, from the codes ``inputs`` (B, N) before it that are not
        ``hidden`` (B, N). All are in the order in which they are written."""
        before = self.embed(inputs[:, :-1], None if hidden is None else hidden[:, :-1])
        x = F.pad(before, (0, 0, 1, 0))  # the first place sees only the class
        return self.predict(self.run(x, labels))

    def loss(self, codes: Tensor, labels: Tensor, inputs: Tensor, random: BatchRandom) -> Tensor:
        """The training loss: nats per code, the mean over (B, N)."""
        logits = self(inputs[:, self.order], labels, self.hide(codes, random))
        return code_nats(logits, codes[:, self.order]).mean()

    def decoder(self, labels: Tensor, weights: Weights) -> Step:
        return CausalTransformerDecoder(self, labels, weights).step

    @torch.no_grad()
    def decoded_nats(self, codes: Tensor, labels: Tensor, weights: Weights = "float32") -> Tensor:
        """-log p(codes | label), (B,), from the sampling decoder, so it includes the cost of rounded weights."""
        step, ordered = self.decoder(labels, weights), codes[:, self.order]
        logits = [step(ordered[:, cell - 1] if cell else None) for cell in range(self.cells)]
        return code_nats(torch.stack(logits, 1), ordered).sum(1)


class CausalTransformerDecoder(FastTransformer):
    """Predicts one cell after another with a preallocated key/value cache. The weights are read now.

    Args:
        labels: (B,), ``num_classes`` for no class.
        weights: their precision, see `fast_linear`.
    """

    def __init__(self, model: CausalTransformer, labels: Tensor, weights: Weights = "float32") -> None:
        super().__init__(model, weights)
        heads, cells = model.config.num_heads, model.cells
        width = model.config.hidden_size // heads
        self.cell = 0
        self.added = model.class_embedding(labels).detach()  # (B, D), at every cell
        self.caches = self.added.new_empty(model.config.depth, 2, len(labels), heads, cells, width).unbind()
        # The same memory in the shapes of the products: keys (B H, E, N), values (B H, N, E).
        self.keys = [cache[0].flatten(0, 1).transpose(1, 2) for cache in self.caches]
        self.values = [cache[1].flatten(0, 1) for cache in self.caches]

    @torch.no_grad()
    def step(self, codes: Tensor | None) -> Tensor:
        """Logits (B, K) of the next cell; ``codes`` (B,) are those of the cell before, None at the first cell."""
        model = self.model
        x = self.added if model.positions is None else self.added + model.positions[self.cell]
        if codes is not None:
            x = x + model.code_embedding(codes)
        for number, block in enumerate(self.blocks):
            x = block.finish(x, self._attend(number, block.qkv(x)))
        self.cell += 1
        return self.predict(x)

    def _attend(self, number: int, qkv: Tensor) -> Tensor:
        """Writes this cell's key and value to the block's cache and attends to all cells so far.

        Takes (B, 3, H, E), returns (B, D). In float32 on a CPU, two products are faster than torch's fused kernel, if
        the query is a row: with the keys on the left they take four times as long.
        """
        if self.rotation is not None:
            turn(qkv, self.rotation[self.cell])
        self.caches[number][:, :, :, self.cell] = qkv[:, 1:].transpose(0, 1)
        keys, values = self.keys[number], self.values[number]
        seen = self.cell + 1
        scores = torch.bmm(qkv[:, 0].reshape(len(keys), 1, -1), keys[:, :, :seen])  # (B H, 1, n)
        bias = self.biases[number]
        if bias is not None:
            scores.view(len(qkv), -1, seen).add_(bias[:, self.cell, :seen])
        return torch.bmm(scores.softmax(-1), values[:, :seen]).view(len(qkv), -1)
