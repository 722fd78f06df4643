"""Trained models side by side: the same held-out images through every tokenizer, the same classes and seeds through
every prior, and the figures of each."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.comparison.compared_models import (
    ComparedModel,
    ModelFigures,
    check_settings,
    find_common_data,
    open_models,
    settings_for,
)
from pipelines.drawing.rebuilt_images import rebuild_images
from pipelines.evaluation.evaluation_report import describe_machine
from pipelines.evaluation.judged_images import RealImages
from pipelines.evaluation.judges import ImageNetFeatures, Judge, not_evidence, open_judge
from pipelines.evaluation.likelihood import image_costs
from pipelines.evaluation.measurement import HeldOutImages, Measurement
from pipelines.evaluation.reconstructions import JUDGED_RECONSTRUCTIONS, measure_reconstructions
from pipelines.evaluation.samples import JUDGED_SAMPLES, SampleRequest, measure_samples
from pipelines.evaluation.shared_work import SharedWork
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.image_data import ImageData
from twostage.core.data.spread import spread_over_classes
from twostage.core.errors import InputError

__all__ = ["Comparison", "compare_models"]

NUM_MEASURED_IMAGES = 1000


@dataclass
class Comparison:
    """The result of :func:`compare_models`."""

    models: list[ComparedModel]
    originals: Tensor
    """The held-out images that are shown, (n, C, H, W) uint8 or uint16."""
    original_classes: list[str] | None
    """The class of each of them; None: they have none."""
    classes: list[str] | None
    """The class of each column of samples; None: no model has classes."""
    data: ImageData
    protocol: dict[str, Any]


def compare_models(
    runs: Sequence[str | Path],
    source: str | None = None,
    *,
    num_images: int = 12,
    features: str | Path | None = None,
    class_names: list[str] | None = None,
    request: SampleRequest = SampleRequest(),  # noqa: B008 (immutable)
) -> Comparison:
    """Measures every model on the same images, classes and seeds.

    Args:
        source: the images; by default those that the models were trained on.
        num_images: images to show of each model; up to `NUM_MEASURED_IMAGES` held-out images are measured.
        features: the run folder of a feature network, or `imagenet`, for Frechet distances and class accuracy.
        class_names: the columns cycle through these classes; None: through all.
        request: the samples of each model for a network to judge; a model ignores sampling settings that it lacks.

    Raises:
        InputError: the errors of :func:`open_models`; the data cannot be found or has other classes; no model has a
            sampling setting.
    """
    models, work = open_models(runs), SharedWork()
    config = find_common_data(models, source)
    check_settings(models, request.sampling)
    network = open_judge(None, features, config.channels)
    images = HeldOutImages.choose(config, load_images(config), None, NUM_MEASURED_IMAGES)
    for model in models:
        if names := model.data_classes:
            images.check_classes(names, model.path)
    needed = isinstance(network, ImageNetFeatures) or any(model.pipeline for model in models)
    real = RealImages.judge(network, images, request.num_samples, work) if network and needed else None
    shown = spread_over_classes(images.split.labels, len(images.split), num_images)
    originals, labels = images.split.read(shown), images.split.read_labels(shown)
    classes = _column_classes(models, class_names, len(originals))
    for model in models:
        model.measurements += _training_of(model)
        model.tokenizer.to(work.device)
        if model.reconstructs:
            found = measure_reconstructions(model.tokenizer, images, work, network)
            model.measurements += [_size_of(model.tokenizer), *found.measurements]
            model.reconstructions = rebuild_images(
                model.tokenizer, originals, model.tokenizer.read_given(images.split, shown)
            )
        if model.pipeline:
            _measure_pipeline(model, images, len(originals), classes, request, real, work)
        judged = [name for name in (*JUDGED_RECONSTRUCTIONS, *JUDGED_SAMPLES) if name in model.figures]
        where = model.saved_tokenizer.path if model.saved_tokenizer else model.path
        model.not_evidence = not_evidence(model.tokenizer.config, where, network, config.source, judged)
    protocol = _protocol(images, network, request, len(originals), work)
    return Comparison(models, originals, _names_of(images, labels), classes, images.data, protocol)


def _protocol(
    images: HeldOutImages, network: Judge | None, request: SampleRequest, num_shown: int, work: SharedWork
) -> dict[str, Any]:
    sampling = {"seed": request.seed, "measured": request.num_samples if network else 0}
    return {
        "data": {"source": images.config.source, "split": images.split_name, "images": len(images.rows)},
        "pixels": f"reconstructions are clipped and rounded to {images.split.bits} bits",
        "features": network.protocol if network else None,
        "samples": {**sampling, **request.sampling.model_dump(mode="json")},
        "images_per_s": (
            f"{num_shown} images in one batch, decoding included, on this machine with whatever else ran on it"
        ),
        "nats_per_code": "cost of the codes of these images; an upper bound for a masked transformer",
        "threads": torch.get_num_threads(),
        **describe_machine(work),
    }


def _names_of(images: HeldOutImages, labels: Tensor | None) -> list[str] | None:
    """The classes of images with these labels; None: they have none."""
    names = images.data.class_names
    return None if labels is None or names is None else [names[label] for label in labels.tolist()]


def _column_classes(models: list[ComparedModel], class_names: list[str] | None, count: int) -> list[str] | None:
    """The class of each of ``count`` columns; None: no model has classes."""
    classes = None
    for model in models:
        if model.pipeline and model.pipeline.class_names:
            model.pipeline.labels_for(class_names)  # refuses unknown names
            names = class_names or model.pipeline.class_names
            classes = [names[i % len(names)] for i in range(count)]
    if class_names and classes is None:
        raise InputError(f"--class-name {class_names[0]}: none of these models has classes. Remove it.")
    return classes


def _measure_pipeline(
    model: ComparedModel,
    images: HeldOutImages,
    num_shown: int,
    classes: list[str] | None,
    request: SampleRequest,
    real: RealImages | None,
    work: SharedWork,
) -> None:
    pipeline = model.pipeline
    assert pipeline is not None
    pipeline.to(work.device)
    settings = settings_for(pipeline, request.sampling)
    names = classes if pipeline.class_names else None
    start = time.perf_counter()
    model.samples = pipeline(num_shown, class_names=names, seed=request.seed, output_type="pt", **settings).images
    figures = ModelFigures(images_per_s=num_shown / (time.perf_counter() - start))
    model.measurements.append(Measurement(figures))
    if pipeline.prior:
        costs = image_costs(pipeline, pipeline.tokenizer.config.loss, images, work)
        nats = costs.prior.mean().item() / math.prod(pipeline.prior.config.grid)
        model.measurements += [_size_of(pipeline.prior), Measurement(ModelFigures(nats_per_code=nats))]
    if real:
        own = SampleRequest(request.num_samples, request.seed, SamplingConfig(**settings))
        found = measure_samples(pipeline, real.training.network, own, work, real)
        model.measurements += found.measurements
        model.missing = {name: reason for each in found.measurements for name, reason in each.missing.items()}


def _training_of(model: ComparedModel) -> list[Measurement[ModelFigures]]:
    """How the model was trained, if its run is there."""
    run, line = model.saved and model.saved.run, model.saved and model.saved.held_out_figures()
    if not run or not line:
        return []
    rate = (run.stored_config() or {}).get("train", {}).get("lr")
    return [Measurement(ModelFigures(steps=int(line["step"]), learning_rate=rate))]


def _size_of(module: nn.Module) -> Measurement[ModelFigures]:
    return Measurement(ModelFigures(parameters=sum(parameter.numel() for parameter in module.parameters())))
