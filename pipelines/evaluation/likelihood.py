"""The cost of held-out codes under a prior, and of held-out images under the prior and its tokenizer together.

Axes: n rows, B of them in a batch, h and w cells of the code grid, C channels, H and W pixels, D draws.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.drawing.sampler import ImageSampler
from pipelines.evaluation.measurement import HeldOutImages, Measurement, chosen_rows
from pipelines.evaluation.shared_work import RowDigests, SharedWork
from pipelines.saved.evaluation_figures import CodeCost, Cost, ImageCost
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.losses.objective import ObjectiveConfig, negative_log_likelihood, reconstruction_loss
from stage2_prior.codes import CodeCache, CodeSplit
from stage2_prior.prior import Prior
from twostage.core.conditions.conditions import Given
from twostage.core.data.image_data import ImageSplit
from twostage.core.data.spread import spread
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_float
from twostage.core.machine.placement import copy_to
from twostage.core.training.random import BatchRandom, seed_for

__all__ = [
    "HeldOutCodes",
    "PerImageCosts",
    "fit_likelihood",
    "image_costs",
    "measure_codes",
    "measure_images",
    "min_scale",
    "prior_nats",
]

NUM_BOUND_DRAWS, BOUND_SEED = 2, 0
"""Draws per image that an upper bound is averaged over: at least two, to tell how far they are apart."""
NUM_SCALE_IMAGES = 4096
"""Training images that the likelihood's scale is fitted on."""


# --- codes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOutCodes:
    """The code grids that a prior is measured on."""

    cache: CodeCache
    split_name: str
    rows: Tensor
    """(n,) int64: the rows of the split that are measured."""

    @classmethod
    def choose(cls, cache: CodeCache, split: str | None, num_images: int | None) -> "HeldOutCodes":
        """Chooses the grids of ``num_images`` images, spread evenly over a split (None: all); by default the split that
        training validated on.

        Raises:
            InputError: there is no such split (the message lists the existing ones).
        """
        name = split or cache.manifest.validation_split
        if name not in cache.splits:
            choices = " or ".join(cache.splits)
            raise InputError(f"--split {name}: codes {cache.path} have no such split. Choose {choices}.")
        return cls(cache, name, spread(len(cache.splits[name]), num_images))

    @property
    def split(self) -> CodeSplit:
        """The split that the grids come from."""
        return self.cache.splits[self.split_name]


@torch.no_grad()
def measure_codes(prior: Prior, codes: HeldOutCodes, work: SharedWork) -> Measurement[CodeCost]:
    """Measures the cost of held-out codes under ``prior``."""
    split, rows, manifest = codes.split, codes.rows, codes.cache.manifest
    # One row per grid, and each process fills in its own rows: so the means do not depend on which process did what.
    nats = torch.zeros(len(rows), _num_draws(prior), dtype=torch.float64)
    digests = RowDigests(len(rows))
    for places in work.batches(len(rows), "codes"):
        indices, given = split.read(rows[places]), prior.conditions.read(split, rows[places])
        digests.update(places, indices)
        nats[places] = prior_nats(prior, indices.to(work.device), given, int(rows[places[0]]))
    nats = work.total(nats)
    digests.gather(work)
    config, cells = prior.config, math.prod(prior.config.grid)
    error = None if prior.exact_likelihood else Cost.of(standard_error(nats, work.batch_size), config)
    figures = CodeCost(
        parameters=sum(parameter.numel() for parameter in prior.parameters()),
        images=len(rows),
        cost=Cost.of(nats.mean().item(), config),
        unigram=Cost.of(manifest.unigram_nats_per_code[codes.split_name] * cells, config),
        uniform=Cost.of(math.log(config.codebook_size) * cells, config),
        standard_error=error,
    )
    chosen = chosen_rows(len(rows), len(split))
    about = {
        "path": str(codes.cache.path),
        "split": codes.split_name,
        "rows": len(rows),
        "chosen": chosen,
        "sha256": digests.sha256,
        "sha256_of": "the sha256 digests of the grids (int64, height x width), in order",
    }
    likelihood = _likelihood_protocol(prior)
    notes = [] if likelihood["kind"] == "exact" else [f"The cost of the codes is an {likelihood['kind']}."]
    subject = f"{codes.cache.path}, {codes.split_name}: {len(rows):,} code grids ({chosen}), {digests.sha256[:12]}"
    return Measurement(figures, {}, {"codes": about, "likelihood": likelihood}, [subject], notes)


def _likelihood_protocol(prior: Prior) -> dict[str, Any]:
    config = prior.config
    dimensions = " x ".join(map(str, (*config.image_size, config.channels)))
    kind: dict[str, Any] = {"kind": config.model.likelihood(config.grid)}
    if not prior.exact_likelihood:
        kind = {
            "kind": "upper bound (any-order autoregression): do not compare it with exact figures as if it were exact",
            "draws": NUM_BOUND_DRAWS,
            "seed": BOUND_SEED,
            "standard_error": "from the draws alone, for these code grids",
        }
    return kind | {
        "of": f"the codes given the image's {' and '.join(prior.conditions)}" if prior.conditions else "the codes",
        "bits_per_dim": f"nats per image / (ln 2 x {dimensions}): the cost of the codes per value of the image",
        "unigram": "code frequencies of the training split, add-one smoothing; cost of the whole held-out split",
        "uniform": f"ln {config.codebook_size} nats per code",
    }


def standard_error(nats: Tensor, batch_size: int) -> float:
    """The standard error of the mean of nats (n, D) that the draws alone cause, for these rows.

    The draws of one batch may depend on each other (a masked transformer spreads its masks evenly over it), but those
    of different batches do not.
    """
    sums = torch.stack([part.sum(0) for part in nats.split(batch_size)])  # (batches, D)
    return (sums.var(1).sum() / nats.shape[1]).sqrt().item() / len(nats)


def _num_draws(prior: Prior) -> int:
    return 1 if prior.exact_likelihood else NUM_BOUND_DRAWS


def prior_nats(prior: Prior, indices: Tensor, given: Given, first_row: int) -> Tensor:
    """-log p(codes | conditions) of a batch of codes (B, h, w) in nats, (B, D). The draws for a bound belong to the
    batch, whichever process works on it."""
    nats = []
    for draw in range(_num_draws(prior)):
        random = BatchRandom(seed_for(BOUND_SEED, draw, first_row), slice(0, len(indices)), len(indices))
        nats.append(prior.nats_per_image(indices, given, random).cpu().double())
    return torch.stack(nats, 1)


# --- images ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerImageCosts:
    """Both parts of the cost of each image, the same in every process."""

    reconstruction: Tensor
    """(n,) -log p(image | its codes) in nats per image."""
    prior: Tensor
    """(n, D) nats per image of these codes."""
    level_bits: float
    """The width of a grey level in bits, which is added to the bits per dimension."""
    digests: RowDigests


@torch.no_grad()
def image_costs(
    pipeline: ImageSampler, likelihood: ObjectiveConfig, images: HeldOutImages, work: SharedWork
) -> PerImageCosts:
    """Both parts of the bound -log p(x) <= -log p(x | codes(x)) - log p(codes(x)), which keeps one term of
    p(x) = sum over codes of p(x | codes) p(codes)."""
    prior, tokenizer = pipeline.prior, pipeline.tokenizer
    assert prior
    split, rows = images.split, images.rows
    table = torch.zeros(len(rows), 1 + _num_draws(prior), dtype=torch.float64)
    digests = RowDigests(len(rows))
    for places, pixels in work.read(split, rows, "images"):
        originals, given = to_float(copy_to(work.device, pixels)), pipeline.read_given(split, rows[places])
        digests.update(places, pixels)
        latent = tokenizer.encode(originals)
        assert latent.indices is not None
        decoded = tokenizer.run_decoder(latent.z)
        for place, one, original in zip(places.tolist(), decoded.split(1), originals.split(1), strict=True):
            table[place, 0] = negative_log_likelihood(one, original, likelihood)[0].cpu().double()
        table[places, 1:] = prior_nats(prior, latent.indices, given, int(rows[places[0]]))
    table = work.total(table)
    digests.gather(work)
    nothing = torch.zeros(1, 1, 1, 1)
    _, level_bits = negative_log_likelihood(nothing, nothing, likelihood, split.bits)
    return PerImageCosts(table[:, 0], table[:, 1:], level_bits, digests)


def measure_images(pipeline: ImageSampler, images: HeldOutImages, work: SharedWork) -> Measurement[ImageCost]:
    """Measures the cost of held-out images under the tokenizer and the prior together."""
    prior, tokenizer = pipeline.prior, pipeline.tokenizer
    assert prior
    scale_rows = spread(len(images.train), NUM_SCALE_IMAGES)
    likelihood = fit_likelihood(tokenizer, images.train, scale_rows, work)
    costs = image_costs(pipeline, likelihood, images, work)
    reconstruction, codes = costs.reconstruction.mean().item(), costs.prior.mean().item()
    total = reconstruction + codes
    bits = Cost.of(total, prior.config).bits_per_dim + costs.level_bits
    protocol = _chain_rule_protocol(prior, tokenizer, likelihood, len(scale_rows), costs.level_bits)
    return Measurement(
        ImageCost(total, reconstruction, codes, bits),
        protocol={"data": images.protocol(costs.digests), "chain_rule": protocol},
        subject=[images.sentence(costs.digests)],
        notes=[f"Whole model: cost of {protocol['of']}, {protocol['note']}."],
    )


@torch.no_grad()
def fit_likelihood(model: Autoencoder, split: ImageSplit, rows: Tensor, work: SharedWork) -> ObjectiveConfig:
    """The tokenizer's reconstruction loss with the scale that makes the images of ``rows`` most likely: the root of the
    mean squared error for a Gaussian, the mean absolute error for a Laplace. A Bernoulli has no scale."""
    loss = model.config.loss
    if loss.reconstruction == "bce":
        return loss
    errors = torch.zeros(len(rows), dtype=torch.float64)
    for places, pixels in work.read(split, rows, "scale"):
        images = to_float(copy_to(work.device, pixels))
        decoded = model.run_decoder(model.encode(images).z)
        pairs = zip(decoded.split(1), images.split(1), strict=True)
        errors[places] = torch.stack([reconstruction_loss(*pair, loss.reconstruction) for pair in pairs]).cpu().double()
    error = work.total(errors).mean().item()
    scale = error if loss.reconstruction == "l1" else math.sqrt(error)
    return loss.model_copy(update={"likelihood_scale": max(scale, min_scale(split.bits))})


def min_scale(bits: int) -> float:
    """The minimum scale of a pixel's likelihood, in units of [-1, 1]: the standard deviation of rounding to 8 or 16
    bits. A narrower density says nothing about grey levels."""
    return 2 / (2**bits - 1) / math.sqrt(12)


def _chain_rule_protocol(
    prior: Prior, tokenizer: Autoencoder, likelihood: ObjectiveConfig, num_scale_images: int, level_bits: float
) -> dict[str, Any]:
    given = f" | {', '.join(prior.conditions)}" if prior.conditions else ""
    about: dict[str, Any] = {
        "of": f"the images given their {' and '.join(prior.conditions)}" if given else "the images",
        "bound": (
            f"-log p(x{given}) <= -log p(x | decoder(codes(x))) - log p(codes(x){given}); held-out images are encoded "
            "without noise"
        ),
        "likelihood": {"bce": "Bernoulli", "l1": "Laplace", "l2": "Gaussian"}[likelihood.reconstruction],
        "level_bits": level_bits,
    }
    if likelihood.reconstruction == "bce":
        about["note"] = "a grey value counts as a probability, so only compare it with other Bernoulli figures"
    else:
        about |= {
            "scale": likelihood.likelihood_scale,
            "scale_of": (
                f"maximum likelihood on {num_scale_images} training images, spread evenly, in units of [-1, 1]; the "
                "tokenizer was trained without a scale"
            ),
            "note": (
                "a density at the grey levels (in bits: times the width of a level) without dequantisation noise, not "
                "comparable with likelihoods of discrete pixels"
            ),
            "level": (
                f"the density is over [-1, 1], where a grey level is 2/{2**tokenizer.config.bits - 1} wide; level_bits "
                "account for that"
            ),
        }
    if tokenizer.config.adversarial or tokenizer.config.trained_against:
        about["decoder"] = "trained with more than the reconstruction loss, so it does not aim to make images likely"
    return about
