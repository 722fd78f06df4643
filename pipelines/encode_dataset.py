"""Turns a data set into codes with a trained tokenizer.

accelerate launch -m pipelines.encode_dataset runs/TOKENIZER [--out DIR] [--data SOURCE] [--horizontal-flip] [--crops N]

The processes that share the work have to be of one machine.
"""

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from accelerate import PartialState

from pipelines.encoding.image_variants import ImageVariants, image_variants
from pipelines.encoding.partial_codes import CHUNK, PartialCodes, discard_leftover
from pipelines.saved.saved_model import SavedModel
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.codes import (
    Augmentation,
    CodeCache,
    Manifest,
    SplitFiles,
    TokenizerReference,
    code_dtype,
    code_statistics,
)
from twostage.core.data.dataset import DataConfig, ImageData, load_images
from twostage.core.data.sources import find_local
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_float
from twostage.core.machine.command import run_command
from twostage.core.machine.processes import join_processes
from twostage.core.machine.progress import ProgressBar
from twostage.core.machine.stopping import going_on_later
from twostage.core.runs.places import Record, find_places, portable, same_place

__all__ = ["encode_dataset"]


def encode_dataset(
    tokenizer: str | Path,
    out: str | Path | None = None,
    source: str | None = None,
    augmentation: Augmentation | None = None,
) -> Path:
    """Encodes every split into ``out`` (codes/NAME by default), the images shared by the processes of one machine.

    Killed at any instant and called again, with any number of processes, it goes on where it was.

    Args:
        augmentation: which further rows the training split gets; none by default.

    Returns:
        The folder: a code cache.

    Raises:
        InputError: no tokenizer there, one without codes, a folder that holds other codes or other things already, or
            processes of several machines that do not see each other's writes.
    """
    augmentation = augmentation or Augmentation()
    state = join_processes()
    model = Autoencoder.from_pretrained(tokenizer).to(state.device)
    if model.codebook_size is None:
        kind = model.config.model.bottleneck.type
        raise InputError(
            f"{tokenizer}: its bottleneck is {kind!r}, which has no codes; train one with "
            "`vector`, `finite_scalar`, `lookup_free` or `residual`"
        )
    saved = SavedModel.find_run(tokenizer)
    data_config = saved.training_data(source)
    final = Path(out) if out else Path("codes") / _name_of(saved.home)
    reference = TokenizerReference(hash=model.content_hash(), path=portable(tokenizer, final))
    if _already_there(final, reference, data_config, augmentation):
        _say(state, f"{final}: already holds the codes of this tokenizer; nothing to do")
        if state.is_main_process:
            discard_leftover(final)  # of a call killed at its last step
        return final

    data = load_images(data_config)
    for line in [data.description, *data.notices]:
        _say(state, line)
    splits = image_variants(data, data_config, augmentation)
    common = {"tokenizer": reference.hash, "augmentation": augmentation.model_dump(mode="json")}
    group, contents = data_config.model_dump(mode="json"), data.contents()
    identity = common | {"data": {**group, "source": None}, "images": contents.facts}
    partial = PartialCodes(final, identity, splits, former=common | {"data": group})
    if state.is_main_process and (found := partial.begin(model.code_grid, code_dtype(model.codebook_size))):
        print(found)
    state.wait_for_everyone()
    partial.check_shared()
    for split, images in splits.items():
        _encode_split(model, images, split, partial, state)
    state.wait_for_everyone()
    if state.is_main_process:
        manifest = _manifest(model, data, contents.record, data_config, reference, augmentation, partial)
        partial.finish(manifest)
        print(f"{final}: {_describe(manifest)}")
    state.wait_for_everyone()
    return final


def _name_of(folder: Path) -> str:
    """The last part of a path, also of `.` and `..`."""
    return folder.resolve().name if folder.name in ("", "..") else folder.name


def _already_there(final: Path, reference: TokenizerReference, data: DataConfig, augmentation: Augmentation) -> bool:
    if _is_free(final):
        return False
    if not (final / "manifest.json").is_file():
        raise InputError(f"--out {final}: exists and holds no codes; give another --out")
    manifest = CodeCache(final).manifest
    if manifest.tokenizer.hash != reference.hash:
        raise InputError(
            f"--out {final}: holds the codes of the tokenizer {manifest.tokenizer.hash[:12]}, this one is "
            f"{reference.hash[:12]}; nothing was changed. Give another --out, or remove the folder"
        )
    if not _same_images(final, manifest, data):
        raise InputError(
            f"--out {final}: holds the codes of {manifest.source!r}, this is {data.source!r}, with other images; give "
            "another --out"
        )
    if manifest.augmentation != augmentation:
        raise InputError(
            f"--out {final}: holds codes made with {manifest.augmentation}, this is {augmentation}; nothing was "
            "changed. Give another --out, or remove the folder"
        )
    return True


def _same_images(final: Path, manifest: Manifest, data: DataConfig) -> bool:
    """Whether ``data`` are the images of the codes in ``final``: by where they are, or else by what they are."""
    here = find_local(data.source)
    if here is None:
        return manifest.source == data.source
    if manifest.images is None:  # of an earlier version
        return any(same_place(str(here), str(place)) for place in find_places(manifest.source, final).direct)
    if manifest.source == data.source == portable(data.source, final):
        return True
    return load_images(data).identity() == manifest.images.facts


def _is_free(final: Path) -> bool:
    """Whether there is nothing, or an empty folder that the codes can be renamed to."""
    if final.is_symlink() or final.is_mount():
        return False
    return not final.exists() or (final.is_dir() and not any(final.iterdir()))


@torch.no_grad()
def _encode_split(
    model: Autoencoder, images: ImageVariants, name: str, partial: PartialCodes, state: PartialState
) -> None:
    """Writes this process's share of one split's codes."""
    codes, done = partial.open(name)
    chunks = torch.arange(len(images.images)).split(CHUNK)
    mine = [chunk for chunk in range(state.process_index, len(chunks), state.num_processes) if not done[chunk]]
    for chunk in ProgressBar(mine, desc=name, unit="batch", disable=not state.is_main_process, leave=False):
        first = chunk * CHUNK
        for pixels in images.read(chunks[chunk]):
            indices = model.encode(to_float(pixels.to(state.device))).indices
            assert indices is not None
            codes[first : first + len(pixels)] = indices.cpu().numpy()
            first += len(images.images)
        codes.flush()
        done[chunk] = 1


def _manifest(
    model: Autoencoder,
    data: ImageData,
    images: Record,
    data_config: DataConfig,
    reference: TokenizerReference,
    augmentation: Augmentation,
    partial: PartialCodes,
) -> Manifest:
    assert model.codebook_size is not None
    # From what is on disk, so that it does not matter which call or process has written it.
    statistics = code_statistics({split: partial.open(split)[0] for split in partial.splits}, model.codebook_size)
    return Manifest(
        tokenizer=reference,
        source=_remembered_source(data_config.source, partial.final),
        images=images,
        image_size=model.config.image_size,
        channels=model.config.channels,
        grid=model.code_grid,
        codebook_size=model.codebook_size,
        class_names=data.class_names,
        validation_split=data.validation_name,
        augmentation=augmentation,
        splits={
            split: SplitFiles(
                rows=variants.rows,
                codes=f"{split}.codes.npy",
                labels=None if variants.images.labels is None else f"{split}.labels.npy",
            )
            for split, variants in partial.splits.items()
        },
        **statistics,
    )


def _remembered_source(source: str, final: Path) -> str:
    """A path as the codes can find it again; a name as it is."""
    return portable(source, final) if source != "shapes" and Path(source).exists() else source


def _describe(manifest: Manifest) -> str:
    augmentation, train = manifest.augmentation, manifest.splits["train"].rows
    held_out = sum(files.rows for files in manifest.splits.values()) - train
    said = f"{train // augmentation.variants + held_out:,} images, "
    if augmentation.variants > 1:
        crops = f", {augmentation.crops} crop{'s' * (augmentation.crops > 1)}" if augmentation.crops else ""
        mirrored = ", each mirrored too" if augmentation.horizontal_flip else ""
        said += f"train in {augmentation.variants} variants (plain{crops}{mirrored}): {train + held_out:,} rows, "
    return (
        f"{said}grid {manifest.grid[0]}x{manifest.grid[1]}, "
        f"{manifest.codes_used} of {manifest.codebook_size} codes used, entropy "
        f"{manifest.entropy_nats_per_code:.3f} and held-out unigram "
        f"{manifest.unigram_nats_per_code[manifest.validation_split]:.3f} nats per code "
        f"(uniform {math.log(manifest.codebook_size):.3f})"
    )


def _say(state: PartialState, message: str) -> None:
    if state.is_main_process:
        print(message)


def command(
    tokenizer: Annotated[str, typer.Argument(help="runs/NAME of a trained tokenizer, or its model folder.")],
    out: Annotated[str | None, typer.Option(help="Where the codes go; codes/NAME by default.")] = None,
    data: Annotated[str | None, typer.Option(help="Another source than the tokenizer was trained on.")] = None,
    horizontal_flip: Annotated[
        bool, typer.Option("--horizontal-flip", help="Rows of the mirrored training images, too.")
    ] = False,
    crops: Annotated[int, typer.Option(min=0, help="Rows of this many crops of each training image, too.")] = 0,
) -> None:
    """Turn a data set into codes with a trained tokenizer. The same command resumes."""
    with going_on_later():
        encode_dataset(tokenizer, out, data, Augmentation(horizontal_flip=horizontal_flip, crops=crops))


if __name__ == "__main__":
    run_command(command)
