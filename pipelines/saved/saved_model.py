"""The trained model at a path: its kind, the location of its files, and the data it was trained on.

A model stores the paths of its tokenizer, its codes and its images. They are found from any folder, even after the
project or a part of it was moved, and recognized by their content, not by their name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.saved.pipeline_folder import download_pipeline, is_hub_id, is_pipeline_folder, read_pipeline_folder
from pipelines.saved.stored_paths import find_places
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.codes import CodeCache
from stage2_prior.prior import Prior, PriorConfig
from twostage.core.conditions.map_condition import MapConditionConfig
from twostage.core.config.sections import parse_config
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.drawn_sources import DRAWN_SOURCES
from twostage.core.data.image_data import ImageSplit
from twostage.core.data.records import AUTO
from twostage.core.data.sources import find_local
from twostage.core.errors import InputError
from twostage.core.files import read_json
from twostage.core.runs.contents import Record, same_place
from twostage.core.runs.model_folder import find_model_folder
from twostage.core.runs.run_folder import RunFolder, read_metrics

__all__ = ["Kind", "SavedModel", "check_map_tokenizer", "check_tokenizer", "find_data", "tokenizer_of_codes"]

Kind = Literal["tokenizer", "prior", "features", "pipeline"]


@dataclass(frozen=True)
class SavedModel:
    """A trained model on disk, not yet loaded."""

    path: str | Path
    """The path as given: a run folder, a model folder, a pipeline folder, or a hub id."""
    kind: Kind | None
    """None: its config.json is damaged; the error on loading the model explains how."""
    folder: Path
    """The folder of config.json; for a pipeline, that of pipeline.json."""
    home: Path
    """The run folder; or ``folder``, for a pipeline and for a model folder outside of a run."""

    @classmethod
    def find(cls, path: str | Path) -> "SavedModel":
        """The model at ``path``. If it is a hub id and not a local folder, it is downloaded.

        Raises:
            InputError: no model there, or the hub cannot be reached.
        """
        if is_pipeline_folder(path):
            folder = Path(path)
        elif not Path(path).exists() and is_hub_id(str(path)):
            folder = download_pipeline(str(path))
        else:
            return cls.find_run(path)
        return cls(path, "pipeline", folder, folder)

    @classmethod
    def find_run(cls, path: str | Path) -> "SavedModel":
        """The model in a run folder or model folder; never a pipeline, never a download.

        Raises:
            InputError: no model there.
        """
        folder = find_model_folder(path)
        try:
            kind = read_json(folder / "config.json", "copy the model again").get("kind")
        except InputError:
            kind = None
        return cls(path, kind, folder, folder.parent if folder.name == "model" else folder)

    @property
    def run(self) -> RunFolder | None:
        """The run that trained the model, if its config.yaml is there."""
        return RunFolder(self.home) if (self.home / "config.yaml").is_file() else None

    def held_out_figures(self) -> dict[str, float]:
        """The line of metrics.jsonl about the weights in `model/`, with their step: the best one of a prior, the last
        one of another model. Empty if it is not known."""
        lines = read_metrics(self.run.metrics_file) if self.run else []
        found = [{k: v for k, v in line.items() if k != "split"} for line in lines if line["split"] == "val"]
        if not found:
            return {}
        return min(found, key=lambda line: line["loss"]) if self.kind == "prior" else found[-1]

    def open_tokenizer(self) -> tuple["SavedModel", Autoencoder]:
        """The tokenizer: this model itself, a pipeline's, or the one whose codes this prior was trained on.

        Raises:
            InputError: it is missing, damaged, or not the one whose codes the prior was trained on.
        """
        if self.kind == "pipeline":
            folder = self.folder / "tokenizer"
            return SavedModel(self.path, "tokenizer", folder, folder), read_pipeline_folder(self.folder)[0]
        if self.kind != "prior":
            return self, Autoencoder.from_pretrained(self.path)
        config = Prior.from_pretrained(self.path).config
        found, tokenizer = self.find_tokenizer(config)
        check_tokenizer(tokenizer, config)
        return found, tokenizer

    def find_tokenizer(self, config: PriorConfig) -> tuple["SavedModel", Autoencoder]:
        """The tokenizer of this prior, by its content hash.

        Returns:
            Where it is, and the model. If no tokenizer has the hash, this returns one with the right
            name, which :func:`check_tokenizer` then refuses.

        Raises:
            InputError: there is no tokenizer with that name either.
        """
        reference, run = config.tokenizer, RunFolder(self.home)
        codes = run.stored_sources().get("codes")
        places = find_places(reference.path, run.path, Path(codes.place) if codes and codes.place else None)
        if found := _tokenizer_among(list(places), reference.hash):
            return found
        raise InputError(
            f"{self.path}: its tokenizer was at {reference.path}, but is neither there nor near {run.path}. Give "
            "--tokenizer runs/TOKENIZER; if this command has no such option, export a pipeline with twostage export "
            "--tokenizer runs/TOKENIZER and give that"
        )

    def find_map_tokenizer(self, config: PriorConfig) -> Autoencoder | None:
        """The tokenizer of this prior's maps, by its content hash; None if it is not found, or none is needed."""
        forms = [each.codes for each in config.conditions if isinstance(each, MapConditionConfig) and each.codes]
        run = RunFolder(self.home)
        codes = run.stored_sources().get("codes")
        for form in forms:
            places = find_places(form.path, run.path, Path(codes.place) if codes and codes.place else None)
            found = _tokenizer_among(list(places), form.hash)
            if found and found[1].content_hash() == form.hash:
                return found[1]
        return None

    def training_data(self, source: str | None = None) -> DataConfig:
        """The `data` group that this tokenizer was trained with; with ``source`` instead of its own if one is given.

        Raises:
            InputError: no config.yaml and no ``source``, or the images are no longer there.
        """
        if not self.run and source is None:
            raise InputError(f"{self.path}: no config.yaml says what it was trained on. Give --data SOURCE")
        document = ((self.run.stored_config() or {})["data"]) if self.run else {}
        model = read_json(self.folder / "config.json", "copy the model again")
        document |= {key: model[key] for key in ("image_size", "channels") if key in model}
        document |= {"bits": model.get("bits", 8), "shown_channels": model.get("shown_channels")}
        if source:  # tables have columns of their own, and drawn images no range
            document |= {"source": source, "label_column": AUTO, "caption_column": AUTO}
            document |= {"vector_column": None, "maps": None} | (
                {"value_range": None} if source in DRAWN_SOURCES else {}
            )
        config = parse_config(DataConfig, document, "data")
        if source or not self.run:
            return config
        return find_data(config, self.home, self.run.stored_sources().get("data.source"))

    def held_out_images(self, source: str | None = None, class_names: list[str] | None = None) -> ImageSplit:
        """The held-out images of this tokenizer's training source, or of ``source``, whose notices are printed.

        Args:
            class_names: the classes that the images must have; None: any, or none.

        Raises:
            InputError: no ``source``, and no config.yaml or no images; or images without these classes.
        """
        if source is None and not self.run:
            raise InputError(
                f"{self.path}: does not say which images it was trained on. Give images with --image FILE, or a "
                "dataset with --data SOURCE"
            )
        data = load_images(self.training_data(source))
        for line in data.notices if source else []:
            print(line)
        if class_names is not None and (data.class_names != class_names or data.validation.labels is None):
            raise InputError(
                f"{self.path}: needs the class of each image, one of {class_names}, but the held-out images of "
                f"{source or 'its training source'} have {data.class_names}. Use --data with images of the same classes"
            )
        return data.validation

    def default_output(self, name: str) -> Path:
        """The default path of a file about this model: in its run folder; for a pipeline, in the current folder."""
        return Path(name) if self.kind == "pipeline" else self.folder.parent / name

    def find_codes(self, config: PriorConfig) -> Path:
        """The codes that this prior was trained on.

        Raises:
            InputError: no config.yaml.
        """
        if not self.run:
            raise InputError(f"{self.path}: no config.yaml says which codes it was trained on. Give --codes DIR")
        stored, known = str((self.run.stored_config() or {})["codes"]), self.run.stored_sources().get("codes")
        places = find_places(stored, self.home, recorded=known and known.place)
        for place in places:
            try:
                cache = CodeCache(place)
            except (InputError, OSError):
                continue
            if known and cache.contents().facts == known.facts:
                return place
            if not known and cache.manifest.tokenizer.hash == config.tokenizer.hash:
                return place
        return next(iter(places.direct), Path(stored))


def tokenizer_of_codes(cache: CodeCache) -> Autoencoder:
    """The tokenizer that wrote the codes, by its content hash.

    Raises:
        InputError: it is missing or damaged, or has changed since.
    """
    reference = cache.manifest.tokenizer
    if found := _tokenizer_among(list(find_places(reference.path, cache.path)), reference.hash):
        if (present := found[1].content_hash()) == reference.hash:
            return found[1]
        raise InputError(
            f"the codes in {cache.path} are those of the tokenizer {reference.hash[:12]}, but {found[0].path} holds "
            f"{present[:12]}. Encode the images again, or restore the tokenizer"
        )
    raise InputError(
        f"codes {cache.path}: the tokenizer that wrote them was at {reference.path}, but is neither there nor near the "
        "codes. Move it back"
    )


def _tokenizer_among(places: list[Path], hash: str) -> tuple[SavedModel, Autoencoder] | None:
    """The tokenizer with this hash; if there is none, another one, and if there is none either, None.

    Raises:
        InputError: there are only damaged ones.
    """
    others = []
    for place in places:
        try:
            found = SavedModel.find_run(place), Autoencoder.from_pretrained(place)
        except (InputError, OSError):
            continue
        if found[1].content_hash() == hash:
            return found
        others.append(found)
    if not others and places:
        return SavedModel.find_run(places[0]), Autoencoder.from_pretrained(places[0])  # explains why it cannot
    return others[0] if others else None


def check_tokenizer(tokenizer: Autoencoder, config: PriorConfig) -> None:
    """Refuses a tokenizer other than the one whose codes a prior was trained on.

    Raises:
        InputError: their hashes differ.
    """
    if not config.tokenizer.hash:
        raise InputError(
            f"prior {config.model.type}: does not know which tokenizer made its codes. Use "
            "twostage.new_prior(tokenizer) to build it, or decode its codes yourself with "
            "tokenizer.decode_indices(prior.sample(...))"
        )
    if (found := tokenizer.content_hash()) != (expected := config.tokenizer.hash):
        raise InputError(
            f"this prior was trained on the codes of the tokenizer {expected[:12]} (it was at "
            f"{config.tokenizer.path}), but the tokenizer given is {found[:12]}: their codes mean different things. "
            "Give the tokenizer that made the codes, or encode the dataset again and train a new prior"
        )


def check_map_tokenizer(tokenizer: Autoencoder, config: MapConditionConfig | None) -> None:
    """Refuses a tokenizer of maps other than the one whose codes a prior was trained with.

    Raises:
        InputError: the prior sees no codes of maps, or their hashes differ.
    """
    codes = config.codes if config else None
    if codes is None:
        raise InputError("map_tokenizer: this prior was trained without codes of maps. Omit it")
    if (found := tokenizer.content_hash()) != codes.hash:
        raise InputError(
            f"map_tokenizer: this prior was trained with the codes of the map tokenizer {codes.hash[:12]} (it was at "
            f"{codes.path}), but the one given is {found[:12]}. Give the one that made the codes"
        )


def find_data(config: DataConfig, remembered_by: Path, known: Record | None) -> DataConfig:
    """A stored `data` group with a source that finds its images from the current folder.

    Images in their old place may have changed; images in any other place must be the same.

    Args:
        remembered_by: the folder that the group is stored in.
        known: where the images were and what they were, if that was stored.

    Raises:
        InputError: no place holds those images, or several places are possible.
    """
    if config.source in DRAWN_SOURCES:
        return config
    config = _find_beside(config, remembered_by)
    places = find_places(config.source, remembered_by, recorded=known and known.place)
    if known is None:
        if len(places.direct) > 1:
            raise InputError(
                f"data.source {config.source}: {remembered_by} may mean {' or '.join(map(str, places.direct))}. "
                "Choose one with --data SOURCE"
            )
        chosen = next(iter(places.direct), None)
    elif len(places.direct) == 1 and known.place and same_place(known.place, str(places.direct[0])):
        chosen = places.direct[0]
    else:
        chosen = next((place for place in places if _holds(config, place, known.facts)), None)
        if chosen is None and list(places):
            raise InputError(
                f"data.source {config.source}: the images at {', '.join(map(str, places))} are not those that "
                f"{remembered_by} was made from. Choose the images with --data SOURCE"
            )
    here = find_local(config.source)
    if chosen is None or (here and same_place(str(here), str(chosen))):
        return config
    return config.model_copy(update={"source": str(chosen)})


def _find_beside(config: DataConfig, remembered_by: Path) -> DataConfig:
    """The group with a folder of maps and a file of vectors that are found from the current folder; names of columns
    stay."""
    found = {}
    if config.maps is not None and "/" in config.maps and not Path(config.maps).is_dir():
        found["maps"] = next(iter(find_places(config.maps, remembered_by)), None)
    if config.vector_file and not config.vector_file.is_file():
        found["vector_column"] = next(iter(find_places(str(config.vector_file), remembered_by)), None)
    return config.model_copy(update={key: str(place) for key, place in found.items() if place is not None})


def _holds(config: DataConfig, place: Path, facts: dict[str, Any]) -> bool:
    try:
        identity = load_images(config.model_copy(update={"source": str(place)})).identity()
        return identity == {key: value for key, value in facts.items() if key != "captions"}
    except (InputError, OSError):
        return False
