"""What the causal and the masked transformer share: embeddings, positions, blocks, head.

Axes: B images, N = h w cells of a grid, D hidden size, H heads, E = D / H, K codes.
"""

import math
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from stage2_prior.fast_linear import TrainedLinear, fast_linear, linear
from stage2_prior.sampling import Weights
from twostage.core.config.sections import Depth, Flag, Section, Share, Width
from twostage.core.training.random import BatchRandom

__all__ = [
    "Block",
    "FastBlock",
    "Transformer",
    "TransformerConfig",
    "attention",
    "complex_rotation",
    "normalized",
    "rotate",
    "rotations",
    "turn",
]


class TransformerConfig(Section):
    """Pre-normalised blocks as in GPT-2."""

    hidden_size: Width = 256
    depth: Depth = 6
    num_heads: Width = 8
    mlp_ratio: Depth = 4
    dropout: Share = 0.1
    """On the embeddings and on what each block adds."""
    code_dropout: Share = 0.0
    """Share of the input codes that a training step hides (their embedding is 0)."""
    positions: Literal["learned", "rotary", "both"] = "both"
    """`learned`: a vector a cell; `rotary`: heads turned by a cell's row and column."""
    tied_head: Flag = False
    """Whether the head's weights are the code embedding's."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "TransformerConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.positions != "learned" and self.hidden_size // self.num_heads % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} / num_heads {self.num_heads} must be a multiple of 4, because half of "
                "each head is turned by the row and half by the column"
            )
        return self


def rotations(grid: tuple[int, int], width: int) -> Tensor:
    """Cosines and sines (2, N, width / 2) that turn a head by a cell's row and column (RoPE, Su et al. 2021, arXiv
    2104.09864, in two dimensions): attention can then see how far apart two cells are, whichever they are.

    The slowest turn is a quarter circle in ten cells, the fastest one in a cell.
    """
    frequencies = math.pi / 2 * 10 ** -(torch.arange(width // 4) / (width // 4))
    rows, columns = torch.arange(grid[0]), torch.arange(grid[1])
    cells = torch.cartesian_prod(rows, columns).float()  # (N, 2)
    angles = (cells[:, :, None] * frequencies).flatten(1)  # (N, width / 2)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns each pair of (..., E) by (2, ..., E / 2) cosines and sines."""
    cos, sin = rotation.to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over (B, H, N, E), each cell attending to all, or to itself and those before it.

    In bfloat16 on a CPU the products are written out: torch's fused kernel has a slow backward pass there (measured
    at 4.5 times the time for 64 cells, twice for 256; in float32 the fused one wins).
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, N, N)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu_(1), -torch.inf)
    return scores.softmax(-1) @ v


class Block(nn.Module):
    """Self-attention and an MLP, each added to the stream."""

    def __init__(self, config: TransformerConfig, causal: bool) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads, self.dropout, self.causal = config.num_heads, config.dropout, causal
        self.norm1 = nn.LayerNorm(size)
        self.qkv = TrainedLinear(size, 3 * size)
        self.attention_out = TrainedLinear(size, size)
        self.norm2 = nn.LayerNorm(size)
        self.mlp_in = TrainedLinear(size, config.mlp_ratio * size)
        self.mlp_out = TrainedLinear(config.mlp_ratio * size, size)

    def forward(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        batch, length, size = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = qkv[:2] if rotation is None else rotate(qkv[:2], rotation)  # each (B, H, N, E)
        attended = attention(q, k, qkv[2], self.causal)
        attended = attended.transpose(1, 2).reshape(batch, length, size)
        x = x + F.dropout(self.attention_out(attended), self.dropout, self.training)
        hidden = F.gelu(self.mlp_in(self.norm2(x)), approximate="tanh")
        return x + F.dropout(self.mlp_out(hidden), self.dropout, self.training)


class FastBlock:
    """A block at inference but for its attention, which is left to the caller. The weights are read now.

    Args:
        weights: of its products, as in `fast_linear`, which says what is refused.
    """

    def __init__(self, block: Block, weights: Weights = "float32") -> None:
        def fast(layer: nn.Linear, gelu: bool = False):
            return fast_linear(layer.weight, layer.bias, weights, gelu=gelu)

        self.num_heads, self.norm1, self.norm2 = block.num_heads, block.norm1, block.norm2
        rows = _rows_for_attention(block)
        self._qkv = fast_linear(rows[:, :-1], rows[:, -1].contiguous(), weights)
        self._attention_out = fast(block.attention_out)
        self._mlp_in, self._mlp_out = fast(block.mlp_in, gelu=True), fast(block.mlp_out)

    def qkv(self, x: Tensor) -> Tensor:
        """Queries, keys and values, (R, D) -> (R, 3, H, E): the queries are divided by sqrt(E), and the pairs that
        :func:`turn` turns stand side by side."""
        return self._qkv(normalized(x, self.norm1)).view(len(x), 3, self.num_heads, -1)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The block's result for ``x`` and what its heads attended to, both (R, D)."""
        x = self._attention_out(attended, x)
        return self._mlp_out(self._mlp_in(normalized(x, self.norm2)), x)


def _rows_for_attention(block: Block) -> Tensor:
    """The weights and, last, the bias of a block's first product, (3 D, D + 1), as :meth:`FastBlock.qkv` wants them:
    a head's dimensions in another order are all the same to q k^T."""
    rows = torch.cat([block.qkv.weight, block.qkv.bias[:, None]], 1).detach()
    queries, keys, values = rows.unflatten(0, (3, block.num_heads, -1))  # each (H, E, D + 1)
    width = queries.shape[1]
    if width % 2 == 0:  # else there is nothing that turns
        queries, keys = (x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2) for x in (queries, keys))
    return torch.stack([queries * width**-0.5, keys, values]).flatten(0, 2)


def turn(qkv: Tensor, rotation: Tensor) -> None:
    """:func:`rotate` of queries and keys in place, (..., 3, H, E) of :meth:`FastBlock.qkv`, by (..., E / 2) complex
    numbers: a turned pair is a complex product."""
    pairs = qkv[..., :2, :, :]
    torch.view_as_complex(pairs.view(*pairs.shape[:-1], -1, 2)).mul_(rotation)


def normalized(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """``norm`` of (..., D), in half the time of calling the module."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias)


class Transformer(nn.Module):
    """Codes in, a prediction of the code at each place out.

    Args:
        inputs: how many codes can be input: the codebook's, and a mask's where there is one.
        order: (N,) the cells in the order of the sequence; by default row by row.
        num_classes: 0 for a prior without classes. One further class, the last, stands for "no class".
    """

    rotation: Tensor | None

    def __init__(
        self,
        config: TransformerConfig,
        codebook_size: int,
        inputs: int,
        grid: tuple[int, int],
        num_classes: int,
        causal: bool,
        order: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.codebook_size, self.grid, self.num_classes = codebook_size, grid, num_classes
        self.dropout, self.code_dropout = config.dropout, config.code_dropout
        size, self.cells = config.hidden_size, grid[0] * grid[1]
        self.code_embedding = nn.Embedding(inputs, size)
        self.class_embedding = nn.Embedding(num_classes + 1, size)
        self.positions = None if config.positions == "rotary" else nn.Parameter(torch.empty(self.cells, size))
        rotation = None if config.positions == "learned" else rotations(grid, size // config.num_heads)
        if rotation is not None and order is not None:
            rotation = rotation[:, order]
        self.register_buffer("rotation", rotation, persistent=False)
        self.blocks = nn.ModuleList([Block(config, causal) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(size)
        self.head = None if config.tied_head else nn.Linear(size, codebook_size, bias=False)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in cast(list[Block], list(self.blocks)):  # what the blocks add together stays of order one (GPT-2)
            for layer in (block.attention_out, block.mlp_out):
                nn.init.normal_(layer.weight, std=0.02 * (2 * len(self.blocks)) ** -0.5)
        if self.positions is not None:
            nn.init.normal_(self.positions, std=0.02)
        if self.head is not None:
            nn.init.zeros_(self.head.weight)  # the first prediction is uniform

    @property
    def head_weight(self) -> Tensor:
        """(K, D); a tied head leaves a mask's embedding out."""
        return self.code_embedding.weight[: self.codebook_size] if self.head is None else self.head.weight

    def embed(self, codes: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Codes (B, n) -> (B, n, D), alone; 0 where ``hidden`` (B, n) is true."""
        x = self.code_embedding(codes)
        return x if hidden is None else x.masked_fill(hidden[..., None], 0)

    def hide(self, codes: Tensor, random: BatchRandom) -> Tensor | None:
        """Which of the codes (B, N) a training step hides: (B, N) bool; None outside of training."""
        if not (self.training and self.code_dropout):
            return None
        return random.uniform("code dropout", (codes.shape[1],), codes.device) < self.code_dropout

    def run(self, x: Tensor, labels: Tensor) -> Tensor:
        """Embedded codes (B, N, D) and labels (B,), ``num_classes`` for none, through the blocks: (B, N, D)."""
        x = x + self.class_embedding(labels)[:, None]
        if self.positions is not None:
            x = x + self.positions
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x, self.rotation)
        return self.norm(x)

    def predict(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., K)."""
        return linear(hidden, self.head_weight, None)


def complex_rotation(model: Transformer) -> Tensor:
    """A model's rotations as :func:`turn` takes them, in the type of its weights: (N, E / 2)."""
    assert model.rotation is not None
    return torch.complex(*model.rotation.to(model.norm.weight.dtype))
