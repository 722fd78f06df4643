"""Measures a trained prior: the cost of held-out codes and images, and the quality of its samples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from pipelines.drawing.asked import Cycle
from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.evaluation.attributes import can_judge_attributes, measure_attributes
from pipelines.evaluation.evaluation_report import Evaluation, Sheet, describe_machine, describe_weights
from pipelines.evaluation.judged_images import RealImages
from pipelines.evaluation.judges import Judge, not_evidence, open_judge
from pipelines.evaluation.likelihood import HeldOutCodes, measure_codes, measure_images
from pipelines.evaluation.listening import measure_listening
from pipelines.evaluation.measurement import HeldOutImages, Measurement, figures_of
from pipelines.evaluation.novelty import Neighbours, neighbours_sheet
from pipelines.evaluation.samples import (
    JUDGED_SAMPLES,
    SampleRequest,
    Samples,
    held_out_cycle,
    measure_samples,
    unmeasured_samples,
)
from pipelines.evaluation.shared_work import SharedWork
from pipelines.saved.evaluation_figures import PRIOR_ROWS, ImageCost
from pipelines.saved.saved_model import SavedModel, find_data
from stage2_prior.codes import CodeCache
from stage2_prior.prior import Prior
from twostage.core.data.dataset import load_images
from twostage.core.data.spread import spread
from twostage.core.errors import InputError
from twostage.core.images.sheets import prompt_sheet

__all__ = ["evaluate_prior"]

NEIGHBOURS_CAPTION = (
    "Samples, each followed by its nearest training images by their features. The number is the distance: 1 is the "
    "median distance of held-out images to their nearest training image, 0 is a copy."
)
OpenedT = TypeVar("OpenedT")


def evaluate_prior(
    prior: str | Path,
    codes: str | Path | None = None,
    tokenizer: str | Path | None = None,
    source: str | None = None,
    split: str | None = None,
    *,
    features: str | Path | None = None,
    inception: str | Path | None = None,
    num_images: int | None = None,
    samples: SampleRequest = SampleRequest(),  # noqa: B008 (immutable)
    batch_size: int = 64,
) -> Evaluation:
    """Measures a trained prior; processes share codes, images and samples.

    Args:
        codes: a code cache of the same tokenizer; by default the one that the prior was trained on.
        tokenizer: its folder; by default, twostage looks where it was when the codes were made, and near there.
        source: the images; by default those that the codes were made from.
        split: held out; by default the one that training validated on.
        features: the run folder of a feature network that judges samples, or `imagenet`.
        inception: torch-fidelity's file with the Inception weights of published FIDs, to judge with them instead.
        num_images: code grids and images, spread evenly over the split; None: all.
        samples: what to draw for a network; the result's `refusal` says if over 1% of the samples are copies of others.

    Raises:
        InputError: there is no prior; the codes have another tokenizer, codebook, grid or other classes; the prior does
            not have a sampling setting; or an argument names something unusable.
    """
    work = SharedWork(batch_size)
    saved, model = SavedModel.find_run(prior), Prior.from_pretrained(prior).to(work.device)
    model.check_sampling(samples.sampling)
    network = open_judge(inception, features, model.config.channels)
    held_out = _held_out_codes(saved, model, codes, split, num_images)
    judges_shapes = can_judge_attributes(model, held_out)
    _check_judge(network is not None or judges_shapes, samples)
    required = tokenizer is not None or network is not None
    pipeline, reason = _open(lambda: TwoStagePipeline.from_prior(model, saved, tokenizer).to(work.device), required)
    images = None
    if pipeline:
        images, reason = _open(lambda: _held_out_images(pipeline, source, held_out, num_images), source is not None)
    found: list[Measurement] = [measure_codes(model, held_out, work), measure_listening(model, held_out, work)]
    found.append(_measure_images(pipeline, images, reason, work))
    real = RealImages.judge(network, images, samples.num_samples, work) if pipeline and network and images else None
    cycle = _asked(model, held_out, samples)
    drawn = measure_samples(pipeline, network, samples, work, real, reason, cycle) if pipeline and network else None
    if pipeline and judges_shapes:
        found.append(measure_attributes(pipeline, held_out, samples, work))
    found += drawn.measurements if drawn else [unmeasured_samples()]
    settings = {"batch_size": batch_size, "processes": work.state.num_processes, **describe_machine(work)}
    return Evaluation(
        prior,
        PRIOR_ROWS,
        found,
        models=_describe_models(prior, model, tokenizer, pipeline, bool(images or network)),
        settings={"image_size": list(model.config.image_size), "channels": model.config.channels, **settings},
        not_evidence=_doubts(pipeline, network, drawn, source or held_out.cache.manifest.source),
        refusal=drawn.refusal if drawn else None,
        sheets=_sheets(drawn, pipeline, cycle) if drawn and pipeline else (),
    )


def _asked(prior: Prior, held_out: HeldOutCodes, samples: SampleRequest) -> Cycle | None:
    """What samples show: the captions, maps and vectors of held-out images; None: the prior has none, and they show all
    classes in turn."""
    if {condition.type for condition in prior.config.conditions} <= {"class"}:
        return None
    return held_out_cycle(prior, held_out.split, spread(len(held_out.split), samples.num_samples))


def _measure_images(
    pipeline: TwoStagePipeline | None, images: HeldOutImages | None, reason: str, work: SharedWork
) -> Measurement[ImageCost]:
    """The cost of images; without them, the ``reason`` why it is missing."""
    if pipeline and pipeline.prior and images:
        return measure_images(pipeline, images, work)
    return Measurement(ImageCost(), {"chain_rule_nats_per_image": reason})


# --- opening what it needs ------------------------------------------------------------------------------------------


def _open(opens: Callable[[], OpenedT], required: bool) -> tuple[OpenedT | None, str]:
    """Call ``opens``; if it fails and is not required, return None and the reason."""
    try:
        return opens(), ""
    except InputError as error:
        if required:
            raise
        return None, str(error)


def _check_judge(is_judged: bool, request: SampleRequest) -> None:
    """Refuses settings of samples that nothing judges."""
    plain = SampleRequest()
    given = {"num-samples": request.num_samples} if request.num_samples != plain.num_samples else {}
    given |= {"seed": request.seed} if request.seed != plain.seed else {}
    given |= request.sampling.model_dump(exclude_defaults=True)
    if given and not is_judged:
        options = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
        raise InputError(
            f"{options}: samples are only drawn if a network judges them. Add --features imagenet, --features "
            "runs/NAME (twostage train-features) or --inception FILE, or remove these options."
        )


def _held_out_codes(
    saved: SavedModel, prior: Prior, codes: str | Path | None, split: str | None, num_images: int | None
) -> HeldOutCodes:
    """Code grids that match the prior: the same tokenizer, codebook, grid and classes."""
    config, cache = prior.config, CodeCache(codes or saved.find_codes(prior.config))
    manifest, path = cache.manifest, cache.path
    if manifest.tokenizer.hash != config.tokenizer.hash:
        raise InputError(
            f"codes {path}: made by the tokenizer {manifest.tokenizer.hash[:12]}, but the prior {saved.path} was "
            f"trained on codes of {config.tokenizer.hash[:12]}. Use --codes DIR with codes of that tokenizer."
        )
    for name, found, expected in (
        ("grid", "x".join(map(str, manifest.grid)), "x".join(map(str, config.grid))),
        ("codebook_size", manifest.codebook_size, config.codebook_size),
        ("class_names", manifest.class_names if config.class_names else None, config.class_names),
    ):
        if found != expected:
            raise InputError(
                f"codes {path}: have {name} {found}, but the prior {saved.path} was trained with {name} {expected}. "
                "Use --codes DIR with such codes."
            )
    cache.check_codes()
    held_out = HeldOutCodes.choose(cache, split, num_images)
    if config.class_names and held_out.split.labels is None:
        raise InputError(
            f"--split {held_out.split_name}: has no labels, but {saved.path} was trained with classes. Choose another "
            "split."
        )
    beside = {"text": held_out.split.captions, "map": held_out.split.maps, "vector": held_out.split.vectors}
    for condition in config.conditions:
        if beside.get(condition.type, held_out) is None:
            raise InputError(
                f"codes {path}: have no {condition.plural}, but {saved.path} was trained with them. Use --codes DIR "
                "with such codes."
            )
    return held_out


def _held_out_images(
    pipeline: TwoStagePipeline, source: str | None, codes: HeldOutCodes, num_images: int | None
) -> HeldOutImages:
    """The images of ``source``, or those that the codes were made from, in the size that the tokenizer takes."""
    assert pipeline.saved_tokenizer
    assert pipeline.prior
    manifest = codes.cache.manifest
    config = pipeline.saved_tokenizer.training_data(source or manifest.source)
    if source is None:
        config = config.model_copy(update=manifest.condition_settings or {})
        config = find_data(config, codes.cache.path, manifest.images)
    data, names = load_images(config), pipeline.prior.config.class_names
    if names and data.class_names != names:
        raise InputError(
            f"data.source {config.source}: has the classes {data.class_names}, but the prior was trained on {names}. "
            "Use --data with images of the same classes."
        )
    pipeline.read_given(data.validation, torch.arange(1))  # refuses to go on without a tokenizer of maps
    return HeldOutImages.choose(config, data, codes.split_name, num_images)


# --- the protocol ---------------------------------------------------------------------------------------------------


def _describe_models(
    path: str | Path, prior: Prior, tokenizer: str | Path | None, pipeline: TwoStagePipeline | None, decodes: bool
) -> dict[str, Any]:
    """The prior and its tokenizer in the protocol; the tokenizer's weights if its decoder was used."""
    config = prior.config
    about: dict[str, Any] = {"prior": describe_weights(path, type=config.model.type)}
    where = pipeline.saved_tokenizer.path if pipeline and pipeline.saved_tokenizer else tokenizer
    where, content = str(where or config.tokenizer.path), config.tokenizer.hash
    about["tokenizer"] = describe_weights(where, hash=content) if decodes else {"path": where, "hash": content}
    return about


def _doubts(
    pipeline: TwoStagePipeline | None, network: Judge | None, drawn: Samples | None, source: str
) -> dict[str, str]:
    """Why figures of the samples are not evidence of quality: the tokenizer was trained against the judging network."""
    if not pipeline or not drawn or not pipeline.saved_tokenizer:
        return {}
    figures = figures_of(drawn.measurements)
    judged = [name for name in JUDGED_SAMPLES if name in figures]
    return not_evidence(pipeline.tokenizer.config, pipeline.saved_tokenizer.path, network, source, judged)


def _sheets(drawn: Samples, pipeline: TwoStagePipeline, cycle: Cycle | None) -> list[Sheet]:
    captions = cycle.captions if cycle else ()
    labels = cycle.labels if cycle else pipeline.labels_for(None)
    names = [pipeline.label_names[label] for label in labels] if labels and pipeline.label_names else None
    sheet = prompt_sheet(pipeline.to_shown(drawn.images), captions) if captions else pipeline.sheet(drawn.images)
    sheets = [Sheet("samples", sheet, "The first samples.")]
    if drawn.neighbours:
        found = drawn.neighbours
        shown = Neighbours(pipeline.to_shown(found.samples), pipeline.to_shown(found.nearest), found.distances)
        sheet = neighbours_sheet(shown, names, labels)
        sheets.append(Sheet("neighbours", sheet, NEIGHBOURS_CAPTION))
    return sheets
