"""Maps as a condition: for each pixel, the label of what is there (a segmentation), or values (edges, depth, a sketch);
or the codes of such maps by a tokenizer of their own.

Axes: B images, H and W pixels, M labels, C channels, h and w cells of the code grid, N = h w, D the width of a
network's contexts.
"""

import math
from abc import abstractmethod
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twostage.core.conditions.condition import Condition, ConditionConfig, ConditionedSplit, ConditionSource
from twostage.core.conditions.context import Context, ContextForm, ContextSpace
from twostage.core.conditions.map_form import MapCodes
from twostage.core.config.sections import Count, Depth, Size
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_float
from twostage.core.wording import some_of

__all__ = ["NO_LABEL", "CodedMapCondition", "ImageMapCondition", "LabelMapCondition", "MapConditionConfig"]

NO_LABEL = 255
"""A pixel without a label, as in many datasets; a map of such pixels alone says nothing."""
NO_VALUE = -1
"""A pixel of an image without a map."""
ROWS_AT_ONCE = 1024


@ConditionConfig.register
class MapConditionConfig(ConditionConfig):
    """The map beside the image."""

    plural = "maps"

    type: Literal["map"] = "map"
    depth: Depth = 2
    """Residual convolutions over the cells."""
    labels: tuple[Size, ...] = ()
    """Those of the training maps; set from the data. Empty if the maps are images."""
    names: tuple[str, ...] = ()
    """Those of the labels, from label 0 on; set from the data, and empty if they are not known."""
    channels: Literal[1, 3] | None = None
    """Those of maps that are images; set from the data."""
    size: tuple[Count, Count] | None = None
    """(height, width) of the maps in pixels."""
    codes: MapCodes | None = None
    """The tokenizer of the maps, if their codes lie beside those of the images; set from the data."""

    @property
    def form(self) -> ContextForm:
        return ContextForm(cells=True)

    def learned_from(self, source: ConditionSource) -> "MapConditionConfig":
        first = source.splits["train"].read_maps(torch.arange(1))
        if first is None:
            raise InputError(
                f"condition.type 'map': no maps in {source.name}. Use images with maps (data.maps=COLUMN or "
                "data.maps=FOLDER)"
            )
        if source.maps and source.maps.codes:
            known = tuple(label for label in source.maps.classes or () if label != NO_LABEL)
            found = {"labels": known, "channels": source.maps.channels, "size": source.image_size}
            return self.model_copy(update=found | {"codes": source.maps.codes, "names": source.map_names})
        if first.ndim == 4:
            found = {"labels": (), "channels": first.shape[1], "size": source.image_size, "codes": None}
            return self.model_copy(update=found)
        labels = _labels_of(source.splits["train"]) - {NO_LABEL}
        for name, split in source.splits.items():
            if unknown := _labels_of(split) - {*labels, NO_LABEL}:
                raise InputError(
                    f"condition.type 'map': the maps of `{name}` contain the label {min(unknown)}, which those of "
                    f"`train` lack. Move some of these images to `train`, or set these pixels to {NO_LABEL}"
                )
        found = {"labels": tuple(sorted(labels)), "channels": None, "size": source.image_size, "codes": None}
        return self.model_copy(update=found | {"names": source.map_names})

    def build(self, space: ContextSpace) -> "MapCondition":
        assert self.size is not None
        if self.codes is not None:
            return CodedMapCondition(self.codes, self.depth, space)
        if self.channels is not None:
            return ImageMapCondition(self, self.channels, self.size, space)
        return LabelMapCondition(self, self.size, space)

    def read_map(self, value: Any) -> Tensor:
        """A map as a person gives it, checked: labels (1, H, W) uint8, or an image (1, C, H, W) int16.

        Raises:
            InputError: not such a map.
        """
        found = np.asarray(value)
        if self.channels is not None:
            if found.dtype != np.uint8 or found.ndim != 3:
                raise InputError(
                    f"map: expected an image of the type uint8 and the shape (channels, height, width), got "
                    f"{found.dtype} {found.shape}. Read it with Pillow, and put the channels first"
                )
            values = torch.from_numpy(found.astype(np.int16))[None]
        else:
            if found.dtype.kind not in "iu" or found.size == 0 or found.min() < 0 or found.max() > NO_LABEL:
                raise InputError(f"map: expected whole numbers from 0 to {NO_LABEL}, got {found.dtype} {found.shape}")
            values = torch.from_numpy(found.astype(np.uint8))[None]
        self.check_maps(values)
        return values

    def check_maps(self, values: Tensor) -> None:
        """Refuses maps (B, H, W) uint8 or (B, C, H, W) int16 that were never seen in training.

        Raises:
            InputError: of another size, or with another label.
        """
        assert self.size is not None
        if self.channels is not None:
            if values.shape[1:] != (self.channels, *self.size) or values.dtype != torch.int16:
                raise InputError(
                    f"map: expected {self.channels} channel{'s' * (self.channels > 1)} of "
                    f"{self.size[0]}x{self.size[1]} pixels (height x width), got {values.dtype} of the shape "
                    f"{tuple(values.shape[1:])}. Convert and resize the image"
                )
            return
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


def _labels_of(split: ConditionedSplit) -> set[int]:
    """The labels that occur in the maps of a split."""
    rows = torch.arange(len(split)).split(ROWS_AT_ONCE)
    return set().union(*(_labels_in(maps) for part in rows if (maps := split.read_maps(part)) is not None))


def _labels_in(maps: Tensor) -> set[int]:
    """The labels that occur in maps (B, H, W) uint8: by counting, because each step of a training asks and sorting
    would take far longer."""
    return set(maps.flatten().bincount(minlength=NO_LABEL + 1).nonzero().flatten().tolist())


class MapCondition(Condition):
    """Convolutions that turn planes of pixels into something for each cell."""

    def __init__(self, planes: int, size: tuple[int, int], depth: int, space: ContextSpace) -> None:
        super().__init__()
        self.size = size
        patch = math.ceil(size[0] / space.grid[0]), math.ceil(size[1] / space.grid[1])
        self.padding = space.grid[1] * patch[1] - size[1], space.grid[0] * patch[0] - size[0]
        self.patches = nn.Conv2d(planes, space.width, patch, stride=patch)
        self.blocks = nn.ModuleList(nn.Conv2d(space.width, space.width, 3, padding=1) for _ in range(depth))
        self.cells_out = nn.Conv2d(space.width, space.width, 1)
        nn.init.normal_(self.cells_out.weight, std=space.std * space.width**-0.5)

    @abstractmethod
    def planes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Planes (B, planes, H, W), and the pixels that say something (B, H, W) bool."""

    def read(self, split: ConditionedSplit, rows: Tensor) -> Tensor | None:
        maps = split.read_maps(rows)
        return None if maps is None else maps.to(self.nothing(0).dtype)

    def forward(self, values: Tensor) -> Context:
        planes, known = self.planes(values)
        right, below = self.padding
        x = F.silu(self.patches(F.pad(planes, (0, right, 0, below))))
        for block in self.blocks:
            x = x + F.silu(block(x))
        cells = self.cells_out(x).flatten(2).transpose(1, 2)
        return Context(len(values), cells=cells * known.flatten(1).any(1)[:, None, None])


class LabelMapCondition(MapCondition):
    """Values are maps (B, H, W) uint8; `NO_LABEL` where nothing is known."""

    number: Tensor

    def __init__(self, config: MapConditionConfig, size: tuple[int, int], space: ContextSpace) -> None:
        super().__init__(len(config.labels), size, config.depth, space)
        self.config, self.labels = config, config.labels
        number = {label: i for i, label in enumerate(self.labels)}
        self.register_buffer("number", torch.tensor([number.get(value, -1) for value in range(256)]), persistent=False)

    def nothing(self, count: int) -> Tensor:
        return torch.full((count, *self.size), NO_LABEL, dtype=torch.uint8)

    def parse(self, value: Any) -> Tensor:
        return self.config.read_map(value)

    def check(self, values: Tensor) -> None:
        self.config.check_maps(values)

    def planes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        number = self.number[values.long()]  # (B, H, W), -1 where nothing is known
        known, weight = number >= 0, self.patches.weight
        one_hot = torch.zeros(len(values), len(self.labels), *self.size, dtype=weight.dtype, device=weight.device)
        one_hot.scatter_(1, number.clamp(min=0)[:, None], known[:, None].to(weight.dtype))
        return one_hot, known

    def taken_over(self, earlier: "MapCondition") -> tuple[dict[str, Tensor], str]:
        """The weights of each label; new ones start at 0."""
        state, labels = earlier.state_dict(), list(getattr(earlier, "labels", ()))
        before = state["patches.weight"]  # (D, M, height, width)
        planes = [before[:, labels.index(one)] if one in labels else before[:, 0] * 0.0 for one in self.labels]
        state["patches.weight"] = torch.stack(planes, 1)
        return state, f"{len(set(labels) & set(self.labels))} of {len(self.labels)} labels of maps are the same"


class ImageMapCondition(MapCondition):
    """Values are images (B, C, H, W) int16 from 0 to 255; `NO_VALUE` in all pixels of an image without a map."""

    def __init__(self, config: MapConditionConfig, channels: int, size: tuple[int, int], space: ContextSpace) -> None:
        super().__init__(channels, size, config.depth, space)
        self.config, self.channels = config, channels

    def nothing(self, count: int) -> Tensor:
        return torch.full((count, self.channels, *self.size), NO_VALUE, dtype=torch.int16)

    def parse(self, value: Any) -> Tensor:
        return self.config.read_map(value)

    def check(self, values: Tensor) -> None:
        self.config.check_maps(values)

    def planes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        known = (values != NO_VALUE).all(1)
        return to_float(values).to(self.patches.weight.dtype) * known[:, None], known


class CodedMapCondition(MapCondition):
    """Values are codes (B, h', w') int32 of maps; `NO_VALUE` in all codes of an image without a map. Where the grid of
    these codes is coarser than that of the network, a code speaks for several cells."""

    def __init__(self, codes: MapCodes, depth: int, space: ContextSpace) -> None:
        height, width = (max(sides) for sides in zip(codes.grid, space.grid, strict=True))
        super().__init__(space.width, (height, width), depth, space)
        self.codes = codes
        self.embedding = nn.Embedding(codes.codebook_size, space.width)

    def nothing(self, count: int) -> Tensor:
        return torch.full((count, *self.codes.grid), NO_VALUE, dtype=torch.int32)

    def parse(self, value: Any) -> Tensor:
        values = torch.as_tensor(value)[None].int()
        self.check(values)
        return values

    def check(self, values: Tensor) -> None:
        fits = values.shape[1:] == self.codes.grid and values.dtype == torch.int32
        if not fits or values.max() >= self.codes.codebook_size:
            raise InputError(
                f"condition 'map': expected the codes of maps, below {self.codes.codebook_size} and of the shape "
                f"(images, {self.codes.grid[0]}, {self.codes.grid[1]}), got {values.dtype} of the shape "
                f"{tuple(values.shape)}. Encode maps with their tokenizer, {self.codes.path}"
            )

    def planes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        known = values >= 0
        embedded = (self.embedding(values.clamp(min=0)) * known[..., None]).permute(0, 3, 1, 2)
        return F.interpolate(embedded, self.size), known
