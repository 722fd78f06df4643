"""Measures a trained model: a tokenizer or a prior.

accelerate launch -m pipelines.evaluate runs/NAME [--features runs/features_NAME] [--json FILE]
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.drawing.sampling_options import with_sampling_options
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.errors import InputError
from twostage.core.files import write_json
from twostage.core.machine.command import run_command

__all__ = ["command"]

FEATURES_HELP = (
    "The network that judges images: imagenet (needs the extra imagenet), or runs/NAME of a feature network (twostage "
    "train-features)."
)
FOR_TOKENIZERS, FOR_PRIORS = "For tokenizers", "For priors"
SAMPLES_HELP = "Samples to judge; by default 1,000. Needs --features or --inception."


@with_sampling_options
def command(
    model: Annotated[str, typer.Argument(help="runs/NAME of a trained tokenizer (or AE, VAE ...) or prior.")],
    data: Annotated[str | None, typer.Option(help="Source of the images; by default the model's own.")] = None,
    split: Annotated[
        str | None, typer.Option(help="val, test or train; by default the one that training validated on.")
    ] = None,
    features: Annotated[str | None, typer.Option(help=FEATURES_HELP)] = None,
    inception: Annotated[
        Path | None, typer.Option(help="Inception weights (torch-fidelity's .pth) to judge with instead.")
    ] = None,
    num_images: Annotated[
        int | None, typer.Option(min=1, help="Images to measure, spread evenly over the split; by default all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write evaluation.json to this file.")] = None,
    weights_dir: Annotated[
        Path | None, typer.Option(help="Folder with the VGG weights for LPIPS.", rich_help_panel=FOR_TOKENIZERS)
    ] = None,
    codes: Annotated[
        str | None, typer.Option(help="Codes to measure; by default those of its training.", rich_help_panel=FOR_PRIORS)
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="runs/TOKENIZER, if it has moved.", rich_help_panel=FOR_PRIORS)
    ] = None,
    num_samples: Annotated[int | None, typer.Option(min=1, help=SAMPLES_HELP, rich_help_panel=FOR_PRIORS)] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the samples; by default 0.", rich_help_panel=FOR_PRIORS)
    ] = None,
    *,
    sampling: SamplingConfig,
) -> None:
    """Measure a tokenizer and judge whether it is ready for stage two, or measure a prior."""
    from accelerate import PartialState

    from pipelines.evaluation.evaluate_prior import evaluate_prior
    from pipelines.evaluation.evaluate_tokenizer import evaluate_tokenizer
    from pipelines.evaluation.samples import SampleRequest
    from pipelines.saved.saved_model import SavedModel

    if json_file and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise InputError(f"--json {json_file}: expected a file in an existing folder.")
    saved = SavedModel.find_run(model)
    common: dict[str, Any] = {"features": features, "inception": inception, "num_images": num_images}
    for_samples = _sample_options(num_samples, seed, sampling)
    if saved.kind == "prior":
        _refuse_others(model, "prior", "tokenizers", {"--weights-dir": weights_dir})
        samples = SampleRequest(num_samples or 1000, seed or 0, sampling)
        found = evaluate_prior(model, codes, tokenizer, data, split, samples=samples, batch_size=batch_size, **common)
    else:
        _refuse_others(model, "tokenizer", "priors", {"--codes": codes, "--tokenizer": tokenizer, **for_samples})
        found = evaluate_tokenizer(model, data, split, weights_dir=weights_dir, batch_size=batch_size, **common)
    out = saved.home / "evaluation"
    if PartialState().is_main_process:
        if json_file:
            write_json(json_file, found.document())
        print(f"{found.table()}\n{out}: {', '.join(found.write(out))}")
    PartialState().wait_for_everyone()
    if found.refusal:
        raise InputError(f"{found.refusal}. The other figures are in {out / 'evaluation.json'}.")


def _sample_options(num_samples: int | None, seed: int | None, sampling: SamplingConfig) -> dict[str, Any]:
    settings = sampling.model_dump(exclude_defaults=True)
    named = {f"--{name.replace('_', '-')}": value for name, value in settings.items()}
    return {"--num-samples": num_samples, "--seed": seed} | named


def _refuse_others(model: str, kind: str, others: str, options: dict[str, Any]) -> None:
    """Refuses options that only apply to the other kind of model."""
    for option, value in options.items():
        if value is not None:
            raise InputError(f"{option} {value}: only applies to {others}, but {model} is a {kind}. Remove it.")


if __name__ == "__main__":
    run_command(command)
