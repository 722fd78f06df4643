"""A folder of generated images: written by several processes together, and completed if the command was stopped."""

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from pipelines.drawing.asked import Asked, Cycle
from pipelines.drawing.batch_size import fitting_batch_size
from pipelines.drawing.sampler import ImageSampler
from pipelines.files.image_files import FileFormat, ImageFiles, ImageForm, NumberedFiles, ParquetShards
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.config.sections import describe_differences
from twostage.core.errors import InputError
from twostage.core.files import read_json, write_json
from twostage.core.images.sheets import class_sheet, prompt_sheet, save_image
from twostage.core.machine.overlap import BackgroundWriter
from twostage.core.machine.processes import join_processes
from twostage.core.machine.progress import ProgressBar
from twostage.core.runs.model_folder import check_format, hash_tensors

__all__ = ["GenerateRequest", "generate_folder"]

FORMAT_VERSION = 1
"""Format of settings.json; the first versions did not record it."""
MAX_SHOWN = 80


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """A request for generated images."""

    num_images: int
    asked: Asked = Asked()  # noqa: RUF009 (immutable)
    """What the images show."""
    seed: int = 0
    sampling: SamplingConfig = SamplingConfig()  # noqa: RUF009 (immutable)
    batch_size: int | None = None
    """Images that each process draws at a time; None: as many as fit in the free memory."""
    file_format: FileFormat = "png"


def generate_folder(sampler: ImageSampler, request: GenerateRequest, out: Path) -> None:
    """Writes ``out``/images/ (000000.png ..., or parquet shards), grid.png and settings.json; the processes share the
    images.

    Intact images from the same settings are kept; damaged ones are drawn again.

    Raises:
        InputError: the folder holds images from other settings. The message shows the differences; nothing is changed.
    """
    state = join_processes()
    sampler.to(state.device or "cpu")
    cycle = sampler.cycle(request.asked)
    names = None if cycle.labels is None else request.asked.class_names or sampler.class_names
    sampler.check_sampling(request.sampling)
    settings = _settings(sampler, request, cycle)
    _check_folder(out, settings)
    state.wait_for_everyone()  # nobody writes before everyone has looked
    form = ImageForm(sampler.image_size, sampler.channels, sampler.bits)
    files = NumberedFiles(out / "images", form)
    if request.file_format == "parquet":
        files = ParquetShards(out / "images", form, sampler.label_names)
    missing, batch_size = _plan(sampler, request, files, state)
    if state.is_main_process:
        _begin(sampler, request, out, settings, names)
    state.wait_for_everyone()

    size, start = files.part_size(batch_size), time.perf_counter()
    firsts = sorted({number // size * size for number in missing})
    parts = [range(first, min(first + size, request.num_images)) for first in firsts]
    wanted, mine = sum(map(len, parts)), parts[state.process_index :: state.num_processes]
    # The bar shows all processes together, assuming that the others are as fast as this one.
    speedup = wanted / max(1, sum(map(len, mine)))
    bar = ProgressBar(total=wanted, unit="images", disable=not state.is_main_process)
    with bar, BackgroundWriter() as writer:
        for part in mine:
            drawn = sampler.draw(
                part, cycle, request.sampling, request.seed, batch_size, lambda n: bar.update(n * speedup)
            )
            writer(files.write, part, torch.cat([pixels for pixels, _ in drawn]), cycle.labels_of(part))
    state.wait_for_everyone()
    if state.is_main_process:
        seconds, total = time.perf_counter() - start, request.num_images
        shown = sampler.to_shown(files.read(min(total, MAX_SHOWN)))
        sheet = prompt_sheet(shown, cycle.captions) if cycle.captions else class_sheet(shown, names, cycle.labels)
        save_image(sheet, out / "grid.png")
        kept = f"{total - len(missing)} were already there" if len(missing) < total else ""
        rate = f"{wanted / seconds:.1f} per second" if wanted else ""
        print(f"{total} images: {out / 'images'} ({', '.join(filter(None, [kept, rate]))})")
        print(f"overview: {out / 'grid.png'}; settings: {out / 'settings.json'}")


def _settings(sampler: ImageSampler, request: GenerateRequest, cycle: Cycle) -> dict[str, Any]:
    """All settings that determine the images, as in settings.json."""
    models = [model for model in (sampler.prior, sampler.tokenizer) if model]
    return {
        "weights_sha256": hash_tensors(itertools.chain.from_iterable(model.state_dict().items() for model in models)),
        "tokenizer": sampler.tokenizer.content_hash(),
        "seed": request.seed,
        "class_names": request.asked.class_names,
        **_condition_settings(request.asked, cycle),
        **request.sampling.model_dump(mode="json"),
        "file_format": request.file_format,
    }


def _condition_settings(asked: Asked, cycle: Cycle) -> dict[str, Any]:
    """The conditions beside the class, if there are any."""
    found: dict[str, Any] = {}
    if cycle.captions or cycle.negative:
        against = asked.negative_prompts
        found["prompts"] = list(cycle.captions)
        found["negative_prompt"] = against[0] if against and len(against) == 1 else against  # as in earlier versions
    hashes = {name: hash_tensors([(name, value)]) for name, value in cycle.values.items() if name != "text"}
    return found | ({"conditions_sha256": hashes} if hashes else {})


def _check_folder(out: Path, settings: dict[str, Any]) -> None:
    file = out / "settings.json"
    if file.is_file():
        stored = read_json(file, "the settings of these images are lost. Choose another --out")
        check_format(stored.get("format_version", 1), FORMAT_VERSION, file)
        stored = SamplingConfig().model_dump(mode="json") | stored  # an earlier version may lack newer settings
        differences = describe_differences({key: stored.get(key) for key in settings}, settings)
        if differences:
            raise InputError(
                f"--out {out}: holds images from other settings:\n  "
                + "\n  ".join(differences)
                + "\nNothing was changed. Choose another --out, or remove the folder"
            )
    elif out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - {".settings.json.partial"}):
        raise InputError(f"--out {out}: exists but holds no generated images. Choose another --out")


def _plan(
    sampler: ImageSampler, request: GenerateRequest, files: ImageFiles, state: PartialState
) -> tuple[list[int], int]:
    """The missing images and the batch size: decided by one process, so that all have the same."""
    decided: list[Any] = [None, None]
    if state.is_main_process:
        fitting = request.batch_size or fitting_batch_size(sampler.prior, request.sampling, sampler.device)
        decided = [files.missing(request.num_images), fitting]
    if state.num_processes > 1:
        broadcast_object_list(decided)
    return decided[0], decided[1]


def _begin(
    sampler: ImageSampler, request: GenerateRequest, out: Path, settings: dict[str, Any], names: list[str] | None
) -> None:
    """Writes settings.json and makes the folders."""
    untrained = [name for name in sampler.label_names or [] if name not in (sampler.class_names or [])]
    if untrained and not request.asked.class_names:
        print(f"skipped classes that had no training images: {', '.join(untrained)}")
    labels = [names[i % len(names)] for i in range(request.num_images)] if names else None
    out.mkdir(parents=True, exist_ok=True)
    document = {"format_version": FORMAT_VERSION, **settings, "num_images": request.num_images, "classes": labels}
    write_json(out / "settings.json", document)
    (out / "images").mkdir(exist_ok=True)
