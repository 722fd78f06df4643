"""Generates images with a trained prior and its tokenizer, or with a variational autoencoder.

accelerate launch -m pipelines.generate runs/PRIOR --num-images 64 --class-name cat --seed 0 --out DIR
"""

import itertools
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate.utils import broadcast_object_list

from pipelines.drawing.batch_size import fitting_batch_size
from pipelines.drawing.sampling_options import with_sampling_options
from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.files.class_sheet import class_sheet
from pipelines.files.image_files import FileFormat, image_files
from stage2_prior.sampling import SamplingConfig
from twostage.core.config.sections import describe_differences
from twostage.core.errors import InputError
from twostage.core.files import read_json
from twostage.core.images.sheets import save_image
from twostage.core.machine.command import run_command
from twostage.core.machine.processes import join_processes
from twostage.core.machine.progress import ProgressBar
from twostage.core.machine.stopping import resumable
from twostage.core.runs.model_folder import check_format, hash_tensors, write_json

__all__ = ["generate_folder"]

FORMAT_VERSION = 1
"""Of settings.json; the first ones did not say it."""
MAX_SHOWN = 80


def generate_folder(
    pipeline: TwoStagePipeline,
    out: Path,
    num_images: int,
    class_names: list[str] | None,
    seed: int,
    sampling: SamplingConfig,
    batch_size: int | None = None,
    file_format: FileFormat = "png",
) -> None:
    """Writes ``out``/images/ (000000.png ..., or shards of parquet), grid.png and settings.json, the images shared by
    the processes.

    Images that are there already, from the same settings, are kept; damaged ones are made anew.

    Raises:
        InputError: the folder holds images from other settings (the differences are shown; nothing is changed).
    """
    state = join_processes()
    pipeline.to(state.device or "cpu")
    cycle, names = pipeline.labels_for(class_names), class_names or pipeline.class_names
    pipeline.check_sampling(sampling)
    settings = _settings(pipeline, class_names, seed, sampling) | {"file_format": file_format}
    _check_folder(out, settings)
    state.wait_for_everyone()  # nobody writes before all have looked
    files = image_files(file_format, out / "images", pipeline.image_size, pipeline.channels, pipeline.label_names)
    decided: list[Any] = [None, None]  # by one for all: what is missing, and how many images fit the memory
    if state.is_main_process:
        fitting = batch_size or fitting_batch_size(pipeline.prior, sampling, pipeline.device)
        decided = [files.missing(num_images), fitting]
    if state.num_processes > 1:
        broadcast_object_list(decided)
    missing, at_once = decided
    size = files.part_size(at_once)
    parts = [range(k * size, min((k + 1) * size, num_images)) for k in sorted({number // size for number in missing})]
    if state.is_main_process:
        untrained = [name for name in pipeline.label_names or [] if name not in (pipeline.class_names or [])]
        if untrained and not class_names:
            print(f"no images of the classes that had no training image: {', '.join(untrained)}")
        out.mkdir(parents=True, exist_ok=True)
        labels = [names[i % len(names)] for i in range(num_images)] if names else None
        document = {"format_version": FORMAT_VERSION, **settings, "num_images": num_images, "classes": labels}
        write_json(out / "settings.json", document)
        (out / "images").mkdir(exist_ok=True)
    state.wait_for_everyone()

    start, wanted = time.perf_counter(), sum(map(len, parts))
    mine = parts[state.process_index :: state.num_processes]
    speedup = wanted / max(1, sum(map(len, mine)))  # the bar is of all processes, as if they were as fast as this one
    with ProgressBar(total=wanted, unit="images", disable=not state.is_main_process) as bar:
        for part in mine:
            drawn = pipeline.generate(part, cycle, sampling, seed, at_once, lambda n: bar.update(n * speedup))
            labels = None if cycle is None else [cycle[i % len(cycle)] for i in part]
            files.write(part, torch.cat([pixels for pixels, _ in drawn]), labels)
    state.wait_for_everyone()
    if state.is_main_process:
        seconds = time.perf_counter() - start
        save_image(class_sheet(files.read(min(num_images, MAX_SHOWN)), names, cycle), out / "grid.png")
        kept = f"{num_images - len(missing)} were there already" if len(missing) < num_images else ""
        rate = f"{wanted / seconds:.1f} a second" if wanted else ""
        print(f"{num_images} images: {out / 'images'} ({', '.join(filter(None, [kept, rate]))})")
        print(f"at a glance: {out / 'grid.png'}; how: {out / 'settings.json'}")


def _settings(
    pipeline: TwoStagePipeline, class_names: list[str] | None, seed: int, sampling: SamplingConfig
) -> dict[str, Any]:
    models = [model for model in (pipeline.prior, pipeline.tokenizer) if model]
    return {
        "weights_sha256": hash_tensors(itertools.chain.from_iterable(model.state_dict().items() for model in models)),
        "tokenizer": pipeline.tokenizer.content_hash(),
        "seed": seed,
        "class_names": class_names,
        **sampling.model_dump(mode="json"),
    }


def _check_folder(out: Path, settings: dict[str, Any]) -> None:
    file = out / "settings.json"
    if file.is_file():
        stored = read_json(file, "how these images were made is lost; give another --out")
        check_format(stored.get("format_version", 1), FORMAT_VERSION, file)
        differences = describe_differences({key: stored.get(key) for key in settings}, settings)
        if differences:
            raise InputError(
                f"--out {out}: holds images from other settings:\n  "
                + "\n  ".join(differences)
                + "\nNothing was changed. Give another --out, or remove the folder"
            )
    elif out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - {".settings.json.partial"}):
        raise InputError(f"--out {out}: exists and holds no generated images; give another --out")


@with_sampling_options
def command(
    prior: Annotated[str, typer.Argument(help="runs/NAME of a prior or a VAE, a pipeline folder, or a hub id.")],
    out: Annotated[Path, typer.Option(help="The folder for images/, grid.png and settings.json.")],
    num_images: Annotated[int, typer.Option(min=1)] = 64,
    class_name: Annotated[list[str] | None, typer.Option(help="Repeat for several, which take turns.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Image i depends on the seed and i alone.")] = 0,
    *,
    sampling: SamplingConfig,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images at a time, each process; what fits the memory by default.")
    ] = None,
    file_format: Annotated[
        FileFormat, typer.Option("--format", help="A PNG each, or parquet of 1,000 images each.")
    ] = "png",
    tokenizer: Annotated[str | None, typer.Option(help="runs/TOKENIZER, where it has moved.")] = None,
) -> None:
    """Generate images with a trained prior and its tokenizer."""
    pipeline = TwoStagePipeline.from_pretrained(prior, tokenizer)
    with resumable():
        generate_folder(pipeline, out, num_images, class_name or None, seed, sampling, batch_size, file_format)


if __name__ == "__main__":
    run_command(command)
