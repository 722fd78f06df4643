"""Whether a tokenizer is ready for stage two, in words: a pure function of the figures that `evaluate` measures."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

__all__ = ["Verdict", "verdict"]

MIN_PSNR = 18.0
"""dB; a judgement. Below it, shapes are wrong and not only textures."""
MIN_USAGE = 0.5
"""Of the codebook. A healthy one is used nearly in full; below half, training has lost codes faster than it revived."""
MIN_ENTROPY_SHARE = 0.1
"""Of log(codebook_size). Below a tenth the grid says next to nothing about its image."""
MIN_EVENNESS = 0.25
"""Perplexity over the codes used. Below a quarter, a few codes do nearly all the work."""
MIN_CODES_SEEN = 10
"""Cells read per codebook entry. With fewer, entries stay unused by chance."""
MIN_ACTIVE_SHARE = 0.2
"""Of the latent's units; a judgement. Some inactive ones are usual (Burda et al. 2016), nearly all a collapse."""
MIN_BITS_PER_PIXEL = 0.02
"""The coarsest grids that priors are commonly trained on, 16x16 codes of 1024 for 256x256 pixels, have 0.04."""
MAX_BITS_PER_PIXEL = 2.0
"""A quarter of a grey image's 8 bits: above it a prior has nearly as much to learn as one over pixels."""
MAX_CELLS = 1024
"""Attention costs the square of the sequence; 32x32 codes are what a prior on one GPU still learns well."""


@dataclass(frozen=True)
class Verdict:
    """What the figures mean for stage two."""

    ready: bool
    """Whether a prior over its codes is worth training."""
    sentences: list[str]
    """The outcome first, then each finding with what to try."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found."""

    blocks: bool
    """Whether it stands in the way of stage two."""
    sentence: str


def verdict(figures: Mapping[str, float | None]) -> Verdict:
    """Judges the figures of `evaluate` (missing and None alike are not judged); every threshold is named above."""
    known = {name: value for name, value in figures.items() if value is not None}
    findings = [*(_codes(known) if "codebook_size" in known else _continuous(known)), *_quality(known)]
    blockers = [finding.sentence for finding in findings if finding.blocks]
    remarks = [finding.sentence for finding in findings if not finding.blocks]
    if blockers:
        return Verdict(False, ["Not ready for stage two.", *blockers, *remarks])
    outcome = "Ready for stage two: twostage encode, then twostage train-prior."
    return Verdict(True, [outcome, *remarks])


def _quality(figures: dict[str, float]) -> Iterator[Finding]:
    if "psnr" in figures and figures["psnr"] < MIN_PSNR:
        yield Finding(
            True,
            f"PSNR is {figures['psnr']:.1f} dB, below {MIN_PSNR:g}: generated images can be no better than "
            "reconstructions; train longer, widen model.backbone.channels, or halve the image's sides once less.",
        )


def _continuous(figures: dict[str, float]) -> Iterator[Finding]:
    yield Finding(
        True,
        "Its latent is continuous, and priors are trained over codes: it cannot be used for stage two; train one with "
        "codes (model.bottleneck.type=vector).",
    )
    if "active_units" not in figures:
        return
    active, units = figures["active_units"], figures["latent_units"]
    if active < MIN_ACTIVE_SHARE * units:
        yield Finding(
            False,
            f"Posterior collapse: {active:.0f} of {units:.0f} latent units are active, below {MIN_ACTIVE_SHARE:.0%}; "
            "lower loss.kl_weight, or take fewer model.latent_channels.",
        )


def _codes(figures: dict[str, float]) -> Iterator[Finding]:
    size, used, books = figures["codebook_size"], figures["codes_used"], figures["codebooks"]
    seen = figures["images"] * figures["cells"]  # as many in each codebook, over all of them
    if used < MIN_USAGE * size * books:
        if seen < MIN_CODES_SEEN * size * books:
            yield Finding(
                False,
                f"{used:.0f} of {size * books:.0f} codes are used, but only {seen:.0f} cells were read: evaluate at "
                f"least {math.ceil(MIN_CODES_SEEN * size * books / figures['cells'])} images to judge the codebook.",
            )
        else:
            yield Finding(
                True,
                f"The codebook is collapsing: {used:.0f} of {size * books:.0f} codes are used, below {MIN_USAGE:.0%}; "
                "raise model.bottleneck.revive_below (0.05 is usual), take a smaller codebook_size or l2_normalize "
                "with few model.latent_channels (8), or change commitment_weight (0.25 to 1) and ema_decay (0.99); of "
                "lookup_free raise entropy_weight, of finite_scalar take fewer levels.",
            )
    if figures["entropy_nats_per_code"] < MIN_ENTROPY_SHARE * math.log(size):
        yield Finding(
            True,
            f"The codes say next to nothing: {figures['entropy_nats_per_code']:.3f} nats each of at most "
            f"{math.log(size):.3f}; check that the loss falls, and start the codebook anew with another run.seed or a "
            "lower train.lr.",
        )
    elif figures["perplexity"] < MIN_EVENNESS * used / books:
        yield Finding(
            False,
            f"Few codes do most of the work: perplexity {figures['perplexity']:.1f} with {used / books:.0f} codes "
            "used; raise model.bottleneck.revive_below or train longer.",
        )
    if figures["cells"] > MAX_CELLS:
        yield Finding(
            True,
            f"Its grid has {figures['cells']:.0f} cells, above {MAX_CELLS}: too long a sequence for a prior; add a "
            "number to model.backbone.channel_mult, which quarters the cells.",
        )
    bits = figures["code_bits_per_pixel"]
    if bits > MAX_BITS_PER_PIXEL:
        yield Finding(
            False,
            f"The codes hold {bits:.2f} bits per pixel, above {MAX_BITS_PER_PIXEL:g}: they hardly compress, and the "
            "prior has much to learn; take a coarser grid (model.backbone.channel_mult) or a smaller codebook_size.",
        )
    if bits < MIN_BITS_PER_PIXEL:
        yield Finding(
            False,
            f"The codes hold {bits:.3f} bits per pixel, below {MIN_BITS_PER_PIXEL:g}: detail is lost that no prior "
            "brings back; take a finer grid (model.backbone.channel_mult) or a larger codebook_size.",
        )
