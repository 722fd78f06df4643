"""What is measured of a prior: the cost of held-out codes, of held-out images through the tokenizer, and its samples.

Axes: n rows, B of them in a batch, h and w cells of the code grid, C channels, H and W pixels, D draws.
"""

import math
import time
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from core.data import ImageSplit
from core.images import to_float
from core.random import BatchRandom, seed_for
from pipelines.evaluation_document import spread
from pipelines.frechet import FeatureDistance, InceptionFeatures, OwnFeatures, bias_warning, too_few
from pipelines.measurements import count_distinct, hash_of, row_digests, total_over_processes
from pipelines.two_stage import TwoStagePipeline
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.losses import LossConfig, negative_log_likelihood, reconstruction_loss
from stage2_prior.codes import CodeSplit
from stage2_prior.prior import Prior
from stage2_prior.sampling import SamplingConfig

__all__ = [
    "BOUND_DRAWS",
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
LEAST_SCALE = 2 / 255 / math.sqrt(12)
"""Of a pixel's likelihood, in units of [-1, 1]: the standard deviation of rounding to 8 bits. A narrower density says
nothing about grey levels."""
MOST_REFERENCES = 50_000  # training images that samples are compared with
MOST_PICTURED = 80


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
    counts: dict[str, int]
    """How many images of each kind were looked at."""
    warning: str | None
    pictures: Tensor
    """The first samples, (at most 80, C, H, W) uint8."""


def shared_batches(count: int, batch_size: int, state: PartialState, what: str) -> tqdm:
    """This process's batches of the places 0 ... count - 1."""
    parts = torch.arange(count).split(batch_size)[state.process_index :: state.num_processes]
    return tqdm(parts, desc=what, unit="batch", disable=not state.is_main_process, leave=False)


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
) -> LossConfig:
    """The tokenizer's reconstruction loss with the scale that makes the images of ``rows`` most likely: of a Gaussian
    the root of the mean squared error, of a Laplace the mean absolute error. A Bernoulli has none."""
    loss = model.config.loss
    if loss.reconstruction == "bce":
        return loss
    errors = torch.zeros(len(rows), dtype=torch.float64)
    for places in shared_batches(len(rows), batch_size, state, "scale"):
        images = to_float(split.read(rows[places]).to(state.device))
        decoded = model.decoded(model.encode(images).z)
        pairs = zip(decoded.split(1), images.split(1), strict=True)
        errors[places] = torch.stack([reconstruction_loss(*pair, loss.reconstruction) for pair in pairs]).cpu().double()
    error = total_over_processes(state, errors).mean().item()
    scale = error if loss.reconstruction == "l1" else math.sqrt(error)
    return loss.model_copy(update={"likelihood_scale": max(scale, LEAST_SCALE)})


@torch.no_grad()
def measure_images(
    pipeline: TwoStagePipeline,
    likelihood: LossConfig,
    split: ImageSplit,
    rows: Tensor,
    batch_size: int,
    state: PartialState,
) -> ChainRule:
    """Both parts of the bound -log p(x) <= -log p(x | codes(x)) - log p(codes(x)) on the images of ``rows``: one of the
    terms of p(x) = sum over codes of p(x | codes) p(codes)."""
    prior, model = pipeline.prior, pipeline.tokenizer
    table = torch.zeros(len(rows), 1 + num_draws(prior), dtype=torch.float64)
    digests = torch.zeros(len(rows), 32, dtype=torch.uint8)
    for places in shared_batches(len(rows), batch_size, state, "images"):
        pixels, labels = split.read(rows[places]), split.read_labels(rows[places])
        digests[places] = row_digests(pixels)
        images, labels = to_float(pixels.to(state.device)), None if labels is None else labels.to(state.device)
        latent = model.encode(images)
        assert latent.indices is not None
        decoded = model.decoded(latent.z)
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
        train: the images whose distance to the samples is measured; None: no distance.
        held_out: likewise None; as many of them as there are samples are measured as the samples are.
    """
    device = torch.device(state.device or "cpu")
    network = network.to(device)
    total = partial(total_over_processes, state)
    names, (height, width) = pipeline.class_names, pipeline.prior.config.grid
    cycle = pipeline.labels_for(None)
    of_samples, of_real = (FeatureDistance(network.num_features, device) for _ in range(2))
    looks = Looks(network, names)

    # 1. The samples.
    digests = torch.zeros(num_samples, 32, dtype=torch.uint8)
    correct = torch.zeros(num_samples, dtype=torch.float64)
    size = (pipeline.prior.config.channels, *pipeline.prior.config.image_size)
    pictures = torch.zeros(min(num_samples, MOST_PICTURED), *size, dtype=torch.uint8)
    seconds = torch.zeros(state.num_processes, dtype=torch.float64)
    for places in shared_batches(num_samples, batch_size, state, "samples"):
        numbers = range(int(places[0]), int(places[-1]) + 1)
        watch = Watch(len(places), device)
        for pixels, _ in pipeline.generate(numbers, cycle, sampling, seed, batch_size, watch):
            digests[places] = row_digests(pixels)
            labels = None if cycle is None else torch.tensor(cycle)[places % len(cycle)]
            features, correct[places] = looks(pixels.to(device), labels)
            of_samples.update(features, real=False)
            pictured = places < len(pictures)
            pictures[places[pictured]] = pixels[pictured]
        seconds[state.process_index] += watch.seconds
    digests = total(digests)
    figures = {"samples": float(num_samples), "distinct_samples": float(count_distinct(digests))}
    figures["codes_per_s"] = num_samples * height * width / total(seconds).max().item()
    counts, missing, warning = {}, {}, None
    if looks.problem:
        missing["class_accuracy"] = looks.problem
    else:
        figures["class_accuracy"] = total(correct).mean().item()

    # 2. Real images: those for training, which both are compared with, and as many held-out ones as there are samples.
    if train is not None and held_out is not None:
        references = spread(len(train), MOST_REFERENCES)
        for places in shared_batches(len(references), batch_size, state, "training images"):
            features, _ = looks(train.read(references[places]).to(device), None)
            of_samples.update(features, real=True)
            of_real.update(features, real=True)
        rows = spread(len(held_out), num_samples)
        digests, correct = torch.zeros(len(rows), 32, dtype=torch.uint8), torch.zeros(len(rows), dtype=torch.float64)
        for places in shared_batches(len(rows), batch_size, state, "held-out images"):
            pixels = held_out.read(rows[places])
            digests[places] = row_digests(pixels)
            features, correct[places] = looks(pixels.to(device), held_out.read_labels(rows[places]))
            of_real.update(features, real=False)
        counts = {"training_images": len(references), "held_out_images": len(rows)}
        distinct = count_distinct(total(digests))
        for name, distance, count in (
            ("frechet_distance", of_samples, int(figures["distinct_samples"])),
            ("frechet_distance_real", of_real, distinct),
        ):
            if reason := too_few(count, network.num_features):
                missing[name] = reason
            else:
                figures[name] = distance.compute(total)
        warning = bias_warning(min(num_samples, len(rows), len(references)), network.num_features)
        if not looks.problem:
            figures["class_accuracy_real"] = total(correct).mean().item()
    return SampleFigures(figures, missing, counts, warning, total(pictures))


class Looks:
    """The features of images, and which of them the network gives their class.

    Args:
        class_names: of the labels.
    """

    def __init__(self, network: OwnFeatures | InceptionFeatures, class_names: list[str] | None) -> None:
        self.network, self.problem = network, None
        if not class_names:
            self.problem = "the prior has no classes"
        elif not isinstance(network, OwnFeatures):
            self.problem = "the Inception network knows other classes; give --features runs/NAME"
        elif network.network.config.class_names != class_names:
            self.problem = (
                f"the feature network knows the classes {', '.join(network.network.config.class_names)}, the prior's "
                f"are {', '.join(class_names)}"
            )

    def __call__(self, pixels: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of uint8 images (B, C, H, W): the features (B, F) float64, and 1 where the class is found, (B,)."""
        features = self.network(pixels)
        if self.problem or labels is None or not isinstance(self.network, OwnFeatures):
            return features, torch.zeros(len(pixels), dtype=torch.float64)
        found = self.network.network.head(features.float()).argmax(1).cpu()
        return features, (found == labels).double()


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
