"""Contact sheets with captions, and loss curves."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from twostage.core.files import replacing
from twostage.core.images.conversion import to_pil, to_shown
from twostage.core.images.fonts import class_labels, figure_families, fit_width, font_for, legible, load_matplotlib

__all__ = ["class_sheet", "contact_sheet", "draw_curves", "figure_canvas", "prompt_sheet", "save_image", "to_image"]

MARGIN = 4
MAX_TITLE = 300
MAX_PROMPT_LINES = 5
LINE_HEIGHT = 15


class _Text:
    """A text and a font with its characters, shortened to ``max_width`` pixels."""

    def __init__(self, text: str, max_width: int) -> None:
        text = legible(text)
        self._font = font_for(text)
        assert self._font is not None  # a legible text has a font
        self._text = fit_width(text, self._font, max_width)
        self.width = math.ceil(self._font.getlength(self._text))

    def draw(self, draw: ImageDraw.ImageDraw, place: tuple[float, float], anchor: str) -> None:
        draw.text(place, self._text, fill="black", font=self._font, anchor=anchor)


def _wrapped(text: str, width: int, max_lines: int) -> list[_Text]:
    """A text in lines of at most ``width`` pixels; what does not fit into the last line is shortened."""
    lines, words = [], legible(text).split()
    while words and len(lines) < max_lines - 1:
        count = len(words)
        while count > 1 and (font := font_for(" ".join(words[:count]))) is not None:
            if font.getlength(" ".join(words[:count])) <= width:
                break
            count -= 1
        lines.append(" ".join(words[:count]))
        words = words[count:]
    return [_Text(line, width) for line in [*lines, *([" ".join(words)] if words else [])]]


def contact_sheet(
    pixels: Tensor,
    columns: int,
    captions: Sequence[str | None] | None = None,
    row_titles: Sequence[str] | None = None,
    lines: int = 1,
) -> Image.Image:
    """Images side by side; small ones are enlarged without smoothing.

    Characters that no font has are drawn as escapes (for class names see
    :func:`twostage.core.images.fonts.class_labels`).

    Args:
        pixels: (n, C, H, W), row by row; see :func:`to_shown`, which chooses among their channels.
        captions: one below each image, shortened to its width; below a row of None there is no room for them.
        row_titles: one to the left of each row.
        lines: the largest number of lines of a caption.
    """
    pixels, (height, width) = to_shown(pixels), pixels.shape[-2:]
    scale = max(1, round(88 / max(height, width)))
    below_each = [_wrapped(caption or "", width * scale + MARGIN - 2, lines) for caption in captions or ()]
    room = 3 + LINE_HEIGHT * max([1, *map(len, below_each)])
    titles = [_Text(title, MAX_TITLE) for title in row_titles or ()]
    left = 8 + max((title.width for title in titles), default=0) if titles else 0
    starts, captioned = range(0, len(pixels), columns), [caption is not None for caption in captions or ()]
    heights = [height * scale + MARGIN + room * any(captioned[start : start + columns]) for start in starts]
    tops = list(itertools.accumulate(heights, initial=MARGIN))
    cell_width = width * scale + MARGIN
    sheet = Image.new("RGB", (left + columns * cell_width + MARGIN, tops[-1]), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(pixels):
        x, y = left + MARGIN + (i % columns) * cell_width, tops[i // columns]
        tile = to_pil(image).convert("RGBA" if len(image) == 4 else "RGB")
        tile = tile.resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(tile, (x, y), tile if tile.mode == "RGBA" else None)
        for line, text in enumerate(below_each[i] if captions else ()):
            text.draw(draw, (x + width * scale // 2, y + height * scale + 2 + line * LINE_HEIGHT), "ma")
        if titles and i % columns == 0:
            titles[i // columns].draw(draw, (4, y + height * scale // 2), "lm")
    return sheet


def class_sheet(pixels: Tensor, names: list[str] | None, numbers: Sequence[int] | None = None) -> Image.Image:
    """A contact sheet of images (n, C, H, W), where image i belongs to the class ``names[i % len(names)]``. Each
    class gets a column of its own if there are 4 to 12 of them.

    Args:
        numbers: the labels of the classes, if ``names`` are not all classes.
    """
    columns = len(names) if names and 4 <= len(names) <= 12 else 8
    labels = class_labels(names, numbers) if names else []
    captions = [labels[i % len(labels)] for i in range(len(pixels))] if labels else None
    return contact_sheet(pixels, min(columns, len(pixels)), captions)


def prompt_sheet(pixels: Tensor, prompts: Sequence[str]) -> Image.Image:
    """A contact sheet of images (n, C, H, W) with their whole prompts below; image i has the prompt
    ``prompts[i % len(prompts)]``."""
    captions = [prompts[i % len(prompts)] for i in range(len(pixels))]
    return contact_sheet(pixels, min(8, len(pixels)), captions, lines=MAX_PROMPT_LINES)


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG; other processes never see half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        image.save(partial, format="PNG")


def draw_curves(
    lines: list[dict[str, Any]], path: Path, title: str, baselines: dict[str, float] | None = None, metric: str = "loss"
) -> None:
    """Plot a metric over the steps for both splits; ``baselines`` become horizontal lines."""
    canvas, figure = figure_canvas((6.4, 4.0))
    axes = figure.subplots()
    shown: list[float] = []
    for split, style in {"train": {"alpha": 0.7}, "val": {"marker": "o", "markersize": 3}}.items():
        found = [(x["step"], x.get(metric, math.nan)) for x in lines if x["split"] == split]
        points = [(step, value) for step, value in found if math.isfinite(value)]
        if points:
            style |= {"marker": "o"} if len(points) == 1 else {}  # a line of one point is invisible
            axes.plot(*zip(*points, strict=True), label="held out" if split == "val" else "training", **style)
            # Scale to the later steps: the first ones would flatten everything else.
            losses = torch.tensor([loss for step, loss in points if step >= points[-1][0] * 0.05])
            shown += [*torch.quantile(losses, torch.tensor([0.0, 0.98])).tolist()]
    for name, value in (baselines or {}).items():
        axes.axhline(value, linestyle="--", color="grey", linewidth=1, label=name)
        shown.append(value)
    if shown:
        margin = 0.06 * (max(shown) - min(shown)) or 1.0
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set(xlabel="step", ylabel=metric)
    title = legible(title)
    axes.set_title(title, family=figure_families([title]), parse_math=False)
    if shown:
        axes.legend()
    axes.grid(alpha=0.3)
    save_image(to_image(canvas), path)


def figure_canvas(size: tuple[float, float]) -> tuple[Any, Any]:
    """A matplotlib canvas and its figure without pyplot's global state; ``size`` is in inches."""
    load_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return FigureCanvasAgg(figure), figure


def to_image(canvas: Any) -> Image.Image:
    """Render a matplotlib canvas."""
    canvas.draw()
    return Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")
