"""Measures a tokenizer's reconstructions in one pass over held-out images.

Image quality, the likelihood bound, active latent units, the use of the codebook, and what a judging network sees.
Axes: n images, B of them in a batch, C channels, H and W pixels, K codes in a codebook.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.evaluation.distances import FrechetDistance, bias_warning, too_few
from pipelines.evaluation.judges import NO_NETWORK, Judge, class_mismatch, distance_note
from pipelines.evaluation.measurement import HeldOutImages, Measurement
from pipelines.evaluation.shared_work import RowDigests, RowRandom, SharedWork
from pipelines.saved.evaluation_figures import (
    CodebookUse,
    ImageQuality,
    JudgedReconstructions,
    LatentUnits,
    LikelihoodBound,
)
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.bottlenecks.bottleneck import code_counts
from stage1_tokenizer.bottlenecks.code_perturbation import code_vectors, perturb_codes
from stage1_tokenizer.losses.perceptual import MIN_SIDE, TRUNK, LPIPSConfig, build_perceptual, find_trunk
from stage1_tokenizer.validation import ACTIVE_VARIANCE, psnr
from twostage.core.errors import InputError
from twostage.core.files import file_sha256, shorten_home
from twostage.core.images.conversion import to_float, to_integers, white_level
from twostage.core.machine.placement import copy_to
from twostage.core.training.random import seed_for

__all__ = [
    "JUDGED_RECONSTRUCTIONS",
    "Lpips",
    "ReconstructionJudge",
    "Reconstructions",
    "measure_reconstructions",
    "ssim",
    "ssim_window",
]

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
NOISE_SEED = 0
"""The seed of the posterior's noise and of a denoising autoencoder's corruption."""
PERTURBED_SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)
PERTURBED_NEIGHBOURS = 0.07
"""How codes are replaced for `rfid_perturbed`: the share of an image's codes, one image after another, and the share of
the codebook that counts as similar to a code (as RobusTok, arXiv 2503.08354, about 280 of 4,096)."""
JUDGED_RECONSTRUCTIONS = ("recognised", "rfid", "rfid_perturbed")
"""Figures that the judging network gives."""
BOUND_COLUMNS = ("nats_per_image", "bits_per_dim", "kl")


@dataclass(frozen=True)
class Reconstructions:
    """The result of :func:`measure_reconstructions`, the same in every process."""

    measurements: list[Measurement]
    psnr: Tensor
    """(n,) dB, of each image."""


# --- the pass over the images ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lpips:
    """The network for LPIPS, or why it is not available."""

    network: Callable[[Tensor, Tensor], Tensor] | None = None
    """(decoded, images) in [-1, 1] -> the mean over the batch."""
    protocol: dict[str, str] = field(default_factory=dict)

    @classmethod
    def find(cls, model: Autoencoder, weights_dir: str | Path | None, device: torch.device) -> "Lpips":
        """Looks for the weights in ``weights_dir`` and torch's cache; nothing is downloaded."""
        size, channels = model.config.image_size, model.config.channels
        trunk, folders = find_trunk(weights_dir)
        if min(size) < MIN_SIDE:
            reason = f"images of {size[0]}x{size[1]} are smaller than VGG's {MIN_SIDE}x{MIN_SIDE}"
        elif trunk is None:
            reason = f"no {TRUNK} in {' or '.join(map(shorten_home, folders))}; use --weights-dir DIR"
        else:
            try:
                network = build_perceptual(LPIPSConfig(), channels, size, trunk.parent).to(device)
                about = {"network": f"VGG-16, heads of lpips {version('lpips')}", "hash": file_sha256(trunk)}
                return cls(network, about)
            except InputError as error:
                reason = str(error)
        return cls(protocol={"not_measured": reason})


@torch.no_grad()
def measure_reconstructions(
    model: Autoencoder,
    images: HeldOutImages,
    work: SharedWork,
    network: Judge | None = None,
    lpips: Lpips = Lpips(),
    perturb: bool = False,
) -> Reconstructions:
    """Encodes and decodes held-out images once, and measures everything that applies to the model.

    Args:
        network: judges the reconstructions, if given.
        perturb: whether it also judges images that are decoded from perturbed codes (`rfid_perturbed`).
    """
    split, rows = images.split, images.rows
    columns = ["psnr", "ssim"]
    columns += ["psnr_corrupted"] if _corrupts(model) else []
    columns += ["lpips"] if lpips.network else []
    columns += BOUND_COLUMNS if model.variational else []
    # One row per image, and each process fills in its own rows: so the means do not depend on which process did what.
    table = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    digests = RowDigests(len(rows))
    judge = None
    if network:
        perturbation = _perturbation(model) if perturb else None
        judge = ReconstructionJudge(network, len(rows), work, images.data.class_names, perturbation)
    codes = code_counts(model.bottleneck, torch.zeros(0, *model.code_grid, dtype=torch.long))
    moments = torch.zeros(2, math.prod(model.latent_shape), dtype=torch.float64)  # sums of means and of their squares
    for places, pixels in work.read(split, rows, "evaluate"):
        originals, labels = copy_to(work.device, pixels), split.read_labels(rows[places])
        labels = None if labels is None else labels.to(work.device)
        digests.update(places, pixels)
        given = model.read_given(split, rows[places])
        latent = model.encode(to_float(originals), given)
        decoded = to_integers(model.decode(latent.z, given), split.bits)
        values = _image_values(model, originals, decoded, given, rows[places], lpips)
        for column, name in enumerate(columns):
            table[places, column] = values[name].cpu().double()
        if model.variational:
            means = latent.z.flatten(1).cpu().double()
            moments += torch.stack([means.sum(0), means.square().sum(0)])
        if latent.indices is not None:
            codes = codes + code_counts(model.bottleneck, latent.indices.cpu())
        if judge:
            perturbed = _decode_perturbed(model, latent.indices, rows[places]) if judge.perturbation else None
            judge.update(originals, decoded, places, labels, perturbed)
    table = work.total(table)
    digests.gather(work)
    means = dict(zip(columns, table.mean(0).tolist(), strict=True))
    found: list[Measurement] = [_image_quality(model, images, digests, means, lpips)]
    if model.variational:
        bound = LikelihoodBound(**{name: means[name] for name in BOUND_COLUMNS})
        about = f"one sample of the posterior per image, seed {NOISE_SEED}; the loss's own likelihood, KL weight 1"
        about += "; of images corrupted as during training" if _corrupts(model) else ""
        found += [Measurement(bound, protocol={"elbo": about}), _latent_units(work.total(moments) / len(rows))]
    if model.codebook_size:
        found.append(_codebook_use(work.total(codes), len(rows), model))
    no_judge = Measurement(JudgedReconstructions(), {"rfid": NO_NETWORK}, {"rfid": {}})
    found.append(judge.compute(digests.distinct) if judge else no_judge)
    return Reconstructions(found, table[:, 0])


def _image_values(
    model: Autoencoder, originals: Tensor, decoded: Tensor, given: Tensor | None, rows: Tensor, lpips: Lpips
) -> dict[str, Tensor]:
    """The measurements of each image, by the column of the table."""
    images = to_float(originals)
    values = {"psnr": psnr(decoded, originals), "ssim": ssim(decoded, originals)}
    if lpips.network:
        values["lpips"] = lpips.network(to_float(decoded), images)
    if model.variational or _corrupts(model):
        output = model(images, given, RowRandom(NOISE_SEED, rows))
        values |= output.metrics
        if _corrupts(model):
            values["psnr_corrupted"] = psnr(
                to_integers(model.to_images(output.decoded), 8 * originals.element_size()), originals
            )
    return values


def _corrupts(model: Autoencoder) -> bool:
    return model.config.loss.corruption is not None


def _num_similar(model: Autoencoder) -> int:
    return max(1, round(PERTURBED_NEIGHBOURS * model.bottleneck.codebook_size))


def _perturbation(model: Autoencoder) -> str | None:
    """How codes are replaced for `rfid_perturbed`, in words; None: the model has no codes, or several per cell."""
    if model.codebook_size is None or model.bottleneck.depth > 1 or model.bottleneck.scales:
        return None
    shares = ", ".join(map(str, PERTURBED_SHARES))
    return (
        f"each code becomes, with probability {shares} in images 0, 1, 2 ... and so on, one of the "
        f"{_num_similar(model)} codes nearest to it; seed {NOISE_SEED}"
    )


def _decode_perturbed(model: Autoencoder, indices: Tensor | None, rows: Tensor) -> Tensor:
    """Integer images decoded from codes (B, h, w) of which many are replaced by similar ones."""
    assert indices is not None
    share = torch.tensor(PERTURBED_SHARES, device=indices.device)[rows.to(indices.device) % len(PERTURBED_SHARES)]
    random = RowRandom(NOISE_SEED, rows)
    vectors = code_vectors(model.bottleneck, indices.device)
    replaced = perturb_codes(indices, vectors, share, _num_similar(model), random)
    return to_integers(model.decode_indices(replaced), model.config.bits)


# --- the measurements -----------------------------------------------------------------------------------------------


def _image_quality(
    model: Autoencoder, images: HeldOutImages, digests: RowDigests, means: dict[str, float], lpips: Lpips
) -> Measurement[ImageQuality]:
    size, window = model.config.image_size, ssim_window(model.config.image_size)
    bits, narrow = (
        images.split.bits,
        "" if window == SSIM_WINDOW else f" (the images are too small for the usual {SSIM_WINDOW})",
    )
    protocol: dict[str, Any] = {
        "data": images.protocol(digests),
        "image_size": list(size),
        "channels": model.config.channels,
        "resize": "cropped at the centre, then Lanczos with antialiasing",
        "pixels": (
            f"reconstructions are clipped and rounded to {bits} bits before PSNR, SSIM, LPIPS and the Frechet distance"
        ),
        "psnr": f"from each image's mean squared error, peak {2**bits - 1}; averaged over the images",
        "ssim": (
            f"Gaussian window {window}x{window}{narrow}, borders reflected, data range {2**bits - 1}; averaged over "
            "the images"
        ),
    }
    if _corrupts(model):
        protocol["psnr_corrupted"] = f"from images corrupted as during training, seed {NOISE_SEED}"
    if model.variational:
        protocol["reconstruction"] = "from the posterior's mean"
    protocol["lpips"] = lpips.protocol
    subject, notes = [images.sentence(digests)], []
    if digests.duplicates:
        subject.append(f"{digests.duplicates} of these images are copies of others among them")
    if lpips.network:
        notes.append(f"LPIPS is measured with {lpips.protocol['network']} ({lpips.protocol['hash'][:12]}).")
    figures = ImageQuality(
        images=len(images.rows), **{name: mean for name, mean in means.items() if name not in BOUND_COLUMNS}
    )
    missing = {"lpips": reason} if (reason := lpips.protocol.get("not_measured")) else {}
    return Measurement(figures, missing, protocol, subject, notes)


def _latent_units(moments: Tensor) -> Measurement[LatentUnits]:
    """Counts active units by the mean (units,) and the mean square (units,) of the posterior's means."""
    variance = moments[1] - moments[0].square()
    rule = f"variance of the posterior's mean over the images above {ACTIVE_VARIANCE} (Burda et al. 2016)"
    figures = LatentUnits(int((variance > ACTIVE_VARIANCE).sum()), len(variance))
    return Measurement(figures, protocol={"active_units": rule})


def _codebook_use(counts: Tensor, num_images: int, model: Autoencoder) -> Measurement[CodebookUse]:
    """Measures the use of the codebooks from the counts (codebooks, K) of their codes."""
    shares = counts.double() / counts.sum(1, keepdim=True)
    entropy = torch.special.entr(shares).sum(1).mean().item()
    used, cells = int((counts > 0).sum()), int(counts.sum()) // num_images
    bits_per_pixel = math.log2(counts.shape[1]) * cells / math.prod(model.config.image_size)
    figures = CodebookUse(
        codebook_size=counts.shape[1],
        codebooks=len(counts),
        codes_used=used,
        dead_codes=counts.numel() - used,
        codebook_usage=used / counts.numel(),
        perplexity=math.exp(entropy),
        entropy_nats_per_code=entropy,
        cells=cells,
        code_bits_per_pixel=bits_per_pixel,
        code_bits_per_dim=bits_per_pixel / model.config.channels,
    )
    return Measurement(figures)


class ReconstructionJudge:
    """Measures originals and their reconstructions with a network, batch by batch.

    Args:
        num_images: over all processes.
        class_names: the images' classes; None: recognition is not measured.
        perturbation: how codes are replaced for `rfid_perturbed`, in words; None: it is not measured.
    """

    def __init__(
        self,
        network: Judge,
        num_images: int,
        work: SharedWork,
        class_names: list[str] | None = None,
        perturbation: str | None = None,
    ) -> None:
        self.perturbation = perturbation
        self._network, self._num_images, self._work = network.to(work.device), num_images, work
        self._mismatch = class_mismatch(network, class_names, "data") if class_names else None
        self._knows_classes = bool(class_names) and self._mismatch is None
        self._recognised = torch.zeros(3, dtype=torch.long)  # originals, reconstructions; images that were judged
        self._reconstructions, self._halves, self._perturbed = (
            FrechetDistance(network.num_features, work.float64_device) for _ in range(3)
        )
        # At random, because classes often alternate.
        generator = torch.Generator().manual_seed(seed_for("halves"))
        self._first_half = torch.randperm(num_images, generator=generator) < num_images // 2

    def update(
        self,
        originals: Tensor,
        decoded: Tensor,
        places: Tensor,
        labels: Tensor | None = None,
        perturbed: Tensor | None = None,
    ) -> None:
        """Adds images (B, C, H, W) uint8 or uint16, their rounded reconstructions, the places (B,) of the images among
        all of them, their classes (B,) int64 if there are any, and the images decoded from replaced codes."""
        features, of_decoded = self._network(originals), self._network(decoded)
        self._reconstructions.update(features, real=True)
        self._reconstructions.update(of_decoded, real=False)
        if perturbed is not None:
            self._perturbed.update(features, real=True)
            self._perturbed.update(self._network(perturbed), real=False)
        if self._knows_classes and labels is not None:
            correct = [(self._network.logits(each).argmax(1) == labels).sum() for each in (features, of_decoded)]
            self._recognised += torch.stack([*correct, torch.full_like(correct[0], len(labels))]).cpu()
        first = self._first_half[places].to(features.device)
        self._halves.update(features[first], real=True)
        self._halves.update(features[~first], real=False)

    def compute(self, distinct: int) -> Measurement[JudgedReconstructions]:
        """The network's figures, given that ``distinct`` of the originals differ from each other."""
        num_features, protocol = self._network.num_features, dict(self._network.protocol)
        originals, reconstructions, judged = self._work.total(self._recognised).tolist()
        shares = (reconstructions / judged, originals / judged) if judged else (None, None)
        missing = {"recognised": self._mismatch} if self._mismatch else {}
        notes = [distance_note(self._network)]
        if reason := too_few(distinct, num_features):
            return Measurement(
                JudgedReconstructions(*shares), missing | {"rfid": reason}, {"rfid": protocol}, (), notes
            )
        if warning := bias_warning(self._num_images, num_features):
            protocol["warning"] = warning
            notes.append(f"Frechet distance: {warning}.")
        rfid, halves, perturbed = self._reconstructions.compute(self._work), None, None
        if self._num_images // 2 > num_features:
            halves = self._halves.compute(self._work)
            protocol["halves"] = (
                "rfid_of_halves: a random half of the originals against the other half, so with half as many images"
            )
        if self.perturbation:
            perturbed = self._perturbed.compute(self._work)
            protocol["perturbed"] = f"rfid_perturbed: {self.perturbation}"
        figures = JudgedReconstructions(*shares, rfid, halves, perturbed)
        return Measurement(figures, missing, {"rfid": protocol}, (), notes)


# --- structural similarity ------------------------------------------------------------------------------------------


def ssim_window(size: tuple[int, int]) -> int:
    """The side of SSIM's window: 11 pixels, or the largest odd number that fits into images of ``size``."""
    side = min(size)
    return min(SSIM_WINDOW, side - 1 + side % 2)


def ssim(decoded: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each of (B, C, H, W) uint8 or uint16 images to its original, (B,),
    at most 1.

    A Gaussian window of sigma 1.5 (smaller in proportion if the window is), borders reflected.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    # torchmetrics derives the window's side from sigma.
    sigma = SSIM_SIGMA * ssim_window((originals.shape[-2], originals.shape[-1])) / SSIM_WINDOW
    similarity = structural_similarity_index_measure(
        decoded.float(), originals.float(), sigma=sigma, data_range=float(white_level(originals)), reduction="none"
    )
    assert isinstance(similarity, Tensor)
    return similarity.reshape(len(originals))
