"""What a trained model remembers by a path, found where it lies now: a prior's tokenizer and codes, the images that a
tokenizer was trained on. From any folder, and after the whole project or a part of it was moved; told by content."""

from pathlib import Path
from typing import Any

from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.codes import CodeCache
from stage2_prior.prior import Prior, PriorConfig
from twostage.core.data.dataset import DataConfig, load_images
from twostage.core.data.sources import find_local
from twostage.core.errors import InputError
from twostage.core.runs.model_folder import find_model_folder
from twostage.core.runs.places import Record, find_places, same_place
from twostage.core.runs.run_folder import RunFolder

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
    codes = RunFolder(run).stored_sources().get("codes")
    places = list(find_places(reference.path, run, Path(codes.place) if codes and codes.place else None))
    others = []
    for place in places:
        try:
            tokenizer = Autoencoder.from_pretrained(place)
        except (InputError, OSError):
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
    stored, known = str((folder.stored_config() or {})["codes"]), folder.stored_sources().get("codes")
    places = find_places(stored, run, recorded=known and known.place)
    for place in places:
        try:
            cache = CodeCache(place)
        except (InputError, OSError):
            continue
        if cache.contents().facts == known.facts if known else cache.manifest.tokenizer.hash == config.tokenizer.hash:
            return place
    return next(iter(places.direct), Path(stored))


def find_images(config: DataConfig, remembered_by: Path, known: Record | None) -> DataConfig:
    """A stored `data` group whose source leads to its images from here.

    Images that lie where they lay are taken as they are now; of any other place they have to be the same.

    Args:
        remembered_by: the folder that it is stored in.
        known: where they were and what, as far as that is known.

    Raises:
        InputError: there are such places, and none holds those images, or which of several is not known.
    """
    if config.source == "shapes":
        return config
    places = find_places(config.source, remembered_by, recorded=known and known.place)
    if known is None:
        if len(places.direct) > 1:
            raise InputError(
                f"data.source {config.source}: {remembered_by} may mean {' or '.join(map(str, places.direct))}; say "
                "with --data SOURCE which to take"
            )
        chosen = next(iter(places.direct), None)
    elif len(places.direct) == 1 and known.place and same_place(known.place, str(places.direct[0])):
        chosen = places.direct[0]
    else:
        chosen = next((place for place in places if _holds(config, place, known.facts)), None)
        if chosen is None and list(places):
            raise InputError(
                f"data.source {config.source}: {remembered_by} remembers other images than there are at "
                f"{', '.join(map(str, places))}; say with --data SOURCE which to take"
            )
    here = find_local(config.source)
    if chosen is None or (here and same_place(str(here), str(chosen))):
        return config
    return config.model_copy(update={"source": str(chosen)})


def _holds(config: DataConfig, place: Path, facts: dict[str, Any]) -> bool:
    try:
        return load_images(config.model_copy(update={"source": str(place)})).identity() == facts
    except (InputError, OSError):
        return False
