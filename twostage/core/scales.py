"""Images as codes of several grids, the scales, from coarse to fine: how they are stored, described and resized.

The codes of all scales make one row: the first scale row by row, then the second, and so on. So whatever reads a grid
of codes can read scales as a grid of one row. Axes: B images, h and w cells of a scale, N codes of all scales.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Resize", "Scales", "describe_grids", "join_scales", "num_codes", "split_scales"]

Scales = tuple[tuple[int, int], ...]
"""The grids (h, w), coarse to fine; () for codes of a single grid."""


def num_codes(scales: Scales) -> int:
    """N."""
    return sum(math.prod(grid) for grid in scales)


def split_scales(codes: Tensor, scales: Scales) -> list[Tensor]:
    """A row of codes (B, ..., N) -> the grids of its scales, each (B, ..., h, w)."""
    parts = codes.split([math.prod(grid) for grid in scales], dim=-1)
    return [part.unflatten(-1, grid) for part, grid in zip(parts, scales, strict=True)]


def join_scales(grids: Sequence[Tensor]) -> Tensor:
    """The inverse of :func:`split_scales`."""
    return torch.cat([grid.flatten(-2) for grid in grids], -1)


def describe_grids(grid: Sequence[int], scales: Sequence[Sequence[int]] = ()) -> str:
    """In words: `7x7`, or `1x1 + 2x2 + 4x4` for scales."""
    return " + ".join("x".join(map(str, sides)) for sides in scales or [grid])


class Resize(nn.Module):
    """Grids (..., h, w) of one size to another: the mean over areas where they shrink, bicubic interpolation where they
    grow, as in VAR (Tian et al. 2024, arXiv 2404.02905, algorithms 1 and 2).

    Both are products with fixed matrices: unlike torch's interpolation they can be exported, and their gradient adds up
    in the same order every time on a GPU.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, size: tuple[int, int], new_size: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("rows", _weights(size[0], new_size[0]), persistent=False)
        self.register_buffer("columns", _weights(size[1], new_size[1]).T.contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows.to(x.dtype) @ x @ self.columns.to(x.dtype)


def _weights(size: int, new_size: int) -> Tensor:
    """The matrix (new_size, size) that resizes one axis."""
    unit = torch.eye(size)[None, None]  # each column is an axis with a single 1
    if new_size <= size:
        return F.interpolate(unit, (new_size, size), mode="area")[0, 0]
    return F.interpolate(unit, (new_size, size), mode="bicubic", align_corners=False)[0, 0]
