"""Measures samples with a judging network: their classes, their distance to real images, and whether they are copies of
training images. A prior and its tokenizer, or a variational autoencoder, draws the samples.

Axes: n samples, F features, k neighbours, C channels, H and W pixels.
"""

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipelines.drawing.asked import Asked, Cycle
from pipelines.drawing.sampler import ImageSampler
from pipelines.evaluation.distances import (
    NUM_NEIGHBOURS,
    NUM_SUBSETS,
    bias_warning,
    frechet_distance,
    inception_score,
    kernel_distance,
    num_splits,
    precision_recall,
    subset_size,
    too_few,
)
from pipelines.evaluation.judged_images import JudgedImages, RealImages
from pipelines.evaluation.judges import NO_NETWORK, Judge, class_mismatch, distance_note
from pipelines.evaluation.measurement import Measurement
from pipelines.evaluation.novelty import Neighbours, measure_novelty
from pipelines.evaluation.shared_work import SharedWork
from pipelines.saved.evaluation_figures import SampleCounts, SampleNovelty, SampleQuality
from stage2_prior.codes import CodeSplit
from stage2_prior.prior import Prior
from stage2_prior.sampling_config import SamplingConfig

__all__ = ["JUDGED_SAMPLES", "SampleRequest", "Samples", "held_out_cycle", "measure_samples", "unmeasured_samples"]

MAX_KEPT = 80
"""Samples on the sheet of samples."""
MAX_DUPLICATES = 0.01
"""The largest share of the samples that may be copies of others; with more, no figures are given."""
REAL_FIGURES: tuple[str, ...] = (
    "frechet_distance",
    "kernel_distance",
    "precision",
    "recall",
    "neighbour_distance_ratio",
    "training_copies",
)
"""Figures that compare samples with real images."""
SAMPLE_FIGURES: tuple[str, ...] = ("class_accuracy", "inception_score", *REAL_FIGURES)
"""All figures of samples that a judging network gives."""
JUDGED_SAMPLES = ("class_accuracy", "frechet_distance", "kernel_distance", "inception_score", "precision", "recall")
"""Figures of the quality of samples."""


# --- what is measured -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleRequest:
    """The samples to draw. Image i depends on ``seed``, ``sampling`` and i alone."""

    num_samples: int = 1000
    seed: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True)
class Samples:
    """The result of :func:`measure_samples`, the same in every process."""

    measurements: list[Measurement]
    images: Tensor
    """The first samples, (at most 80, C, H, W) uint8 or uint16."""
    neighbours: Neighbours | None = None
    """Neighbours of the first samples; None: they were not compared with training images."""
    refusal: str | None = None
    """Why the samples are not measured: too many of them are copies of others."""


def unmeasured_samples() -> Measurement[SampleCounts]:
    """The figures of samples that are missing because no network judges them."""
    return Measurement(SampleCounts(), dict.fromkeys((*SAMPLE_FIGURES, "codes_per_s"), NO_NETWORK))


def held_out_cycle(prior: Prior, split: CodeSplit, rows: Tensor) -> Cycle:
    """What the held-out images ``rows`` show: a sample for each is asked to show the same."""
    given = prior.conditions.read(split, rows)
    labels = given.pop("class").tolist() if "class" in given else None
    texts = split.read_captions(rows) if "text" in given else None
    return Cycle(labels, given, captions=[each[0] if each else "" for each in texts or []])


# --- measuring ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_samples(
    sampler: ImageSampler,
    network: Judge,
    request: SampleRequest,
    work: SharedWork,
    real: RealImages | None,
    no_images: str = "",
    cycle: Cycle | None = None,
) -> Samples:
    """Draws samples and measures them and real images with ``network``.

    Args:
        cycle: what the samples show, with the conditions of held-out images; None: all classes in turn.
        real: the images that as many samples are compared with; None: no comparison.
        no_images: the reason if there are no ``real`` images.
    """
    asked = cycle or sampler.cycle(Asked())
    samples, kept, codes_per_s = _draw_samples(sampler, asked, network, request, work)
    copies = samples.digests.duplicates
    counts = SampleCounts(request.num_samples, request.num_samples - copies, codes_per_s)
    protocol = _sample_protocol(sampler, cycle, request, copies)
    notes = [distance_note(network)]
    if copies:
        notes.insert(0, f"{copies:,} of the samples are copies of others among them.")
    if copies > MAX_DUPLICATES * request.num_samples:
        refusal = _too_many_copies(copies, request)
        missing = dict.fromkeys(SAMPLE_FIGURES, f"{copies:,} of the samples are copies of others")
        refused = {"samples": protocol | {"refused": refusal}, "frechet_distance": network.protocol}
        return Samples([Measurement(counts, missing, refused, (), notes)], kept, refusal=refusal)
    found: list[Measurement] = [Measurement(counts, {}, {"samples": protocol}, (), notes)]
    found.append(_measure_quality(sampler, asked.labels, samples, real, work))
    if not real:
        return Samples([*found, Measurement(SampleNovelty(), dict.fromkeys(REAL_FIGURES, no_images))], kept)
    novelty, neighbours = measure_novelty(samples, kept, real, len(sampler.class_names or []), work)
    return Samples([*found, novelty], kept, neighbours)


def _draw_samples(
    sampler: ImageSampler, cycle: Cycle, network: Judge, request: SampleRequest, work: SharedWork
) -> tuple[JudgedImages, Tensor, float | None]:
    """The samples as the network sees them, the first of them (n, C, H, W), and the codes drawn per second."""
    count = request.num_samples
    samples = JudgedImages(network, count, work)
    kept = torch.zeros(min(count, MAX_KEPT), sampler.channels, *sampler.image_size, dtype=torch.int32)  # to be summed
    seconds = torch.zeros(work.state.num_processes, dtype=torch.float64)
    for places in work.batches(count, "samples"):
        numbers = range(int(places[0]), int(places[-1]) + 1)
        watch = Stopwatch(len(places), work.device)
        for pixels, _ in sampler.draw(numbers, cycle, request.sampling, request.seed, len(places), watch):
            samples.update(places, pixels)
            first = places < len(kept)
            kept[places[first]] = pixels[first].int()
        seconds[work.state.process_index] += watch.seconds
    samples.gather()
    kept, codes_per_s = work.total(kept).to(torch.uint8 if sampler.bits == 8 else torch.uint16), None
    if sampler.prior:
        codes_per_s = count * math.prod(sampler.prior.config.grid) / work.total(seconds).max().item()
    return samples, kept, codes_per_s


class Stopwatch:
    """Measures how long it takes to draw a number of images, without the decoding that follows; call it with the
    number of images that were drawn since the last call."""

    def __init__(self, images: int, device: torch.device) -> None:
        self.device, self.seconds, self._left, self._start = device, 0.0, float(images), time.perf_counter()

    def __call__(self, images: float) -> None:
        self._left -= images
        if self._left < 1e-6:
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
            self.seconds = time.perf_counter() - self._start


def _measure_quality(
    sampler: ImageSampler, cycle: list[int] | None, samples: JudgedImages, real: RealImages | None, work: SharedWork
) -> Measurement[SampleQuality]:
    """The classes of the samples, which cycle through ``cycle``, and how the samples and held-out images compare with
    training images."""
    network, count = samples.network, len(samples)
    mismatch = class_mismatch(network, sampler.label_names, "model")
    missing = {"class_accuracy": mismatch} if mismatch else {}
    labels = None if mismatch or cycle is None else torch.tensor(cycle)[torch.arange(count) % len(cycle)]
    found, lacking = _set_quality(samples, labels, "", real, work)
    protocol: dict[str, Any] = {"frechet_distance": network.protocol}
    notes = []
    if network.has_logits:
        protocol["inception_score"] = _score_protocol(network, count)
        notes.append(f"The Inception score uses {protocol['inception_score']['classes']}.")
    if real:
        labels = None if mismatch else real.source.split.read_labels(real.held_out_rows)
        of_real, lacking_real = _set_quality(real.held_out, labels, "_real", real, work)
        found, lacking = found | of_real, lacking | lacking_real
        protocol |= _distance_protocol(network, real)
        if warning := bias_warning(real.num_compared, network.num_features):
            protocol["frechet_distance"]["warning"] = warning
            notes.insert(0, f"Frechet distance: {warning}.")
    return Measurement(SampleQuality(**found), missing | lacking, protocol, (), notes)


def _set_quality(
    images: JudgedImages, labels: Tensor | None, ending: str, real: RealImages | None, work: SharedWork
) -> tuple[dict[str, float], dict[str, str]]:
    """The figures of one set of images, and why some are missing, by the field of :class:`SampleQuality`.

    Args:
        labels: the class that each image should have; None: this is not measured.
        ending: the ending of the fields' names.
        real: what the images are compared with; None: nothing.
    """
    found, missing = _class_quality(images, labels, ending)
    if not real:
        return found, missing
    training = real.training.features
    if reason := too_few(images.digests.distinct, training.shape[1]):
        missing[f"frechet_distance{ending}"] = reason
    else:
        found[f"frechet_distance{ending}"] = frechet_distance(images.features, training, work.float64_device)
    if real.num_compared <= NUM_NEIGHBOURS:
        reason = f"{real.num_compared} images, but at least {NUM_NEIGHBOURS + 1} are needed"
        return found, missing | {f"{name}{ending}": reason for name in ("kernel_distance", "precision", "recall")}
    distance, deviation = kernel_distance(images.features, training, subset_size(real.num_compared), work)
    precision, recall = precision_recall(images.features, training[real.ball_rows], work)
    found |= {f"kernel_distance{ending}": distance, f"kernel_distance{ending}_deviation": deviation}
    return found | {f"precision{ending}": precision, f"recall{ending}": recall}, missing


def _class_quality(images: JudgedImages, labels: Tensor | None, ending: str) -> tuple[dict[str, float], dict[str, str]]:
    """The part of :func:`_set_quality` that needs the network's classes."""
    if not images.network.has_logits:
        return {}, {f"inception_score{ending}": images.network.no_classes}
    logits, found = images.logits(), {}
    found[f"inception_score{ending}"], deviation = inception_score(logits)
    if num_splits(len(logits)) > 1:
        found[f"inception_score{ending}_deviation"] = deviation
    if labels is not None:
        found[f"class_accuracy{ending}"] = (logits.argmax(1) == labels).double().mean().item()
    return found, {}


# --- the protocol, in words -----------------------------------------------------------------------------------------


def _condition_protocol(sampler: ImageSampler, cycle: Cycle | None) -> dict[str, str | None]:
    if cycle is None:
        return {"classes": "all in turn" if sampler.class_names else None}
    names, count = [*(["class"] if cycle.labels else []), *cycle.values], len(next(iter(cycle.values.values())))
    return {"conditions": f"{', '.join(names)} of {count:,} held-out images in turn"}


def _sample_protocol(
    sampler: ImageSampler, cycle: Cycle | None, request: SampleRequest, duplicates: int
) -> dict[str, Any]:
    protocol = {
        "seed": request.seed,
        "sampling": request.sampling.model_dump(mode="json"),
        **_condition_protocol(sampler, cycle),
        "duplicates": duplicates,
        "duplicates_allowed": f"{MAX_DUPLICATES:.0%} of the samples",
        "pixels": f"clipped and rounded to {sampler.bits} bits",
        "class_accuracy": (
            "share of the samples that the network assigns to their class; the same for equally many held-out images"
        ),
    }
    if sampler.prior:
        protocol["codes_per_s"] = (
            "wall time for drawing the codes, all processes together, without decoding; on this machine"
        )
    return protocol


def _score_protocol(network: Judge, count: int) -> dict[str, Any]:
    classes = "1008 logits without the bias, as published"
    if network.class_names is not None:
        number = len(network.class_names)
        classes = f"the network's own {number} classes, so do not compare it with scores of other networks"
    return {
        "network": network.protocol["network"],
        "classes": classes,
        "splits": num_splits(count),
        "chosen": "at random, the same for equally many images",
    }


def _distance_protocol(network: Judge, real: RealImages) -> dict[str, Any]:
    name, counts = network.protocol["network"], real.counts
    return {
        "frechet_distance": {
            **network.protocol,
            **counts,
            "frechet_distance": "samples against training images",
            "frechet_distance_real": (
                f"images of `{real.source.split_name}`, as many as samples if there are enough, against the same: the "
                "best value to expect"
            ),
        },
        "kernel_distance": {
            "network": name,
            **counts,
            "kernel": "(x.y / features + 1)^3, unbiased",
            "subsets": NUM_SUBSETS,
            "subset_size": subset_size(real.num_compared),
            "deviation": "of the subsets",
        },
        "precision_recall": {
            "network": name,
            "neighbours": NUM_NEIGHBOURS,
            "samples": real.num_samples,
            "training_images": len(real.ball_rows),
            "held_out_images": counts["held_out_images"],
            "chosen": (
                "spread evenly over the training images, as many as samples, because balls shrink with the number of "
                "images"
            ),
        },
    }


def _too_many_copies(copies: int, request: SampleRequest) -> str:
    given = [f"{name} {value}" for name, value in request.sampling.model_dump(exclude_defaults=True).items()]
    return (
        f"{copies:,} of the {request.num_samples:,} samples are copies of others, more than {MAX_DUPLICATES:.0%}, so "
        "no figures are given: they would describe fewer images than stated. Usual causes: temperature, top_k "
        f"or top_p is too low (here {', '.join(given) or 'the defaults'}), several processes use the same seeds, or "
        "the model has memorised a few images. Try a higher temperature, no top_k and no top_p, or train on more data"
    )
