"""Pictures that people look at: contact sheets with captions, and loss curves."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from core.files import replacing
from core.images import to_pil

__all__ = ["contact_sheet", "draw_curves", "figure_canvas", "save_picture", "to_image"]

MARGIN = 4


def contact_sheet(
    pixels: Tensor, columns: int, captions: Sequence[str] | None = None, row_titles: Sequence[str] | None = None
) -> Image.Image:
    """Pictures side by side, small ones enlarged with square pixels.

    Args:
        pixels: (n, C, H, W) uint8, row by row.
        captions: one below each picture.
        row_titles: one to the left of each row.
    """
    height, width = pixels.shape[-2:]
    scale = max(1, round(88 / max(height, width)))
    font = ImageFont.load_default(13)
    below = 18 if captions else 0
    left = 8 + max((int(font.getlength(title)) for title in row_titles), default=0) if row_titles else 0
    rows = -(-len(pixels) // columns)
    cell_width, cell_height = width * scale + MARGIN, height * scale + MARGIN + below
    sheet = Image.new("RGB", (left + columns * cell_width + MARGIN, rows * cell_height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(pixels):
        x, y = left + MARGIN + (i % columns) * cell_width, MARGIN + (i // columns) * cell_height
        tile = to_pil(image).convert("RGBA" if len(image) == 4 else "RGB")
        tile = tile.resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(tile, (x, y), tile if tile.mode == "RGBA" else None)
        if captions:
            centre = x + width * scale // 2
            draw.text((centre, y + height * scale + 2), captions[i], fill="black", font=font, anchor="ma")
        if row_titles and i % columns == 0:
            draw.text((4, y + height * scale // 2), row_titles[i // columns], fill="black", font=font, anchor="lm")
    return sheet


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG so that a reader never finds half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        picture.save(partial, format="PNG")


def draw_curves(
    lines: list[dict[str, Any]],
    path: Path,
    title: str,
    baselines: dict[str, float] | None = None,
    metric: str = "loss",
) -> None:
    """A metric, such as the loss, over the steps for both splits; ``baselines`` are drawn as level lines."""
    canvas, figure = figure_canvas((6.4, 4.0))
    axes = figure.subplots()
    shown: list[float] = []
    for split, style in {"train": {"alpha": 0.7}, "val": {"marker": "o", "markersize": 3}}.items():
        found = [(x["step"], x.get(metric, math.nan)) for x in lines if x["split"] == split]
        points = [(step, value) for step, value in found if math.isfinite(value)]
        if points:
            style |= {"marker": "o"} if len(points) == 1 else {}  # a line of one point cannot be seen
            axes.plot(*zip(*points, strict=True), label="held out" if split == "val" else "training", **style)
            # The first steps would press everything after them flat.
            losses = torch.tensor([loss for step, loss in points if step >= points[-1][0] * 0.05])
            shown += [*torch.quantile(losses, torch.tensor([0.0, 0.98])).tolist()]
    for name, value in (baselines or {}).items():
        axes.axhline(value, linestyle="--", color="grey", linewidth=1, label=name)
        shown.append(value)
    if shown:
        margin = 0.06 * (max(shown) - min(shown)) or 1.0
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set(xlabel="step", ylabel=metric, title=title)
    if shown:
        axes.legend()
    axes.grid(alpha=0.3)
    save_picture(to_image(canvas), path)


def figure_canvas(size: tuple[float, float]) -> tuple[Any, Any]:
    """A matplotlib canvas and its figure, ``size`` in inches, without the state that pyplot keeps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return FigureCanvasAgg(figure), figure


def to_image(canvas: Any) -> Image.Image:
    """What was drawn on a matplotlib canvas."""
    canvas.draw()
    return Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")
