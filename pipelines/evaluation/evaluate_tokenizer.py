"""Measures a trained tokenizer (or AE, VAE ...) on held-out images, and judges whether it is ready for stage two."""

from pathlib import Path

import torch
from torch import Tensor

from pipelines.evaluation.evaluation_report import Evaluation, Sheet, describe_machine, describe_weights
from pipelines.evaluation.judged_images import judge_training_images
from pipelines.evaluation.judges import ImageNetFeatures, Judge, not_evidence, open_judge
from pipelines.evaluation.measurement import HeldOutImages, figures_of
from pipelines.evaluation.reconstructions import JUDGED_RECONSTRUCTIONS, Lpips, Reconstructions, measure_reconstructions
from pipelines.evaluation.shared_work import SharedWork
from pipelines.evaluation.verdict import verdict
from pipelines.saved.evaluation_figures import TOKENIZER_ROWS
from pipelines.saved.saved_model import SavedModel
from stage1_tokenizer.autoencoder import Autoencoder
from twostage.core.data.dataset import load_images
from twostage.core.data.spread import spread_over_classes
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_float, to_integers, to_shown
from twostage.core.images.sheets import contact_sheet

__all__ = ["evaluate_tokenizer", "typical_images"]

NUM_SHOWN = 12
LPIPS_REASON = "the tokenizer was trained to lower LPIPS itself (loss.perceptual)"


def evaluate_tokenizer(
    tokenizer: str | Path,
    source: str | None = None,
    split: str | None = None,
    *,
    features: str | Path | None = None,
    inception: str | Path | None = None,
    weights_dir: str | Path | None = None,
    num_images: int | None = None,
    batch_size: int = 64,
) -> Evaluation:
    """Measures a trained stage-one model; processes share the images.

    Args:
        source: the images; by default those that the model was trained on.
        split: `val`, `test` or `train`; by default the one that training validated on.
        features: the run folder of a feature network that judges the reconstructions, or `imagenet`.
        inception: torch-fidelity's file with the Inception weights of published FIDs, to judge with them instead.
        weights_dir: the folder with the VGG weights for LPIPS.
        num_images: spread evenly over the split; None: all.

    Raises:
        InputError: there is no tokenizer or no such split, the images have other classes, or a network cannot be used.
    """
    work = SharedWork(batch_size)
    model = Autoencoder.from_pretrained(tokenizer).to(work.device)
    network = open_judge(inception, features, model.config.channels)
    images = _held_out_images(model, tokenizer, source, split, num_images)
    if isinstance(network, ImageNetFeatures):
        judge_training_images(network, images, work)
    lpips = Lpips.find(model, weights_dir, work.device)
    found = measure_reconstructions(model, images, work, network, lpips, perturb=True)
    figures = figures_of(found.measurements)
    doubts = _doubts(model, tokenizer, network, images.config.source, figures)
    return Evaluation(
        tokenizer,
        TOKENIZER_ROWS,
        found.measurements,
        models={"tokenizer": describe_weights(tokenizer, hash=model.content_hash())},
        settings={
            "trained_against": [net.model_dump() for net in model.config.trained_against],
            "batch_size": batch_size,
            **describe_machine(work),
        },
        not_evidence=doubts,
        verdict=verdict(figures, doubts),
        sheets=_sheets(model, images, found) if work.state.is_main_process else (),
    )


def _held_out_images(
    model: Autoencoder, tokenizer: str | Path, source: str | None, split: str | None, num_images: int | None
) -> HeldOutImages:
    config = SavedModel.find_run(tokenizer).training_data(source)
    images = HeldOutImages.choose(config, load_images(config), split, num_images)
    if model.class_conditional and images.split.labels is None:
        raise InputError(
            f"--split {images.split_name}: has no labels, but {tokenizer} was trained with classes. Choose another "
            "split."
        )
    if model.class_conditional:
        images.check_classes(model.config.class_names, tokenizer)
    return images


def _doubts(
    model: Autoencoder, tokenizer: str | Path, network: Judge | None, source: str, figures: dict[str, float]
) -> dict[str, str]:
    """Why some figures are not evidence of quality: the model was trained to improve them."""
    judged = [name for name in JUDGED_RECONSTRUCTIONS if name in figures]
    doubts = not_evidence(model.config, tokenizer, network, source, judged)
    if "lpips" in figures and any(net.type == "lpips" for net in model.config.trained_against):
        doubts["lpips"] = LPIPS_REASON
    return doubts


def typical_images(ratios: Tensor, labels: Tensor | None, count: int) -> Tensor:
    """Choose typical images, cycling through the classes: those whose PSNR is closest to the median of their class.

    Args:
        ratios: (n,) dB.
        labels: (n,) int64; None: the images are one class.

    Returns:
        (min(count, n),) int64.
    """

    def closest_to_median(places: Tensor, wanted: int) -> Tensor:
        return places[(ratios[places] - ratios[places].median()).abs().argsort(stable=True)[:wanted]]

    return spread_over_classes(labels, len(ratios), count, closest_to_median)


def _sheets(model: Autoencoder, images: HeldOutImages, found: Reconstructions) -> list[Sheet]:
    labels = images.split.read_labels(images.rows)
    of_class = "" if labels is None else " of their class; the classes alternate"
    worst = torch.sort(found.psnr, stable=True).indices[:NUM_SHOWN]
    typical, caption = typical_images(found.psnr, labels, NUM_SHOWN), "those whose PSNR is closest to the median"
    return [
        _sheet(model, images, found.psnr, "worst", worst, "The images with the worst reconstructions, by PSNR."),
        _sheet(model, images, found.psnr, "typical", typical, f"Typical images: {caption}{of_class}."),
    ]


def _sheet(model: Autoencoder, images: HeldOutImages, ratios: Tensor, name: str, places: Tensor, caption: str) -> Sheet:
    """Originals above their reconstructions."""
    rows = images.rows[places]
    originals, given = images.split.read(rows), model.read_given(images.split, rows)
    device = next(model.parameters()).device
    decoded = to_integers(model.reconstruct(to_float(originals.to(device)), given), images.split.bits).cpu()
    captions = [f"row {row}" for row in rows.tolist()] + [f"{ratio:.1f} dB" for ratio in ratios[places].tolist()]
    tiles = to_shown(torch.cat([originals, decoded]), model.config.shown_channels)
    return Sheet(name, contact_sheet(tiles, len(places), captions, ["original", "reconstruction"]), caption)
