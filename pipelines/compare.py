"""Compares trained models side by side, or trains every family and compares them.

twostage compare runs/VQVAE runs/VAE runs/PRIOR ... [--features runs/features_NAME] [--out compare]
twostage compare --tour [--minutes 1.2] [--data shapes] [--out runs/tour]
"""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.drawing.sampling_options import with_sampling_options
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.errors import InputError
from twostage.core.files import write_json
from twostage.core.machine.command import run_command

__all__ = ["command"]


@with_sampling_options
def command(
    runs: Annotated[
        list[str] | None, typer.Argument(help="runs/NAME of tokenizers, VAEs or priors, or pipelines.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Source of the images; by default the models' own.")] = None,
    num_images: Annotated[int, typer.Option(min=1, max=32, help="Images to show for each model.")] = 10,
    features: Annotated[
        str | None,
        typer.Option(help="imagenet, or runs/NAME of a feature network, for distances and class accuracy."),
    ] = None,
    class_name: Annotated[
        list[str] | None, typer.Option(help="Class of the samples. Repeat to cycle through several classes.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Output folder; by default compare, or runs/tour.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write compare.json to this file.")] = None,
    train_all: Annotated[
        bool,
        typer.Option("--tour", help="Train nine models, from AE to MaskGIT, and compare them (guidance scale 2)."),
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(help="Training time for each model of the tour; by default 1.0.")
    ] = None,
    *,
    sampling: SamplingConfig,
) -> None:
    """Compare trained models side by side, or train all families and compare them."""
    from pipelines.comparison.comparison_report import comparison_document, comparison_text, write_comparison
    from pipelines.comparison.side_by_side import compare_models
    from pipelines.comparison.tour import DEFAULT_MINUTES, take_tour
    from pipelines.evaluation.samples import SampleRequest

    if json_file and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise InputError(f"--json {json_file}: expected a file in an existing folder.")
    if out and out.is_file():
        raise InputError(f"--out {out}: is a file. Choose a folder.")
    if minutes is not None and not minutes > 0:
        raise InputError(f"--minutes {minutes:g}: expected a number above 0, such as {DEFAULT_MINUTES:g}.")
    request = SampleRequest(seed=seed, sampling=sampling)
    if train_all:
        _refuse_for_tour({"runs": runs, "--features": features, "--class-name": class_name})
        out = out or Path("runs/tour")
        comparison = take_tour(out, data or "shapes", minutes or DEFAULT_MINUTES, num_images, request)
    else:
        if not runs:
            raise InputError("no runs: expected runs/NAME of at least one trained model, or --tour to train some.")
        if minutes is not None:
            raise InputError(f"--minutes {minutes:g}: only applies to --tour, which trains. Remove it.")
        out = out or Path("compare")
        comparison = compare_models(
            runs, data, num_images=num_images, features=features, class_names=class_name or None, request=request
        )
        write_comparison(comparison, out)
    if json_file:
        write_json(json_file, comparison_document(comparison))
    print(comparison_text(comparison))
    print(f"{out / 'compare.html'}; images: {out / 'compare.png'}; figures: {out / 'compare.json'}")


def _refuse_for_tour(options: dict[str, str | list[str] | None]) -> None:
    for option, value in options.items():
        if value:
            shown = " ".join(value) if isinstance(value, list) else value
            raise InputError(
                f"{option} {shown}: does not apply to --tour, which trains its own models and its own judge and "
                "shows all classes. Remove it."
            )


if __name__ == "__main__":
    run_command(command)
