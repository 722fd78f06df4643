"""The verdict: whether a tokenizer is ready for stage two, as a pure function of the figures of `evaluate`.

PSNR and the use of the codebook can only show that something is wrong. Only an independent network that judges
its reconstructions can show that it is ready.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Verdict", "verdict"]

MIN_PSNR = 18.0
"""dB; a judgement. Below it, shapes are wrong and not only textures."""
MIN_USAGE = 0.5
"""Share of the codes in use. A healthy codebook is almost fully used; below half, codes die faster than they revive."""
MIN_ENTROPY_SHARE = 0.1
"""Entropy divided by log(codebook_size). Below a tenth, the grid says almost nothing about its image."""
MIN_EVENNESS = 0.25
"""Perplexity divided by the codes used. Below a quarter, a few codes do nearly all the work."""
MIN_CODES_SEEN = 10
"""Cells per codebook entry. With fewer cells, entries can be unused by chance."""
MIN_ACTIVE_SHARE = 0.2
"""Share of active latent units; a judgement. Some are usually inactive (Burda et al. 2016); if almost all are, the
posterior has collapsed."""
MIN_BITS_PER_PIXEL = 0.02
"""The coarsest grids that priors are usually trained on, 16x16 codes of 1024 for 256x256 pixels, have 0.04."""
MAX_BITS_PER_PIXEL = 2.0
"""A quarter of a grey image's 8 bits: above it, a prior has almost as much to learn as a prior over pixels."""
MIN_RECOGNISED = 0.8
"""Accuracy on reconstructions divided by that on originals; a judgement. Below it, reconstructions lost their class."""
MIN_RECOGNISED_ORIGINALS = 0.5
"""A judgement: a network that does not recognise the originals cannot tell what reconstructions lack."""
MAX_DISTANCE_RATIO = 10.0
"""Frechet distance divided by the distance between two halves of the originals; a judgement. Above it, the network
easily tells reconstructions from originals."""
MAX_CELLS = 1024
"""A prior on one GPU still learns 32x32 codes well; attention costs the square of the sequence length."""

NEXT_STEPS = "Next: twostage encode, then twostage train-prior."
SAME_JUDGE = "the judging network is one that the tokenizer was trained against"
WEAK_JUDGE = "the judging network hardly recognises the originals"
NO_JUDGE = "no independent network judged whether reconstructions still show what the originals show"
JUDGE_ADVICE = (
    "Have another network judge it, one that is not in loss.perceptual: --features imagenet, --features runs/NAME "
    "(twostage train-features, with another --seed and --width) or --inception FILE."
)


@dataclass(frozen=True)
class Verdict:
    """The judgement of a tokenizer's figures."""

    ready: bool | None
    """Whether a prior over its codes is worth training. None: no problem was found, but no independent network judged
    the reconstructions."""
    sentences: list[str]
    """The outcome, then each finding with what to try."""


@dataclass(frozen=True)
class Finding:
    """A weakness that the figures show."""

    sentence: str
    blocks: bool = False
    """Whether the tokenizer is not ready because of it."""


def verdict(figures: Mapping[str, float | None], not_evidence: Mapping[str, str] | None = None) -> Verdict:
    """Judges the figures of `evaluate` by the thresholds above.

    Args:
        figures: by their keys; missing figures are not judged.
        not_evidence: why some figures are not evidence of quality, by their keys; they are not judged.
    """
    not_evidence = not_evidence or {}
    known = {name: value for name, value in figures.items() if value is not None and name not in not_evidence}
    of_latent = [*_code_findings(known)] if "codebook_size" in known else [*_continuous_findings(known)]
    findings = [*of_latent, *_judge_findings(known), *_psnr_findings(known)]
    blockers = [finding.sentence for finding in findings if finding.blocks]
    remarks = [finding.sentence for finding in findings if not finding.blocks]
    if blockers:
        return Verdict(False, ["Not ready for stage two.", *blockers, *remarks])
    judged, weak = list(_judged_by(known)), known.get("recognised_originals", 1) < MIN_RECOGNISED_ORIGINALS
    if judged and not weak:
        outcome = f"Ready for stage two by {_listed([*_basis(known), *judged])}. {NEXT_STEPS}"
        return Verdict(True, [outcome, *remarks])
    same = any(name in not_evidence for name in ("recognised", "rfid"))
    reason = SAME_JUDGE if same else WEAK_JUDGE if weak else NO_JUDGE
    outcome = f"No verdict on stage two: {_listed(_basis(known))} show no problem, but {reason}."
    return Verdict(None, [outcome, f"{JUDGE_ADVICE} To continue without a judge: {NEXT_STEPS[6:]}", *remarks])


def _basis(figures: dict[str, float]) -> list[str]:
    """Name the figures that were judged without a network."""
    return [*([f"PSNR {figures['psnr']:.1f} dB"] if "psnr" in figures else []), "the use of its codes"]


def _judged_by(figures: dict[str, float]) -> Iterator[str]:
    """Name the figures that an independent network gave."""
    if "recognised" in figures:
        yield (
            f"{figures['recognised']:.1%} recognised reconstructions ({figures['recognised_originals']:.1%} of the "
            "originals)"
        )
    if "rfid" in figures:
        halves = figures.get("rfid_of_halves")
        yield f"Frechet distance {figures['rfid']:.3g}" + (
            f" (halves of the originals: {halves:.3g})" if halves else ""
        )


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _judge_findings(figures: dict[str, float]) -> Iterator[Finding]:
    """Find weaknesses in the figures of the judging network."""
    if "recognised" in figures:
        share, originals = figures["recognised"], figures["recognised_originals"]
        if originals < MIN_RECOGNISED_ORIGINALS:
            yield Finding(
                f"The judging network only recognises {originals:.1%} of the originals, below "
                f"{MIN_RECOGNISED_ORIGINALS:.0%}, so it says little about reconstructions. Use another judge, or train "
                "your feature network longer."
            )
        elif share < MIN_RECOGNISED * originals:
            yield Finding(
                f"The judging network recognises {share:.1%} of the reconstructions and {originals:.1%} of the "
                f"originals, a ratio below {MIN_RECOGNISED:.0%}: reconstructions lost what makes their class. Train "
                "longer, widen model.backbone.channels, or downsample once less (model.backbone.channel_mult).",
                blocks=True,
            )
    if "rfid" in figures and figures["rfid"] > MAX_DISTANCE_RATIO * figures.get("rfid_of_halves", math.inf):
        yield Finding(
            f"The Frechet distance is more than {MAX_DISTANCE_RATIO:g} times that between two halves of the originals: "
            "the network easily tells reconstructions from originals. Look at worst.png and typical.png, and train "
            "longer if detail matters."
        )


def _psnr_findings(figures: dict[str, float]) -> Iterator[Finding]:
    if "psnr" in figures and figures["psnr"] < MIN_PSNR:
        yield Finding(
            f"PSNR is {figures['psnr']:.1f} dB, below {MIN_PSNR:g}, and generated images cannot be better than "
            "reconstructions. Train longer, widen model.backbone.channels, or downsample once less "
            "(model.backbone.channel_mult).",
            blocks=True,
        )


def _continuous_findings(figures: dict[str, float]) -> Iterator[Finding]:
    yield Finding(
        "The latent is continuous, but priors are trained on codes. For stage two, train a tokenizer with codes "
        "(model.bottleneck.type=vector).",
        blocks=True,
    )
    active, units = figures.get("active_units", math.inf), figures.get("latent_units", 0)
    if active < MIN_ACTIVE_SHARE * units:
        yield Finding(
            f"Posterior collapse: {active:.0f} of {units:.0f} latent units are active, below {MIN_ACTIVE_SHARE:.0%}. "
            "Lower loss.kl_weight or model.latent_channels."
        )


def _code_findings(figures: dict[str, float]) -> Iterator[Finding]:
    """Find weaknesses in the use of the codebook and the size of the grid."""
    size, used, books = figures["codebook_size"], figures["codes_used"], figures["codebooks"]
    codes = f"{used:.0f} of {size * books:.0f} codes"
    if used < MIN_USAGE * size * books:
        seen = figures["images"] * figures["cells"]
        if seen < MIN_CODES_SEEN * size * books:
            yield Finding(
                f"Only {codes} are used, but {seen:.0f} cells are too few to judge that. Evaluate at least "
                f"{math.ceil(MIN_CODES_SEEN * size * books / figures['cells'])} images (--num-images)."
            )
        else:
            yield Finding(
                f"The codebook is collapsing: only {codes} are used, below {MIN_USAGE:.0%}. Raise "
                "model.bottleneck.revive_below (0.05 is usual), lower codebook_size, set l2_normalize=true with few "
                "model.latent_channels (8), or change commitment_weight (0.25 to 1) or ema_decay (0.99). For "
                "lookup_free, raise entropy_weight. For finite_scalar, use fewer levels.",
                blocks=True,
            )
    if figures["entropy_nats_per_code"] < MIN_ENTROPY_SHARE * math.log(size):
        yield Finding(
            f"The codes say almost nothing: {figures['entropy_nats_per_code']:.3f} nats each, of at most "
            f"{math.log(size):.3f}. Check that the loss falls, and retrain with another run.seed or a lower train.lr.",
            blocks=True,
        )
    elif figures["perplexity"] < MIN_EVENNESS * used / books:
        yield Finding(
            f"A few codes do most of the work: perplexity {figures['perplexity']:.1f} with {used / books:.0f} codes "
            "used. Raise model.bottleneck.revive_below or train longer."
        )
    yield from _grid_findings(figures["cells"], figures["code_bits_per_pixel"])


def _grid_findings(cells: float, bits: float) -> Iterator[Finding]:
    if cells > MAX_CELLS:
        yield Finding(
            f"The grid has {cells:.0f} cells, above {MAX_CELLS}, which is too long a sequence for a prior. Add a "
            "number to model.backbone.channel_mult, which divides the cells by four.",
            blocks=True,
        )
    if bits > MAX_BITS_PER_PIXEL:
        yield Finding(
            f"The codes hold {bits:.2f} bits per pixel, above {MAX_BITS_PER_PIXEL:g}: they hardly compress, so the "
            "prior has much to learn. Use a coarser grid (model.backbone.channel_mult) or a smaller codebook_size."
        )
    if bits < MIN_BITS_PER_PIXEL:
        yield Finding(
            f"The codes hold {bits:.3f} bits per pixel, below {MIN_BITS_PER_PIXEL:g}: they lose detail that no prior "
            "can restore. Use a finer grid (model.backbone.channel_mult) or a larger codebook_size."
        )
