"""What a trained model remembers by a path, found where it lies now: a prior's tokenizer and codes, the images that a
tokenizer was trained on. From any folder, and after the whole project or a part of it was moved; told by content."""

from pathlib import Path
from typing import Any

from core.data import DataConfig, load_images
from core.errors import InputError
from core.model_folder import find_model_folder
from core.places import find_places, same_place
from core.run_folder import RunFolder
from core.sources import find_local
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.codes import CodeCache
from stage2_prior.prior import Prior, PriorConfig

__all__ = ["find_codes", "find_images", "find_tokenizer", "run_of"]


def run_of(path: str | Path) -> Path:
    """The run folder that a trained model lies in, or its model folder where that lies alone."""
    folder = find_model_folder(path)
    return folder.parent if folder.name == "model" else folder


def find_tokenizer(prior: Prior, path: str | Path) -> tuple[Path, Autoencoder]:
    """The tokenizer whose codes a prior was trained on, by its content hash: another one of that name is passed over.

    Args:
        path: where the prior was read from.

    Returns:
        Its folder, and the model; where none has the hash, one of the name, whose use is refused elsewhere.

    Raises:
        InputError: there is none of that name.
    """
    reference, run = prior.config.tokenizer, run_of(path)
    codes = RunFolder(run).stored_sources().get("codes", {}).get("place")
    places = list(find_places(reference.path, run, Path(codes) if codes else None))
    others = []
    for place in places:
        try:
            tokenizer = Autoencoder.from_pretrained(place)
        except InputError:
            continue
        if tokenizer.content_hash() == reference.hash:
            return place, tokenizer
        others.append((place, tokenizer))
    if others:
        return others[0]
    if places:
        return places[0], Autoencoder.from_pretrained(places[0])  # says why it cannot be read
    raise InputError(
        f"{path}: its tokenizer was at {reference.path}, and is neither there nor beside {run}; give --tokenizer "
        "runs/TOKENIZER (a command without that option: run twostage export with it, and give what it writes)"
    )


def find_codes(prior: str | Path, config: PriorConfig) -> Path:
    """The codes that a prior was trained on.

    Raises:
        InputError: nothing says which they were.
    """
    run = run_of(prior)
    if not (run / "config.yaml").is_file():
        raise InputError(f"{prior}: no config.yaml says which codes it was trained on; give --codes DIR")
    folder = RunFolder(run)
    stored, known = str((folder.stored_config() or {})["codes"]), folder.stored_sources().get("codes", {})
    places = find_places(stored, run, recorded=known.get("place"))
    for place in places:
        try:
            cache = CodeCache(place)
        except InputError:
            continue
        facts = known.get("facts")
        if cache.contents().facts == facts if facts else cache.manifest.tokenizer.hash == config.tokenizer.hash:
            return place
    return next(iter(places.direct), Path(stored))


def find_images(
    config: DataConfig, remembered_by: Path, facts: dict[str, Any] | None, place: str | None, was_local: bool = True
) -> DataConfig:
    """A stored `data` group whose source leads to its images from here.

    Args:
        remembered_by: the folder that it is stored in.
        facts: what the images were (:meth:`ImageData.identity`), as far as that is known.
        place: where they were, absolute, as far as that is known.
        was_local: False: they were a Hugging Face dataset.

    Raises:
        InputError: there are several such places, or one of that name elsewhere, and none holds those images.
    """
    if config.source == "shapes":
        return config
    places = find_places(config.source, remembered_by, recorded=place)
    here = find_local(config.source)
    if (was_local and len(places.direct) == 1) or not facts:
        chosen = next(iter(places.direct), None)
    elif not list(places):
        chosen = None
    else:
        chosen = next((one for one in places if _holds(config, one, facts)), None)
        if chosen is None:
            shown = ", ".join(map(str, places))
            raise InputError(
                f"data.source {config.source}: {remembered_by} remembers other images than there are at {shown}; say "
                "with --data SOURCE which to take"
            )
    if chosen is None or (here and same_place(str(here), str(chosen))):
        return config
    return config.model_copy(update={"source": str(chosen)})


def _holds(config: DataConfig, place: Path, facts: dict[str, Any]) -> bool:
    try:
        return load_images(config.model_copy(update={"source": str(place)})).identity() == facts
    except InputError:
        return False
