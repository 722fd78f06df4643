"""The fixed orders in which an autoregressive prior may write the cells of a grid."""

from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["ORDERS", "Order", "cell_order"]

Order = Literal["raster", "columns", "snake", "spiral", "z_curve"]
ORDERS: tuple[Order, ...] = get_args(Order)


def cell_order(order: Order, grid: tuple[int, int]) -> Tensor:
    """The cells of an (h, w) grid, numbered row by row, in the order they are written in: (h w,) int64.

    `raster`: row by row; `columns`: column by column; `snake`: row by row, every other row backwards; `spiral`: from
    the centre outwards; `z_curve`: Morton's, by quarters, and within them by quarters.
    """
    height, width = grid
    cells = torch.arange(height * width).view(height, width)
    match order:
        case "raster":
            return cells.flatten()
        case "columns":
            return cells.T.flatten()
        case "snake":
            cells[1::2] = cells[1::2].flip(1)
            return cells.flatten()
        case "spiral":
            rings = []
            while cells.numel():  # peels the first row off and turns what is left
                rings.append(cells[0])
                cells = cells[1:].T.flip(0)
            return torch.cat(rings).flip(0)
        case "z_curve":
            rows, columns = cells.flatten() // width, cells.flatten() % width
            bits = range(max(height, width).bit_length())
            morton = sum((columns >> b & 1) << 2 * b | (rows >> b & 1) << 2 * b + 1 for b in bits)
            assert isinstance(morton, Tensor)
            return morton.argsort()
