"""The scale transformer (VAR, Tian et al. 2024, arXiv 2404.02905) predicts images as grids of codes, coarse to fine,
each grid at once from the coarser ones. So it samples an image in as many steps as there are scales.

Axes: B images, S scales, h and w cells of the finest grid, N codes of all scales, n those of one scale, D hidden size,
H heads, E = D / H, L places of a context's sequence, P numbers of a prediction, see `CodeHead`.
"""

import math
from dataclasses import replace
from typing import Literal, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from stage2_prior.networks.autoregressive import images_at_once
from stage2_prior.networks.code_head import sample_codes
from stage2_prior.networks.network import OnProgress
from stage2_prior.networks.transformer import (
    Block,
    FastTransformer,
    Transformer,
    TransformerConfig,
    rotations_at,
    turn,
)
from stage2_prior.sampling import Branches, CodeNoise, guidance_at
from stage2_prior.sampling_config import SamplingConfig, Weights
from twostage.core.conditions.context import Context, ContextForm, ContextSpace
from twostage.core.config.sections import Count
from twostage.core.errors import InputError
from twostage.core.scales import Resize, Scales, describe_grids, num_codes, split_scales
from twostage.core.training.random import BatchRandom

__all__ = ["ScaleDecoder", "ScaleTransformer", "ScaleTransformerConfig"]


class ScaleTransformerConfig(TransformerConfig):
    """A transformer in which the codes of a scale see each other and all coarser ones."""

    type: Literal["scale_transformer"] = "scale_transformer"
    scales: tuple[tuple[Count, Count], ...] = Field(default=())
    """The grids of the codes; set from the codes."""

    @model_validator(mode="after")
    def _has_scales(self) -> "ScaleTransformerConfig":
        if self.positions == "relative":
            raise ValueError(
                "positions 'relative': knows offsets within one grid only. Set positions=learned, rotary or both"
            )
        return self

    def for_codes(self, codebook_size: int, digits: list[int] | None, scales: Scales = ()) -> Self:
        if not scales:
            raise InputError(
                "model.type 'scale_transformer': needs codes of several scales, got codes of a single grid. Encode "
                "with a tokenizer whose model.bottleneck.type is multi_scale, or set model.type=causal_transformer"
            )
        if self.scales not in ((), scales):
            raise InputError(
                f"model.scales {describe_grids((), self.scales)}: the codes have {describe_grids((), scales)}. Remove "
                "model.scales, which is set from the codes"
            )
        return super().for_codes(codebook_size, digits).model_copy(update={"scales": scales})

    def build(self, codebook_size: int, grid: tuple[int, int], form: ContextForm) -> "ScaleTransformer":
        return ScaleTransformer(self, codebook_size, form)

    def context_space(self, grid: tuple[int, int]) -> ContextSpace:
        return ContextSpace(self.hidden_size, 0.02, self.scales[-1])

    def default_steps(self, grid: tuple[int, int]) -> int:
        return len(self.scales)

    def codes_at_once(self, grid: tuple[int, int]) -> int:
        return math.prod(self.scales[-1])


class ScaleTransformer(Transformer):
    """p(codes | conditions) as a product over the scales. The codes of a scale are independent of each other, given all
    coarser ones (equation 6 of the paper).

    What it reads at a cell is the sum of the coarser codes' embeddings, each scale interpolated to the finest grid, and
    then averaged down to the grid of the cell: the tokenizer's own arithmetic, with embeddings that are learned here
    and that all scales share, like the codebook. So a prior needs the codes alone, and works for any tokenizer with
    scales.

    Args:
        form: that of the contexts.
    """

    exact_likelihood = True
    keeps = "any codes"
    mask: Tensor
    """(N, N): 0 where a cell sees another, else -inf."""

    def __init__(self, config: ScaleTransformerConfig, codebook_size: int, form: ContextForm) -> None:
        scales, size = config.scales, config.hidden_size
        super().__init__(config, codebook_size, codebook_size, (1, num_codes(scales)), form, causal=False)
        self.config, self.scales = config, scales
        finest = scales[-1]
        self.up = nn.ModuleList(Resize(scale, finest) for scale in scales[:-1])
        self.down = nn.ModuleList(Resize(finest, scale) for scale in scales[1:])
        self.to_scales = nn.ModuleList(Resize(finest, scale) for scale in scales) if form.cells else None
        number = torch.cat([torch.full((math.prod(scale),), s) for s, scale in enumerate(scales)])
        later = torch.full((len(number), len(number)), -torch.inf).masked_fill_(number[:, None] >= number, 0.0)
        self.register_buffer("mask", later, persistent=False)
        if self.rotation is not None:
            self.rotation = rotations_at(
                torch.cat([cells_in(finest, scale) for scale in scales]), size // config.num_heads
            )

    def forward(self, inputs: Tensor, context: Context, hidden: Tensor | None = None) -> Tensor:
        """Predictions (B, N, P) of each code, from the coarser ones of the codes ``inputs`` (B, N) that are not
        ``hidden`` (B, N)."""
        x = self.read(inputs)
        x = x if hidden is None else x.masked_fill(hidden[..., None], 0)
        x = x + self.added(self.at_scales(context))
        x = x if self.positions is None else x + self.positions
        return self.predict(self.run_blocks(x, context, self.rotation, None, self.mask))

    def read(self, codes: Tensor) -> Tensor:
        """What is read at each cell, (B, N, D), from codes (B, N): nothing at the first scale."""
        grids = split_scales(codes, self.scales)
        weight = self.norm.weight
        sums = weight.new_zeros(len(codes), len(weight), *self.scales[-1])
        parts = [sums.new_zeros(len(codes), math.prod(self.scales[0]), sums.shape[1])]
        for scale, grid in enumerate(grids[:-1]):
            sums, part = self.add(sums, scale, grid)
            parts.append(part)
        return torch.cat(parts, 1)

    def add(self, sums: Tensor, scale: int, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the codes (B, h_s, w_s) of a ``scale`` to the ``sums`` (B, D, h, w) of the coarser ones; returns the new
        sums, and what the next scale reads of them, (B, n, D)."""
        vectors = self.code_embedding(codes).permute(0, 3, 1, 2)
        sums = sums + self.up[scale](vectors)
        return sums, self.down[scale](sums).flatten(2).transpose(1, 2)

    def at_scales(self, context: Context) -> Context:
        """A context of the finest grid, (B, h w, D), as that of all scales, (B, N, D)."""
        if context.cells is None or self.to_scales is None:
            return context
        finest = context.cells.transpose(1, 2).unflatten(2, self.scales[-1])
        parts = [resize(finest).flatten(2).transpose(1, 2) for resize in self.to_scales]
        return replace(context, cells=torch.cat(parts, 1))

    def loss(self, codes: Tensor, context: Context, inputs: Tensor, random: BatchRandom) -> Tensor:
        """The training loss: nats per code, the mean over (B, N)."""
        return self.code_head.nats(self(inputs, context, self.hide(codes, random)), codes).mean()

    def nats_per_image(self, codes: Tensor, context: Context, random: BatchRandom) -> Tensor:
        """-log p(codes | conditions), (B,). Nothing is random. Many logits are computed a few images at a time."""
        head = self.code_head
        images = images_at_once(codes.shape[1], head.floats)
        parts = zip(codes.split(images), context.split(images), strict=True)
        return torch.cat([head.nats(self(part, given), part).sum(1) for part, given in parts])

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
        """Codes (B, N), see `PriorNetwork.sample`: known codes of a scale are seen by all finer ones. Guidance grows
        from scale to scale. All branches are predicted as one batch."""
        decoder = ScaleDecoder(self, branches.context, sampling.weights)
        head, grids = self.code_head, list[Tensor]()
        noise = CodeNoise(seeds, sum(head.choices), self.norm.weight.device)
        given = [None] * len(self.scales) if known is None else split_scales(known, self.scales)
        for scale, (size, here) in enumerate(zip(self.scales, given, strict=True)):
            predictions = decoder.step(branches.repeat(grids[-1]) if grids else None).flatten(0, 1)
            share = guidance_at(scale, len(self.scales), sampling)
            gumbel = noise.next(math.prod(size)).flatten(0, 1)
            codes = sample_codes(head, predictions, branches, share, sampling, gumbel).view(-1, *size)
            grids.append(codes if here is None else torch.where(here < 0, codes, here))
            if on_progress:
                on_progress(codes.numel() if here is None else int((here < 0).sum()))
        return torch.cat([grid.flatten(1) for grid in grids], 1)


def cells_in(finest: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Where the cells of a grid lie, as rows and columns of the finest grid: (n, 2) float."""
    rows, columns = (
        (torch.arange(size) + 0.5) * (whole / size) - 0.5 for size, whole in zip(grid, finest, strict=True)
    )
    return torch.cartesian_prod(rows, columns).view(-1, 2)


class ScaleDecoder(FastTransformer):
    """Predicts one scale after another with a preallocated key/value cache. The weights are read now.

    Args:
        context: of B images.
        weights: their precision, see `fast_linear`.
    """

    @torch.no_grad()
    def __init__(self, model: ScaleTransformer, context: Context, weights: Weights = "float32") -> None:
        super().__init__(model, weights)
        self.transformer, self.scale, self.cells = model, 0, 0
        context = model.at_scales(context)
        self.added = model.added(context).expand(-1, model.cells, -1)
        self.sums = self.added.new_zeros(context.size, self.added.shape[-1], *model.scales[-1])
        self.places = 0 if context.sequence is None else context.sequence.shape[1]
        self.absent = None
        if context.present is not None:  # (B, 1, 1, L): added to the scores of the sequence
            self.absent = self.added.new_zeros(context.present.shape).masked_fill_(~context.present, -torch.inf)
            self.absent = self.absent[:, None, None]
        heads = cast(Block, model.blocks[0]).num_heads
        width = self.added.shape[-1] // heads
        shape = (len(model.blocks), 2, context.size, heads, self.places + model.cells, width)
        self.caches = self.added.new_empty(shape).unbind()
        for block, cache in zip(self.blocks, self.caches, strict=True):
            if context.sequence is not None and (keys_values := block.sequence_kv(context.sequence)) is not None:
                cache[:, :, :, : self.places] = keys_values

    @torch.no_grad()
    def step(self, codes: Tensor | None) -> Tensor:
        """Predictions (B, n, P) of the next scale; ``codes`` (B, h_s, w_s) are those of the scale before, None at
        first."""
        model = self.transformer
        here = slice(self.cells, self.cells + math.prod(model.scales[self.scale]))
        x = self.added[:, here]
        x = x if model.positions is None else x + model.positions[here]
        if codes is not None:
            self.sums, read = model.add(self.sums, self.scale - 1, codes)
            x = x + read
        self.scale, self.cells = self.scale + 1, here.stop
        shape = x.shape[:2]
        x = x.reshape(-1, x.shape[-1])  # (B n, D)
        for number, block in enumerate(self.blocks):
            qkv = block.qkv(x).unflatten(0, shape)  # (B, n, 3, H, E)
            if self.rotation is not None:
                turn(qkv, self.rotation[here, None, None])
            cache, seen = self.caches[number], self.places + here.stop
            cache[:, :, :, self.places + here.start : seen] = qkv[:, :, 1:].permute(2, 0, 3, 1, 4)
            mask = None
            if self.absent is not None:
                mask = F.pad(self.absent, (0, here.stop))
            keys, values = cache[:, :, :, :seen]
            attended = F.scaled_dot_product_attention(qkv[:, :, 0].transpose(1, 2), keys, values, mask, scale=1.0)
            x = block.finish(x, attended.transpose(1, 2).reshape(x.shape))
        return self.predictions(x).unflatten(0, shape)
