"""The gated PixelCNN (van den Oord et al. 2016, arXiv 1606.05328) over a code grid.

Two stacks see the cells before a cell. The vertical stack sees all rows above it, without the blind spot that masked
convolutions leave. The horizontal stack sees the row to its left and, through the vertical stack, everything else. No
weight is masked: each kernel holds only the cells that it may see, and the input is shifted accordingly.

Axes: B images, h and w cells of a grid, N = h w, D the width of a context, C channels, K codes, P numbers of a
prediction (see `CodeHead`), R the reach of a kernel (half its side), T the cells of a row that a horizontal kernel
sees.
"""

from dataclasses import dataclass
from typing import Literal, Self, cast

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from stage2_prior.networks.autoregressive import Autoregressive, Step, cell_order
from stage2_prior.networks.captured_step import FixedDecoder
from stage2_prior.networks.code_head import CodeHead
from stage2_prior.networks.digits import DigitEmbedding, DigitHead, DigitsConfig, digit_floats, head_for_codes
from stage2_prior.sampling_config import Weights
from twostage.core.conditions.context import Context, ContextForm, ContextSpace
from twostage.core.config.sections import Depth, Share, Width
from twostage.core.errors import InputError
from twostage.core.scales import Scales, describe_grids

__all__ = ["PixelCNN", "PixelCNNConfig", "PixelCNNDecoder"]


class PixelCNNConfig(DigitsConfig):
    """A vertical stack that sees the rows above and a horizontal stack that sees the row to the left."""

    type: Literal["pixelcnn"] = "pixelcnn"
    channels: Width = 64
    depth: Depth = 15
    first_kernel: Depth = 7
    """Side of the first layer's kernel, odd. It sees only cells before the current one (mask A)."""
    kernel: Depth = 3
    """Side of the other layers' kernels, odd. They also see the current cell's features (mask B)."""
    head_channels: Width = 256
    dropout: Share = 0.0
    """Dropout on what each layer adds to its stack."""
    context_channels: Width = 64
    """The width of what the conditions say, which every layer's gates see."""

    def for_codes(self, codebook_size: int, digits: list[int] | None, scales: Scales = ()) -> Self:
        if scales:
            raise InputError(
                f"model.type 'pixelcnn': reads a single grid, but the codes have {describe_grids((), scales)}. Set "
                "model.type=scale_transformer, or scale_by_scale for a network for each grid"
            )
        return super().for_codes(codebook_size, digits)

    def build(self, codebook_size: int, grid: tuple[int, int], form: ContextForm) -> "PixelCNN":
        return PixelCNN(self, codebook_size, grid, form)

    def context_space(self, grid: tuple[int, int]) -> ContextSpace:
        return ContextSpace(self.context_channels, 1.0, grid)

    def floats_per_code(self, codebook_size: int) -> int:
        bases = self.bases(codebook_size)
        return codebook_size if bases is None else digit_floats(bases, self.head_channels)

    def sampling_floats(self, grid: tuple[int, int], form: ContextForm) -> int:
        each = 8 if form.cells else 4  # with the gates of all cells
        return each * self.channels * (self.depth * grid[0] * grid[1] + 8 * grid[1])

    @model_validator(mode="after")
    def _kernels_have_a_centre(self) -> "PixelCNNConfig":
        wrong = [
            f"{name} {side}"
            for name, side in (("first_kernel", self.first_kernel), ("kernel", self.kernel))
            if side < 3 or side % 2 == 0
        ]
        if wrong:
            raise ValueError(
                f"{' and '.join(wrong)}: a kernel's side must be odd and at least 3, because it reaches equally far to "
                "the left and to the right of a cell. Use 3, 5 or 7, for example"
            )
        return self


def gate(x: Tensor) -> Tensor:
    """tanh(a) sigmoid(b) of the two halves of (B, 2 C, ...): equation 2."""
    a, b = x.chunk(2, 1)
    return a.tanh() * b.sigmoid()


class GatedLayer(nn.Module):
    """One layer of both stacks (the paper's figure 2).

    Unlike the paper's, the vertical stack has residual connections too: without them its features fade with depth (15
    layers, 130 steps on quantised MNIST: 1.584 held-out nats per code, 1.637 without).

    Args:
        context_channels: D; 0 without conditions.
        first: whether its inputs are the embeddings of the codes, so that a cell must not see its own (mask A).
    """

    def __init__(
        self, channels: int, kernel: int, num_classes: int, context_channels: int, dropout: float, first: bool
    ) -> None:
        super().__init__()
        self.reach, self.dropout, self.first = kernel // 2, dropout, first
        seen = self.reach if first else self.reach + 1  # rows or columns
        self.vertical = nn.Conv2d(channels, 2 * channels, (seen, kernel))
        self.vertical_to_horizontal = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.horizontal = nn.Conv2d(channels, 2 * channels, (1, seen), bias=False)
        self.horizontal_out = nn.Conv2d(channels, channels, 1, bias=False)
        self.class_embedding = nn.Embedding(num_classes + 1, 4 * channels)  # 2 C a stack
        self.of_context = nn.Conv2d(context_channels, 4 * channels, 1, bias=False) if context_channels else None

    def down(self, seen: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """The vertical stack at n rows.

        Args:
            seen: (B, C, n + the kernel's rows - 1, w + 2 R): the rows that it sees, with zeros around the grid.
            added: what :meth:`gates` returns at these rows.

        Returns:
            Its output (B, C, n, w), without the residual, and what the horizontal stack adds before its gate
            (B, 2 C, n, w).
        """
        of_vertical, of_horizontal = added.chunk(2, 1)
        hidden = self.vertical(seen) + of_vertical
        return gate(hidden), self.vertical_to_horizontal(hidden) + of_horizontal

    def gates(self, labels: Tensor, conditions: Tensor | None) -> Tensor:
        """What labels (B,) and other conditions (B, D, h or 1, w or 1) add before the gates of both stacks: (B, 4 C,
        h or 1, w or 1), 2 C channels each."""
        of_class = self.class_embedding(labels)[:, :, None, None]
        return of_class if conditions is None or self.of_context is None else of_class + self.of_context(conditions)

    def forward(self, vertical: Tensor, horizontal: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """Both stacks, (B, C, h, w) each, at all cells; ``added`` is what :meth:`gates` returns."""
        reach, own = self.reach, -1 if self.first else 0  # padding of -1 removes the last row or column
        down, from_vertical = self.down(F.pad(vertical, (reach, reach, reach, own)), added)
        across = gate(self.horizontal(F.pad(horizontal, (reach, own))) + from_vertical)
        down = F.dropout(down, self.dropout, self.training)
        across = self.horizontal_out(F.dropout(across, self.dropout, self.training))
        return (down, across) if self.first else (vertical + down, horizontal + across)


class PixelCNN(Autoregressive):
    """p(codes | conditions) as a product over the grid's cells, row by row. Of a context, it sees what is pooled and
    what belongs to a cell, not the sequence.

    Args:
        form: that of the contexts.
    """

    adamw_layers = ("head_out",)

    def __init__(self, config: PixelCNNConfig, codebook_size: int, grid: tuple[int, int], form: ContextForm) -> None:
        super().__init__()
        self.config, self.codebook_size, self.grid = config, codebook_size, grid
        self.num_classes = form.num_classes
        context_channels = config.context_channels if form.pooled or form.cells else 0
        channels = config.channels
        self.register_buffer("order", cell_order("raster", grid), persistent=False)
        bases = config.bases(codebook_size)
        embeds = nn.Embedding(codebook_size, channels) if bases is None else DigitEmbedding(bases, channels, std=1.0)
        self.code_embedding = embeds
        kernels = [config.first_kernel] + [config.kernel] * (config.depth - 1)
        self.layers = nn.ModuleList(
            [
                GatedLayer(channels, side, form.num_classes, context_channels, config.dropout, i == 0)
                for i, side in enumerate(kernels)
            ]
        )
        self.head_in = nn.Linear(channels, config.head_channels)
        if bases is None:
            self.head_out = nn.Linear(config.head_channels, codebook_size)
            nn.init.zeros_(self.head_out.weight)
            nn.init.zeros_(self.head_out.bias)
        else:
            self.head_out = DigitHead(bases, config.head_channels)

    @property
    def code_head(self) -> CodeHead:
        return head_for_codes(self.head_out, self.codebook_size)

    def forward(self, inputs: Tensor, context: Context) -> Tensor:
        """Predictions (B, N, P) of the code at each cell, from the codes ``inputs`` (B, N) before it."""
        embedded = self.code_embedding(inputs).transpose(1, 2).unflatten(2, self.grid)
        vertical = horizontal = embedded  # (B, C, h, w)
        labels, conditions = self.conditions(context)
        for layer in self.layers:
            added = cast(GatedLayer, layer).gates(labels, conditions)
            vertical, horizontal = layer(vertical, horizontal, added)
        return self.predict(self.head_in(horizontal.flatten(2).transpose(1, 2)).relu())

    def predict(self, hidden: Tensor) -> Tensor:
        """The head's hidden layer (..., H) -> predictions (..., P). A head of digits takes it as it is."""
        return hidden if isinstance(self.head_out, DigitHead) else self.head_out(hidden)

    def conditions(self, context: Context) -> tuple[Tensor, Tensor | None]:
        """The labels (B,), and the other conditions at the cells: (B, D, h, w), (B, D, 1, 1) if they are the same
        everywhere, or None."""
        labels = context.class_numbers(self.num_classes, self.code_embedding.weight.device)
        added = context.added()
        if added is not None:
            added = added.transpose(1, 2).unflatten(2, self.grid if context.cells is not None else (1, 1))
        return labels, added

    def decoder(self, context: Context, weights: Weights) -> Step:
        return PixelCNNDecoder(self, context).step

    def fixed_decoder(self, context: Context, weights: Weights, codes: Tensor) -> FixedDecoder:
        return FixedPixelCNNDecoder(self, context, codes)


@dataclass
class HorizontalStep:
    """One layer of the horizontal stack at one column: views of the decoder's memory, and the layer's weights."""

    hidden: Tensor
    """(B, 2 C). At the start of a row it holds what the vertical stack and the conditions add."""
    halves: tuple[Tensor, Tensor]
    """The halves of ``hidden``, (B, C) each."""
    seen: Tensor
    """(B, T C): the layer's inputs at the columns that its kernel sees."""
    residual: Tensor
    """(B, C): the layer's input at this column; zeros in the first layer."""
    output: Tensor
    """(B, C): the next layer's input at this column."""
    weight: Tensor
    """(T C, 2 C)"""
    out_weight: Tensor
    """(C, C)"""

    def run(self) -> None:
        """Four operations, because on small batches the number of operations decides the speed: tanh(a) sigmoid(b) is
        written as (tanh(a) + tanh(a) tanh(b / 2)) / 2, and the weights contain both factors 1 / 2."""
        self.hidden.addmm_(self.seen, self.weight).tanh_()
        a, b = self.halves
        torch.addmm(self.residual, torch.addcmul(a, a, b), self.out_weight, out=self.output)


class PixelCNNDecoder:
    """Predicts one cell after another and computes each layer at each cell once. Full forward passes would compute all
    cells N times.

    The vertical stack moves down one row at a time and keeps the rows that its kernels see. The horizontal stack moves
    from cell to cell and keeps its layers' inputs in this row. The weights are read now.

    Args:
        context: of B images.
    """

    @torch.no_grad()
    def __init__(self, model: PixelCNN, context: Context) -> None:
        self.model, self.cell = model, 0
        self.layers = cast(list[GatedLayer], list(model.layers))
        labels, conditions = model.conditions(context)
        self.added = [layer.gates(labels, conditions) for layer in self.layers]  # (B, 4 C, h or 1, w or 1) each
        batch, width, channels = context.size, model.grid[1], model.config.channels
        zeros = model.code_embedding.weight.new_zeros
        self.above = [zeros(batch, channels, layer.vertical.kernel_size[0], width) for layer in self.layers]
        self.hidden = [zeros(width, batch, 2 * channels) for _ in self.layers]
        self.halving = torch.cat([zeros(channels) + 1, zeros(channels) + 0.5])  # (2 C,): the gate's b / 2

        # Each layer's inputs in this row and the last layer's outputs, with the zeros to the left of the grid.
        reaches = [layer.reach for layer in self.layers] + [0]
        self.rows = [zeros(batch, reach + width, channels) for reach in reaches]
        self.cells = [row[:, reach:].unbind(1) for row, reach in zip(self.rows, reaches, strict=True)]

        self.columns: list[list[HorizontalStep]] = [[] for _ in range(width)]
        for i, layer in enumerate(self.layers):
            kernel = layer.horizontal.weight.squeeze(2).permute(2, 1, 0)  # (2 C, C, 1, T) -> (T, C, 2 C)
            weight = kernel.flatten(0, 1) * self.halving
            out_weight = layer.horizontal_out.weight.flatten(1).T / 2
            for column, steps in enumerate(self.columns):
                hidden = self.hidden[i][column]
                seen = self.rows[i][:, column : column + len(kernel)].view(batch, -1)
                residual = torch.zeros_like(self.cells[i][column]) if layer.first else self.cells[i][column]
                halves = hidden[:, :channels], hidden[:, channels:]
                output = self.cells[i + 1][column]
                steps.append(HorizontalStep(hidden, halves, seen, residual, output, weight, out_weight))

    @torch.no_grad()
    def step(self, codes: Tensor | None) -> Tensor:
        """The prediction (B, P) of the next cell; ``codes`` (B,) are those of the cell before, None at the first."""
        row, column = divmod(self.cell, self.model.grid[1])
        if codes is not None:
            self.cells[0][column - 1].copy_(self.model.code_embedding(codes))
        if column == 0:
            self._start_row(self.halving.new_full((1,), row, dtype=torch.long))
        return self._predict_column(column)

    def _predict_column(self, column: int) -> Tensor:
        """Runs the horizontal stack; the memory holds all that it sees."""
        for step in self.columns[column]:
            step.run()
        self.cell += 1
        return self.model.predict(self.model.head_in(self.cells[-1][column]).relu_())

    def _start_row(self, number: Tensor) -> None:
        """Runs the vertical stack at the row ``number`` (1,), on the codes of the row before (zeros at the first)."""
        row = torch.stack(self.cells[0], 2).unsqueeze(2)  # (B, C, 1, w)
        for i, layer in enumerate(self.layers):
            added = self.added[i]
            if added.shape[2] > 1:
                added = added.index_select(2, number)
            self.above[i].copy_(torch.cat([self.above[i][:, :, 1:], row], 2))
            down, to_horizontal = layer.down(F.pad(self.above[i], (layer.reach, layer.reach)), added)
            row = down if layer.first else row + down
            torch.mul(to_horizontal.squeeze(2).permute(2, 0, 1), self.halving, out=self.hidden[i])


class FixedPixelCNNDecoder(PixelCNNDecoder):
    """A `FixedDecoder` after the ``codes`` (B, n) of the first n cells. A call predicts a row, since the memory of a
    column is the same in all rows."""

    def __init__(self, model: PixelCNN, context: Context, codes: Tensor) -> None:
        super().__init__(model, context)
        self.first, self.cells_per_call, self.cells_per_graph = codes.shape[1], model.grid[1], len(model.order)
        for cell in range(self.first - self.first % self.cells_per_call):
            self.step(codes[:, cell - 1] if cell else None)

    @torch.no_grad()
    def predict(self, cell: Tensor, before: Tensor, end: int) -> Tensor:
        """See `FixedDecoder.predict`."""
        column = self.cell % self.cells_per_call
        self.cells[0][column - 1].copy_(self.model.code_embedding(before) * (cell > 0))
        if column == 0:
            self._start_row(cell // self.cells_per_call)
        return self._predict_column(column)
