"""Measures a trained model: a tokenizer (`evaluate_tokenizer`) or a prior (`evaluate_prior`).

accelerate launch -m pipelines.evaluate runs/NAME [--features runs/features_NAME] [--json FILE]
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from accelerate import PartialState

from pipelines.drawing.sampling_options import with_sampling_options
from pipelines.evaluation.evaluate_prior import evaluate_prior
from pipelines.evaluation.evaluate_tokenizer import evaluate_tokenizer, tokenizer_table
from pipelines.evaluation.evaluation_report import PICTURES
from pipelines.evaluation.prior_table import prior_table
from pipelines.saved.saved_model import SavedModel
from stage2_prior.sampling import SamplingConfig
from twostage.core.errors import InputError
from twostage.core.machine.command import run_command
from twostage.core.runs.model_folder import write_json

__all__ = ["command"]


@with_sampling_options
def command(
    model: Annotated[str, typer.Argument(help="runs/NAME of a trained tokenizer (or AE, VAE ...) or prior.")],
    data: Annotated[str | None, typer.Option(help="Another source of images than it was made for.")] = None,
    split: Annotated[str | None, typer.Option(help="val, test or train; what its training validated on.")] = None,
    features: Annotated[str | None, typer.Option(help="runs/NAME of a feature network, for Frechet distances.")] = None,
    inception: Annotated[Path | None, typer.Option(help="Inception weights (torch-fidelity's .pth) instead.")] = None,
    num_images: Annotated[int | None, typer.Option(min=1, help="Evenly spread over the split; all by default.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="Another file for what is measured.")] = None,
    weights_dir: Annotated[
        Path | None, typer.Option(help="Where the VGG weights of LPIPS lie.", rich_help_panel="Of tokenizers")
    ] = None,
    codes: Annotated[
        str | None, typer.Option(help="Other codes than it was trained on.", rich_help_panel="Of priors")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="runs/TOKENIZER, where it has moved.", rich_help_panel="Of priors")
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="1,000 by default; needs a network.", rich_help_panel="Of priors")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the samples; 0 by default.", rich_help_panel="Of priors")
    ] = None,
    *,
    sampling: SamplingConfig,
) -> None:
    """Measure a tokenizer, and say whether it is ready for stage two; or measure a prior."""
    if json_file and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise InputError(f"--json {json_file}: expected a file in a folder that is there")
    saved = SavedModel.find_run(model)
    out = saved.home / "evaluation"
    common: dict[str, Any] = {
        "features": features,
        "inception": inception,
        "num_images": num_images,
        "batch_size": batch_size,
        "out": out,
    }
    of_samples: dict[str, Any] = {"--num-samples": num_samples, "--seed": seed} | {
        f"--{name.replace('_', '-')}": value for name, value in sampling.model_dump(exclude_defaults=True).items()
    }
    if saved.kind == "prior":
        _refuse_other(model, "prior", "tokenizers", {"--weights-dir": weights_dir})
        given = [f"{option} {value}" for option, value in of_samples.items() if value is not None]
        if given and not (features or inception):
            raise InputError(
                f"{', '.join(given)}: samples are drawn only where a network judges them; give --features runs/NAME "
                "(twostage train-features) or --inception FILE, or leave this out"
            )
        document = evaluate_prior(
            model,
            codes,
            tokenizer,
            data,
            split,
            num_samples=num_samples or 1000,
            seed=seed or 0,
            sampling=sampling,
            **common,
        )
        shown = prior_table(document)
    else:
        _refuse_other(model, "tokenizer", "priors", {"--codes": codes, "--tokenizer": tokenizer, **of_samples})
        document = evaluate_tokenizer(model, data, split, weights_dir=weights_dir, **common)
        shown = tokenizer_table(document)
    if PartialState().is_main_process:
        if json_file:
            write_json(json_file, document)
        print(shown)
        files = [out / f"{name}.png" for name in PICTURES]
        print(f"{out}: {', '.join(['evaluation.json', 'evaluation.html', *(f.name for f in files if f.exists())])}")
    if refused := document["protocol"].get("samples", {}).get("refused"):
        raise InputError(f"{refused}; the other figures are in {out / 'evaluation.json'}")


def _refuse_other(model: str, kind: str, others: str, options: dict[str, Any]) -> None:
    """Refuses options of the other kind of model."""
    for option, value in options.items():
        if value is not None:
            raise InputError(f"{option} {value}: is of {others}, {model} holds a {kind}; leave it out")


if __name__ == "__main__":
    run_command(command)
