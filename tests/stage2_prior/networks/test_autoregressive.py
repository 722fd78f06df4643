import pytest
import torch

from stage2_prior.networks.autoregressive import ORDERS, cell_order


@pytest.mark.parametrize("grid", [(1, 5), (5, 1), (3, 5), (5, 3), (1, 1), (4, 4)], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_every_cell_is_written_once(order, grid):
    cells = cell_order(order, grid)
    assert cells.dtype == torch.int64
    assert cells.sort().values.tolist() == list(range(grid[0] * grid[1]))


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("raster", [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]),
        ("columns", [[0, 3, 6, 9, 12], [1, 4, 7, 10, 13], [2, 5, 8, 11, 14]]),
        ("snake", [[0, 1, 2, 3, 4], [9, 8, 7, 6, 5], [10, 11, 12, 13, 14]]),
        ("spiral", [[14, 13, 12, 11, 10], [3, 2, 1, 0, 9], [4, 5, 6, 7, 8]]),
        ("z_curve", [[0, 1, 4, 5, 12], [2, 3, 6, 7, 13], [8, 9, 10, 11, 14]]),
    ],
)
def test_places_in_a_grid_of_three_by_five(order, expected):
    assert cell_order(order, (3, 5)).argsort().view(3, 5).tolist() == expected


@pytest.mark.parametrize("grid", [(3, 5), (4, 4), (6, 3)], ids=str)
@pytest.mark.parametrize("order", ["snake", "spiral"])
def test_each_cell_is_adjacent_to_the_one_before(order, grid):
    cells = cell_order(order, grid)
    places = torch.stack([cells // grid[1], cells % grid[1]], 1)
    assert (places.diff(dim=0).abs().sum(1) == 1).all()


@pytest.mark.parametrize("order", ["raster", "snake", "z_curve"])
def test_a_single_row_is_written_from_left_to_right(order):
    assert cell_order(order, (1, 5)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("grid", "centre"), [((3, 3), 4), ((5, 5), 12), ((3, 5), 8)], ids=str)
def test_a_spiral_starts_at_the_centre(grid, centre):
    assert cell_order("spiral", grid)[0] == centre


def test_a_z_curve_writes_quarters_one_after_another():
    cells = cell_order("z_curve", (8, 8))
    quarters = (cells // 8 // 4) * 2 + cells % 8 // 4
    assert quarters.tolist() == [0] * 16 + [1] * 16 + [2] * 16 + [3] * 16
