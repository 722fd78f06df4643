"""Measures a trained prior: the likelihood of held-out codes and images, and its samples.

twostage evaluate runs/PRIOR [--features runs/features_NAME] [--json FILE]
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from core.data import DataConfig, ImageData, load_images
from core.errors import InputError
from core.model_folder import find_model_folder, write_json
from core.pictures import save_picture
from core.processes import join_processes
from core.run_folder import RunFolder
from pipelines.encode_dataset import training_data
from pipelines.evaluation_document import (
    DIGESTS_OF_IMAGES,
    NO_NETWORK,
    Rows,
    choose_split,
    described_rows,
    described_weights,
    figure_lines,
    sorted_figures,
    spread,
    versions,
)
from pipelines.frechet import open_features
from pipelines.prior_measurements import (
    SampleFigures,
    fit_likelihood,
    measure_codes,
    measure_images,
    measure_samples,
    standard_error,
)
from pipelines.prior_protocol import about_chain_rule, about_distance, about_likelihood, about_samples
from pipelines.two_stage import TwoStagePipeline, class_sheet
from stage2_prior.codes import CodeCache
from stage2_prior.prior import Prior, PriorConfig
from stage2_prior.sampling import SamplingConfig

__all__ = ["evaluate_prior", "prior_table"]

SCALE_IMAGES = 4096
"""Training images that the likelihood's scale is fitted on."""
MANY_COPIES = 0.01  # of the samples
UNITS = {  # of the codes' cost
    "nats_per_code": ("nats per code", "{:.4f}"),
    "nats_per_image": ("nats per image", "{:.2f}"),
    "bits_per_code": ("bits per code", "{:.4f}"),
    "bits_per_dim": ("bits per dimension", "{:.4f}"),
}
ROWS: Rows = {
    "parameters": ("parameters", "{:,.0f}"),
    "images": ("code grids", "{:,.0f}"),
    **{
        name: row
        for unit, (title, form) in UNITS.items()
        for name, row in {
            unit: (title, form),
            f"{unit}_bound": (f"{title}, at most", form),
            f"{unit}_standard_error": ("  standard error of that", "{:.2g}"),
            f"unigram_{unit}": ("  unigram", form),
            f"uniform_{unit}": ("  uniform", form),
        }.items()
    },
    "chain_rule_nats_per_image": ("whole model, at most", "{:.2f} nats per image"),
    "reconstruction_nats_per_image": ("  of it reconstruction", "{:.2f} nats per image"),
    "prior_nats_per_image": ("  of it codes", "{:.2f} nats per image"),
    "chain_rule_bits_per_dim": ("  per dimension", "{:.4f} bits"),
    "samples": ("samples", "{:.0f}"),
    "distinct_samples": ("  distinct", "{:.0f}"),
    "codes_per_s": ("  drawn at", "{:.0f} codes per second"),
    "class_accuracy": ("class accuracy", "{:.2%}"),
    "class_accuracy_real": ("  of held-out images", "{:.2%}"),
    "frechet_distance": ("Frechet distance", "{:.4g}"),
    "frechet_distance_real": ("  of held-out images", "{:.4g}"),
}
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
        out: a folder for evaluation.json and samples.png; None: nothing is written.

    Returns:
        `figures` (numbers by name; None: not measured) and `protocol` (how they came about, in plain JSON).

    Raises:
        InputError: no prior there; codes of another tokenizer, codebook, grid or other classes; sampling settings that
            it does not have; or something that is asked for and cannot be used.
    """
    state = join_processes()
    model = Prior.from_pretrained(prior).to(state.device)
    config, cells = model.config, math.prod(model.config.grid)
    model.check_sampling(sampling)
    network = open_features(inception, features, config.channels)
    cache = open_codes(prior, codes, config)
    name = split or cache.manifest.validation_split
    if name not in cache.splits:
        raise InputError(f"--split {name}: codes {cache.path} have {' and '.join(cache.splits)}; give one of them")
    pipeline, no_pipeline = _opened(
        lambda: TwoStagePipeline.from_prior(model, prior, tokenizer),
        asked_for=tokenizer is not None or network is not None,
    )
    images, no_images = None, no_pipeline
    if pipeline:
        pipeline.to(state.device or "cpu")
        images, no_images = _opened(
            lambda: open_images(tokenizer or config.tokenizer.path, source or cache.manifest.source, config),
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
        "tokenizer": {"path": str(tokenizer or config.tokenizer.path), "hash": config.tokenizer.hash},
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
        protocol["tokenizer"] = described_weights(tokenizer or config.tokenizer.path, hash=config.tokenizer.hash)
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
    samples = None
    if network and pipeline:
        train, real = None, None
        if images:
            train, real = images[1].splits["train"], choose_split(images[1], name, images[0])[1]
        samples = measure_samples(pipeline, network, num_samples, sampling, seed, batch_size, state, train, real)
        figures |= samples.figures
        missing |= samples.missing | ({} if images else {"frechet_distance": no_images})
        protocol["samples"] = about_samples(samples, sampling, seed, num_samples, model)
        protocol["frechet_distance"] = about_distance(samples, network.protocol, name)
    else:
        missing |= dict.fromkeys(("class_accuracy", "frechet_distance", "codes_per_s"), NO_NETWORK)
    ordered, missing = sorted_figures(figures, missing, ROWS)
    document = {
        "figures": ordered,
        "protocol": {
            **protocol,
            "image_size": list(config.image_size),
            "channels": config.channels,
            "not_measured": missing,
            "batch_size": batch_size,
            "processes": state.num_processes,
            "device": torch.device(state.device or "cpu").type,
            "versions": versions(),
        },
    }
    if out and state.is_main_process:
        _write(Path(out), document, samples, config)
    state.wait_for_everyone()
    return document


def in_units(nats_per_image: float, config: PriorConfig) -> dict[str, float]:
    """The same cost in each of `UNITS`."""
    cells, dimensions = math.prod(config.grid), math.prod(config.image_size) * config.channels
    nats_per_code = nats_per_image / cells
    return {
        "nats_per_code": nats_per_code,
        "nats_per_image": nats_per_image,
        "bits_per_code": nats_per_code / math.log(2),
        "bits_per_dim": nats_per_image / (math.log(2) * dimensions),
    }


# --- what it needs --------------------------------------------------------------------------------------------------


def _opened(opens: Callable[[], OpenedT], asked_for: bool) -> tuple[OpenedT | None, str]:
    """What ``opens`` gives, or None and why; what was asked for has to be there."""
    try:
        return opens(), ""
    except InputError as error:
        if asked_for:
            raise
        return None, str(error)


def open_codes(prior: str | Path, codes: str | Path | None, config: PriorConfig) -> CodeCache:
    """The code cache that is given, or that the run was trained on.

    Raises:
        InputError: none is known, it is not of this prior's tokenizer, codebook, grid and classes, or it is damaged.
    """
    if codes is None:
        run = find_model_folder(prior).parent
        if not (run / "config.yaml").is_file():
            raise InputError(f"{prior}: no config.yaml says which codes it was trained on; give --codes DIR")
        codes = str((RunFolder(run).stored_config() or {})["codes"])
    cache = CodeCache(codes)
    manifest = cache.manifest
    if manifest.tokenizer.hash != config.tokenizer.hash:
        raise InputError(
            f"codes {codes}: made by the tokenizer {manifest.tokenizer.hash[:12]}, but the prior {prior} was trained "
            f"on codes of {config.tokenizer.hash[:12]}; give --codes DIR of that tokenizer's"
        )
    for what, found, expected in (
        ("a grid of", "x".join(map(str, manifest.grid)), "x".join(map(str, config.grid))),
        ("a codebook of", manifest.codebook_size, config.codebook_size),
        ("the classes", manifest.class_names, config.class_names),
    ):
        if found != expected:
            raise InputError(
                f"codes {codes}: have {what} {found}, but the prior {prior} was trained on {expected}; give "
                "--codes DIR of such codes"
            )
    cache.check_codes()
    return cache


def open_images(tokenizer: str | Path, source: str, config: PriorConfig) -> tuple[DataConfig, ImageData]:
    """The images of ``source`` in the tokenizer's form.

    Raises:
        InputError: there are none, or they have other classes.
    """
    data_config = training_data(tokenizer, source)
    data = load_images(data_config)
    if config.class_names and data.class_names != config.class_names:
        raise InputError(
            f"data.source {source}: has the classes {data.class_names}, the prior was trained on {config.class_names}; "
            "give images of the same classes"
        )
    return data_config, data


# --- files and table ------------------------------------------------------------------------------------------------


def _write(out: Path, document: dict[str, Any], samples: SampleFigures | None, config: PriorConfig) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if samples:
        save_picture(class_sheet(samples.pictures, config.class_names), out / "samples.png")
    write_json(out / "evaluation.json", document)


def prior_table(document: dict[str, Any]) -> str:
    """The figures as people read them."""
    protocol = document["protocol"]
    about, missing = protocol["codes"], protocol["not_measured"]
    lines = [
        f"{about['path']}, {about['split']}: {about['rows']:,} code grids ({about['chosen']}), {about['sha256'][:12]}"
    ]
    if "data" in protocol:
        data = protocol["data"]
        lines.append(
            f"{data['source']}, {data['split']}: {data['images']:,} images ({data['chosen']}), {data['sha256'][:12]}"
        )
    lines += figure_lines(document["figures"], missing, ROWS)
    if protocol["likelihood"]["kind"] != "exact":
        lines.append(f"its likelihood: an {protocol['likelihood']['kind']}")
    if "chain_rule" in protocol:
        about = protocol["chain_rule"]
        lines.append(f"whole model: of {about['of']}; {about['note']}")
    if "samples" in protocol and (copies := protocol["samples"]["duplicates"]):
        many = copies > MANY_COPIES * document["figures"]["samples"]
        means = "; class accuracy and Frechet distance describe fewer images than were drawn" if many else ""
        lines.append(f"{copies} of the samples are copies of others among them{means}")
    if "frechet_distance" in protocol:
        about = protocol["frechet_distance"]
        lines.append(f"Frechet distance to training images in {about['network']}, {about['hash'][:12]}")
        lines += [about["warning"]] if "warning" in about else []
    return "\n".join(lines)
