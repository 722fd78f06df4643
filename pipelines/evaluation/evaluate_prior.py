"""Measures a trained prior: the likelihood of held-out codes and images, and its samples.

twostage evaluate runs/PRIOR [--features runs/features_NAME] [--json FILE]
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.evaluation.evaluation_document import (
    DIGESTS_OF_IMAGES,
    NO_NETWORK,
    choose_split,
    described_rows,
    described_weights,
    sorted_figures,
    versions,
)
from pipelines.evaluation.evaluation_report import sample_sheets, write_evaluation
from pipelines.evaluation.frechet import open_features
from pipelines.evaluation.independence import not_evidence
from pipelines.evaluation.prior_measurements import (
    JUDGING,
    OF_SAMPLES,
    WITH_REAL,
    SampleFigures,
    fit_likelihood,
    measure_codes,
    measure_images,
    measure_samples,
    standard_error,
)
from pipelines.evaluation.prior_protocol import about_chain_rule, about_likelihood, about_samples
from pipelines.evaluation.prior_table import ROWS, in_units, measured_on, prior_notes
from pipelines.saved.saved_model import SavedModel, find_data
from stage2_prior.codes import CodeCache
from stage2_prior.prior import Prior, PriorConfig
from stage2_prior.sampling import SamplingConfig
from twostage.core.data.dataset import DataConfig, ImageData, load_images
from twostage.core.data.spread import spread
from twostage.core.errors import InputError
from twostage.core.machine.processes import join_processes

__all__ = ["evaluate_prior"]

SCALE_IMAGES = 4096
"""Training images that the likelihood's scale is fitted on."""
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
    num_samples: int = 1000,
    seed: int = 0,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (immutable)
    batch_size: int = 64,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Measures a trained prior, codes, images and samples shared by the processes.

    Args:
        codes: a code cache of its tokenizer; by default what it was trained on.
        tokenizer: where it has moved; by default where it was when the codes were made.
        source: of the images; by default what the codes were made of.
        split: held out; by default what its training validated on.
        features: a feature network's run folder, for class accuracy and Frechet distances.
        inception: the Inception weights of published FIDs, a file of torch-fidelity, for Frechet distances.
        num_images: code grids and images, spread evenly over the split; None: all.
        num_samples: drawn, where one of the networks is given; image i depends on ``seed``, ``sampling`` and i alone.
        out: a folder for evaluation.json, evaluation.html, samples.png and neighbours.png; None: nothing is written.

    Returns:
        `figures` (numbers by name; None: not measured) and `protocol` (how they came about, in plain JSON). Where
        more than 1% of the samples are copies of others, none of their figures is measured and
        ``protocol["samples"]["refused"]`` is a sentence that says so.

    Raises:
        InputError: no prior there; codes of another tokenizer, codebook, grid or other classes; sampling settings that
            it does not have; or something that is asked for and cannot be used.
    """
    state = join_processes()
    saved, model = SavedModel.find_run(prior), Prior.from_pretrained(prior).to(state.device)
    config, cells = model.config, math.prod(model.config.grid)
    model.check_sampling(sampling)
    network = open_features(inception, features, config.channels)
    cache = open_codes(saved, codes, config)
    name = split or cache.manifest.validation_split
    if name not in cache.splits:
        raise InputError(f"--split {name}: codes {cache.path} have {' and '.join(cache.splits)}; give one of them")
    if config.class_names and cache.splits[name].labels is None:
        raise InputError(f"--split {name}: has no labels, but {prior} was trained with classes; give another one")
    pipeline, no_pipeline = _opened(
        lambda: TwoStagePipeline.from_prior(model, saved, tokenizer),
        asked_for=tokenizer is not None or network is not None,
    )
    where = tokenizer or config.tokenizer.path
    if pipeline and pipeline.saved_tokenizer:
        where = pipeline.saved_tokenizer.path
    images, no_images = None, no_pipeline
    if pipeline:
        pipeline.to(state.device or "cpu")
        images, no_images = _opened(
            lambda: open_images(pipeline, source, cache),
            asked_for=source is not None,
        )

    # 1. The codes.
    held_out = cache.splits[name]
    rows = spread(len(held_out), num_images)
    found = measure_codes(model, held_out, rows, batch_size, state)
    suffix = "" if model.exact_likelihood else "_bound"
    figures: dict[str, float] = {"parameters": sum(p.numel() for p in model.parameters()), "images": len(rows)}
    for (prefix, ending), value in {
        ("", suffix): found.nats.mean().item(),
        ("unigram_", ""): cache.manifest.unigram_nats_per_code[name] * cells,
        ("uniform_", ""): math.log(config.codebook_size) * cells,
    }.items():
        figures |= {f"{prefix}{unit}{ending}": one for unit, one in in_units(value, config).items()}
    if not model.exact_likelihood:
        error = in_units(standard_error(found.nats, batch_size), config)
        figures |= {f"{unit}_standard_error": one for unit, one in error.items()}
    protocol: dict[str, Any] = {
        "prior": described_weights(prior, type=config.model.type),
        "tokenizer": {"path": str(where), "hash": config.tokenizer.hash},
        "codes": {
            "path": str(cache.path),
            "split": name,
            "rows": len(rows),
            "chosen": described_rows(len(rows), len(held_out)),
            "sha256": found.sha256,
            "sha256_of": "the grids' own sha256 digests (int64, height x width), in order",
        },
        "likelihood": about_likelihood(model),
    }
    if pipeline and (images or network):  # its decoder has a part in what is measured
        protocol["tokenizer"] = described_weights(where, hash=config.tokenizer.hash)
    missing: dict[str, str] = {}

    # 2. The images: the tokenizer's part and the prior's.
    if pipeline and images:
        data_config, data = images
        _, pictures = choose_split(data, name, data_config)
        chosen, fitted = spread(len(pictures), num_images), spread(len(data.splits["train"]), SCALE_IMAGES)
        likelihood = fit_likelihood(pipeline.tokenizer, data.splits["train"], fitted, batch_size, state)
        chain = measure_images(pipeline, likelihood, pictures, chosen, batch_size, state)
        parts = chain.reconstruction.mean().item(), chain.prior.mean().item()
        figures |= {
            "chain_rule_nats_per_image": sum(parts),
            "reconstruction_nats_per_image": parts[0],
            "prior_nats_per_image": parts[1],
            "chain_rule_bits_per_dim": in_units(sum(parts), config)["bits_per_dim"] + chain.level_bits,
        }
        protocol["data"] = {
            "source": data_config.source,
            "split": name,
            "images": len(chosen),
            "chosen": described_rows(len(chosen), len(pictures)),
            "sha256": chain.sha256,
            "sha256_of": DIGESTS_OF_IMAGES,
            "duplicates": chain.duplicates,
        }
        protocol["chain_rule"] = about_chain_rule(pipeline, likelihood, len(fitted), chain.level_bits)
    else:
        missing["chain_rule_nats_per_image"] = no_images

    # 3. Samples.
    samples, doubts = None, {}
    if network and pipeline:
        train, real = None, None
        if images:
            train, real = images[1].splits["train"], choose_split(images[1], name, images[0])[1]
        samples = measure_samples(pipeline, network, num_samples, sampling, seed, batch_size, state, train, real)
        figures |= samples.figures
        judged = [name for name in JUDGING if name in samples.figures]
        where, judged_on = tokenizer or config.tokenizer.path, source or cache.manifest.source
        doubts = not_evidence(pipeline.tokenizer.config, where, network, features, judged_on, judged)
        missing |= ({} if images else dict.fromkeys(WITH_REAL, no_images)) | samples.missing
        protocol |= about_samples(samples, sampling, seed, num_samples, pipeline, network, name)
    else:
        missing |= dict.fromkeys((*OF_SAMPLES, "codes_per_s"), NO_NETWORK)
    ordered, missing = sorted_figures(figures, missing, ROWS)
    document = {
        "figures": ordered,
        "protocol": {
            **protocol,
            "image_size": list(config.image_size),
            "channels": config.channels,
            "not_evidence": doubts,
            "not_measured": missing,
            "batch_size": batch_size,
            "processes": state.num_processes,
            "device": torch.device(state.device or "cpu").type,
            "versions": versions(),
        },
    }
    if out and state.is_main_process:
        _write(Path(out), document, samples, pipeline)
    state.wait_for_everyone()
    return document


# --- what it needs --------------------------------------------------------------------------------------------------


def _opened(opens: Callable[[], OpenedT], asked_for: bool) -> tuple[OpenedT | None, str]:
    """What ``opens`` gives, or None and why; what was asked for has to be there."""
    try:
        return opens(), ""
    except InputError as error:
        if asked_for:
            raise
        return None, str(error)


def open_codes(prior: SavedModel, codes: str | Path | None, config: PriorConfig) -> CodeCache:
    """The code cache that is given, or that the run was trained on.

    Raises:
        InputError: none is known, it is not of this prior's tokenizer, codebook, grid and classes, or it is damaged.
    """
    codes = codes or prior.find_codes(config)
    cache = CodeCache(codes)
    manifest = cache.manifest
    if manifest.tokenizer.hash != config.tokenizer.hash:
        raise InputError(
            f"codes {codes}: made by the tokenizer {manifest.tokenizer.hash[:12]}, but the prior {prior.path} "
            f"was trained on codes of {config.tokenizer.hash[:12]}; give --codes DIR of that tokenizer's"
        )
    for what, found, expected in (
        ("a grid of", "x".join(map(str, manifest.grid)), "x".join(map(str, config.grid))),
        ("a codebook of", manifest.codebook_size, config.codebook_size),
        ("the classes", manifest.class_names, config.class_names),
    ):
        if found != expected:
            raise InputError(
                f"codes {codes}: have {what} {found}, but the prior {prior.path} was trained on {expected}; give "
                "--codes DIR of such codes"
            )
    cache.check_codes()
    return cache


def open_images(pipeline: TwoStagePipeline, source: str | None, cache: CodeCache) -> tuple[DataConfig, ImageData]:
    """The images of ``source``, or those that the codes were made of, in the tokenizer's form.

    Raises:
        InputError: there are none, or they have other classes.
    """
    assert pipeline.prior
    assert pipeline.saved_tokenizer
    config, manifest = pipeline.prior.config, cache.manifest
    data_config = pipeline.saved_tokenizer.training_data(source or manifest.source)
    if source is None:
        data_config = find_data(data_config, cache.path, manifest.images)
    data = load_images(data_config)
    if config.class_names and data.class_names != config.class_names:
        raise InputError(
            f"data.source {data_config.source}: has the classes {data.class_names}, the prior was trained on "
            f"{config.class_names}; give images of the same classes"
        )
    return data_config, data


# --- files ----------------------------------------------------------------------------------------------------------


def _write(
    out: Path, document: dict[str, Any], samples: SampleFigures | None, pipeline: TwoStagePipeline | None
) -> None:
    pictures = sample_sheets(samples, pipeline) if samples and pipeline else []
    refused = [samples.refused] if samples and samples.refused else []
    notes = measured_on(document) + refused + prior_notes(document)
    title = f"Evaluation of {document['protocol']['prior']['path']}"
    write_evaluation(out, title, document, ROWS, notes, pictures)
