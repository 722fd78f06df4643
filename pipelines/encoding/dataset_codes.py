"""Encodes every image of a dataset with a trained tokenizer, into a code cache that a prior is trained on."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from pipelines.encoding.condition_data import (
    MapCoder,
    check_captions,
    condition_settings,
    map_form,
    mirrored_words,
    open_with_codes,
    with_settings,
)
from pipelines.encoding.image_variants import ImageVariants, image_variants
from pipelines.encoding.partial_codes import CHUNK, PartialCodes, discard_leftover
from pipelines.saved.saved_model import SavedModel
from pipelines.saved.stored_paths import find_places, portable
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
from twostage.core.config.sections import summarize_differences
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.drawn_sources import DRAWN_SOURCES
from twostage.core.data.image_data import ImageData
from twostage.core.data.sources import find_local
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_float
from twostage.core.machine.command import print_once
from twostage.core.machine.overlap import BackgroundWriter, read_ahead
from twostage.core.machine.placement import copy_to
from twostage.core.machine.processes import join_processes
from twostage.core.machine.progress import ProgressBar
from twostage.core.runs.contents import Contents, Record, same_place
from twostage.core.scales import describe_grids

__all__ = ["encode_dataset"]

CHANGE_NO_CODE = {"bits", "shown_channels", "cache", "cache_gb"}
"""Settings of `data` that may change before an encoding resumes; the images themselves are compared."""


def encode_dataset(
    tokenizer: str | Path,
    out: str | Path | None = None,
    source: str | None = None,
    augmentation: Augmentation | None = None,
    settings: list[str] | None = None,
    shard: tuple[int, int] | None = None,
    map_tokenizer: str | Path | None = None,
) -> Path:
    """Encode every split into ``out`` (codes/NAME by default). The processes of one machine share the images.

    If it is killed, the same call resumes, with any number of processes. Several machines share the images by
    ``shard``; a last call without it puts their codes together and encodes what is missing.

    Args:
        source: another dataset than the one that the tokenizer was trained on.
        augmentation: the additional rows of the training split; none by default.
        settings: of captions, vectors and maps, such as `data.on_missing_caption=skip`; by default the tokenizer's.
        shard: (2, 4): encode the second of four shares, into a folder beside ``out``.
        map_tokenizer: turns the maps beside the images into codes; None: the maps themselves are stored.

    Returns:
        The folder: a code cache, or the share of one.

    Raises:
        InputError: no tokenizer there, one without codes, a map tokenizer and no maps, a folder that contains other
            codes or other files, images without a caption next to others that have one, or processes on several
            machines that do not see each other's files.
    """
    augmentation, state = augmentation or Augmentation(), join_processes()
    model = open_with_codes(tokenizer).to(state.device)
    saved = SavedModel.find_run(tokenizer)
    config = with_settings(saved.training_data(source), settings or [])
    final = Path(out or Path("codes") / _name_of(saved.home))
    reference = TokenizerReference(hash=model.content_hash(), path=portable(tokenizer, final))
    coder = MapCoder.open(map_tokenizer, final, config.size, model.device) if map_tokenizer else None
    if _contains_these_codes(final, reference, config, augmentation, coder):
        print_once(f"{final}: already contains the codes of this tokenizer; nothing to do")
        if state.is_main_process:
            discard_leftover(final, reference.hash)  # of a call that was killed in its last step
        return final
    data, splits = _load(config, augmentation, map_tokenizer)
    contents = data.contents()
    partial = _partial_codes(final, reference, config, contents, splits, shard, coder)
    if state.is_main_process:
        for message in partial.begin(model.code_grid, code_dtype(model.codebook_size or 0)):
            print(message)
    state.wait_for_everyone()
    partial.check_shared()
    for split, images in splits.items():
        _encode_split(model, images, split, partial, state, shard or (1, 1), coder)
    state.wait_for_everyone()
    if shard:
        print_once(f"{partial.folder}: done. When all shares are beside {final}, run the command without --shard")
        return partial.folder
    if state.is_main_process:
        partial.finish(manifest := _manifest(model, data, config, contents.record, reference, partial, coder))
        print(f"{final}: {_describe(manifest)}")
    state.wait_for_everyone()
    return final


def _name_of(folder: Path) -> str:
    """The name of a folder, even if its path ends in `.` or `..`."""
    return folder.resolve().name if folder.name in ("", "..") else folder.name


def _contains_these_codes(
    final: Path,
    reference: TokenizerReference,
    data: DataConfig,
    augmentation: Augmentation,
    coder: MapCoder | None,
) -> bool:
    """Whether the codes are already there; False if the folder is free.

    Raises:
        InputError: the folder contains something else.
    """
    if _is_free(final):
        return False
    if not (final / "manifest.json").is_file():
        raise InputError(f"--out {final}: exists but contains no codes. Choose another --out.")
    manifest = CodeCache(final).manifest
    remedy = "Nothing was changed. Choose another --out, or remove the folder."
    if manifest.tokenizer.hash != reference.hash:
        there, here = manifest.tokenizer.hash[:12], reference.hash[:12]
        raise InputError(f"--out {final}: contains the codes of the tokenizer {there}, this one is {here}. {remedy}")
    if not _same_images(final, manifest, data):
        raise InputError(
            f"--out {final}: contains the codes of other images: {manifest.source!r} instead of {data.source!r}. "
            f"{remedy}"
        )
    if manifest.augmentation != augmentation:
        raise InputError(
            f"--out {final}: contains codes with {manifest.augmentation} instead of {augmentation}. {remedy}"
        )
    codes = manifest.maps and manifest.maps.codes
    if (there := codes and codes.hash) != (here := coder and coder.about.hash):
        there, here = (found[:12] if found else "none" for found in (there, here))
        raise InputError(f"--out {final}: contains codes with the map tokenizer {there}, this one is {here}. {remedy}")
    stored, wanted = manifest.condition_settings, condition_settings(data, final)
    if stored and (differences := summarize_differences({"data": stored}, {"data": wanted})):
        raise InputError(f"--out {final}: contains codes with other settings ({differences}). {remedy}")
    return True


def _same_images(final: Path, manifest: Manifest, data: DataConfig) -> bool:
    """Whether the codes in ``final`` are those of the images ``data``: by where the images are, or by their content."""
    here = find_local(data.source)
    if here is None:
        return manifest.source == data.source
    if manifest.images is None:  # written by an earlier version
        return any(same_place(str(here), str(place)) for place in find_places(manifest.source, final).direct)
    if manifest.source == data.source == portable(data.source, final):
        return True
    return load_images(data).identity() == manifest.images.facts


def _is_free(final: Path) -> bool:
    """Whether nothing is there, or an empty folder that a rename can replace."""
    if final.is_symlink() or final.is_mount():
        return False
    return not final.exists() or (final.is_dir() and not any(final.iterdir()))


def _load(
    config: DataConfig, augmentation: Augmentation, map_tokenizer: str | Path | None
) -> tuple[ImageData, dict[str, ImageVariants]]:
    """The images, with captions for all of them or for none, and their variants."""
    data = load_images(config)
    if map_tokenizer and data.splits["train"].map_form is None:
        raise InputError(f"--map-tokenizer {map_tokenizer}: there are no maps. Set data.maps, or omit it")
    check_captions(data, config)
    splits = image_variants(data, augmentation)
    for line in [data.description, *data.notices, *mirrored_words(data, augmentation)]:
        print_once(line)
    return data, splits


def _partial_codes(
    final: Path,
    reference: TokenizerReference,
    config: DataConfig,
    images: Contents,
    splits: dict[str, ImageVariants],
    shard: tuple[int, int] | None,
    coder: MapCoder | None,
) -> PartialCodes:
    augmentation = splits["train"].augmentation.model_dump(mode="json")
    group = config.model_dump(mode="json", exclude=CHANGE_NO_CODE)
    common = {"tokenizer": reference.hash, "augmentation": augmentation}
    common |= {"map_tokenizer": coder.about.hash} if coder else {}
    places = dict.fromkeys(("source", "maps", *(("vector_column",) if config.vector_file else ())))
    identity = common | {"data": group | places, "images": images.facts}
    map_codes = (coder.about.grid, code_dtype(coder.about.codebook_size)) if coder else None
    return PartialCodes(final, identity, splits, former=common | {"data": group}, shard=shard, map_codes=map_codes)


@torch.no_grad()
def _encode_split(
    model: Autoencoder,
    images: ImageVariants,
    name: str,
    partial: PartialCodes,
    state: PartialState,
    shard: tuple[int, int],
    coder: MapCoder | None,
) -> None:
    """Write this process's share of a split's codes."""
    codes, maps, done = partial.open(name), partial.open_maps(name), partial.open_done(name)
    chunks = torch.arange(len(images.images)).split(CHUNK)
    of_shard = range(shard[0] - 1, len(chunks), shard[1])
    mine = [chunk for chunk in of_shard[state.process_index :: state.num_processes] if not done[chunk]]

    def read(chunk: int) -> tuple[Iterator[Tensor], Iterator[Tensor]]:
        return images.read(chunks[chunk]), images.read_maps(chunks[chunk]) or iter(())

    def write(chunk: int, indices: list[Tensor], map_values: list[Tensor]) -> None:
        for array, variants in ((codes, indices), (maps, map_values)):
            if array is None:
                continue
            for variant, rows in enumerate(variants):
                first = variant * len(images.images) + chunk * CHUNK
                array[first : first + len(rows)] = rows.cpu().numpy()
            array.flush()
        done[chunk] = 1

    bar = ProgressBar(mine, desc=name, unit="batch", disable=not state.is_main_process, leave=False)
    with BackgroundWriter() as writer:
        for chunk, (variants, of_maps) in read_ahead(bar, read, in_thread=not images.images.in_memory):
            indices = [model.encode_indices(to_float(copy_to(model.device, pixels))) for pixels in variants]
            writer(write, chunk, indices, [coder.encode(each) if coder else each for each in of_maps])


def _manifest(
    model: Autoencoder,
    data: ImageData,
    config: DataConfig,
    images: Record,
    reference: TokenizerReference,
    partial: PartialCodes,
    coder: MapCoder | None,
) -> Manifest:
    assert model.codebook_size is not None
    is_path = config.source not in DRAWN_SOURCES and Path(config.source).exists()
    # Computed from the files, so that it does not matter which call or process wrote them.
    train = data.splits["train"]
    statistics = code_statistics({split: partial.open(split) for split in partial.splits}, model.codebook_size)
    return Manifest(
        tokenizer=reference,
        source=portable(config.source, partial.final) if is_path else config.source,
        images=images,
        image_size=model.config.image_size,
        channels=model.config.channels,
        grid=model.code_grid,
        scales=model.bottleneck.scales,
        codebook_size=model.codebook_size,
        digits=list(model.bottleneck.digits) or None,
        class_names=data.class_names,
        vector_length=None if train.vectors is None else train.vectors.shape[1],
        maps=map_form(data, {split: partial.open_maps(split) for split in partial.splits}, coder and coder.about),
        condition_settings=condition_settings(config, partial.final),
        validation_split=data.validation_name,
        augmentation=partial.splits["train"].augmentation,
        splits={split: _files(split, variants) for split, variants in partial.splits.items()},
        **statistics,
    )


def _files(split: str, variants: ImageVariants) -> SplitFiles:
    images = variants.images
    return SplitFiles(
        rows=variants.rows,
        codes=f"{split}.codes.npy",
        labels=None if images.labels is None else f"{split}.labels.npy",
        captions=None if images.captions is None else f"{split}.captions.npy",
        caption_starts=None if images.captions is None else f"{split}.caption_starts.npy",
        vectors=None if images.vectors is None else f"{split}.vectors.npy",
        maps=None if images.map_form is None else f"{split}.maps.npy",
    )


def _describe(manifest: Manifest) -> str:
    augmentation, train = manifest.augmentation, manifest.splits["train"].rows
    held_out = sum(files.rows for files in manifest.splits.values()) - train
    variants = ""
    if augmentation.variants > 1:
        crops = f", {augmentation.crops} crop{'s' * (augmentation.crops > 1)}" if augmentation.crops else ""
        mirrored = ", each also mirrored" if augmentation.horizontal_flip else ""
        variants = f"train in {augmentation.variants} variants (plain{crops}{mirrored}): {train + held_out:,} rows, "
    unigram = manifest.unigram_nats_per_code[manifest.validation_split]
    beside = ["captions"] if manifest.has_captions else []
    if manifest.vector_length:
        beside.append(f"vectors of {manifest.vector_length} numbers")
    if manifest.maps:
        classes, codes = manifest.maps.classes, manifest.maps.codes
        maps = "maps" if classes is None else f"maps of {len(classes)} class{'es' * (len(classes) > 1)}"
        beside.append(f"{maps} as {codes.grid[0]}x{codes.grid[1]} codes" if codes else maps)
    variants += f"with {', '.join(beside)}, " if beside else ""
    return (
        f"{train // augmentation.variants + held_out:,} images, {variants}"
        f"grid {describe_grids(manifest.grid, manifest.scales)}, "
        f"{manifest.codes_used} of {manifest.codebook_size} codes used. Nats per code: entropy "
        f"{manifest.entropy_nats_per_code:.3f}, held-out unigram {unigram:.3f}, "
        f"uniform {math.log(manifest.codebook_size):.3f}"
    )
