"""Shows trained models side by side, or trains every family and tells their story.

twostage compare runs/VQVAE runs/VAE runs/PRIOR ... [--features runs/features_NAME] [--out compare]
twostage compare --tour [--minutes 1.2] [--data shapes] [--out runs/tour]
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines.comparison.side_by_side import (
    COLUMNS,
    Comparison,
    compare_models,
    comparison_document,
    comparison_sheet,
    evidence_notes,
    figure_rows,
)
from pipelines.comparison.tour import MINUTES, tour
from pipelines.drawing.sampling_options import with_sampling_options
from pipelines.files.report import Report
from stage2_prior.sampling import SamplingConfig
from twostage.core.errors import InputError
from twostage.core.images.sheets import save_image
from twostage.core.machine.command import run_command
from twostage.core.runs.model_folder import write_json

__all__ = ["write_comparison"]


def write_comparison(comparison: Comparison, out: Path) -> None:
    """Writes ``out``/compare.html, compare.png and compare.json."""
    document, picture = comparison_document(comparison), comparison_sheet(comparison)
    report = Report("Models side by side")
    report.table(COLUMNS, figure_rows(comparison.models))
    for note in evidence_notes(comparison.models):
        report.text(note)
    about = comparison.protocol["data"]
    report.text(f"Measured on {about['images']:,} images of `{about['split']}` of {about['source']}.")
    report.heading("The same images, the same classes and seeds")
    report.image(picture, "held-out images through every tokenizer, and new images")
    report.details("How this was measured", json.dumps(comparison.protocol, indent=2))
    report.save(out / "compare.html")
    save_image(picture, out / "compare.png")
    write_json(out / "compare.json", document)


def text_table(rows: list[dict[str, str]]) -> str:
    """The lines with the columns that any of them fills."""
    columns = {key: title for key, title in COLUMNS.items() if any(key in row for row in rows)}
    cells = [list(columns.values()), *([row.get(key, "") for key in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


@with_sampling_options
def command(
    runs: Annotated[list[str] | None, typer.Argument(help="runs/NAME of tokenizers, VAEs, priors; pipelines.")] = None,
    data: Annotated[str | None, typer.Option(help="Of the images; what the models were trained on.")] = None,
    num_images: Annotated[int, typer.Option(min=1, max=32, help="Pictured of each model.")] = 12,
    features: Annotated[
        str | None, typer.Option(help="runs/NAME of a feature network, for Frechet distances and class accuracy.")
    ] = None,
    class_name: Annotated[list[str] | None, typer.Option(help="Repeat for several, which take turns.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A folder: compare, or runs/tour, by default.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Another file for what is measured.")] = None,
    train_all: Annotated[
        bool,
        typer.Option(
            "--tour",
            help="Train nine models, from AE to MaskGIT, and tell their story (samples: guidance 2).",
        ),
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(help=f"Of training for each model of the tour; {MINUTES} by default.")
    ] = None,
    *,
    sampling: SamplingConfig,
) -> None:
    """Show trained models side by side, or train all families and tell their story."""
    if json_file and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise InputError(f"--json {json_file}: expected a file in a folder that is there")
    if train_all and runs:
        raise InputError(
            f"--tour and {' '.join(runs)}: the tour trains its own models; give --tour alone, or runs alone"
        )
    if not train_all and not runs:
        raise InputError("no runs: give runs/NAME of at least one trained model, or --tour, which trains them itself")
    if minutes is not None and not minutes > 0:
        raise InputError(f"--minutes {minutes:g}: expected more than 0; {MINUTES:g} by default")
    if out and out.is_file():
        raise InputError(f"--out {out}: is a file; expected a folder")
    if train_all:
        if features or class_name:
            option = f"--features {features}" if features else f"--class-name {(class_name or [''])[0]}"
            raise InputError(f"{option}: the tour trains its own judge and shows all classes; leave it out")
        out = out or Path("runs/tour")
        comparison = tour(out, data or "shapes", MINUTES if minutes is None else minutes, num_images, seed, sampling)
    else:
        if minutes is not None:
            raise InputError(
                f"--minutes {minutes}: is of --tour, which trains; leave it out, or give --tour and no runs"
            )
        out = out or Path("compare")
        comparison = compare_models(
            runs or [], data, num_images=num_images, features=features, class_names=class_name or None, seed=seed,
            sampling=sampling,
        )  # fmt: skip
        write_comparison(comparison, out)
    if json_file:
        write_json(json_file, comparison_document(comparison))
    print("\n".join([text_table(figure_rows(comparison.models)), *evidence_notes(comparison.models)]))
    print(f"{out / 'compare.html'}; the pictures: {out / 'compare.png'}; the figures: {out / 'compare.json'}")


if __name__ == "__main__":
    run_command(command)
