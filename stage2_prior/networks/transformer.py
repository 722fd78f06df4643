"""The parts that the causal, masked and parallel transformers share: embeddings, positions, blocks, head.

Axes: B images, N = h w cells of a grid, L places of a context's sequence, D hidden size, H heads, E = D / H, K codes, P
numbers of a prediction, see `CodeHead`.
"""

import math
from dataclasses import dataclass
from typing import Literal, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stage2_prior.networks.code_head import CodeHead
from stage2_prior.networks.digits import DigitEmbedding, DigitHead, DigitsConfig, digit_floats, head_for_codes
from stage2_prior.networks.fast_linear import Linear, TrainedLinear, fast_linear, linear
from stage2_prior.networks.network import COMMON_SETTINGS
from stage2_prior.sampling_config import Weights
from twostage.core.conditions.context import Context, ContextForm, ContextSpace
from twostage.core.config.sections import Depth, Flag, Share, Width
from twostage.core.training.random import BatchRandom

__all__ = [
    "Block",
    "FastBlock",
    "FastTransformer",
    "Transformer",
    "TransformerConfig",
    "attention",
    "offsets",
    "packed_layers",
    "rotate",
    "rotations",
    "rotations_at",
    "turn",
]


QUERIES = 128
"""The cells that :func:`attention` in bfloat16 on a CPU takes at a time."""


class TransformerConfig(DigitsConfig):
    """Pre-normalised blocks as in GPT-2."""

    sampling_settings = COMMON_SETTINGS | {"weights"}
    shardable = True

    hidden_size: Width = 256
    depth: Depth = 6
    num_heads: Width = 8
    mlp_ratio: Depth = 4
    dropout: Share = 0.1
    """Dropout on the embeddings and on what each block adds."""
    code_dropout: Share = 0.0
    """Share of the images of which a training step hides all codes (their embedding is 0), so that each code has to be
    predicted from the conditions alone. Details that a caption names but neighbouring codes show, too, such as a
    colour, are then learned in a fraction of the steps; the loss falls more slowly."""
    positions: Literal["learned", "rotary", "both", "relative"] = "both"
    """`learned`: one vector for each cell; `rotary`: heads are rotated by a cell's row and column; `both`; `relative`:
    `learned` and a learned bias of each head for each offset between two cells, which trains faster than rotations."""
    mlp: Literal["gelu", "squared_relu"] = "gelu"
    """The activation between an MLP's two layers. `squared_relu` trains faster on a CPU."""
    biases: Flag = True
    """Whether linear layers add a bias."""
    tied_head: Flag = False
    """Whether the head shares its weights with the code embedding."""

    def context_space(self, grid: tuple[int, int]) -> ContextSpace:
        return ContextSpace(self.hidden_size, 0.02, grid)

    def floats_per_code(self, codebook_size: int) -> int:
        bases = self.bases(codebook_size)
        return codebook_size if bases is None else digit_floats(bases, self.hidden_size)

    def sampling_floats(self, grid: tuple[int, int], form: ContextForm) -> int:
        places = math.prod(grid) + form.sequence
        return 2 * self.hidden_size * (self.depth * places + 8 * self.codes_at_once(grid))

    @model_validator(mode="after")
    def _heads_divide(self) -> "TransformerConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.positions in ("rotary", "both") and self.hidden_size // self.num_heads % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} / num_heads {self.num_heads} must be a multiple of 4, because half of "
                "each head is rotated by the row and half by the column. Change either, or set positions=learned"
            )
        if self.tied_head and self.codes != "table":
            raise ValueError(
                f"tied_head True: only applies to codes=table, but codes is {self.codes!r}. Set tied_head=false"
            )
        return self


def rotations(grid: tuple[int, int], width: int) -> Tensor:
    """Cosines and sines (2, N, width / 2) that rotate a head by a cell's row and column (RoPE, Su et al. 2021, arXiv
    2104.09864, in two dimensions), so that attention sees the distance between two cells.

    The slowest frequency is a quarter turn in ten cells, the fastest a quarter turn in one cell.
    """
    rows, columns = torch.arange(grid[0]), torch.arange(grid[1])
    return rotations_at(torch.cartesian_prod(rows, columns).float(), width)


def rotations_at(cells: Tensor, width: int) -> Tensor:
    """:func:`rotations` of cells at any (row, column), (N, 2) float."""
    frequencies = math.pi / 2 * 10 ** -(torch.arange(width // 4) / (width // 4))
    angles = (cells[:, :, None] * frequencies).flatten(1)  # (N, width / 2)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates each pair of (..., E) by cosines and sines (2, ..., E / 2)."""
    cos, sin = rotation.to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def offsets(grid: tuple[int, int]) -> Tensor:
    """The number of the offset between each two cells of an (h, w) grid, below (2 h - 1) (2 w - 1): (N, N) int64."""
    height, width = grid
    cells = torch.arange(height * width)
    rows, columns = cells // width, cells % width
    down, right = rows[:, None] - rows, columns[:, None] - columns
    return (down + height - 1) * (2 * width - 1) + right + width - 1


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None = None, present: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(E) + bias) v over (B, H, N, E), with a bias (H, N, N) or (B, 1 or H, N, N). Each cell
    attends to all cells or, if ``causal``, to itself and those before it.

    Args:
        present: (B, L) bool: the keys and values, (B, H, L + N, E), begin with those of a sequence that every cell
            attends to where this is True.

    In bfloat16 on a CPU the products are written out, because the backward pass of torch's fused kernel is slow there
    (measured: 4.5 times as long for 64 cells, twice as long for 256). In float32 the fused kernel is faster.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and causal and bias is None and present is None:
        return cast(Tensor, _CausalAttention.apply(q, k, v))
    if causal and (bias is not None or present is not None):
        later = torch.full((q.shape[-2],) * 2, -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
        bias = later if bias is None else bias + later
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        if bias is None and present is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        mask = None if bias is None else bias.to(q.dtype)
        if present is not None:
            mask = sequence_mask(present, mask, q.shape[-2], q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, N, L + N)
    of_cells = scores
    if present is not None:
        of_cells = scores[..., present.shape[1] :]
        scores[..., : present.shape[1]].masked_fill_(~present[:, None, None], -torch.inf)
    if bias is not None:
        of_cells.add_(bias.to(scores.dtype))
    return scores.softmax(-1) @ v


class _CausalAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(E)) v over (B, H, N, E), in which each cell attends to itself and those before it. A block
    of queries skips all keys after the block, which saves up to half of the products and of the memory."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        q, attended, weights = q * q.shape[-1] ** -0.5, torch.empty_like(q), []
        later = torch.full((QUERIES, QUERIES), -torch.inf, dtype=q.dtype).triu_(1)
        for start in range(0, q.shape[-2], QUERIES):
            stop = min(start + QUERIES, q.shape[-2])
            scores = q[:, :, start:stop] @ k[:, :, :stop].mT
            scores[..., start:] += later[: stop - start, : stop - start]
            weights.append(scores.softmax(-1))
            attended[:, :, start:stop] = weights[-1] @ v[:, :, :stop]
        ctx.save_for_backward(q, k, v, *weights)
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        q, k, v, *weights = ctx.saved_tensors
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for number, weight in enumerate(weights):
            rows, stop = slice(number * QUERIES, weight.shape[-1]), weight.shape[-1]
            of_v[:, :, :stop] += weight.mT @ gradient[:, :, rows]
            of_weight = gradient[:, :, rows] @ v[:, :, :stop].mT
            of_scores = torch.ops.aten._softmax_backward_data(of_weight, weight, -1, weight.dtype)
            of_q[:, :, rows] = of_scores @ k[:, :, :stop]
            of_k[:, :, :stop] += of_scores.mT @ q[:, :, rows]
        return of_q.mul_(q.shape[-1] ** -0.5), of_k, of_v


def sequence_mask(present: Tensor, bias: Tensor | None, cells: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of a sequence's places, of which those ``present`` (B, L) count, and of the cells
    after them, with their ``bias`` (N, M), (H, N, M) or (B, 1 or H, N, M): (B, 1 or H, N, L + M). Without a bias, N and
    M are ``cells``."""
    absent = torch.zeros(present.shape, dtype=dtype, device=present.device).masked_fill_(~present, -torch.inf)
    of_cells = absent.new_zeros(cells, cells) if bias is None else bias
    of_cells = of_cells[(None,) * (4 - of_cells.ndim)].expand(len(present), -1, -1, -1)
    return torch.cat([absent[:, None, None].expand(*of_cells.shape[:-1], -1), of_cells], -1)


class SquaredReLU(torch.autograd.Function):
    """max(x, 0)^2 (So et al. 2021, arXiv 2109.08668) with as few passes over memory as possible."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[override]
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        (positive,) = ctx.saved_tensors
        return (gradient * positive).mul_(2)


class Block(nn.Module):
    """Self-attention and an MLP, each added to the stream.

    The keys and values of a context's sequence come before those of the cells, as if its places were cells that every
    cell may see. This takes no products in sampling, unlike cross-attention.
    """

    def __init__(self, config: TransformerConfig, causal: bool, grid: tuple[int, int], form: ContextForm) -> None:
        super().__init__()
        size, biases = config.hidden_size, config.biases
        self.num_heads, self.dropout, self.causal, self.mlp = config.num_heads, config.dropout, causal, config.mlp
        self.norm1 = nn.LayerNorm(size)
        self.qkv = TrainedLinear(size, 3 * size, biases)
        self.sequence_kv = TrainedLinear(size, 2 * size, biases) if form.sequence else None
        self.attention_out = TrainedLinear(size, size, biases)
        self.norm2 = nn.LayerNorm(size)
        self.mlp_in = TrainedLinear(size, config.mlp_ratio * size, biases)
        self.mlp_out = TrainedLinear(config.mlp_ratio * size, size, biases)
        self.attention_bias = None
        if config.positions == "relative":
            self.attention_bias = nn.Parameter(torch.zeros(config.num_heads, (2 * grid[0] - 1) * (2 * grid[1] - 1)))

    def forward(
        self, x: Tensor, context: Context, rotation: Tensor | None, offsets: Tensor | None, mask: Tensor | None = None
    ) -> Tensor:
        """(B, N, D) -> (B, N, D); ``offsets`` (N, N) are those of :func:`offsets`, and ``mask`` (B, 1, N, N) is added
        to the scores."""
        batch, length, size = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous().unbind()  # each (B, H, N, E)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        present = None
        if self.sequence_kv is not None and context.sequence is not None:
            present = context.present
            kv = self.sequence_kv(context.sequence).view(batch, -1, 2, self.num_heads, size // self.num_heads)
            k, v = (torch.cat(pair, 2) for pair in zip(kv.permute(2, 0, 3, 1, 4), (k, v), strict=True))
        bias = self.bias(offsets)
        if mask is not None:
            bias = mask if bias is None else bias + mask
        attended = attention(q, k, v, self.causal, bias, present)
        attended = attended.transpose(1, 2).reshape(batch, length, size)
        x = x + F.dropout(self.attention_out(attended), self.dropout, self.training)
        hidden = self.mlp_in(self.norm2(x))
        hidden = F.gelu(hidden, approximate="tanh") if self.mlp == "gelu" else SquaredReLU.apply(hidden)
        return x + F.dropout(self.mlp_out(cast(Tensor, hidden)), self.dropout, self.training)

    def bias(self, offsets: Tensor | None) -> Tensor | None:
        """What is added to the scores of each head, from cell to cell: (H, N, N)."""
        return None if self.attention_bias is None or offsets is None else self.attention_bias[:, offsets]


class FastBlock:
    """A block for inference, without its attention, which the caller computes. The weights are read now.

    Args:
        weights: their precision, see `fast_linear`.
    """

    def __init__(self, block: Block, weights: Weights) -> None:
        def fast(layer: nn.Linear, gelu: bool = False):
            return fast_linear(layer.weight, layer.bias, weights, gelu=gelu)

        self.num_heads, self.norm1, self.norm2, self.mlp = block.num_heads, block.norm1, block.norm2, block.mlp
        rows = _rows_for_attention(block)
        self._qkv = fast_linear(rows[:, :-1], rows[:, -1].contiguous(), weights)
        self._attention_out = fast(block.attention_out)
        self._mlp_in, self._mlp_out = fast(block.mlp_in, gelu=block.mlp == "gelu"), fast(block.mlp_out)
        self._block = block

    def sequence_kv(self, sequence: Tensor) -> Tensor | None:
        """The keys and values of a context's sequence (B, L, D) for the queries of :meth:`qkv`: (2, B, H, L, E)."""
        layer = self._block.sequence_kv
        if layer is None:
            return None
        keys, values = layer(sequence).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return torch.stack([_interleaved(keys, -1), values])

    def qkv(self, x: Tensor) -> Tensor:
        """Queries, keys and values, (R, D) -> (R, 3, H, E). Queries are divided by sqrt(E), and the two numbers of each
        pair that :func:`turn` rotates are neighbours."""
        return self._qkv(_normalized(x, self.norm1)).view(len(x), 3, self.num_heads, -1)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The block's output for its input ``x`` and the result of its attention, both (R, D)."""
        x = self._attention_out(attended, x)
        hidden = self._mlp_in(_normalized(x, self.norm2))
        return self._mlp_out(hidden if self.mlp == "gelu" else hidden.relu_().square_(), x)


def _rows_for_attention(block: Block) -> Tensor:
    """The weights and, in the last column, the bias of a block's first product, (3 D, D + 1), for
    :meth:`FastBlock.qkv`: q k^T does not depend on the order of a head's dimensions."""
    weight, bias = block.qkv.weight, block.qkv.bias
    rows = torch.cat([weight, weight.new_zeros(len(weight), 1) if bias is None else bias[:, None]], 1).detach()
    queries, keys, values = rows.unflatten(0, (3, block.num_heads, -1))  # each (H, E, D + 1)
    queries, keys = _interleaved(queries, 1) * queries.shape[1] ** -0.5, _interleaved(keys, 1)
    return torch.stack([queries, keys, values]).flatten(0, 2)


def _interleaved(x: Tensor, dim: int) -> Tensor:
    """``x`` with the two halves of a head's dimensions interleaved; unchanged if they are odd, since then nothing is
    rotated."""
    if x.shape[dim] % 2:
        return x
    dim %= x.ndim
    return x.unflatten(dim, (2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def turn(qkv: Tensor, rotation: Tensor) -> None:
    """:func:`rotate` in place, for the queries and keys of :meth:`FastBlock.qkv` (..., 3, H, E), as products with
    complex numbers (..., E / 2)."""
    pairs = qkv[..., :2, :, :]
    torch.view_as_complex(pairs.view(*pairs.shape[:-1], -1, 2)).mul_(rotation)


def _normalized(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """``norm(x)`` in a third of the time that calling the module takes."""
    return torch.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class Transformer(nn.Module):
    """Predicts the code at each place from codes.

    Args:
        inputs: how many different codes the input can have: the codebook's, plus one if there is a mask code.
        form: that of the contexts.
        order: (N,) the cells in the order of the sequence; by default row by row.
    """

    adamw_layers = ("head",)
    rotation: Tensor | None
    offsets: Tensor | None

    def __init__(
        self,
        config: TransformerConfig,
        codebook_size: int,
        inputs: int,
        grid: tuple[int, int],
        form: ContextForm,
        causal: bool,
        order: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.codebook_size, self.grid, self.num_classes = codebook_size, grid, form.num_classes
        self.dropout, self.code_dropout = config.dropout, config.code_dropout
        size, self.cells = config.hidden_size, grid[0] * grid[1]
        bases = config.bases(codebook_size)
        if bases is None:
            self.code_embedding = nn.Embedding(inputs, size)
        else:
            self.code_embedding = DigitEmbedding(bases, size, std=0.02, masked=inputs > codebook_size)
        self.class_embedding = nn.Embedding(form.num_classes + 1, size)
        self.positions = None if config.positions == "rotary" else nn.Parameter(torch.empty(self.cells, size))
        is_rotary = config.positions in ("rotary", "both")
        rotation = rotations(grid, size // config.num_heads) if is_rotary else None
        if rotation is not None and order is not None:
            rotation = rotation[:, order]
        self.register_buffer("rotation", rotation, persistent=False)
        distances = offsets(grid) if config.positions == "relative" else None
        if distances is not None and order is not None:
            distances = distances[order][:, order]
        self.register_buffer("offsets", distances, persistent=False)
        self.blocks = nn.ModuleList([Block(config, causal, grid, form) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(size)
        self.head = None if config.tied_head else nn.Linear(size, codebook_size, bias=False)
        if bases is not None:
            self.head = DigitHead(bases, size)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in cast(list[Block], list(self.blocks)):  # the sum of all blocks stays of order one (GPT-2)
            for layer in (block.attention_out, block.mlp_out):
                nn.init.normal_(layer.weight, std=0.02 * (2 * len(self.blocks)) ** -0.5)
        if self.positions is not None:
            nn.init.normal_(self.positions, std=0.02)
        if isinstance(self.head, DigitHead):
            self.head.initialize()
        elif self.head is not None:
            nn.init.zeros_(self.head.weight)  # the first prediction is uniform

    @property
    def code_head(self) -> CodeHead:
        """What its predictions mean."""
        return head_for_codes(self.head, self.codebook_size)

    @property
    def head_weight(self) -> Tensor | None:
        """(K, D), of a softmax; a tied head does not use the embedding of the mask code."""
        if isinstance(self.head, DigitHead):
            return None
        return self.code_embedding.weight[: self.codebook_size] if self.head is None else self.head.weight

    def embed(self, codes: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Embeddings of codes, (B, n) -> (B, n, D); 0 where ``hidden`` (B, n) is True."""
        x = self.code_embedding(codes)
        return x if hidden is None else x.masked_fill(hidden[..., None], 0)

    def hide(self, codes: Tensor, random: BatchRandom) -> Tensor | None:
        """Which of the codes (B, N) a training step hides: (B, N) bool, all of an image or none; None in evaluation
        mode."""
        if not (self.training and self.code_dropout):
            return None
        hidden = random.uniform("code dropout", (), codes.device) < self.code_dropout
        return hidden[:, None].expand(codes.shape)

    def added(self, context: Context) -> Tensor:
        """What the conditions add at the cells: (B, N, D), or (B, 1, D) if it is the same everywhere."""
        labels = context.class_numbers(self.num_classes, self.class_embedding.weight.device)
        of_class = self.class_embedding(labels)[:, None]
        return of_class if (added := context.added()) is None else of_class + added

    def run(self, x: Tensor, context: Context) -> Tensor:
        """Runs the blocks on embedded codes (B, N, D): (B, N, D)."""
        x = x + self.added(context)
        if self.positions is not None:
            x = x + self.positions
        return self.run_blocks(x, context, self.rotation, self.offsets)

    def run_blocks(
        self, x: Tensor, context: Context, rotation: Tensor | None, offsets: Tensor | None, mask: Tensor | None = None
    ) -> Tensor:
        """Runs the blocks on tokens (B, n, D) that hold all that is added at their cells: (B, n, D)."""
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):  # a stream in float32 takes more time
            x = x.to(torch.get_autocast_dtype("cpu"))
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x, context, rotation, offsets, mask)
        return self.norm(x)

    def predict(self, hidden: Tensor) -> Tensor:
        """(..., D) -> predictions (..., P). A head of digits takes (..., D) as it is."""
        weight = self.head_weight
        return hidden if weight is None else linear(hidden, weight, None)


@dataclass(frozen=True)
class PackedLayers:
    """A transformer's weights as its layers for inference hold them."""

    blocks: list[FastBlock]
    head: Linear | None
    biases: list[Tensor | None]
    """What is added to the scores of each block, (H, N, N), if anything."""


_PACKED: WeakKeyDictionary[nn.Module, tuple[object, PackedLayers]] = WeakKeyDictionary()
"""What :func:`packed_layers` made of each transformer, with the state of the weights that it was made from. Packing
takes as long as ten sampling steps."""


def packed_layers(model: "Transformer", weights: Weights) -> PackedLayers:
    """The layers of ``model`` for inference: those of the last call, unless its weights have changed since."""
    state = weights, tuple((parameter.data_ptr(), parameter._version) for parameter in model.parameters())
    found = _PACKED.get(model)
    if found is None or found[0] != state:
        layers = cast(list[Block], list(model.blocks))
        biases = [block.bias(model.offsets) for block in layers]
        packed = PackedLayers(
            [FastBlock(block, weights) for block in layers],
            None if (weight := model.head_weight) is None else fast_linear(weight, None, weights),
            [None if bias is None else bias.detach() for bias in biases],
        )
        _PACKED[model] = found = state, packed
    return found[1]


class FastTransformer:
    """A transformer's layers for inference. The weights are read now.

    Args:
        weights: their precision, see `fast_linear`.
    """

    def __init__(self, model: Transformer, weights: Weights) -> None:
        self.model, packed = model, packed_layers(model, weights)
        self.blocks, self.biases, self._head = packed.blocks, packed.biases, packed.head
        self.rotation = None
        """(N, E / 2): the rotations that :func:`turn` takes."""
        if model.rotation is not None:
            self.rotation = torch.complex(*model.rotation.to(model.norm.weight.dtype))

    def predictions(self, x: Tensor) -> Tensor:
        """The output of the last block (R, D) -> predictions (R, P)."""
        x = _normalized(x, self.model.norm)
        return x if self._head is None else self._head(x)
