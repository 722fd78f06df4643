"""What is measured of a prior: the cost of held-out codes, of held-out images through the tokenizer, and its samples
(those of a variational autoencoder likewise).

Axes: n rows, B of them in a batch, h and w cells of the code grid, C channels, H and W pixels, D draws.
"""

import math
import time
from dataclasses import dataclass, field
from functools import partial

import torch
from accelerate import PartialState
from torch import Tensor

from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.evaluation.frechet import (
    InceptionFeatures,
    OwnFeatures,
    bias_warning,
    class_problem,
    frechet_distance,
    too_few,
)
from pipelines.evaluation.measurements import count_distinct, hash_of, row_digests, total_over_processes
from pipelines.evaluation.neighbours import Neighbours, nearest, num_shown
from pipelines.evaluation.sample_quality import (
    NEIGHBOURS,
    ImageFeatures,
    inception_score,
    kernel_distance,
    num_splits,
    precision_recall,
    subset_size,
)
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.losses import ObjectiveConfig, negative_log_likelihood, reconstruction_loss
from stage2_prior.codes import CodeSplit
from stage2_prior.prior import Prior
from stage2_prior.sampling import SamplingConfig
from twostage.core.data.dataset import ImageSplit
from twostage.core.data.spread import spread
from twostage.core.images.conversion import to_float
from twostage.core.machine.progress import ProgressBar
from twostage.core.training.random import BatchRandom, seed_for

__all__ = [
    "BOUND_DRAWS",
    "BOUND_SEED",
    "JUDGING",
    "MANY_COPIES",
    "OF_SAMPLES",
    "WITH_REAL",
    "ChainRule",
    "CodeNats",
    "SampleFigures",
    "fit_likelihood",
    "measure_codes",
    "measure_images",
    "measure_samples",
    "standard_error",
]

BOUND_DRAWS = 2
"""Draws for each image of what a bound is the mean over; two at least say how far they are apart."""
BOUND_SEED = 0
MIN_SCALE = 2 / 255 / math.sqrt(12)
"""Of a pixel's likelihood, in units of [-1, 1]: the standard deviation of rounding to 8 bits. A narrower density says
nothing about grey levels."""
MAX_REFERENCES = 50_000  # training images that samples are compared with
MAX_SHOWN = 80
MANY_COPIES = 0.01
"""Of the samples: with more, figures of them are refused."""
WITH_REAL = (
    "frechet_distance",
    "kernel_distance",
    "precision",
    "recall",
    "neighbour_distance_ratio",
    "training_copies",
)
OF_SAMPLES = ("class_accuracy", "inception_score", *WITH_REAL)
"""Figures of samples: by the network alone, and beside real images."""
JUDGING = ("class_accuracy", "frechet_distance", "kernel_distance", "inception_score", "precision", "recall")
"""Those that say how good samples are."""


@dataclass
class CodeNats:
    """The result of :func:`measure_codes`, the same in every process."""

    nats: Tensor
    """(n, D) nats per image; D is 1 where they are exact."""
    sha256: str
    """Of the grids' own sha256 digests (each of its codes as int64), in their order."""


@dataclass
class ChainRule:
    """The result of :func:`measure_images`, the same in every process."""

    reconstruction: Tensor
    """(n,) -log p(image | its codes) in nats per image."""
    prior: Tensor
    """(n, D) nats per image of these codes."""
    level_bits: float
    """To be added per dimension for bits: a grey level's width."""
    sha256: str
    duplicates: int


@dataclass
class SampleFigures:
    """The result of :func:`measure_samples`, the same in every process."""

    figures: dict[str, float]
    missing: dict[str, str]
    """Why there is no such figure."""
    pictures: Tensor
    """The first samples, (at most 80, C, H, W) uint8."""
    counts: dict[str, int] = field(default_factory=dict)
    """How many images of each kind were looked at."""
    warning: str | None = None
    neighbours: Neighbours | None = None
    """Of the first samples; None where no training images are at hand."""
    refused: str | None = None
    """A sentence: there are too many copies among the samples to measure anything of them."""


def shared_batches(count: int, batch_size: int, state: PartialState, what: str) -> ProgressBar:
    """This process's batches of the places 0 ... count - 1."""
    parts = torch.arange(count).split(batch_size)[state.process_index :: state.num_processes]
    return ProgressBar(parts, desc=what, unit="batch", disable=not state.is_main_process, leave=False)


def num_draws(prior: Prior) -> int:
    """Nats of each image that are measured: one where they are exact."""
    return 1 if prior.exact_likelihood else BOUND_DRAWS


def prior_nats(prior: Prior, indices: Tensor, labels: Tensor | None, first_row: int) -> Tensor:
    """-log p(codes | class) of a batch of codes (B, h, w) in nats, (B, D). What a bound draws belongs to the batch, so
    that it does not matter which process works on it."""
    nats = []
    for draw in range(num_draws(prior)):
        random = BatchRandom(seed_for(BOUND_SEED, draw, first_row), slice(0, len(indices)), len(indices))
        nats.append(prior.nats_per_image(indices, labels, random).cpu().double())
    return torch.stack(nats, 1)


def standard_error(nats: Tensor, batch_size: int) -> float:
    """Of the mean of nats (n, D), by the draws alone, the rows being as they are.

    The draws of one batch may depend on each other (a masked transformer spreads its masks evenly over it), those of
    different batches do not.
    """
    sums = torch.stack([part.sum(0) for part in nats.split(batch_size)])  # (batches, D)
    return (sums.var(1).sum() / nats.shape[1]).sqrt().item() / len(nats)


@torch.no_grad()
def measure_codes(prior: Prior, split: CodeSplit, rows: Tensor, batch_size: int, state: PartialState) -> CodeNats:
    """What the codes of ``rows`` cost under ``prior``, the batches shared by the processes."""
    # One line a grid; each process fills in its own, so that means do not depend on who measured what.
    nats = torch.zeros(len(rows), num_draws(prior), dtype=torch.float64)
    digests = torch.zeros(len(rows), 32, dtype=torch.uint8)
    for places in shared_batches(len(rows), batch_size, state, "codes"):
        indices, labels = split.read(rows[places])
        digests[places] = row_digests(indices)
        labels = None if labels is None else labels.to(state.device)
        nats[places] = prior_nats(prior, indices.to(state.device), labels, int(rows[places[0]]))
    nats, digests = total_over_processes(state, nats), total_over_processes(state, digests)
    return CodeNats(nats, hash_of(digests))


@torch.no_grad()
def fit_likelihood(
    model: Autoencoder, split: ImageSplit, rows: Tensor, batch_size: int, state: PartialState
) -> ObjectiveConfig:
    """The tokenizer's reconstruction loss with the scale that makes the images of ``rows`` most likely: of a Gaussian
    the root of the mean squared error, of a Laplace the mean absolute error. A Bernoulli has none."""
    loss = model.config.loss
    if loss.reconstruction == "bce":
        return loss
    errors = torch.zeros(len(rows), dtype=torch.float64)
    for places in shared_batches(len(rows), batch_size, state, "scale"):
        images = to_float(split.read(rows[places]).to(state.device))
        decoded = model.run_decoder(model.encode(images).z)
        pairs = zip(decoded.split(1), images.split(1), strict=True)
        errors[places] = torch.stack([reconstruction_loss(*pair, loss.reconstruction) for pair in pairs]).cpu().double()
    error = total_over_processes(state, errors).mean().item()
    scale = error if loss.reconstruction == "l1" else math.sqrt(error)
    return loss.model_copy(update={"likelihood_scale": max(scale, MIN_SCALE)})


@torch.no_grad()
def measure_images(
    pipeline: TwoStagePipeline,
    likelihood: ObjectiveConfig,
    split: ImageSplit,
    rows: Tensor,
    batch_size: int,
    state: PartialState,
) -> ChainRule:
    """Both parts of the bound -log p(x) <= -log p(x | codes(x)) - log p(codes(x)) on the images of ``rows``: one of the
    terms of p(x) = sum over codes of p(x | codes) p(codes)."""
    prior, model = pipeline.prior, pipeline.tokenizer
    assert prior is not None
    table = torch.zeros(len(rows), 1 + num_draws(prior), dtype=torch.float64)
    digests = torch.zeros(len(rows), 32, dtype=torch.uint8)
    for places in shared_batches(len(rows), batch_size, state, "images"):
        pixels, labels = split.read(rows[places]), split.read_labels(rows[places])
        digests[places] = row_digests(pixels)
        images, labels = to_float(pixels.to(state.device)), None if labels is None else labels.to(state.device)
        latent = model.encode(images)
        assert latent.indices is not None
        decoded = model.run_decoder(latent.z)
        for place, one, image in zip(places.tolist(), decoded.split(1), images.split(1), strict=True):
            table[place, 0] = negative_log_likelihood(one, image, likelihood)[0].cpu().double()
        table[places, 1:] = prior_nats(prior, latent.indices, labels, int(rows[places[0]]))
    table, digests = total_over_processes(state, table), total_over_processes(state, digests)
    nothing = torch.zeros(1, 1, 1, 1)
    _, level = negative_log_likelihood(nothing, nothing, likelihood)
    return ChainRule(table[:, 0], table[:, 1:], level, hash_of(digests), len(rows) - count_distinct(digests))


@torch.no_grad()
def measure_samples(
    pipeline: TwoStagePipeline,
    network: OwnFeatures | InceptionFeatures,
    num_samples: int,
    sampling: SamplingConfig,
    seed: int,
    batch_size: int,
    state: PartialState,
    train: ImageSplit | None,
    held_out: ImageSplit | None,
) -> SampleFigures:
    """Samples images of all classes in turn and looks at them, and at real ones, with ``network``.

    Args:
        pipeline: of a prior or of a variational autoencoder.
        train: the images that the samples are compared with; None: they are compared with none.
        held_out: likewise None; as many of them as there are samples are measured as the samples are.
    """
    device = torch.device(state.device or "cpu")
    network = network.to(device)
    total = partial(total_over_processes, state)
    cycle = pipeline.labels_for(None)

    # 1. The samples.
    samples = ImageFeatures(network, num_samples, state)
    size = (pipeline.channels, *pipeline.image_size)
    pictures = torch.zeros(min(num_samples, MAX_SHOWN), *size, dtype=torch.uint8)
    seconds = torch.zeros(state.num_processes, dtype=torch.float64)
    for places in shared_batches(num_samples, batch_size, state, "samples"):
        numbers = range(int(places[0]), int(places[-1]) + 1)
        watch = Watch(len(places), device)
        for pixels, _ in pipeline.draw(numbers, cycle, sampling, seed, len(places), watch):
            samples.update(places, pixels)
            pictured = places < len(pictures)
            pictures[places[pictured]] = pixels[pictured]
        seconds[state.process_index] += watch.seconds
    samples, pictures = samples.gather(), total(pictures)
    found = SampleFigures({"samples": num_samples, "distinct_samples": samples.distinct}, {}, pictures)
    if pipeline.prior:
        cells = math.prod(pipeline.prior.config.grid)
        found.figures["codes_per_s"] = num_samples * cells / total(seconds).max().item()
    copies = num_samples - samples.distinct
    if copies > MANY_COPIES * num_samples:
        found.refused = too_many_copies(copies, num_samples, sampling)
        found.missing |= dict.fromkeys(OF_SAMPLES, f"{copies:,} of the samples are copies of others")
        return found

    # 2. What the network makes of them.
    problem = class_problem(network, pipeline.label_names, "model")
    labels = None if cycle is None else torch.tensor(cycle)[torch.arange(num_samples) % len(cycle)]
    if problem:
        found.missing["class_accuracy"] = problem
    found.counts["inception_splits"] = num_splits(num_samples)
    found.figures |= class_figures(samples, None if problem else labels, "")
    if train is None or held_out is None:
        return found

    # 3. Real images: those for training, which both are compared with, and as many held-out ones as there are samples.
    references, rows = spread(len(train), MAX_REFERENCES), spread(len(held_out), num_samples)
    training, real = (ImageFeatures(network, len(chosen), state) for chosen in (references, rows))
    for images, split, chosen, what in (
        (training, train, references, "training images"),
        (real, held_out, rows, "held-out images"),
    ):
        for places in shared_batches(len(chosen), batch_size, state, what):
            images.update(places, split.read(chosen[places]))
        images.gather()
    found.figures |= class_figures(real, None if problem else held_out.read_labels(rows), "_real")
    found.counts |= {"training_images": len(references), "held_out_images": len(rows)}
    balls = spread(len(references), num_samples)  # as many as samples: balls are the smaller, the more there are
    fewest = min(num_samples, len(rows), len(references))
    found.counts |= {"kernel_subset_size": subset_size(fewest), "precision_images": len(balls)}
    found.warning = bias_warning(fewest, network.num_features)
    for images, ending in ((samples, ""), (real, "_real")):
        if reason := too_few(images.distinct, network.num_features):
            found.missing[f"frechet_distance{ending}"] = reason
        else:
            found.figures[f"frechet_distance{ending}"] = frechet_distance(images.features, training.features, device)
        if fewest <= NEIGHBOURS:
            reason = f"{fewest} images, at least {NEIGHBOURS + 1} are needed"
            found.missing |= {f"{name}{ending}": reason for name in ("kernel_distance", "precision", "recall")}
            continue
        distance, deviation = kernel_distance(images.features, training.features, subset_size(fewest), state)
        precision, recall = precision_recall(images.features, training.features[balls], state)
        found.figures |= {f"kernel_distance{ending}": distance, f"kernel_distance{ending}_deviation": deviation}
        found.figures |= {f"precision{ending}": precision, f"recall{ending}": recall}

    # 4. Are samples copies of training images?
    distances, near = nearest(samples.features, training.features, min(NEIGHBOURS, len(references)), state)
    usual = nearest(real.features, training.features, 1, state)[0].median()
    found.figures["neighbour_distance_ratio"] = (distances[:, 0].median() / usual).item()
    known = {bytes(digest) for digest in training.digests.numpy()}
    found.figures["training_copies"] = sum(bytes(digest) in known for digest in samples.digests.numpy())
    shown = num_shown(num_samples, len(pipeline.class_names or []))
    pixels = train.read(references[near[:shown].flatten()]).unflatten(0, (shown, -1))
    found.neighbours = Neighbours(pictures[:shown], pixels, distances[:shown] / usual)
    return found


def class_figures(images: ImageFeatures, labels: Tensor | None, ending: str) -> dict[str, float]:
    """The share of images that the network gives their class (where ``labels`` say it), and the Inception score."""
    logits = images.logits()
    score, deviation = inception_score(logits)
    figures = {f"inception_score{ending}": score}
    if num_splits(len(logits)) > 1:
        figures[f"inception_score{ending}_deviation"] = deviation
    if labels is not None:
        figures[f"class_accuracy{ending}"] = (logits.argmax(1) == labels).double().mean().item()
    return figures


def too_many_copies(copies: int, num_samples: int, sampling: SamplingConfig) -> str:
    """What is wrong with samples that are copies of each other, and what to try."""
    given = [f"{name} {value}" for name, value in sampling.model_dump(exclude_defaults=True).items()]
    return (
        f"{copies:,} of the {num_samples:,} samples are copies of others, more than {MANY_COPIES:.0%}: figures of "
        "them would be of fewer images than they claim, so none is given; the usual causes are a temperature, top_k or "
        f"top_p that is too low (here {', '.join(given) or 'the defaults'}), the same seeds in several processes, or a "
        "model that knows a few images by heart; try a higher temperature, no top_k and top_p, or train on more data"
    )


class Watch:
    """Told of the images that are drawn, it knows how long so many took, without the decoding that follows."""

    def __init__(self, images: int, device: torch.device) -> None:
        self.device, self.seconds, self._left, self._start = device, 0.0, float(images), time.perf_counter()

    def __call__(self, images: float) -> None:
        self._left -= images
        if self._left < 1e-6:
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
            self.seconds = time.perf_counter() - self._start
