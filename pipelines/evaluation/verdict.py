"""Whether a tokenizer is ready for stage two, in words: a pure function of the figures that `evaluate` measures.

PSNR and the use of the codes can only show that something is wrong. That a tokenizer is ready takes an independent
network that looked at its reconstructions, too.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
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
MIN_RECOGNISED = 0.8
"""Of the share of the originals; a judgement. Below it, reconstructions have lost much of what makes their class."""
MIN_RECOGNISED_ORIGINALS = 0.5
"""A judgement: a network that does not know even the originals cannot tell what is missing from reconstructions."""
MAX_HALVES = 10.0
"""rFID over the distance between two halves of the originals; a judgement. Above it, the network tells reconstructions
from originals easily."""
MAX_CELLS = 1024
"""Attention costs the square of the sequence; 32x32 codes are what a prior on one GPU still learns well."""


NEXT = "twostage encode, then twostage train-prior."
SAME_JUDGE = "the network that judged is the one that it was trained against"
WEAK_JUDGE = "the network that judged hardly knows the originals"
NO_JUDGE = "no independent network judged whether its reconstructions still show what the originals show"
JUDGE = (
    "Have another network judge it: --features runs/NAME (twostage train-features, with another --seed and --width "
    "than the network of loss.perceptual) or --inception FILE."
)


@dataclass(frozen=True)
class Verdict:
    """What the figures mean for stage two."""

    ready: bool | None
    """Whether a prior over its codes is worth training; None: nothing speaks against it, but no independent network
    judged the reconstructions."""
    sentences: list[str]
    """The outcome first, then each finding with what to try."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found."""

    blocks: bool
    """Whether it stands in the way of stage two."""
    sentence: str


def verdict(figures: Mapping[str, float | None], not_evidence: Mapping[str, str] | None = None) -> Verdict:
    """Judges the figures of `evaluate`; every threshold is named above.

    Args:
        figures: by name; missing and None alike are not judged.
        not_evidence: the figures that training has lowered or raised by itself, with the reason: they are not judged.
    """
    not_evidence = not_evidence or {}
    known = {name: value for name, value in figures.items() if value is not None and name not in not_evidence}
    findings = [*(_codes(known) if "codebook_size" in known else _continuous(known)), *_quality(known)]
    blockers = [finding.sentence for finding in findings if finding.blocks]
    remarks = [finding.sentence for finding in findings if not finding.blocks]
    if blockers:
        return Verdict(False, ["Not ready for stage two.", *blockers, *remarks])
    judged, weak = list(_judged(known)), known.get("recognised_originals", 1) < MIN_RECOGNISED_ORIGINALS
    if judged and not weak:
        outcome = f"Ready for stage two by {_listed([*_basis(known), *judged])}: {NEXT}"
        return Verdict(True, [outcome, *remarks])
    flattering = any(name in not_evidence for name in ("recognised", "rfid"))
    lacking = SAME_JUDGE if flattering else WEAK_JUDGE if weak else NO_JUDGE
    outcome = f"No verdict on stage two: {_listed(_basis(known))} show nothing against it, but {lacking}."
    return Verdict(None, [outcome, f"{JUDGE} To go on without: {NEXT}", *remarks])


def _basis(figures: dict[str, float]) -> list[str]:
    """What was looked at, without a network."""
    return [*([f"PSNR {figures['psnr']:.1f} dB"] if "psnr" in figures else []), "the use of its codes"]


def _judged(figures: dict[str, float]) -> Iterator[str]:
    """What an independent network has to say."""
    if "recognised" in figures:
        yield (
            f"{figures['recognised']:.1%} recognised reconstructions ({figures['recognised_originals']:.1%} of the "
            "originals)"
        )
    if "rfid" in figures:
        halves = figures.get("rfid_of_halves")
        yield f"rFID {figures['rfid']:.3g}" + (f" (halves of the originals: {halves:.3g})" if halves else "")


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _quality(figures: dict[str, float]) -> Iterator[Finding]:
    if "recognised" in figures:
        share, originals = figures["recognised"], figures["recognised_originals"]
        if originals < MIN_RECOGNISED_ORIGINALS:
            yield Finding(
                False,
                f"The judging network recognises {originals:.1%} of the originals, below "
                f"{MIN_RECOGNISED_ORIGINALS:.0%}: whether it recognises reconstructions says little; train it for "
                "longer.",
            )
        elif share < MIN_RECOGNISED * originals:
            yield Finding(
                True,
                f"The judging network recognises {share:.1%} of the reconstructions and {originals:.1%} of the "
                f"originals, less than {MIN_RECOGNISED:.0%} of that: images have lost what makes their class; train "
                "longer, widen model.backbone.channels, or halve the image's sides once less.",
            )
    if "rfid" in figures and figures["rfid"] > MAX_HALVES * figures.get("rfid_of_halves", math.inf):
        yield Finding(
            False,
            f"rFID is more than {MAX_HALVES:g} times the distance between halves of the originals: the network tells "
            "reconstructions from originals easily; look at worst.png and typical.png, and train longer if detail "
            "matters.",
        )
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
