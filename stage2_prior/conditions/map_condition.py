"""Label maps as a condition: for each pixel, the number of what is there.

Axes: B images, H and W pixels, M labels, h and w cells of the code grid, N = h w, D the width of a network's contexts.
"""

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior.codes import CodeCache
from stage2_prior.conditions.condition import Condition, ConditionConfig, ConditionedSplit
from stage2_prior.conditions.context import Context, ContextForm, ContextSpace
from twostage.core.config.sections import Count, Depth
from twostage.core.errors import InputError

__all__ = ["NO_LABEL", "MapCondition", "MapConditionConfig"]

NO_LABEL = 255
"""A pixel without a label; a map of such pixels alone says nothing."""


class MapConditionConfig(ConditionConfig):
    """The image's label map."""

    plural = "maps"

    type: Literal["map"] = "map"
    depth: Depth = 2
    """Residual convolutions over the cells."""
    num_labels: Count | None = None
    """Labels are 0 to ``num_labels - 1``; set from the codes."""
    size: tuple[Count, Count] | None = None
    """(height, width) of the maps."""

    @property
    def form(self) -> ContextForm:
        return ContextForm(cells=True)

    def learned_from(self, cache: CodeCache) -> "MapConditionConfig":
        num_labels = cache.manifest.map_classes
        if num_labels is None:
            raise InputError(
                f"condition.type 'map': the codes {cache.path} have no maps. Encode images with data.maps=COLUMN or "
                "data.maps=FOLDER"
            )
        return self.model_copy(update={"num_labels": num_labels, "size": cache.manifest.image_size})

    def build(self, space: ContextSpace) -> "MapCondition":
        assert self.size is not None
        assert self.num_labels is not None
        return MapCondition(self.num_labels, self.size, self.depth, space)


class MapCondition(Condition):
    """Values are maps (B, H, W) uint8; `NO_LABEL` where nothing is known."""

    def __init__(self, num_labels: int, size: tuple[int, int], depth: int, space: ContextSpace) -> None:
        super().__init__()
        self.num_labels, self.size = num_labels, size
        patch = size[0] // space.grid[0], size[1] // space.grid[1]
        self.patches = nn.Conv2d(num_labels, space.width, patch, stride=patch)
        self.blocks = nn.ModuleList(nn.Conv2d(space.width, space.width, 3, padding=1) for _ in range(depth))
        self.cells_out = nn.Conv2d(space.width, space.width, 1)
        nn.init.normal_(self.cells_out.weight, std=space.std * space.width**-0.5)

    def nothing(self, count: int) -> Tensor:
        return torch.full((count, *self.size), NO_LABEL, dtype=torch.uint8)

    def read(self, split: ConditionedSplit, rows: Tensor) -> Tensor:
        maps = split.read_maps(rows)
        return self.nothing(len(rows)) if maps is None else maps

    def parse(self, value: Any) -> Tensor:
        values = torch.from_numpy(np.asarray(value).astype(np.uint8))[None]
        self.check(values)
        return values

    def check(self, values: Tensor) -> None:
        if values.shape[1:] != self.size or values.dtype != torch.uint8:
            raise InputError(
                f"map: expected {self.size[0]}x{self.size[1]} labels (height x width), got {values.dtype} of the shape "
                f"{tuple(values.shape[1:])}. Resize it without blending labels"
            )
        unknown = values[(values >= self.num_labels) & (values != NO_LABEL)]
        if len(unknown):
            raise InputError(
                f"map: the label {unknown[0].item()} never occurs in the training maps. Use 0 to "
                f"{self.num_labels - 1}, or {NO_LABEL} where anything may be"
            )

    def forward(self, values: Tensor) -> Context:
        known = values != NO_LABEL
        one_hot = F.one_hot(values.long() * known, self.num_labels) * known[..., None]  # (B, H, W, M)
        x = F.silu(self.patches(one_hot.movedim(-1, 1).to(self.patches.weight.dtype)))
        for block in self.blocks:
            x = x + F.silu(block(x))
        cells = self.cells_out(x).flatten(2).transpose(1, 2)
        return Context(len(values), cells=cells * known.flatten(1).any(1)[:, None, None])
