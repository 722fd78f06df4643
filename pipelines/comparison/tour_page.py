"""The page of a tour: a section for every family, from blurry to sharp, and all of them side by side."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from pipelines.comparison.compared_models import ComparedModel
from pipelines.comparison.comparison_report import (
    class_captions,
    comparison_document,
    comparison_sheet,
    figure_rows,
    strip_sheet,
    used_columns,
)
from pipelines.comparison.side_by_side import Comparison
from pipelines.comparison.tour_families import FAMILIES, Family
from pipelines.drawing import rebuilt_images
from pipelines.evaluation.shared_work import RowRandom
from pipelines.files.report import Report
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.losses.objective import corrupt
from twostage.core.data.spread import spread
from twostage.core.files import write_json
from twostage.core.images.conversion import to_float, to_integers
from twostage.core.images.sheets import save_image
from twostage.core.runs.run_folder import RunFolder, read_metrics

__all__ = ["random_latents", "write_tour"]

NUM_LATENTS = 2000
"""Training images to which the distribution of random latents is fitted."""


def write_tour(
    comparison: Comparison, out: Path, source: str, judge_seed: int, seed: int, decided: dict[str, Any]
) -> None:
    """Writes compare.html, compare.png and compare.json into ``out``.

    Args:
        judge_seed: of the judging network's training.
        seed: of the random latents.
        decided: `minutes`, `steps` of each model, and `codes_of`: the tokenizer whose codes the priors learned.
    """
    models = {model.name: model for model in comparison.models}
    latents = {name: random_latents(models[name].tokenizer, comparison, seed) for name in ("ae", "dae")}
    sheet = comparison_sheet(comparison, {f"{name}: random latents": images for name, images in latents.items()})
    report = Report(f"From blurry to sharp: {len(FAMILIES)} models of {source}")
    report.text(_opening(comparison, out, judge_seed, decided["minutes"]))
    first_prior = next(name for name, family in FAMILIES.items() if family.is_prior)
    for number, (name, family) in enumerate(FAMILIES.items(), 1):
        report.heading(f"{number}. {family.title}")
        for paragraph in (family.summary, family.equation, family.change):
            report.text(paragraph)
        if name == first_prior:
            best = FAMILIES[decided["codes_of"]].title
            report.text(f"All three priors learn the codes of the {best}, because {_why(models)}")
        _write_model(report, name, models[name], comparison, latents.get(name))
        report.text(f"{decided['steps'][name]:,} steps in {decided['minutes']:g} minutes. Code: {family.file}.")
        start = f" from that of {FAMILIES[family.parent].title}" if family.parent else ""
        summary = f"What its configuration changes{start} (the whole configuration is in {name}/config.yaml)"
        report.details(summary, yaml.safe_dump(dict(family.document), sort_keys=False))
    report.heading("All models")
    report.text(_ranking(comparison))
    rows = figure_rows(comparison.models)
    report.table(used_columns(rows), rows)
    report.image(sheet, "Held-out images, their reconstructions by every tokenizer, and new images.")
    report.details("How this was measured", json.dumps(comparison.protocol, indent=2))
    report.save(out / "compare.html")
    save_image(sheet, out / "compare.png")
    write_json(out / "compare.json", comparison_document(comparison) | {"tour": decided})


def _write_model(
    report: Report, name: str, model: ComparedModel, comparison: Comparison, latents: Tensor | None
) -> None:
    strips = {}
    if model.reconstructions is not None:
        strips["original"] = comparison.originals
        if corruption := model.tokenizer.config.loss.corruption:
            random, bits = RowRandom(0, torch.arange(len(comparison.originals))), model.tokenizer.config.bits
            strips["corrupted"] = to_integers(corrupt(to_float(comparison.originals), corruption, random), bits)
            strips["restored"] = rebuilt_images.rebuild_images(model.tokenizer, strips["corrupted"])
        strips["reconstruction"] = model.reconstructions
    strips |= {"random latents": latents} if latents is not None else {}
    strips |= {"new images": model.samples} if model.samples is not None else {}
    captions = {"original": class_captions(comparison, comparison.original_classes)}
    captions |= {"new images": class_captions(comparison, comparison.classes)} if model.shows_classes else {}
    report.image(strip_sheet(strips, captions, [model]), _caption(FAMILIES[name], model, latents))
    (row,) = figure_rows([model])
    report.table(used_columns([row]), [row])


def _opening(comparison: Comparison, out: Path, judge_seed: int, minutes: float) -> str:
    about = comparison.protocol["data"]
    accuracy = read_metrics(RunFolder(out / "judge").metrics_file)[-1]["accuracy"]
    return (
        f"Every model was trained on the same images for the same {minutes:g} minutes on this machine (threads: "
        f"{comparison.protocol['threads']}, {comparison.protocol['device']}). How many steps fit was measured before. "
        f"The figures describe {about['images']:,} held-out images and "
        f"{comparison.protocol['samples']['measured']:,} new ones. Frechet distances and class accuracy come from a "
        f"feature network that was trained here (seed {judge_seed}; it recognises {accuracy:.1%} of the held-out "
        "images). The loss of the VQ-GAN uses a different one. Compare these figures only within this page. Each model "
        "was trained once, so small differences mean nothing."
    )


def _why(models: dict[str, ComparedModel]) -> str:
    """Why the priors learn the codes of one tokenizer and not the other's."""
    if "rfid" in models["vqvae"].figures:
        figure, reason = "rfid", "the Frechet distance of its reconstructions is lower"
    else:
        figure, reason = "psnr", "its PSNR is higher"
    values = [f"{FAMILIES[name].title}: {models[name].figures[figure]:.3g}" for name in ("vqvae", "vqgan")]
    return f"{reason} ({', '.join(values)})."


def _caption(family: Family, model: ComparedModel, latents: Tensor | None) -> str:
    if family.is_prior:
        return "New images: each column has its own class. The codes are sampled, then decoded."
    caption = "Held-out images and their reconstructions."
    if latents is not None:
        caption += (
            " Random latents: each number is drawn from a Gaussian with the mean and the deviation that it has over "
            "the training images. The decoder makes no images of them, because nothing taught it what lies between the "
            "latents of images. The VAE solves that."
        )
    if model.samples is not None:
        caption += " New images: latents drawn from the model's own prior, then decoded."
    return caption


def _ranking(comparison: Comparison) -> str:
    """The models that make images, in the order of their Frechet distance."""
    found = {m.name: m.figures["frechet_distance"] for m in comparison.models if "frechet_distance" in m.figures}
    if not found:
        return "There are too few held-out images for Frechet distances of samples."
    ordered = sorted(found.items(), key=lambda pair: -pair[1])
    listed = ", ".join(f"{FAMILIES[name].title} {distance:.3g}" for name, distance in ordered)
    return f"New images by their Frechet distance to the training images, from the largest to the smallest: {listed}."


@torch.no_grad()
def random_latents(model: Autoencoder, comparison: Comparison, seed: int) -> Tensor:
    """Decodes latents drawn from Gaussians fitted to the training images: one per original, (n, C, H, W)."""
    split = comparison.data.splits["train"]
    device = next(model.parameters()).device
    z = model.encode(to_float(split.read(spread(len(split), NUM_LATENTS))).to(device)).z
    noise = torch.randn(len(comparison.originals), *z.shape[1:], generator=torch.Generator().manual_seed(seed))
    return to_integers(model.decode(z.mean(0) + z.std(0) * noise.to(device)), model.config.bits).cpu()
