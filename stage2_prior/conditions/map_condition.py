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
from twostage.core.config.sections import Count, Depth, Size
from twostage.core.errors import InputError
from twostage.core.wording import some_of

__all__ = ["NO_LABEL", "MapCondition", "MapConditionConfig"]

NO_LABEL = 255
"""A pixel without a label, as in many datasets; a map of such pixels alone says nothing."""
ROWS_AT_ONCE = 1024


class MapConditionConfig(ConditionConfig):
    """The image's label map."""

    plural = "maps"

    type: Literal["map"] = "map"
    depth: Depth = 2
    """Residual convolutions over the cells."""
    labels: tuple[Size, ...] = ()
    """Those of the training maps; set from the codes."""
    size: tuple[Count, Count] | None = None
    """(height, width) of the maps."""

    @property
    def form(self) -> ContextForm:
        return ContextForm(cells=True)

    def learned_from(self, cache: CodeCache) -> "MapConditionConfig":
        maps = cache.manifest.maps
        if maps is None or maps.classes is None:
            raise InputError(
                f"condition.type 'map': the codes {cache.path} have no label maps. Encode images with data.maps=COLUMN "
                "or data.maps=FOLDER, and data.map_kind=labels"
            )
        labels = [label for label in maps.classes if label != NO_LABEL]
        for name, split in cache.splits.items():
            for start in range(0, len(split), ROWS_AT_ONCE):
                part = split.read_maps(torch.arange(start, min(start + ROWS_AT_ONCE, len(split))))
                unknown = set() if part is None else _labels_in(part) - {*labels, NO_LABEL}
                if unknown:
                    raise InputError(
                        f"condition.type 'map': the maps of `{name}` contain the label {min(unknown)}, which those of "
                        f"`train` lack. Move some of these images to `train`, or set these pixels to {NO_LABEL}"
                    )
        return self.model_copy(update={"labels": tuple(labels), "size": cache.manifest.image_size})

    def build(self, space: ContextSpace) -> "MapCondition":
        assert self.size is not None
        return MapCondition(self.labels, self.size, self.depth, space)


def _labels_in(maps: Tensor) -> set[int]:
    """The labels that occur in maps (B, H, W) uint8: by counting, because each step of a training asks and sorting
    would take far longer."""
    return set(maps.flatten().bincount(minlength=NO_LABEL + 1).nonzero().flatten().tolist())


class MapCondition(Condition):
    """Values are maps (B, H, W) uint8; `NO_LABEL` where nothing is known."""

    number: Tensor

    def __init__(self, labels: tuple[int, ...], size: tuple[int, int], depth: int, space: ContextSpace) -> None:
        super().__init__()
        self.labels, self.size = labels, size
        number = torch.full((256,), -1)
        number[list(labels)] = torch.arange(len(labels))
        self.register_buffer("number", number, persistent=False)
        patch = size[0] // space.grid[0], size[1] // space.grid[1]
        self.patches = nn.Conv2d(len(labels), space.width, patch, stride=patch)
        self.blocks = nn.ModuleList(nn.Conv2d(space.width, space.width, 3, padding=1) for _ in range(depth))
        self.cells_out = nn.Conv2d(space.width, space.width, 1)
        nn.init.normal_(self.cells_out.weight, std=space.std * space.width**-0.5)

    def nothing(self, count: int) -> Tensor:
        return torch.full((count, *self.size), NO_LABEL, dtype=torch.uint8)

    def read(self, split: ConditionedSplit, rows: Tensor) -> Tensor:
        maps = split.read_maps(rows)
        return self.nothing(len(rows)) if maps is None else maps

    def parse(self, value: Any) -> Tensor:
        found = np.asarray(value)
        if found.dtype.kind not in "iu" or found.size == 0 or found.min() < 0 or found.max() > NO_LABEL:
            raise InputError(f"map: expected whole numbers from 0 to {NO_LABEL}, got {found.dtype} {found.shape}")
        values = torch.from_numpy(found.astype(np.uint8))[None]
        self.check(values)
        return values

    def check(self, values: Tensor) -> None:
        if values.shape[1:] != self.size or values.dtype != torch.uint8:
            raise InputError(
                f"map: expected {self.size[0]}x{self.size[1]} labels (height x width), got {values.dtype} of the shape "
                f"{tuple(values.shape[1:])}. Resize it without blending labels"
            )
        if unknown := sorted(_labels_in(values) - {*self.labels, NO_LABEL}):
            raise InputError(
                f"map: the label {unknown[0]} never occurs in the training maps. Use {some_of(self.labels, 20)}, or "
                f"{NO_LABEL} where anything may be"
            )

    def forward(self, values: Tensor) -> Context:
        number = self.number[values.long()]  # (B, H, W), -1 where nothing is known
        known, weight = number >= 0, self.patches.weight
        one_hot = torch.zeros(len(values), len(self.labels), *self.size, dtype=weight.dtype, device=weight.device)
        one_hot.scatter_(1, number.clamp(min=0)[:, None], known[:, None].to(weight.dtype))
        x = F.silu(self.patches(one_hot))
        for block in self.blocks:
            x = x + F.silu(block(x))
        cells = self.cells_out(x).flatten(2).transpose(1, 2)
        return Context(len(values), cells=cells * known.flatten(1).any(1)[:, None, None])
