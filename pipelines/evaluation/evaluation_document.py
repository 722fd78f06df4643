"""What the evaluations of tokenizers and of priors have in common: rows, lines of the protocol, the table."""

import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines.saved.figures import NO_EVIDENCE, Rows
from twostage.core.data.dataset import DataConfig, ImageData, ImageSplit
from twostage.core.errors import InputError
from twostage.core.runs.model_folder import file_sha256, find_model_folder

__all__ = [
    "DIGESTS_OF_IMAGES",
    "NO_NETWORK",
    "choose_split",
    "described_rows",
    "described_weights",
    "figure_lines",
    "sorted_figures",
    "versions",
]

PACKAGES = ("torch", "torchmetrics", "numpy", "pillow")
NO_NETWORK = "give --features runs/NAME (twostage train-features), or --inception FILE"
DIGESTS_OF_IMAGES = "the images' own sha256 digests (uint8, channels x height x width), in order"


def choose_split(data: ImageData, split: str | None, config: DataConfig) -> tuple[str, ImageSplit]:
    """The split that is asked for, or the one that validation reads.

    Raises:
        InputError: no such split; those that there are are listed.
    """
    name = split or data.validation_name
    if name not in data.splits:
        raise InputError(
            f"--split {name}: data.source {config.source} has {' and '.join(data.splits)}; give one of them"
        )
    return name, data.splits[name]


def described_rows(count: int, total: int) -> str:
    """How :func:`twostage.core.data.spread.spread` chose."""
    return "all" if count == total else f"spread evenly over {total}"


def described_weights(path: str | Path, **more: str) -> dict[str, str]:
    """A model in the protocol."""
    weights = file_sha256(find_model_folder(path) / "model.safetensors")
    return {"path": str(path), **more, "weights_sha256": weights}


def versions() -> dict[str, str]:
    """Of what measured."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def sorted_figures(
    figures: dict[str, float], missing: dict[str, str], rows: Rows
) -> tuple[dict[str, float | None], dict[str, str]]:
    """The figures in the table's order, None where there is none, and why there is none."""
    missing = missing | {name: "not finite" for name, value in figures.items() if not math.isfinite(value)}
    known: dict[str, float | None] = {**figures, **dict.fromkeys(missing)}
    return {name: known[name] for name in rows if name in known}, missing


def figure_lines(figures: dict[str, Any], protocol: dict[str, Any], rows: Rows) -> list[str]:
    """A line of the table for each figure; what is not measured and what is no evidence is marked."""
    missing, doubts = protocol["not_measured"], protocol["not_evidence"]
    lines, said = [], set()
    for name, value in figures.items():
        title, form, _ = rows[name]
        if value is not None:
            words = form.format(value) + (f" ({NO_EVIDENCE})" if name in doubts else "")
        else:
            words = "not measured: " + ("as above" if missing[name] in said else missing[name])
            said.add(missing[name])
        lines.append(f"  {title:<27} {words}")
    return lines
