"""Generates images with a trained prior and its tokenizer, or with a variational autoencoder.

accelerate launch -m pipelines.generate runs/PRIOR --num-images 64 --class-name cat --seed 0 --out DIR
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipelines.drawing.sampling_options import with_sampling_options
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.machine.command import run_command

__all__ = ["command"]


@with_sampling_options
def command(
    prior: Annotated[str, typer.Argument(help="runs/NAME of a prior or a VAE, a pipeline folder, or a hub id.")],
    out: Annotated[
        Path | None, typer.Option(help="The folder for images/, grid.png and settings.json; by default generated/NAME.")
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Number of images.")] = 64,
    class_name: Annotated[list[str] | None, typer.Option(help="A class; repeat to cycle through several.")] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A text to draw, for a prior with captions; repeat to cycle through several."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="One prompt per line, or one JSON object (prompt, negative_prompt, class, map, vector).",
        ),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="A text that guidance leads away from.")] = None,
    map_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--map", metavar="FILE", help="A map of labels, or an image, for a prior with maps; repeat for several."
        ),
    ] = None,
    vector: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A .npy file of one vector, or of a vector in each row, for a prior with vectors."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Image i depends only on the seed and i.")] = 0,
    *,
    sampling: SamplingConfig,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images that each process generates at a time; by default as many as fit in memory."),
    ] = None,
    file_format: Annotated[
        Literal["png", "parquet"],
        typer.Option("--format", help="One PNG (or TIFF) per image, or parquet files of 1,000 images each."),
    ] = "png",
    tokenizer: Annotated[str | None, typer.Option(help="runs/TOKENIZER, if it has moved.")] = None,
) -> None:
    """Generate images with a trained prior and its tokenizer."""
    from pipelines.drawing.asked import read_asked
    from pipelines.drawing.generated_folder import GenerateRequest, generate_folder
    from pipelines.drawing.two_stage import TwoStagePipeline
    from twostage.core.machine.stopping import resumable

    pipeline = TwoStagePipeline.from_pretrained(prior, tokenizer)
    asked = read_asked(class_name, prompt, negative_prompt, map_file, vector, prompts, pipeline.map_channels)
    request = GenerateRequest(
        num_images=num_images, asked=asked, seed=seed, sampling=sampling, batch_size=batch_size, file_format=file_format
    )  # fmt: skip
    with resumable():
        generate_folder(pipeline, request, out or Path("generated") / Path(prior).resolve().name)


if __name__ == "__main__":
    run_command(command)
