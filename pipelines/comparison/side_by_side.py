"""Trained models side by side: the same held-out images through every tokenizer, the same classes and seeds through
every prior, and what is measured of each."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor

from pipelines.drawing.edits import rebuild_images
from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.evaluation.evaluation_document import choose_split, versions
from pipelines.evaluation.frechet import InceptionFeatures, OwnFeatures, ReconstructionJudge, open_features
from pipelines.evaluation.independence import not_evidence
from pipelines.evaluation.measurements import measure
from pipelines.evaluation.prior_measurements import measure_images, measure_samples
from pipelines.saved.figures import NO_EVIDENCE
from pipelines.saved.saved_model import SavedModel
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.sampling import SamplingConfig
from twostage.core.config.sections import parse_config
from twostage.core.data.dataset import DataConfig, ImageData, ImageSplit, load_images
from twostage.core.data.spread import spread, spread_over_classes
from twostage.core.errors import InputError
from twostage.core.images.fonts import class_labels
from twostage.core.images.sheets import contact_sheet
from twostage.core.machine.processes import join_processes
from twostage.core.runs.places import same_place

__all__ = [
    "COLUMNS",
    "Comparison",
    "Model",
    "column_labels",
    "compare_models",
    "comparison_document",
    "comparison_sheet",
    "evidence_notes",
    "figure_rows",
    "open_models",
    "sheet",
]

MEASURED_IMAGES = 1000
NUM_SAMPLES = 1000
BATCH_SIZE = 64
COLUMNS = {
    "name": "model",
    "parameters": "parameters",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "recognised": "recognised reconstructions",
    "rfid": "Frechet distance of reconstructions",
    "codes": "codes in use",
    "nats_per_image": "nats per image",
    "nats_per_code": "nats per code",
    "images_per_s": "images/s",
    "frechet_distance": "Frechet distance of samples",
    "class_accuracy": "class accuracy",
}
"""Of the table: the titles by figure."""
JUDGED = ("recognised", "rfid", "frechet_distance", "class_accuracy")
"""The figures of the feature network."""
MARK = " *"
"""Behind a figure that is no evidence; :func:`evidence_notes` says why."""
FORMATS = {
    "parameters": "{:,.0f}",
    "psnr": "{:.2f}",
    "ssim": "{:.3f}",
    "recognised": "{:.1%}",
    "rfid": "{:.3g}",
    "nats_per_image": "at most {:.1f}",
    "nats_per_code": "{:.3f}",
    "images_per_s": "{:,.1f}",
    "frechet_distance": "{:.3g}",
    "class_accuracy": "{:.1%}",
}


@dataclass
class Model:
    """A line of the table, and its pictures once they are made."""

    name: str
    path: str
    tokenizer: Autoencoder
    saved_tokenizer: SavedModel | None
    """Where the tokenizer was read from, which may say what it was trained on."""
    reconstructs: bool
    """False for a prior whose tokenizer has a line of its own."""
    pipeline: TwoStagePipeline | None
    """What makes new images; None where it makes none by itself."""
    figures: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Why a figure of its samples is not there."""
    not_evidence: dict[str, str] = field(default_factory=dict)
    """Why a figure says nothing about quality."""
    reconstructions: Tensor | None = None
    """(n, C, H, W) uint8, of the images pictured."""
    samples: Tensor | None = None
    """(n, C, H, W) uint8."""


@dataclass
class Comparison:
    """What :func:`compare_models` found."""

    models: list[Model]
    originals: Tensor
    """The held-out images pictured, (n, C, H, W) uint8."""
    classes: list[str] | None
    """What is asked for in each column of samples; None: no model has classes."""
    data: ImageData
    protocol: dict[str, Any]


def open_models(runs: Sequence[str | Path]) -> list[Model]:
    """The models of run folders, pipeline folders or hub ids; a tokenizer that only a prior names gets a line too.

    Raises:
        InputError: no model there, or images of different sizes or channels (both are named).
    """
    models: list[Model] = []
    last = [Path(run).name for run in runs]
    for run, short in zip(runs, last, strict=True):
        name = short if last.count(short) == 1 else str(run)
        saved = SavedModel.find(run)
        if saved.kind == "tokenizer":
            tokenizer = Autoencoder.from_pretrained(run)
            pipeline = TwoStagePipeline(tokenizer) if tokenizer.variational else None
            models.append(Model(name, str(run), tokenizer, saved, True, pipeline))
        else:
            pipeline = TwoStagePipeline.from_saved(saved)
            where = pipeline.saved_tokenizer
            models.append(Model(name, str(run), pipeline.tokenizer, where, pipeline.prior is None, pipeline))
    for model in [model for model in models if not model.reconstructs]:
        if not any(other.reconstructs and same_weights(other.tokenizer, model.tokenizer) for other in models):
            name = f"tokenizer of {model.name}"
            where = model.saved_tokenizer
            models.append(Model(name, str(where.path) if where else "", model.tokenizer, where, True, None))
    for model in models[1:]:
        first, other = (form_of(one.tokenizer) for one in (models[0], model))
        if first != other:
            raise InputError(
                f"{models[0].path} is of images of {first}, {model.path} of {other}: the same images cannot go through "
                "both; compare models of one form"
            )
    return models


def same_weights(first: Autoencoder, second: Autoencoder) -> bool:
    """Whether two tokenizers are the same one, decoder included."""
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def form_of(tokenizer: Autoencoder) -> str:
    """The images of a tokenizer in words."""
    (height, width), channels = tokenizer.config.image_size, tokenizer.config.channels
    return f"{height}x{width} pixels and {channels} channel{'s' * (channels != 1)}"


def compare_models(
    runs: Sequence[str | Path],
    source: str | None = None,
    *,
    num_images: int = 12,
    num_samples: int = NUM_SAMPLES,
    features: str | Path | None = None,
    class_names: list[str] | None = None,
    seed: int = 0,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (immutable)
) -> Comparison:
    """Measures every model on the same images, classes and seeds.

    Args:
        source: of the images; by default what the models were trained on.
        num_images: pictured; figures are of up to `MEASURED_IMAGES` held-out images.
        num_samples: of each model that makes images, which ``features`` looks at.
        features: a feature network's run folder, for Frechet distances and class accuracy.
        class_names: take turns over the columns; None: all.
        sampling: each model takes what it has of it.

    Raises:
        InputError: those of :func:`open_models`; data that cannot be found or has other classes; a sampling setting
            that no model has.
    """
    models = open_models(runs)
    config = data_of(models, source)
    check_settings(models, sampling)
    network = open_features(None, features, config.channels)
    data, state = load_images(config), join_processes()
    for model in models:
        names = model.tokenizer.config.class_names if model.tokenizer.class_conditional else None
        names = model.pipeline.label_names if model.pipeline else names
        if names and names != data.class_names:
            raise InputError(
                f"{model.path}: was trained on the classes {names}, data.source {config.source} has "
                f"{data.class_names}; give images of the same classes"
            )
    split_name, split = choose_split(data, None, config)
    measured = spread(len(split), MEASURED_IMAGES)
    originals = split.read(spread_over_classes(split.labels, len(split), num_images))
    classes: list[str] | None = None
    for model in models:
        if model.pipeline and model.pipeline.class_names:
            model.pipeline.labels_for(class_names)  # refuses unknown names
            names = class_names or model.pipeline.class_names
            classes = [names[i % len(names)] for i in range(len(originals))]
    if class_names and classes is None:
        raise InputError(f"--class-name {class_names[0]}: none of these models makes images of a class; leave it out")
    for model in models:
        model.tokenizer.to(state.device)
        if model.reconstructs:
            device = torch.device(state.device or "cpu")
            judge = ReconstructionJudge(network, len(measured), device, data.class_names) if network else None
            found = measure(model.tokenizer, split, measured, BATCH_SIZE, 0, state, None, judge)
            model.figures |= {"parameters": num_parameters(model.tokenizer), **found.figures}
            model.reconstructions = rebuild_images(model.tokenizer, originals)
        if model.pipeline:
            measure_pipeline(
                model, data, split, measured, len(originals), num_samples, classes, seed, sampling, network, state
            )
        judged = [name for name in JUDGED if name in model.figures]
        where = model.saved_tokenizer.path if model.saved_tokenizer else model.path
        model.not_evidence = not_evidence(model.tokenizer.config, where, network, features, config.source, judged)
    protocol = {
        "data": {"source": config.source, "split": split_name, "images": len(measured)},
        "pixels": "reconstructions are clipped and rounded to 8 bits",
        "features": network.protocol if network else None,
        "samples": {"seed": seed, "measured": num_samples if network else 0, **sampling.model_dump(mode="json")},
        "images_per_s": f"{len(originals)} images in one batch, decoding included, on this machine as busy as it was",
        "nats_per_code": "of these images' codes; of a masked transformer an upper bound",
        "threads": torch.get_num_threads(),
        "device": torch.device(state.device or "cpu").type,
        "versions": versions(),
    }
    return Comparison(models, originals, classes, data, protocol)


def data_of(models: list[Model], source: str | None) -> DataConfig:
    """The `data` group that the first of the models was trained with, with another source where one is given.

    Raises:
        InputError: none of them says what it was trained on, or they were trained on different sources.
    """
    known = {m.path: m.saved_tokenizer for m in models if m.saved_tokenizer and m.saved_tokenizer.run}
    configs = {path: tokenizer.training_data(source) for path, tokenizer in known.items()}
    if not configs:
        if source is None:
            raise InputError(f"{models[0].path}: nothing says what it was trained on; give --data SOURCE")
        form = models[0].tokenizer.config
        document = {"source": source, "image_size": list(form.image_size), "channels": form.channels}
        return parse_config(DataConfig, document, "data")
    (first, config), *others = configs.items()
    for path, other in others:
        if not same_place(other.source, config.source):
            raise InputError(
                f"{first} was trained on {config.source}, {path} on {other.source}; say with --data SOURCE which "
                "images are to go through both"
            )
    return config


def check_settings(models: list[Model], sampling: SamplingConfig) -> None:
    """Refuses a setting that none of the models has, with the reason of the last one."""
    pipelines = [model.pipeline for model in models if model.pipeline]
    for name, value in sampling.model_dump(exclude_defaults=True).items():
        if not pipelines:
            raise InputError(f"{name} {value}: none of these models makes new images; leave it out")
        if not any(name in settings_of(pipeline, sampling) for pipeline in pipelines):
            pipelines[-1].check_sampling(SamplingConfig(**{name: value}))


def settings_of(pipeline: TwoStagePipeline, sampling: SamplingConfig) -> dict[str, Any]:
    """What of the settings a model has: a variational autoencoder the temperature, a raster prior no steps."""
    taken = {}
    for name, value in sampling.model_dump(exclude_defaults=True).items():
        try:
            pipeline.check_sampling(SamplingConfig(**{name: value}))
        except InputError:
            continue
        taken[name] = value
    return taken


def measure_pipeline(
    model: Model,
    data: ImageData,
    split: ImageSplit,
    rows: Tensor,
    num_images: int,
    num_samples: int,
    classes: list[str] | None,
    seed: int,
    sampling: SamplingConfig,
    network: OwnFeatures | InceptionFeatures | None,
    state: PartialState,
) -> None:
    """Fills in a generative model's samples and their figures."""
    pipeline = model.pipeline
    assert pipeline is not None
    pipeline.to(state.device or "cpu")
    settings = settings_of(pipeline, sampling)
    asked = classes if pipeline.class_names else None
    start = time.perf_counter()
    model.samples = pipeline(num_images, class_names=asked, seed=seed, output_type="pt", **settings).images
    model.figures["images_per_s"] = num_images / (time.perf_counter() - start)
    if pipeline.prior:
        model.figures["parameters"] = num_parameters(pipeline.prior)
        chain = measure_images(pipeline, pipeline.tokenizer.config.loss, split, rows, BATCH_SIZE, state)
        model.figures["nats_per_code"] = chain.prior.mean().item() / math.prod(pipeline.prior.config.grid)
    if network:
        found = measure_samples(
            pipeline,
            network,
            num_samples,
            SamplingConfig(**settings),
            seed,
            BATCH_SIZE,
            state,
            data.splits["train"],
            split,
        )
        model.figures, model.missing = model.figures | found.figures, found.missing


def num_parameters(module: torch.nn.Module) -> int:
    """All weights of a module."""
    return sum(p.numel() for p in module.parameters())


def figure_rows(models: Sequence[Model]) -> list[dict[str, str]]:
    """The lines of the table, by `COLUMNS`; a figure that does not apply is not there."""
    rows = []
    for model in models:
        figures = model.figures
        row = {
            key: form.format(figures[key]) + MARK * (key in model.not_evidence)
            for key, form in FORMATS.items()
            if key in figures
        }
        if "codebook_size" in figures:
            codes = figures["codebook_size"] * figures["codebooks"]
            row["codes"] = f"{figures['codes_used']:.0f} of {codes:.0f}"
        if model.pipeline and model.pipeline.prior and not model.pipeline.prior.exact_likelihood:
            row["nats_per_code"] = f"at most {row['nats_per_code']}"
        rows.append({"name": model.name, **row})
    return rows


def evidence_notes(models: Sequence[Model]) -> list[str]:
    """Why figures of the table that are marked are no evidence, a sentence for each model."""
    return [
        f"{MARK.strip()} {model.name}: {NO_EVIDENCE}, because {reason}."
        for model in models
        for reason in dict.fromkeys(model.not_evidence.values())
    ]


def sheet(
    strips: Mapping[str, Tensor], classes: list[str] | None = None, with_classes: Sequence[str] = ()
) -> Image.Image:
    """A contact sheet: rows of images (n, C, H, W) uint8 by their titles.

    Args:
        classes: of the columns.
        with_classes: the titles of the rows that show these.
    """
    columns = len(next(iter(strips.values())))
    captions = None
    if classes and with_classes:
        captions = [name for title in strips for name in (classes if title in with_classes else [""] * columns)]
    return contact_sheet(torch.cat(list(strips.values())), columns, captions, list(strips))


def column_labels(comparison: Comparison) -> list[str] | None:
    """What stands for the classes of the columns."""
    if comparison.classes is None:
        return None
    known = next(m.pipeline.label_names for m in comparison.models if m.pipeline and m.pipeline.label_names)
    return class_labels(comparison.classes, [known.index(name) for name in comparison.classes])


def comparison_sheet(comparison: Comparison, between: Mapping[str, Tensor] | None = None) -> Image.Image:
    """Every model's reconstructions, further rows where there are some, then every model's samples."""
    strips = {"original": comparison.originals}
    strips |= {m.name: m.reconstructions for m in comparison.models if m.reconstructions is not None}
    samples = {f"{m.name}: new": m for m in comparison.models if m.samples is not None}
    strips |= between or {}
    strips |= {title: model.samples for title, model in samples.items() if model.samples is not None}
    named = [title for title, model in samples.items() if model.pipeline and model.pipeline.class_names]
    return sheet(strips, column_labels(comparison), named)


def comparison_document(comparison: Comparison) -> dict[str, Any]:
    """All of it in plain JSON."""
    models = [
        {
            "name": m.name,
            "path": m.path,
            "figures": m.figures,
            "not_evidence": m.not_evidence,
            "not_measured": m.missing,
        }
        for m in comparison.models
    ]
    return {"models": models, "protocol": comparison.protocol}
