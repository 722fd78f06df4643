"""A network for each scale, coarse to fine: each predicts the grid of its scale from all coarser codes, as the priors
of VQ-VAE-2 do (Razavi et al. 2019, arXiv 1906.00446, section 3.2): any network for the top grid, and any network that
sees the top grid for the bottom one. Together they are one prior over all codes of an image, so no network can be
sampled with the codes of another top.

Axes: B images, h and w cells of a scale, N codes of all scales, n those of one scale, D the width of a network's
contexts.
"""

from dataclasses import replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stage2_prior.networks.network import NetworkConfig, OnProgress, PriorNetwork
from stage2_prior.sampling import Branches
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.conditions.context import Context, ContextForm, ContextSpace
from twostage.core.config.sections import Count, Depth
from twostage.core.errors import InputError
from twostage.core.scales import Resize, Scales, describe_grids, num_codes, split_scales
from twostage.core.training.random import BatchRandom, seed_for

__all__ = ["ScaleByScale", "ScaleByScaleConfig"]


class ScaleByScaleConfig(NetworkConfig):
    """A network for each scale of the codes."""

    type: Literal["scale_by_scale"] = "scale_by_scale"
    networks: tuple[NetworkConfig, ...] = Field(min_length=2)
    """The networks, coarse to fine, each with its `type` and its keys."""
    reader_depth: Depth = 2
    """Residual convolutions over the coarser codes, before a network sees them."""
    scales: tuple[tuple[Count, Count], ...] = Field(default=())
    """The grids of the codes; set from the codes."""

    @property
    def ranks_codes(self) -> bool:
        return all(network.ranks_codes for network in self.networks)

    def for_codes(self, codebook_size: int, digits: list[int] | None, scales: Scales = ()) -> Self:
        if len(self.networks) != len(scales):
            grids = f"{len(scales)} scales, {describe_grids((), scales)}" if scales else "a single grid"
            raise InputError(
                f"model.networks: expected a network for each scale, got {len(self.networks)} for codes of {grids}. "
                "Add or remove networks, or encode with another tokenizer"
            )
        networks = tuple(network.for_codes(codebook_size, digits) for network in self.networks)
        return self.model_copy(update={"networks": networks, "scales": scales})

    def build(self, codebook_size: int, grid: tuple[int, int], form: ContextForm) -> "ScaleByScale":
        return ScaleByScale(self, codebook_size, form)

    def context_space(self, grid: tuple[int, int]) -> ContextSpace:
        return self.networks[-1].context_space(self.scales[-1])

    def per_process_setting(self) -> str:
        return next(filter(None, (network.per_process_setting() for network in self.networks)), "")

    def default_steps(self, grid: tuple[int, int]) -> int:
        return sum(each.default_steps(scale) for each, scale in zip(self.networks, self.scales, strict=True))

    def codes_at_once(self, grid: tuple[int, int]) -> int:
        return max(each.codes_at_once(scale) for each, scale in zip(self.networks, self.scales, strict=True))

    def floats_per_code(self, codebook_size: int) -> int:
        return max(network.floats_per_code(codebook_size) for network in self.networks)

    def sampling_floats(self, grid: tuple[int, int], form: ContextForm) -> int:
        pairs = zip(self.networks, self.scales, strict=True)
        return max(network.sampling_floats(scale, replace(form, cells=True)) for network, scale in pairs)


class CoarserCodes(nn.Module):
    """What the codes of all coarser scales say at each cell of a grid."""

    def __init__(self, codebook_size: int, scales: Scales, depth: int, space: ContextSpace) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(codebook_size, space.width) for _ in scales)
        self.resize = nn.ModuleList(Resize(scale, space.grid) for scale in scales)
        self.blocks = nn.ModuleList(nn.Conv2d(space.width, space.width, 3, padding=1) for _ in range(depth))
        self.out = nn.Conv2d(space.width, space.width, 1)
        nn.init.normal_(self.out.weight, std=space.std * space.width**-0.5)

    def forward(self, grids: list[Tensor]) -> Tensor:
        """Codes, each (B, h_s, w_s), of the coarser scales -> (B, n, D)."""
        parts = zip(self.tables, self.resize, grids, strict=True)
        x = torch.stack([resize(table(grid).permute(0, 3, 1, 2)) for table, resize, grid in parts]).sum(0)
        for block in self.blocks:
            x = x + F.silu(block(x))
        return self.out(x).flatten(2).transpose(1, 2)


class ScaleByScale(nn.Module):
    """p(codes | conditions) as a product of the networks' p(codes of a scale | coarser codes, conditions).

    Args:
        form: that of the contexts.

    Raises:
        InputError: the networks want vectors of different widths for conditions that share one.
    """

    def __init__(self, config: ScaleByScaleConfig, codebook_size: int, form: ContextForm) -> None:
        super().__init__()
        self.scales = scales = config.scales
        spaces = [network.context_space(scale) for network, scale in zip(config.networks, scales, strict=True)]
        if (form.pooled or form.cells or form.sequence) and len({space.width for space in spaces}) > 1:
            raise InputError(
                f"model.networks: conditions besides the class need networks of one width, got "
                f"{', '.join(str(space.width) for space in spaces)}. Set the same hidden_size (context_channels of a "
                "pixelcnn)"
            )
        seen = replace(form, cells=True)
        self.networks = nn.ModuleList(
            network.build(codebook_size, scale, seen if number else form)  # type: ignore[misc]
            for number, (network, scale) in enumerate(zip(config.networks, scales, strict=True))
        )
        self.readers = nn.ModuleList(
            CoarserCodes(codebook_size, scales[:number], config.reader_depth, spaces[number])
            for number in range(1, len(scales))
        )
        self.to_scales = nn.ModuleList(Resize(scales[-1], scale) for scale in scales) if form.cells else None

    @property
    def each(self) -> list[PriorNetwork]:
        """The networks, coarse to fine."""
        return list(self.networks)  # type: ignore[arg-type]

    @property
    def exact_likelihood(self) -> bool:
        return all(network.exact_likelihood for network in self.each)

    @property
    def keeps(self) -> str:
        return ", and ".join(dict.fromkeys(network.keeps for network in self.each)) + " at each scale"

    def can_keep(self, known: Tensor) -> bool:
        return all(
            network.can_keep(grid.flatten(1))
            for network, grid in zip(self.each, split_scales(known, self.scales), strict=True)
        )

    def loss(self, codes: Tensor, context: Context, inputs: Tensor, random: BatchRandom) -> Tensor:
        """The training loss: nats per code, the mean of the networks' losses, weighted by their codes."""
        true, read = split_scales(codes, self.scales), split_scales(inputs, self.scales)
        losses = [
            network.loss(true[i].flatten(1), self.context_of(i, context, read[:i]), read[i].flatten(1), random)
            * true[i][0].numel()
            for i, network in enumerate(self.each)
        ]
        return torch.stack(losses).sum() / num_codes(self.scales)

    def nats_per_image(self, codes: Tensor, context: Context, random: BatchRandom) -> Tensor:
        """-log p(codes | conditions), or an upper bound on it if one network only has a bound: (B,)."""
        grids = split_scales(codes, self.scales)
        nats = [
            network.nats_per_image(grids[i].flatten(1), self.context_of(i, context, grids[:i]), random)
            for i, network in enumerate(self.each)
        ]
        return torch.stack(nats).sum(0)

    def context_of(self, number: int, context: Context, coarser: list[Tensor]) -> Context:
        """What the network of a scale sees: the conditions, and the codes of all coarser scales."""
        cells = context.cells
        if cells is not None and self.to_scales is not None:
            finest = cells.transpose(1, 2).unflatten(2, self.scales[-1])
            cells = self.to_scales[number](finest).flatten(2).transpose(1, 2)
        if number:
            said = self.readers[number - 1](coarser)
            cells = said if cells is None else cells + said
        return replace(context, cells=cells)

    @torch.no_grad()
    def sample(
        self,
        branches: Branches,
        sampling: SamplingConfig,
        seeds: list[int],
        known: Tensor | None = None,
        on_progress: OnProgress | None = None,
    ) -> Tensor:
        """Codes (B, N), see `PriorNetwork.sample`."""
        given = None if known is None else split_scales(known, self.scales)
        grids: list[Tensor] = []
        for i, network in enumerate(self.each):
            context = self.context_of(i, branches.context, [branches.repeat(grid) for grid in grids])
            own_seeds = [seed_for(seed, "scale", i) for seed in seeds]
            here = None if given is None else given[i].flatten(1)
            codes = network.sample(Branches(context, branches.scales), sampling, own_seeds, here, on_progress)
            grids.append(codes.unflatten(1, self.scales[i]))
        return torch.cat([grid.flatten(1) for grid in grids], 1)
