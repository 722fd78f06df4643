"""What an image like those of `captioned_shapes` shows, found by geometry alone: no trained network judges.

Each pixel p of such an image mixes two colours: p = g + c (k - g), with the ground g, the shape's colour k and the
share c of the pixel that the shape covers. The ground is the colour of the border. The shape's colour is the one whose
mixtures leave least of the pixels unexplained; it also gives c. The shape is the one that overlaps c best if it is
drawn with the area and the centre of mass of c.

Axes: n images, h and w pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from twostage.core.data.captioned_shapes import ATTRIBUTES, COLOURS, GROUNDS, MAX_TURN, RADII, TURNS, place_centres
from twostage.core.data.shapes import CLASS_NAMES, shape_cover

__all__ = ["NONE", "judge_shapes", "map_overlap"]

NONE = -1
"""The value of an attribute that is not recognisable."""
MAX_GROUND_DISTANCE = 40
"""Pixels closer to a ground's colour count as ground: the root mean square over the channels, of 255."""
MIN_GROUND = 0.7
"""The smallest share of the border that must be ground. A large shape may touch the border."""
MIN_EXPLAINED = 0.8
"""The smallest share of the squared distance of all other pixels from the ground that one colour must explain."""
MAX_STRAY = 0.15
"""The largest number of other pixels away from the shape, as a share of its pixels."""
MIN_OVERLAP = 0.7
"""The smallest intersection over union with a drawn shape, in shares of pixels."""
MAX_DISTANCE = 0.12
"""The largest distance from a place's centre, as a share of the shorter side."""
NUM_TURNS = 5  # rotations to try for each shape
_UNIT = 96  # pixels; the radius at which a shape's area and centre of mass are measured
_AT_ONCE = 256  # images judged together


@torch.no_grad()
def judge_shapes(images: Tensor) -> dict[str, Tensor]:
    """Find the attributes of images (n, 3, H, W) uint8 of any size.

    Returns:
        The name of each attribute with (n,) int64 indices into its `ATTRIBUTES`. All are `NONE` for an image without
        one recognisable shape on one ground; `place` is also `NONE` for a shape between two places. And `mask`:
        (n, H, W) bool, the pixels of the shape.
    """
    parts = [_judge(part.float()) for part in images.split(_AT_ONCE)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def map_overlap(mask: Tensor, maps: Tensor) -> Tensor:
    """The intersection over union (n,) of found masks (n, H, W) bool and the shapes of label maps (n, H, W)."""
    wanted = maps > 0
    return (mask & wanted).sum((1, 2)) / (mask | wanted).sum((1, 2)).clamp(min=1)


def _judge(pixels: Tensor) -> dict[str, Tensor]:
    height, width = pixels.shape[-2:]
    ground, is_clear = _find_ground(pixels)
    ground_colour = _rgb(GROUNDS)[ground][:, :, None, None]
    is_other = (pixels - ground_colour).square().mean(1) > MAX_GROUND_DISTANCE**2
    colour, cover, explained = _find_colour(pixels, ground_colour, is_other)
    mask = cover > 0.5
    near = max_pool2d(mask.float(), 5, stride=1, padding=2)  # further away, there are no edges, only noise
    stray = (is_other & (near == 0)).sum((1, 2))
    fit = _fit_shape(cover * near)
    radii = torch.tensor(list(RADII.values())).mean(1) * min(height, width)
    distance, place = torch.cdist(fit.centre, torch.from_numpy(place_centres((height, width)))).min(1)
    found = {
        "shape": fit.shape,
        "colour": colour,
        "size": (fit.radius[:, None] - radii).abs().argmin(1),
        "place": place.where(distance < MAX_DISTANCE * min(height, width), NONE),
        "ground": ground,
    }
    is_single = (explained > MIN_EXPLAINED) & (stray <= MAX_STRAY * mask.sum((1, 2)))
    recognisable = is_clear & is_single & (fit.overlap > MIN_OVERLAP)
    return {name: found[name].where(recognisable, NONE) for name in ATTRIBUTES} | {"mask": mask}


def _rgb(palette: dict[str, tuple[int, int, int]]) -> Tensor:
    return torch.tensor(list(palette.values()), dtype=torch.float32)


def _find_ground(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The index of the ground (n,), and whether the border clearly has its colour (n,)."""
    border = torch.cat([pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, :, 0], pixels[:, :, :, -1]], dim=2)
    colours = _rgb(GROUNDS)
    ground = torch.cdist(border.median(2).values, colours).argmin(1)
    distance = (border - colours[ground, :, None]).square().mean(1).sqrt()
    return ground, (distance < MAX_GROUND_DISTANCE).float().mean(1) > MIN_GROUND


def _find_colour(pixels: Tensor, ground: Tensor, is_other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The index of the shape's colour (n,), its cover (n, H, W), and the share of the pixels that it explains (n,).

    Args:
        ground: its colour, (n, 3, 1, 1).
        is_other: the pixels that are not ground, (n, H, W) bool.
    """
    offset = pixels - ground
    covers, rests = [], []
    for colour in _rgb(COLOURS):
        full = colour[:, None, None] - ground
        cover = ((offset * full).sum(1) / full.square().sum(1)).clamp(0, 1)
        rest = (offset - cover[:, None] * full).square().sum(1)
        covers.append(cover)
        rests.append((rest * is_other).sum((1, 2)))
    rest, colour = torch.stack(rests).min(0)
    total = (offset.square().sum(1) * is_other).sum((1, 2))
    return colour, torch.stack(covers)[colour, torch.arange(len(pixels))], 1 - rest / total.clamp(min=1)


@dataclass
class _Fit:
    """The drawn shapes that fit best; all (n,), but ``centre`` (n, 2), which is x and y in pixels."""

    shape: Tensor
    overlap: Tensor
    radius: Tensor
    centre: Tensor


def _fit_shape(cover: Tensor) -> _Fit:
    """Fit each shape, upright and turned, to ``cover`` (n, H, W). Blurred ones are compared with blurred shapes."""
    count, height, width = cover.shape
    area = cover.sum((1, 2))
    weights = cover / area.clamp(min=1)[:, None, None]
    middle = torch.stack([(weights.sum(1) * _axis(width)).sum(1), (weights.sum(2) * _axis(height)).sum(1)], dim=1)
    best = _Fit(torch.full((count,), NONE), torch.zeros(count), torch.zeros(count), torch.zeros(count, 2))
    for label, shape in enumerate(CLASS_NAMES):
        for turn in TURNS.get(shape, 0) + MAX_TURN * np.linspace(-1, 1, NUM_TURNS, dtype=np.float32):
            unit_area, unit_middle = _measure(shape, turn)
            radius = (area / unit_area).sqrt().clamp(min=1)
            centre = middle - radius[:, None] * unit_middle
            crisp = _draw(shape, radius, centre, turn, (height, width))
            blurred = avg_pool2d(crisp, 3, stride=1, padding=1, count_include_pad=False)
            overlap = torch.maximum(_overlap(crisp, cover), _overlap(blurred, cover))
            better = overlap > best.overlap
            best.shape[better] = label
            best.overlap[better] = overlap[better]
            best.radius[better], best.centre[better] = radius[better], centre[better]
    return best


def _measure(shape: str, turn: float) -> tuple[float, Tensor]:
    """The area of a shape of radius 1, and its centre of mass (2,)."""
    side = int(2.2 * _UNIT)
    cover = _draw(shape, torch.tensor([_UNIT]), torch.full((1, 2), side / 2), turn, (side, side))[0]
    axis = _axis(side) - side / 2
    middle = torch.stack([(cover.sum(0) * axis).sum(), (cover.sum(1) * axis).sum()]) / cover.sum()
    return cover.sum().item() / _UNIT**2, middle / _UNIT


def _draw(shape: str, radius: Tensor, centre: Tensor, turn: float, size: tuple[int, int]) -> Tensor:
    """The cover (n, H, W) of shapes with these radii (n,) and centres (n, 2)."""
    x, y = centre.unbind(1)
    turns = np.full(len(radius), turn, dtype=np.float32)
    return torch.from_numpy(shape_cover(shape, radius.numpy(), (x.numpy(), y.numpy()), turns, size)).float()


def _axis(side: int) -> Tensor:
    """The centres of the pixels along one side."""
    return torch.arange(side) + 0.5


def _overlap(one: Tensor, other: Tensor) -> Tensor:
    """The intersection over union (n,) of covers (n, H, W)."""
    return torch.minimum(one, other).sum((1, 2)) / torch.maximum(one, other).sum((1, 2)).clamp(min=1)
