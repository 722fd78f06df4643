"""The figures of an evaluated prior as people read them: a line each, and what is to be said about them."""

import math
from typing import Any

from pipelines.evaluation.evaluation_document import Rows, evidence_warnings, figure_lines
from pipelines.evaluation.prior_measurements import MANY_COPIES
from stage2_prior.prior import PriorConfig

__all__ = ["ROWS", "SAMPLE_ROWS", "in_units", "measured_on", "memorising", "prior_notes", "prior_table", "sample_notes"]

NEAR = 0.5
"""Samples this many times as far from training images as held-out images are look like copies."""
UNITS = {  # of the codes' cost
    "nats_per_code": ("nats per code", "{:.4f}"),
    "nats_per_image": ("nats per image", "{:.2f}"),
    "bits_per_code": ("bits per code", "{:.4f}"),
    "bits_per_dim": ("bits per dimension", "{:.4f}"),
}
REAL = "  of held-out images"
SAMPLE_ROWS: Rows = {
    "samples": ("samples", "{:.0f}", "images drawn from the model"),
    "distinct_samples": ("  distinct", "{:.0f}", "different ones among them; fewer than all is a warning"),
    "codes_per_s": ("  drawn at", "{:.0f} codes per second", "without decoding, on this machine"),
    "class_accuracy": (
        "class accuracy",
        "{:.2%}",
        "the network sees the class that was asked for; higher is better",
    ),
    "class_accuracy_real": (REAL, "{:.2%}", "the most that can be expected"),
    "frechet_distance": ("Frechet distance", "{:.4g}", "samples to training images (gFID); lower is better"),
    "frechet_distance_real": (REAL, "{:.4g}", "the least that can be expected"),
    "kernel_distance": (
        "kernel distance (KID)",
        "{:.4g}",
        "the same question, unbiased for few images; lower is better",
    ),
    "kernel_distance_deviation": ("  deviation of subsets", "{:.2g}", "how sure that is"),
    "kernel_distance_real": (REAL, "{:.4g}", "the least that can be expected; about 0"),
    "kernel_distance_real_deviation": ("  deviation of subsets", "{:.2g}", "how sure that is"),
    "inception_score": (
        "Inception score",
        "{:.3f}",
        "sure and varied classes, 1 to their number; higher is better",
    ),
    "inception_score_deviation": ("  deviation of splits", "{:.2g}", "how sure that is"),
    "inception_score_real": (REAL, "{:.3f}", "what to compare it with"),
    "inception_score_real_deviation": ("  deviation of splits", "{:.2g}", "how sure that is"),
    "precision": ("precision", "{:.2%}", "samples that lie among training images: quality; higher is better"),
    "precision_real": (REAL, "{:.2%}", "what can be expected"),
    "recall": ("recall", "{:.2%}", "training images that lie among samples: variety; higher is better"),
    "recall_real": (REAL, "{:.2%}", "what can be expected"),
    "neighbour_distance_ratio": (
        "nearest training image",
        "{:.2f} times as far as of held-out images",
        "median distances; about 1 is new, far below 1 is copied",
    ),
    "training_copies": ("  exact copies of one", "{:.0f}", "samples that are training images, pixel by pixel"),
}
ROWS: Rows = {
    "parameters": ("parameters", "{:,.0f}", "of the prior"),
    "images": ("code grids", "{:,.0f}", "held-out images whose codes are measured"),
    **{
        name: row
        for unit, (title, form) in UNITS.items()
        for name, row in {
            unit: (title, form, "what held-out codes cost under the prior; lower is better"),
            f"{unit}_bound": (f"{title}, at most", form, "an upper bound of that cost; lower is better"),
            f"{unit}_standard_error": ("  standard error of that", "{:.2g}", "by the draws alone"),
            f"unigram_{unit}": ("  unigram", form, "by the codes' frequencies alone: a prior has to be below"),
            f"uniform_{unit}": ("  uniform", form, "all codes equally likely"),
        }.items()
    },
    "chain_rule_nats_per_image": (
        "whole model, at most",
        "{:.2f} nats per image",
        "images through codes, both stages; lower is better",
    ),
    "reconstruction_nats_per_image": ("  of it reconstruction", "{:.2f} nats per image", "what the codes leave open"),
    "prior_nats_per_image": ("  of it codes", "{:.2f} nats per image", "what the codes cost"),
    "chain_rule_bits_per_dim": ("  per dimension", "{:.4f} bits", "for each value of an image"),
    **SAMPLE_ROWS,
}


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


def prior_table(document: dict[str, Any]) -> str:
    """What the command prints of :func:`evaluate_prior`'s result."""
    lines = figure_lines(document["figures"], document["protocol"], ROWS)
    return "\n".join([*measured_on(document), *lines, *prior_notes(document)])


def measured_on(document: dict[str, Any]) -> list[str]:
    """Which codes and images were measured, a line each."""
    protocol = document["protocol"]
    about = protocol["codes"]
    lines = [
        f"{about['path']}, {about['split']}: {about['rows']:,} code grids ({about['chosen']}), {about['sha256'][:12]}"
    ]
    if "data" in protocol:
        about = protocol["data"]
        lines.append(
            f"{about['source']}, {about['split']}: {about['images']:,} images ({about['chosen']}), "
            f"{about['sha256'][:12]}"
        )
    return lines


def prior_notes(document: dict[str, Any]) -> list[str]:
    """How to read the figures, a line each."""
    figures, protocol = document["figures"], document["protocol"]
    notes = []
    if protocol["likelihood"]["kind"] != "exact":
        notes.append(f"its likelihood: an {protocol['likelihood']['kind']}")
    if "chain_rule" in protocol:
        about = protocol["chain_rule"]
        notes.append(f"whole model: of {about['of']}; {about['note']}")
    return notes + sample_notes(figures, protocol) + evidence_warnings(protocol, ROWS)


def sample_notes(figures: dict[str, Any], protocol: dict[str, Any]) -> list[str]:
    """How to read the figures of samples."""
    if "samples" not in protocol:
        return []
    distance, notes = protocol["frechet_distance"], []
    if copies := protocol["samples"]["duplicates"]:
        notes.append(f"{copies:,} of the samples are copies of others among them")
    notes.append(f"samples are judged by {distance['network']}, {distance['hash'][:12]}")
    if "warning" in distance:
        notes.append(f"Frechet distance: {distance['warning']}")
    if "inception_score" in protocol:
        notes.append(f"classes of the Inception score: {protocol['inception_score']['classes']}")
    memory = memorising(figures)
    return [*notes, memory] if memory else notes


def memorising(figures: dict[str, Any]) -> str | None:
    """A sentence where samples look like copies of training images."""
    ratio, copies = figures.get("neighbour_distance_ratio"), figures.get("training_copies") or 0
    near, many = ratio is not None and ratio < NEAR, copies > MANY_COPIES * figures["samples"]
    if not near and not many:
        return None
    reasons = [f"samples are {ratio:.2f} times as far from training images as held-out images are"] * near
    reasons += [f"{copies} of them are training images, pixel by pixel"] * many
    return (
        f"this looks like memorising: {' and '.join(reasons)}; see neighbours.png, and train on more data, a smaller "
        "model, with more dropout, or for fewer steps"
    )
