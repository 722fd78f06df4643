"""Generates images with a trained prior and its tokenizer.

accelerate launch -m pipelines.generate runs/PRIOR --num-images 64 --class-name cat --seed 0 --out DIR
"""

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from tqdm import tqdm

from core.command import run_command
from core.config import describe_differences
from core.errors import InputError
from core.images import to_pil
from core.model_folder import hash_tensors, write_json
from core.pictures import save_picture
from core.processes import join_processes
from pipelines.sampling_options import with_sampling_options
from pipelines.two_stage import TwoStagePipeline, class_sheet, load_pipeline
from stage2_prior.sampling import SamplingConfig

__all__ = ["generate_folder"]

MOST_PICTURED = 80


def generate_folder(
    pipeline: TwoStagePipeline,
    out: Path,
    num_images: int,
    class_names: list[str] | None,
    seed: int,
    sampling: SamplingConfig,
    batch_size: int,
) -> None:
    """Writes ``out``/images/000000.png ..., grid.png and settings.json, the images shared by the processes.

    Images that are there already, from the same settings, are kept.

    Raises:
        InputError: the folder holds images from other settings (the differences are shown; nothing is changed).
    """
    state = join_processes()
    pipeline.to(state.device or "cpu")
    cycle, names = pipeline.labels_for(class_names), class_names or pipeline.class_names
    pipeline.check_sampling(sampling)
    settings = _settings(pipeline, class_names, seed, sampling)
    _check_folder(out, settings)
    state.wait_for_everyone()
    images = out / "images"
    if state.is_main_process:
        images.mkdir(parents=True, exist_ok=True)
        labels = [names[i % len(names)] for i in range(num_images)] if names else None
        write_json(out / "settings.json", {**settings, "num_images": num_images, "classes": labels})
    state.wait_for_everyone()
    starts = range(0, num_images, batch_size)[state.process_index :: state.num_processes]
    batches = [range(start, min(start + batch_size, num_images)) for start in starts]
    batches = [numbers for numbers in batches if not all(_file(images, i).exists() for i in numbers)]
    with tqdm(total=sum(map(len, batches)), unit="images", unit_scale=True, disable=not state.is_main_process) as bar:
        for numbers in batches:
            for pixels, _ in pipeline.generate(numbers, cycle, sampling, seed, batch_size, bar.update):
                for number, image in zip(numbers, pixels, strict=True):
                    if not _file(images, number).exists():
                        save_picture(to_pil(image), _file(images, number))
    state.wait_for_everyone()
    if state.is_main_process:
        _draw_grid(out, min(num_images, MOST_PICTURED), names)
        print(f"{num_images} images: {images}; at a glance: {out / 'grid.png'}; how: {out / 'settings.json'}")


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"


def _settings(
    pipeline: TwoStagePipeline, class_names: list[str] | None, seed: int, sampling: SamplingConfig
) -> dict[str, Any]:
    weights = itertools.chain(pipeline.prior.state_dict().items(), pipeline.tokenizer.state_dict().items())
    return {
        "weights_sha256": hash_tensors(weights),
        "tokenizer": pipeline.prior.config.tokenizer.hash,
        "seed": seed,
        "class_names": class_names,
        **sampling.model_dump(mode="json"),
    }


def _check_folder(out: Path, settings: dict[str, Any]) -> None:
    file = out / "settings.json"
    if file.is_file():
        stored = json.loads(file.read_text(encoding="utf-8"))
        differences = describe_differences({key: stored.get(key) for key in settings}, settings)
        if differences:
            raise InputError(
                f"--out {out}: holds images from other settings:\n  "
                + "\n  ".join(differences)
                + "\nNothing was changed. Give another --out, or remove the folder"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: exists and holds no generated images; give another --out")


def _draw_grid(out: Path, count: int, names: list[str] | None) -> None:
    arrays = [np.asarray(Image.open(_file(out / "images", i))) for i in range(count)]
    pixels = torch.from_numpy(np.stack([a[None] if a.ndim == 2 else a.transpose(2, 0, 1) for a in arrays]))
    save_picture(class_sheet(pixels, names), out / "grid.png")


@with_sampling_options
def command(
    prior: Annotated[str, typer.Argument(help="runs/NAME of a trained prior, a pipeline folder, or a hub id.")],
    out: Annotated[Path, typer.Option(help="The folder for images/, grid.png and settings.json.")],
    num_images: Annotated[int, typer.Option(min=1)] = 64,
    class_name: Annotated[list[str] | None, typer.Option(help="Repeat for several, which take turns.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Image i depends on the seed and i alone.")] = 0,
    *,
    sampling: SamplingConfig,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time, each process.")] = 32,
    tokenizer: Annotated[str | None, typer.Option(help="runs/TOKENIZER, where it has moved.")] = None,
) -> None:
    """Generate images with a trained prior and its tokenizer."""
    generate_folder(load_pipeline(prior, tokenizer), out, num_images, class_name or None, seed, sampling, batch_size)


if __name__ == "__main__":
    run_command(command)
