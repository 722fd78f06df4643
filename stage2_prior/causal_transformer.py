"""The causal transformer (GPT) over a flattened code grid, class-conditional, row by row.

Axes: B images, N = h w codes of a grid, D hidden size, H heads, E = D / H, K codes.
"""

import math
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from core.config import Count, Section, Share
from stage2_prior.fast_linear import Linear, fast_linear
from stage2_prior.sampling import SamplingConfig, choose, filter_logits, guide, uniform_noise

__all__ = ["CausalTransformer", "CausalTransformerConfig", "CausalTransformerDecoder"]


class CausalTransformerConfig(Section):
    """Pre-normalised blocks as in GPT-2, with learned positions and, in the attention, two-dimensional rotary ones."""

    type: Literal["causal_transformer"] = "causal_transformer"
    hidden_size: Count = 256
    depth: Count = 6
    num_heads: Count = 8
    mlp_ratio: Count = 4
    dropout: Share = 0.1
    """On the embeddings and on what each block adds."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "CausalTransformerConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.hidden_size // self.num_heads % 4:
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


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over (B, H, N, E), each cell attending to itself and those before it.

    In bfloat16 on a CPU the products are written out: torch's fused kernel has a slow backward pass there (measured
    at 4.5 times the time for 64 cells, twice for 256; in float32 the fused one wins).
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, N, N)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu_(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


class Block(nn.Module):
    """Causal self-attention and an MLP, each added to the stream."""

    def __init__(self, config: CausalTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.norm1 = nn.LayerNorm(size)
        self.qkv = nn.Linear(size, 3 * size)
        self.attention_out = nn.Linear(size, size)
        self.norm2 = nn.LayerNorm(size)
        self.mlp_in = nn.Linear(size, config.mlp_ratio * size)
        self.mlp_out = nn.Linear(config.mlp_ratio * size, size)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        batch, length, size = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(qkv[:2], rotation)  # each (B, H, N, E)
        attended = causal_attention(q, k, qkv[2])
        attended = attended.transpose(1, 2).reshape(batch, length, size)
        x = x + F.dropout(self.attention_out(attended), self.dropout, self.training)
        hidden = F.gelu(self.mlp_in(self.norm2(x)), approximate="tanh")
        return x + F.dropout(self.mlp_out(hidden), self.dropout, self.training)


class CausalTransformer(nn.Module):
    """p(codes | class) as a product over the grid's cells, row by row.

    Args:
        num_classes: 0 for a prior without classes. One further class, the last, stands for "no class".
    """

    rotation: Tensor

    def __init__(
        self, config: CausalTransformerConfig, codebook_size: int, grid: tuple[int, int], num_classes: int
    ) -> None:
        super().__init__()
        self.config, self.codebook_size, self.grid, self.num_classes = config, codebook_size, grid, num_classes
        size, cells = config.hidden_size, grid[0] * grid[1]
        self.code_embedding = nn.Embedding(codebook_size, size)
        self.class_embedding = nn.Embedding(num_classes + 1, size)
        self.positions = nn.Parameter(torch.empty(cells, size))
        rotation = rotations(grid, size // config.num_heads)
        self.register_buffer("rotation", rotation, persistent=False)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, codebook_size, bias=False)
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
        nn.init.normal_(self.positions, std=0.02)
        nn.init.zeros_(self.head.weight)  # the first prediction is uniform

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Logits (B, N, K) for the codes (B, N) at each cell, from those before it; labels (B,), ``num_classes`` for
        none."""
        x = F.pad(self.code_embedding(inputs[:, :-1]), (0, 0, 1, 0))  # the first cell sees the class alone
        x = x + self.class_embedding(labels)[:, None] + self.positions
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x, self.rotation)
        return self.head(self.norm(x))

    def loss(self, indices: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
        """Cross-entropy in nats per code, (B, N): of the true codes given ``inputs``, in which some may be replaced."""
        logits = self(inputs, labels)
        return F.cross_entropy(logits.flatten(0, 1).float(), indices.flatten(), reduction="none").view_as(indices)

    @torch.no_grad()
    def sample(self, labels: Tensor, sampling: SamplingConfig, seeds: list[int]) -> Tensor:
        """Codes (B, N) for labels (B,), image i from ``seeds[i]`` alone.

        With guidance the conditional and the unconditional branch are worked on as one batch.
        """
        guided = sampling.guidance_scale != 1.0
        branches = torch.cat([labels, torch.full_like(labels, self.num_classes)]) if guided else labels
        decoder = CausalTransformerDecoder(self, branches)
        noise = uniform_noise(seeds, len(self.positions)).to(labels.device)
        codes = torch.empty(len(labels), len(self.positions), dtype=torch.long, device=labels.device)
        for cell in range(codes.shape[1]):
            logits = decoder.step(codes[:, cell - 1].repeat(1 + guided) if cell else None)
            if guided:
                logits = guide(*logits.chunk(2), sampling.guidance_scale)
            codes[:, cell] = choose(filter_logits(logits, sampling), noise[:, cell])
        return codes


class CausalTransformerDecoder:
    """One cell after another with a preallocated key/value cache.

    Args:
        labels: (B,), ``num_classes`` for none.
    """

    def __init__(self, model: CausalTransformer, labels: Tensor) -> None:
        config, rows = model.config, len(labels)
        cells, width = len(model.positions), config.hidden_size // config.num_heads
        self.model, self.rows, self.cell = model, rows, 0
        self.scale = width**-0.5
        self.added = model.class_embedding(labels)  # (B, D), at every cell
        shape = (config.depth, rows * config.num_heads, cells, width)
        self.keys = list(model.positions.new_empty(shape))  # a (B H, N, E) each block
        self.values = list(model.positions.new_empty(shape))
        self.blocks = cast(list[Block], list(model.blocks))
        self.linears: list[tuple[Linear, ...]] = [
            tuple(fast_linear(layer, rows) for layer in (b.qkv, b.attention_out, b.mlp_in, b.mlp_out))
            for b in self.blocks
        ]
        self.head = fast_linear(model.head, rows)

    @torch.no_grad()
    def step(self, codes: Tensor | None) -> Tensor:
        """Logits (B, K) of the next cell; ``codes`` (B,) are those of the cell before, None at the first."""
        model, cell = self.model, self.cell
        size, heads = model.config.hidden_size, model.config.num_heads
        x = self.added + model.positions[cell]
        if codes is not None:
            x += model.code_embedding(codes)
        for number, block in enumerate(self.blocks):
            qkv, attention_out, mlp_in, mlp_out = self.linears[number]
            keys, values = self.keys[number], self.values[number]
            y = F.layer_norm(x, (size,), block.norm1.weight, block.norm1.bias)
            projected = qkv(y).view(self.rows, 3, heads, -1)
            q, k = rotate(projected[:, :2], model.rotation[:, cell]).unbind(1)  # each (B, H, E)
            keys[:, cell] = k.reshape(len(keys), -1)
            values[:, cell] = projected[:, 2].reshape(len(values), -1)
            scores = torch.bmm(keys[:, : cell + 1], q.reshape(len(keys), -1, 1)).mul_(self.scale)  # (B H, cell + 1, 1)
            attended = torch.bmm(scores.softmax(1).transpose(1, 2), values[:, : cell + 1])  # (B H, 1, E)
            x = x + attention_out(attended.view(self.rows, size))
            y = F.layer_norm(x, (size,), block.norm2.weight, block.norm2.bias)
            x += mlp_out(F.gelu(mlp_in(y), approximate="tanh"))
        self.cell += 1
        return self.head(F.layer_norm(x, (size,), model.norm.weight, model.norm.bias))
