"""A finished comparison: its table, its contact sheet, compare.json and the page compare.html."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipelines.comparison.compared_models import ComparedModel
from pipelines.comparison.side_by_side import Comparison
from pipelines.files.report import Report
from pipelines.files.text_table import text_table
from pipelines.saved.evaluation_figures import NO_EVIDENCE
from twostage.core.files import write_json
from twostage.core.images.conversion import to_shown
from twostage.core.images.fonts import class_labels
from twostage.core.images.sheets import contact_sheet, save_image

__all__ = [
    "COLUMNS",
    "class_captions",
    "comparison_document",
    "comparison_sheet",
    "comparison_text",
    "doubt_notes",
    "figure_rows",
    "strip_sheet",
    "used_columns",
    "write_comparison",
]

FORMS = {
    "name": ("model", ""),
    "parameters": ("parameters", "{:,.0f}"),
    "steps": ("steps", "{:,.0f}"),
    "learning_rate": ("learning rate", "{:.3g}"),
    "psnr": ("PSNR, dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "recognised": ("recognised reconstructions", "{:.1%}"),
    "rfid": ("Frechet distance of reconstructions", "{:.3g}"),
    "codes": ("codes in use", ""),
    "nats_per_image": ("nats per image", "at most {:.1f}"),
    "nats_per_code": ("nats per code", "{:.3f}"),
    "images_per_s": ("images/s", "{:,.1f}"),
    "frechet_distance": ("Frechet distance of samples", "{:.3g}"),
    "class_accuracy": ("class accuracy", "{:.1%}"),
}
"""The title of each column, and the format string of its figure; a column without one shows more than a figure."""
COLUMNS = {key: title for key, (title, _) in FORMS.items()}
"""The titles of the table, by figure."""
DOUBT_MARK = " *"
"""After a figure that is not evidence of quality; :func:`doubt_notes` gives the reason."""


def figure_rows(models: Sequence[ComparedModel]) -> list[dict[str, str]]:
    """The rows of the table, by the keys of `COLUMNS`; a figure that does not apply has no key."""
    rows = []
    for model in models:
        figures = model.figures
        row = {
            key: form.format(figures[key]) + DOUBT_MARK * (key in model.not_evidence)
            for key, (_, form) in FORMS.items()
            if key in figures
        }
        if "codebook_size" in figures:
            codes = figures["codebook_size"] * figures["codebooks"]
            row["codes"] = f"{figures['codes_used']:.0f} of {codes:.0f}"
        if model.pipeline and model.pipeline.prior and not model.pipeline.prior.exact_likelihood:
            row["nats_per_code"] = f"at most {row['nats_per_code']}"
        rows.append({"name": model.name, **row})
    return rows


def doubt_notes(models: Sequence[ComparedModel]) -> list[str]:
    """The reasons why marked figures are not evidence of quality, one sentence per model and reason."""
    return [
        f"{DOUBT_MARK.strip()} {model.name}: {NO_EVIDENCE}, because {reason}."
        for model in models
        for reason in dict.fromkeys(model.not_evidence.values())
    ]


def used_columns(rows: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The columns that some row has."""
    return {key: title for key, title in COLUMNS.items() if any(key in row for row in rows)}


def comparison_text(comparison: Comparison) -> str:
    """The text that the command prints: the table without empty columns, and the notes."""
    rows = figure_rows(comparison.models)
    return "\n".join([text_table(used_columns(rows), rows), *doubt_notes(comparison.models)])


def strip_sheet(
    strips: Mapping[str, Tensor], captions: Mapping[str, Sequence[str] | None], models: Sequence[ComparedModel]
) -> Image.Image:
    """A contact sheet: rows of images (n, C, H, W) by their titles.

    Args:
        captions: those of the images of a row, by its title.
        models: the first that says which channels to show decides it.
    """
    chosen = [shown for model in models if (shown := model.tokenizer.config.shown_channels)]
    tiles = to_shown(torch.cat(list(strips.values())), next(iter(chosen), None))
    columns = len(next(iter(strips.values())))
    below = [caption for title in strips for caption in captions.get(title) or [None] * columns]
    return contact_sheet(tiles, columns, below, list(strips))


def class_captions(comparison: Comparison, classes: list[str] | None) -> list[str] | None:
    """The captions that name the classes of a row of images."""
    known = comparison.data.class_names
    return class_labels(classes, [known.index(name) for name in classes]) if classes and known else None


def comparison_sheet(comparison: Comparison, more: Mapping[str, Tensor] | None = None) -> Image.Image:
    """The reconstructions of every model, ``more`` rows if there are any, and the samples of every model."""
    strips = {"original": comparison.originals}
    strips |= {m.name: m.reconstructions for m in comparison.models if m.reconstructions is not None}
    strips |= more or {}
    strips |= {f"{m.name}: new": m.samples for m in comparison.models if m.samples is not None}
    drawn = class_captions(comparison, comparison.classes)
    captions = {f"{m.name}: new": drawn for m in comparison.models if m.samples is not None and m.shows_classes}
    return strip_sheet(
        strips, captions | {"original": class_captions(comparison, comparison.original_classes)}, comparison.models
    )


def comparison_document(comparison: Comparison) -> dict[str, Any]:
    """The content of compare.json."""
    models = [
        {
            "name": model.name,
            "path": model.path,
            "figures": model.figures,
            "not_evidence": model.not_evidence,
            "not_measured": model.missing,
        }
        for model in comparison.models
    ]
    return {"models": models, "protocol": comparison.protocol}


def write_comparison(comparison: Comparison, out: Path) -> None:
    """Writes compare.html, compare.png and compare.json into ``out``."""
    sheet = comparison_sheet(comparison)
    report = Report("Models side by side")
    rows = figure_rows(comparison.models)
    report.table(used_columns(rows), rows)
    for note in doubt_notes(comparison.models):
        report.text(note)
    about = comparison.protocol["data"]
    report.text(f"Measured on {about['images']:,} images of `{about['split']}` of {about['source']}.")
    report.heading("The same images, the same classes and seeds")
    report.image(sheet, "Held-out images and their reconstructions by every tokenizer, and new images.")
    report.details("How this was measured", json.dumps(comparison.protocol, indent=2))
    report.save(out / "compare.html")
    save_image(sheet, out / "compare.png")
    write_json(out / "compare.json", comparison_document(comparison))
