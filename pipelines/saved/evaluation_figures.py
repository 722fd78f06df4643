"""The figures in an evaluation.json: for each its key, its title and format in tables, and what it means."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from stage2_prior.prior import PriorConfig

__all__ = [
    "NO_EVIDENCE",
    "PRIOR_ROWS",
    "SAMPLE_ROWS",
    "TOKENIZER_ROWS",
    "AttributeAccuracy",
    "CodeCost",
    "CodebookUse",
    "Cost",
    "Figures",
    "ImageCost",
    "ImageQuality",
    "JudgedReconstructions",
    "LatentUnits",
    "LikelihoodBound",
    "Listening",
    "Rows",
    "SampleCounts",
    "SampleNovelty",
    "SampleQuality",
    "evidence_warnings",
]

NO_EVIDENCE = "not evidence of quality"
REAL = "  of held-out images"


class Row(NamedTuple):
    """How a table shows a figure."""

    title: str
    form: str
    """A format string for the value."""
    meaning: str


Rows = dict[str, Row]
"""A table, by the keys of the figures in evaluation.json."""


def figure(title: str, form: str, meaning: str) -> Any:
    """A field of :class:`Figures`, with its row in tables. By default None: not measured."""
    return field(default=None, metadata={"row": Row(title, form, meaning)})


@dataclass(frozen=True)
class Figures:
    """The figures of one measurement: a subclass has a field for each, named as in evaluation.json."""

    def by_key(self) -> dict[str, float]:
        """The figures that were measured, by their key in evaluation.json."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def rows(cls) -> Rows:
        """The rows of all figures, by their key in evaluation.json."""
        return {each.name: each.metadata["row"] for each in fields(cls)}


@dataclass(frozen=True)
class NamedFigures(Figures):
    """Figures whose keys follow a pattern: a subclass lists them in its rows."""

    values: Mapping[str, float]
    """By their key in evaluation.json."""

    def by_key(self) -> dict[str, float]:
        """The figures that were measured, by their key in evaluation.json."""
        return dict(self.values)


# --- tokenizers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageQuality(Figures):
    """The distance of reconstructions to their originals, averaged over the images."""

    images: int | None = figure("images", "{:.0f}", "held-out images that were encoded and decoded")
    psnr: float | None = figure("PSNR", "{:.2f} dB", "error per pixel; higher is better")
    psnr_corrupted: float | None = figure("  from corrupted images", "{:.2f} dB", "corrupted as during training")
    ssim: float | None = figure("SSIM", "{:.4f}", "structure in small windows, at most 1; higher is better")
    lpips: float | None = figure("LPIPS", "{:.4f}", "difference that people would see; lower is better")


@dataclass(frozen=True)
class JudgedReconstructions(Figures):
    """A judging network's figures of reconstructions."""

    recognised: float | None = figure(
        "recognised", "{:.1%}", "reconstructions that the network assigns to their class; higher is better"
    )
    recognised_originals: float | None = figure("  of the originals", "{:.1%}", "the best value to expect")
    rfid: float | None = figure("Frechet distance", "{:.4g}", "reconstructions to originals; lower is better")
    rfid_of_halves: float | None = figure(
        "  of the originals' halves", "{:.4g}", "the distance between two halves of the same images"
    )
    rfid_perturbed: float | None = figure(
        "  from perturbed codes",
        "{:.4g}",
        "with most codes replaced by similar ones, as a prior's mistakes; lower is better",
    )


@dataclass(frozen=True)
class LikelihoodBound(Figures):
    """The negative ELBO of a variational autoencoder, averaged over the images."""

    nats_per_image: float | None = figure(
        "negative ELBO", "{:.2f} nats per image", "an upper bound on the cost of an image; lower is better"
    )
    bits_per_dim: float | None = figure("  per dimension", "{:.4f} bits", "for each value of an image")
    kl: float | None = figure(
        "  KL part", "{:.2f} nats per image", "what the latent says about the image; 0 is a collapsed posterior"
    )


@dataclass(frozen=True)
class LatentUnits(Figures):
    """The number of units of a variational autoencoder's latent that depend on the image."""

    active_units: int | None = figure("active units", "{:.0f}", "latent units that depend on the image")
    latent_units: int | None = figure("  of", "{:.0f}", "all latent units")


@dataclass(frozen=True)
class CodebookUse(Figures):
    """A tokenizer's use of its codebook. Entropy and perplexity are those of one code, averaged over the codebooks."""

    codebook_size: int | None = figure("codebook", "{:.0f} codes", "size of a codebook")
    codebooks: int | None = figure("  codebooks", "{:.0f}, one for each code of a cell", "of that size")
    codes_used: int | None = figure("  used", "{:.0f}", "codes that occur")
    dead_codes: int | None = figure("  dead", "{:.0f}", "codes that never occur")
    codebook_usage: float | None = figure("  usage", "{:.1%}", "share of the codes that occur; higher is better")
    perplexity: float | None = figure(
        "  perplexity", "{:.1f}", "equally frequent codes with the same entropy; best close to the codebook's size"
    )
    entropy_nats_per_code: float | None = figure("  entropy", "{:.3f} nats per code", "logarithm of the perplexity")
    cells: int | None = figure("grid", "{:.0f} cells", "codes per image")
    code_bits_per_pixel: float | None = figure(
        "  holds", "{:.4f} bits per pixel", "the most information that the codes can hold"
    )
    code_bits_per_dim: float | None = figure("  per dimension", "{:.4f} bits", "for each value of an image")


# --- priors ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """A cost of codes in every unit."""

    nats_per_code: float
    nats_per_image: float
    bits_per_code: float
    bits_per_dim: float

    @classmethod
    def of(cls, nats_per_image: float, config: PriorConfig) -> "Cost":
        """A cost in nats per image, for the grid and the images of a prior."""
        nats_per_code = nats_per_image / math.prod(config.grid)
        dimensions = math.prod(config.image_size) * config.channels
        bits_per_dim = nats_per_image / (math.log(2) * dimensions)
        return cls(nats_per_code, nats_per_image, nats_per_code / math.log(2), bits_per_dim)


@dataclass(frozen=True)
class CodeCost(Figures):
    """The cost of held-out codes under a prior."""

    parameters: int
    images: int
    cost: Cost
    unigram: Cost
    """The cost by the frequencies of the codes alone."""
    uniform: Cost
    """The cost with all codes equally likely."""
    standard_error: Cost | None
    """The standard error of the cost if that is an upper bound; None: the cost is exact."""

    def by_key(self) -> dict[str, float]:
        """A cost in each unit has its own key, such as `unigram_nats_per_code`; an upper bound ends in `_bound`."""
        found: dict[str, float] = {"parameters": self.parameters, "images": self.images}
        costs = {"{}": self.cost} if self.standard_error is None else {"{}_bound": self.cost}
        costs |= {"{}_standard_error": self.standard_error} if self.standard_error else {}
        for key, cost in (costs | {"unigram_{}": self.unigram, "uniform_{}": self.uniform}).items():
            found |= {key.format(unit): value for unit, value in asdict(cost).items()}
        return found

    @classmethod
    def rows(cls) -> Rows:
        """The rows of all keys."""
        rows = {
            "parameters": Row("parameters", "{:,.0f}", "of the prior"),
            "images": Row("code grids", "{:,.0f}", "held-out images whose codes are measured"),
        }
        for unit, title, form in (
            ("nats_per_code", "nats per code", "{:.4f}"),
            ("nats_per_image", "nats per image", "{:.2f}"),
            ("bits_per_code", "bits per code", "{:.4f}"),
            ("bits_per_dim", "bits per dimension", "{:.4f}"),
        ):
            rows |= {
                unit: Row(title, form, "cost of held-out codes under the prior; lower is better"),
                f"{unit}_bound": Row(f"{title}, at most", form, "an upper bound on that cost; lower is better"),
                f"{unit}_standard_error": Row("  standard error", "{:.2g}", "from the draws alone"),
                f"unigram_{unit}": Row("  unigram", form, "by the codes' frequencies alone; a prior must be lower"),
                f"uniform_{unit}": Row("  uniform", form, "with all codes equally likely"),
            }
        return rows


@dataclass(frozen=True)
class ImageCost(Figures):
    """The cost of held-out images under a prior and its tokenizer together."""

    chain_rule_nats_per_image: float | None = figure(
        "whole model, at most", "{:.2f} nats per image", "cost of held-out images by both stages; lower is better"
    )
    reconstruction_nats_per_image: float | None = figure(
        "  reconstruction part", "{:.2f} nats per image", "cost of an image given its codes"
    )
    prior_nats_per_image: float | None = figure("  codes part", "{:.2f} nats per image", "cost of the codes")
    chain_rule_bits_per_dim: float | None = figure("  per dimension", "{:.4f} bits", "for each value of an image")


@dataclass(frozen=True)
class Listening(NamedFigures):
    """How much a prior listens to each condition; the keys, such as `text_saves`, begin or end with its type."""

    @classmethod
    def rows(cls) -> Rows:
        """The rows of all keys."""
        rows = {}
        for kind in ("class", "text", "map", "vector"):
            rows |= {
                f"{kind}_saves": Row(
                    f"{kind} saves", "{:.4f} nats per code", "compared with no condition; higher is better"
                ),
                f"wrong_{kind}_costs": Row(
                    f"  a wrong {kind} costs", "{:.4f} nats per code", "compared with the right one; higher is better"
                ),
                f"{kind}_matches": Row(
                    f"  right {kind} likeliest", "{:.1%}", "of the right one and others; higher is better"
                ),
                f"{kind}_matches_by_chance": Row("    by chance", "{:.1%}", "for comparison"),
            }
        return rows


# --- samples --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleCounts(Figures):
    """The samples that were drawn."""

    samples: int | None = figure("samples", "{:.0f}", "images drawn from the model")
    distinct_samples: int | None = figure("  distinct", "{:.0f}", "different images among them; should be all")
    codes_per_s: float | None = figure("  drawn at", "{:.0f} codes per second", "without decoding, on this machine")


@dataclass(frozen=True)
class SampleQuality(Figures):
    """The quality of samples by a judging network, and that of held-out images for comparison."""

    class_accuracy: float | None = figure(
        "class accuracy", "{:.2%}", "samples that the network assigns to their class; higher is better"
    )
    class_accuracy_real: float | None = figure(REAL, "{:.2%}", "the best value to expect")
    frechet_distance: float | None = figure("Frechet distance", "{:.4g}", "samples to training images; lower is better")
    frechet_distance_real: float | None = figure(REAL, "{:.4g}", "the best value to expect")
    kernel_distance: float | None = figure(
        "kernel distance", "{:.4g}", "the same, but unbiased for few images; lower is better"
    )
    kernel_distance_deviation: float | None = figure("  deviation of subsets", "{:.2g}", "uncertainty of that")
    kernel_distance_real: float | None = figure(REAL, "{:.4g}", "the best value to expect, about 0")
    kernel_distance_real_deviation: float | None = figure("  deviation of subsets", "{:.2g}", "uncertainty of that")
    inception_score: float | None = figure(
        "Inception score", "{:.3f}", "clear and varied classes, from 1 to the number of classes; higher is better"
    )
    inception_score_deviation: float | None = figure("  deviation of splits", "{:.2g}", "uncertainty of that")
    inception_score_real: float | None = figure(REAL, "{:.3f}", "for comparison")
    inception_score_real_deviation: float | None = figure("  deviation of splits", "{:.2g}", "uncertainty of that")
    precision: float | None = figure(
        "precision", "{:.2%}", "samples that lie among training images: quality; higher is better"
    )
    precision_real: float | None = figure(REAL, "{:.2%}", "the value to expect")
    recall: float | None = figure(
        "recall", "{:.2%}", "training images that lie among samples: variety; higher is better"
    )
    recall_real: float | None = figure(REAL, "{:.2%}", "the value to expect")


ATTRIBUTE_TITLES = {
    "all": "all five attributes",
    "shape": "shape",
    "colour": "colour",
    "size": "size",
    "place": "place",
    "ground": "ground",
    "colour_and_shape": "colour and shape",
}


@dataclass(frozen=True)
class AttributeAccuracy(NamedFigures):
    """Whether drawn shapes are as their captions and maps say; the keys of combinations that were never trained on end
    in `_unseen`."""

    @classmethod
    def rows(cls) -> Rows:
        """The rows of all keys."""
        rows = {}
        for name, title in ATTRIBUTE_TITLES.items():
            indented = title if name == "all" else f"  {title}"
            rows[f"{name}_right"] = Row(indented, "{:.1%}", "as the caption says; higher is better")
        rows["map_overlap"] = Row(
            "overlap with the map", "{:.3f}", "intersection over union of the drawn shape and its map"
        )
        for name, title in ATTRIBUTE_TITLES.items():
            meaning = "as the caption says, never trained on together; higher is better"
            rows[f"{name}_right_unseen"] = Row(f"  unseen: {title}", "{:.1%}", meaning)
        rows["map_overlap_unseen"] = Row(
            "  unseen: with the map", "{:.3f}", "intersection over union, for shapes never trained on"
        )
        return rows


@dataclass(frozen=True)
class SampleNovelty(Figures):
    """Whether samples are copies of training images."""

    neighbour_distance_ratio: float | None = figure(
        "nearest training image",
        "{:.2f} times as far as held-out images",
        "median distances; about 1 for new images, far below 1 for copies",
    )
    training_copies: int | None = figure(
        "  exact copies", "{:.0f}", "samples that equal a training image, pixel by pixel"
    )


def _rows_of(*figures: type[Figures]) -> Rows:
    return {name: row for each in figures for name, row in each.rows().items()}


TOKENIZER_ROWS = _rows_of(ImageQuality, JudgedReconstructions, LikelihoodBound, LatentUnits, CodebookUse)
SAMPLE_ROWS = _rows_of(SampleCounts, SampleQuality, SampleNovelty)
PRIOR_ROWS = _rows_of(CodeCost, Listening, ImageCost, AttributeAccuracy) | SAMPLE_ROWS


def evidence_warnings(not_evidence: Mapping[str, str], rows: Rows) -> list[str]:
    """A sentence for each reason why figures are not evidence of quality; ``not_evidence`` has them by figure."""
    titles = {
        reason: ", ".join(rows[name].title.strip() for name, why in not_evidence.items() if why == reason)
        for reason in not_evidence.values()
    }
    return [f"Warning: {which}: {NO_EVIDENCE}, because {reason}." for reason, which in titles.items()]
