"""The figures of an evaluated prior as people read them: a line each, and what is to be said about them."""

import math
from typing import Any

from pipelines.evaluation.evaluation_document import figure_lines
from pipelines.evaluation.prior_measurements import MANY_COPIES
from pipelines.saved.figures import PRIOR_ROWS, evidence_warnings
from stage2_prior.prior import PriorConfig

__all__ = ["ROWS", "in_units", "measured_on", "memorising", "prior_notes", "prior_table", "sample_notes"]

NEAR = 0.5
"""Samples this many times as far from training images as held-out images are look like copies."""
ROWS = PRIOR_ROWS


def in_units(nats_per_image: float, config: PriorConfig) -> dict[str, float]:
    """The same cost in each unit."""
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
    return notes + sample_notes(figures, protocol) + evidence_warnings(protocol["not_evidence"], ROWS)


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
