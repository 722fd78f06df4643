"""What an evaluation leaves on disk: its figures as JSON, its pictures, and all of it as one HTML report."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.evaluation.neighbours import neighbours_sheet
from pipelines.evaluation.prior_measurements import SampleFigures
from pipelines.files.class_sheet import class_sheet
from pipelines.files.report import Report
from pipelines.saved.figures import NO_EVIDENCE, Rows
from twostage.core.images.sheets import save_image
from twostage.core.runs.model_folder import write_json

__all__ = ["PICTURES", "Picture", "sample_sheets", "write_evaluation"]

Picture = tuple[str, Image.Image, str]
"""What it is called, the picture, its caption."""
PICTURES = ("worst", "typical", "samples", "neighbours")
NEIGHBOURS_CAPTION = (
    "Samples, each followed by the training images that are nearest to it by their features. The number is how far: 1 "
    "is as far as held-out images are from their nearest training image (the median), 0 is a copy."
)


def write_evaluation(
    out: Path, title: str, document: dict[str, Any], rows: Rows, notes: Iterable[str], pictures: list[Picture]
) -> None:
    """Writes evaluation.json, the pictures and evaluation.html; pictures of an earlier evaluation go.

    Args:
        document: `figures` and `protocol`.
        rows: what the figures are called and mean.
        notes: what is said about them in words, a paragraph each.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        (out / f"{name}.png").unlink(missing_ok=True)
    for name, picture, _ in pictures:
        save_image(picture, out / f"{name}.png")
    _write_report(out / "evaluation.html", title, document, rows, notes, pictures)
    write_json(out / "evaluation.json", document)


def sample_sheets(samples: SampleFigures, pipeline: TwoStagePipeline) -> list[Picture]:
    """The samples of a pipeline, and their neighbours where there are any."""
    classes = pipeline.class_names, pipeline.labels_for(None)
    pictures = [("samples", class_sheet(samples.pictures, *classes), "The first samples.")]
    if samples.neighbours:
        pictures.append(("neighbours", neighbours_sheet(samples.neighbours, *classes), NEIGHBOURS_CAPTION))
    return pictures


def _write_report(
    path: Path, title: str, document: dict[str, Any], rows: Rows, notes: Iterable[str], pictures: list[Picture]
) -> None:
    figures, missing = document["figures"], document["protocol"]["not_measured"]
    doubts = document["protocol"]["not_evidence"]
    report = Report(title)
    for note in notes:
        report.text(note)
    report.heading("Figures")
    lines = []
    for name, value in figures.items():
        heading, form, meaning = rows[name]
        if value is not None:
            meaning = f"{meaning}; {NO_EVIDENCE}, see above" if name in doubts else meaning
            lines.append({"figure": f"{_indented(heading)}: {meaning}", "value": form.format(value)})
    report.table({"figure": "figure", "value": "value"}, lines)
    for reason in dict.fromkeys(missing.values()):
        titles = [rows[name][0].strip() for name in figures if missing.get(name) == reason]
        report.text(f"Not measured: {', '.join(titles)}: {reason}.")
    if pictures:
        report.heading("Pictures")
    for _, picture, caption in pictures:
        report.image(picture, caption)
    report.heading("Protocol")
    report.details("How the figures came about", json.dumps(document["protocol"], indent=2, ensure_ascii=False))
    report.save(path)


def _indented(heading: str) -> str:
    """With spaces that a browser keeps."""
    return heading.replace("  ", "\u00a0\u00a0\u00a0\u00a0")
