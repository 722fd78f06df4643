"""The causal transformer (GPT) over a flattened code grid, class-conditional, one cell after another.

Axes: B images, N = h w codes of a grid, D hidden size, H heads, E = D / H, K codes.
"""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.autoregressive import code_nats, come_first, sample_in_order, sum_nats
from stage2_prior.fast_linear import fast_linear
from stage2_prior.orders import Order, cell_order
from stage2_prior.sampling import Progress, SamplingConfig, Weights
from stage2_prior.transformer import (
    Block,
    FastBlock,
    Transformer,
    TransformerConfig,
    complex_rotation,
    normalized,
    turn,
)
from twostage.core.training.random import BatchRandom

__all__ = ["CausalTransformer", "CausalTransformerConfig", "CausalTransformerDecoder"]


class CausalTransformerConfig(TransformerConfig):
    """A GPT: each code is predicted from those before it."""

    type: Literal["causal_transformer"] = "causal_transformer"
    order: Order = "raster"
    """In which the cells are written."""


class CausalTransformer(Transformer):
    """p(codes | class) as a product over the grid's cells, in a fixed order.

    Args:
        num_classes: 0 for a prior without classes. One further class, the last, stands for "no class".
    """

    exact_likelihood = True
    order: Tensor

    def __init__(
        self, config: CausalTransformerConfig, codebook_size: int, grid: tuple[int, int], num_classes: int
    ) -> None:
        order = cell_order(config.order, grid)
        super().__init__(config, codebook_size, codebook_size, grid, num_classes, causal=True, order=order)
        self.config = config
        self.register_buffer("order", order, persistent=False)

    def forward(self, inputs: Tensor, labels: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Logits (B, N, K) for the codes (B, N) at each place, from those before it that are not ``hidden`` (B, N); all
        in the order they are written in; labels (B,), ``num_classes`` for none."""
        before = self.embed(inputs[:, :-1], None if hidden is None else hidden[:, :-1])
        x = F.pad(before, (0, 0, 1, 0))  # the first sees the class alone
        return self.predict(self.run(x, labels))

    def nats(self, codes: Tensor, labels: Tensor, inputs: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Of each true code given ``inputs``, in which some may be replaced: (B, N), in the order they are written."""
        return code_nats(self(inputs[:, self.order], labels, hidden), codes[:, self.order])

    def loss(self, codes: Tensor, labels: Tensor, inputs: Tensor, random: BatchRandom) -> Tensor:
        """The training loss: nats per code, the mean over (B, N)."""
        return self.nats(codes, labels, inputs, self.hide(codes, random)).mean()

    def nats_per_image(self, codes: Tensor, labels: Tensor, random: BatchRandom) -> Tensor:
        """-log p(codes | label), (B,); nothing is drawn."""
        return sum_nats(self.nats, codes, labels, self.codebook_size)

    @torch.no_grad()
    def decoded_nats(self, codes: Tensor, labels: Tensor, weights: Weights = "float32") -> Tensor:
        """-log p(codes | label), (B,), by the decoder that samples: what its rounded weights cost."""
        decoder, ordered = CausalTransformerDecoder(self, labels, weights), codes[:, self.order]
        steps = [decoder.step(ordered[:, cell - 1] if cell else None) for cell in range(self.cells)]
        return code_nats(torch.stack(steps, 1), ordered).sum(1)

    @property
    def keeps(self) -> str:
        return f"codes that come before all others in the order {self.config.order!r}"

    def can_keep(self, known: Tensor) -> bool:
        return come_first(known, self.order)

    def sample(
        self,
        labels: Tensor,
        sampling: SamplingConfig,
        seeds: list[int],
        known: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Codes (B, N) for labels (B,), image i from ``seeds[i]`` alone; ``known`` as in `Prior.sample`, flat."""
        return sample_in_order(
            lambda branches: CausalTransformerDecoder(self, branches, sampling.weights).step,
            labels,
            self.num_classes,
            self.order,
            sampling,
            seeds,
            known,
            progress,
        )


class CausalTransformerDecoder:
    """One cell after another with a preallocated key/value cache; the weights are read now.

    Args:
        labels: (B,), ``num_classes`` for none.
        weights: of the linear layers, as in `fast_linear`, which says what is refused.
    """

    def __init__(self, model: CausalTransformer, labels: Tensor, weights: Weights = "float32") -> None:
        heads, cells = model.config.num_heads, model.cells
        width = model.config.hidden_size // heads
        self.model, self.cell = model, 0
        self.added = model.class_embedding(labels).detach()  # (B, D), at every cell
        self.rotation = None if model.rotation is None else complex_rotation(model)  # (N, E / 2)
        self.caches = self.added.new_empty(model.config.depth, 2, len(labels), heads, cells, width).unbind()
        # The same as products take them: keys (B H, E, N), values (B H, N, E).
        self.keys = [cache[0].flatten(0, 1).transpose(1, 2) for cache in self.caches]
        self.values = [cache[1].flatten(0, 1) for cache in self.caches]
        self.blocks = [FastBlock(block, weights) for block in cast(list[Block], list(model.blocks))]
        self.head = fast_linear(model.head_weight, None, weights)

    @torch.no_grad()
    def step(self, codes: Tensor | None) -> Tensor:
        """Logits (B, K) of the next cell; ``codes`` (B,) are those of the cell before, None at the first."""
        model = self.model
        x = self.added if model.positions is None else self.added + model.positions[self.cell]
        if codes is not None:
            x = x + model.code_embedding(codes)
        for number, block in enumerate(self.blocks):
            x = block.finish(x, self._attend(number, block.qkv(x)))
        self.cell += 1
        return self.head(normalized(x, model.norm))

    def _attend(self, number: int, qkv: Tensor) -> Tensor:
        """Puts this cell's key and value into the block's cache, and attends to all that are there.

        Takes (B, 3, H, E), returns (B, D). In float32 on a CPU the two products are faster than torch's fused kernel,
        as long as the query is a row: with the keys on the left they take four times as long.
        """
        if self.rotation is not None:
            turn(qkv, self.rotation[self.cell])
        self.caches[number][:, :, :, self.cell] = qkv[:, 1:].transpose(0, 1)
        keys, values = self.keys[number], self.values[number]
        seen = self.cell + 1
        scores = torch.bmm(qkv[:, 0].reshape(len(keys), 1, -1), keys[:, :, :seen])  # (B H, 1, n)
        return torch.bmm(scores.softmax(-1), values[:, :seen]).view(len(qkv), -1)
