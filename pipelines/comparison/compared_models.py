"""The models that a comparison shows: opened from their folders, with data and sampling settings that suit them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.evaluation.measurement import Measurement, figures_of
from pipelines.saved.evaluation_figures import Figures
from pipelines.saved.saved_model import SavedModel
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.config.sections import parse_config
from twostage.core.data.data_config import DataConfig
from twostage.core.errors import InputError
from twostage.core.runs.contents import same_place

__all__ = ["ComparedModel", "ModelFigures", "check_settings", "find_common_data", "open_models", "settings_for"]


@dataclass(frozen=True)
class ModelFigures(Figures):
    """Figures of a model that only a comparison has."""

    parameters: int | None = None
    steps: int | None = None
    """Those after which the compared weights were kept."""
    learning_rate: float | None = None
    images_per_s: float | None = None
    nats_per_code: float | None = None


@dataclass
class ComparedModel:
    """A row of the table; its figures and images are filled in when it is measured."""

    name: str
    path: str
    tokenizer: Autoencoder
    saved_tokenizer: SavedModel | None
    """The stored tokenizer, which may record its training data."""
    reconstructs: bool
    """False for a prior whose tokenizer has a row of its own."""
    pipeline: TwoStagePipeline | None
    """The pipeline that makes new images; None for a model that cannot make any by itself."""
    saved: SavedModel | None
    """The stored model itself, which may record its training."""
    measurements: list[Measurement] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Why a figure of its samples is missing, by its key."""
    not_evidence: dict[str, str] = field(default_factory=dict)
    """Why a figure says nothing about quality, by its key."""
    reconstructions: Tensor | None = None
    """(n, C, H, W) uint8 or uint16, of the originals that are shown."""
    samples: Tensor | None = None
    """(n, C, H, W) uint8 or uint16."""

    @property
    def figures(self) -> dict[str, float]:
        """The figures by their keys."""
        return figures_of(self.measurements)

    @property
    def data_classes(self) -> list[str] | None:
        """The classes that its images must have; None: any, or none."""
        own = self.tokenizer.config.class_names if self.tokenizer.class_conditional else None
        return self.pipeline.label_names if self.pipeline else own

    @property
    def shows_classes(self) -> bool:
        """Whether new images have the classes of the columns."""
        return bool(self.pipeline and self.pipeline.class_names)


def open_models(runs: Sequence[str | Path]) -> list[ComparedModel]:
    """Opens run folders, pipeline folders or hub ids; a tokenizer that only a prior refers to gets a row too.

    Raises:
        InputError: there is no model, or two models have images of different sizes or channels (both are named).
    """
    models: list[ComparedModel] = []
    short_names = [Path(run).name for run in runs]
    for run, short in zip(runs, short_names, strict=True):
        name = short if short_names.count(short) == 1 else str(run)
        saved = SavedModel.find(run)
        if saved.kind == "tokenizer":
            tokenizer = Autoencoder.from_pretrained(run)
            pipeline = TwoStagePipeline(tokenizer) if tokenizer.variational else None
            models.append(ComparedModel(name, str(run), tokenizer, saved, True, pipeline, saved))
        else:
            pipeline = TwoStagePipeline.from_saved(saved)
            is_vae = pipeline.prior is None
            stored = pipeline.saved_tokenizer
            models.append(ComparedModel(name, str(run), pipeline.tokenizer, stored, is_vae, pipeline, saved))
    for model in [model for model in models if not model.reconstructs]:
        if not any(other.reconstructs and _same_weights(other.tokenizer, model.tokenizer) for other in models):
            where = model.saved_tokenizer
            path = str(where.path) if where else ""
            models.append(ComparedModel(f"tokenizer of {model.name}", path, model.tokenizer, where, True, None, where))
    for model in models[1:]:
        first, other = (_image_form(one.tokenizer) for one in (models[0], model))
        if first != other:
            raise InputError(
                f"{models[0].path} takes images with {first}, but {model.path} takes images with {other}. Compare "
                "models with the same image size, channels and bits."
            )
    return models


def _same_weights(first: Autoencoder, second: Autoencoder) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _image_form(tokenizer: Autoencoder) -> str:
    (height, width), channels, bits = tokenizer.config.image_size, tokenizer.config.channels, tokenizer.config.bits
    return f"{height}x{width} pixels and {channels} channel{'s' * (channels != 1)}" + " of 16 bits" * (bits == 16)


def find_common_data(models: list[ComparedModel], source: str | None) -> DataConfig:
    """The `data` group that the first model was trained with; with ``source`` instead of its own if one is given.

    Raises:
        InputError: no model says what it was trained on, or two were trained on different sources.
    """
    known = {m.path: m.saved_tokenizer for m in models if m.saved_tokenizer and m.saved_tokenizer.run}
    configs = {path: tokenizer.training_data(source) for path, tokenizer in known.items()}
    if not configs:
        if source is None:
            raise InputError(f"{models[0].path}: does not say what it was trained on. Add --data SOURCE.")
        form = models[0].tokenizer.config
        document = {"source": source, "image_size": list(form.image_size), "channels": form.channels, "bits": form.bits}
        return parse_config(DataConfig, document, "data")
    (first, config), *others = configs.items()
    for path, other in others:
        if not same_place(other.source, config.source):
            raise InputError(
                f"{first} was trained on {config.source}, but {path} on {other.source}. Use --data SOURCE to choose "
                "the images for both."
            )
    return config


def check_settings(models: list[ComparedModel], sampling: SamplingConfig) -> None:
    """Refuses a sampling setting that no model has, with the reason of the last model."""
    pipelines = [model.pipeline for model in models if model.pipeline]
    for name, value in sampling.model_dump(exclude_defaults=True).items():
        if not pipelines:
            raise InputError(f"{name} {value}: none of these models makes new images. Remove it.")
        if not any(name in settings_for(pipeline, sampling) for pipeline in pipelines):
            pipelines[-1].check_sampling(SamplingConfig(**{name: value}))


def settings_for(pipeline: TwoStagePipeline, sampling: SamplingConfig) -> dict[str, Any]:
    """The settings that apply to a model: only the temperature to a VAE, no number of steps to a raster prior."""
    settings = {}
    for name, value in sampling.model_dump(exclude_defaults=True).items():
        try:
            pipeline.check_sampling(SamplingConfig(**{name: value}))
        except InputError:
            continue
        settings[name] = value
    return settings
