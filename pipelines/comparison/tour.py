"""The tour: every family trained on one set of images at one budget of time, and their story from blurry to sharp.

The same call goes on where it was stopped: steps are measured once, trainings resume, finished ones are kept.
"""

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from pipelines.comparison.side_by_side import (
    BATCH_SIZE,
    COLUMNS,
    MEASURED_IMAGES,
    NUM_SAMPLES,
    Comparison,
    Model,
    column_labels,
    compare_models,
    comparison_document,
    comparison_sheet,
    figure_rows,
    sheet,
)
from pipelines.comparison.step_budget import TIMED_STEPS, seconds_per_step
from pipelines.comparison.tour_families import FAMILIES, Family, document_of, merged
from pipelines.drawing import edits
from pipelines.encoding.dataset_codes import encode_dataset
from pipelines.evaluation.frechet import OwnFeatures, ReconstructionJudge
from pipelines.evaluation.measurements import RowRandom, measure
from pipelines.files.report import Report
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.feature_network import WIDTHS
from stage1_tokenizer.losses import corrupt
from stage1_tokenizer.train_features import FeaturesTrainingConfig, features_config
from stage1_tokenizer.train_features import train as train_features
from stage1_tokenizer.train_tokenizer import TokenizerConfig
from stage1_tokenizer.train_tokenizer import train as train_tokenizer
from stage2_prior.sampling import SamplingConfig
from stage2_prior.train_prior import PriorTrainingConfig
from stage2_prior.train_prior import train as train_prior
from twostage.core.config.sections import parse_config
from twostage.core.data.dataset import DataConfig, ImageSplit, load_images
from twostage.core.data.sources import first_form
from twostage.core.data.spread import spread
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_float, to_uint8
from twostage.core.images.sheets import save_image
from twostage.core.machine.processes import join_processes
from twostage.core.runs.model_folder import write_json
from twostage.core.runs.places import same_place
from twostage.core.runs.run_folder import RunFolder, read_metrics
from twostage.core.training.base_run import BaseRun

__all__ = ["MINUTES", "tour"]

MINUTES = 1.0
"""Of training for each model."""
FEATURE_STEPS = 300
LARGEST_SIDE = 64  # of images; larger ones are cropped and made smaller
NUM_SHAPES = 8000  # that are drawn for training
LATENTS = 2000  # training images whose latents say what a random latent of an autoencoder is
SAMPLING = SamplingConfig(guidance_scale=2.0)
"""Where nothing else is asked for."""
OVERHEAD = 8.0  # seconds beside a model's training: reading data, timing its steps, writing, measuring
NETWORKS = {"judge": (1, WIDTHS[0]), "critic": (0, WIDTHS[0] // 2)}  # seed and width


@dataclass
class Plan:
    """What the parts of a tour have in common, kept in ``out``/tour.json."""

    out: Path
    data: dict[str, Any]
    """The `data` group of every training."""
    minutes: float
    seed: int
    most_steps: int
    """Of any training."""
    steps: dict[str, int] = field(default_factory=dict)
    """Of each model, measured when it was its turn."""
    codes_of: str | None = None
    """The tokenizer whose codes the priors learn."""

    def save(self) -> None:
        """Writes what was decided."""
        decided = {key: getattr(self, key) for key in ("data", "minutes", "seed", "steps", "codes_of")}
        write_json(self.out / "tour.json", decided)


def tour(
    out: Path,
    source: str = "shapes",
    minutes: float = MINUTES,
    num_images: int = 12,
    seed: int = 0,
    sampling: SamplingConfig = SAMPLING,
    *,
    num_samples: int = NUM_SAMPLES,
    most_steps: int | None = None,
    data: dict[str, Any] | None = None,
) -> Comparison:
    """Trains all of `FAMILIES` into ``out``, measures them, and writes ``out``/compare.html, compare.png, compare.json.

    Args:
        source: of images with classes.
        minutes: of training for each model, by the clock on the wall.
        num_images: pictured of each.
        num_samples: measured of each model that makes images.
        most_steps: of any training, even where ``minutes`` hold more; None: as many as they hold.
        data: further keys of the `data` group; by default the form of the first image, at most 64 pixels a side.

    Raises:
        InputError: less time than a step takes, images without classes, or ``out`` holds something else.
    """
    sampling = SAMPLING if sampling == SamplingConfig() else sampling
    plan = open_plan(out, data_group(source) | (data or {}), minutes, seed, most_steps)
    clock = Clock(minutes)
    for name, (network_seed, width) in NETWORKS.items():
        clock.begin(f"a feature network, {'which judges' if name == 'judge' else 'for the loss of the VQ-GAN'}")
        train_features(network_config(plan, name, network_seed, width))
    for name, family in FAMILIES.items():
        if family.is_prior and plan.codes_of is None:
            plan.codes_of = best_tokenizer(plan)
            plan.save()
        if family.is_prior:
            encode_dataset(out / str(plan.codes_of), out / "codes")
        steps = steps_for(plan, name)
        clock.begin(f"{family.title}: {steps:,} steps")
        train(plan, name, out / name, steps)
    clock.begin("measuring all of them")
    runs = [out / name for name in FAMILIES]
    comparison = compare_models(
        runs, num_images=num_images, num_samples=num_samples, features=out / "judge", seed=seed, sampling=sampling
    )
    write_story(plan, comparison)
    return comparison


class Clock:
    """Says what begins, and for about how long the tour still goes on."""

    def __init__(self, minutes: float) -> None:
        short = [minutes * 30] * len(NETWORKS)
        self._left = [*short, *[minutes * 60 + OVERHEAD] * len(FAMILIES), 10 * OVERHEAD]
        self._count = len(self._left)

    def begin(self, what: str) -> None:
        """Called at the beginning of every part."""
        number = self._count - len(self._left) + 1
        print(f"[{number}/{self._count}] {what}; about {sum(self._left) / 60:.0f} minutes left", flush=True)
        self._left.pop(0)


# --- the trainings --------------------------------------------------------------------------------------------------


def data_group(source: str) -> dict[str, Any]:
    """The `data` group for a source in the form of its first image."""
    size, channels = first_form(source)
    group = {"source": source, "image_size": [min(side, LARGEST_SIDE) for side in size], "channels": channels}
    return group | ({"num_images": NUM_SHAPES} if source == "shapes" else {})


def open_plan(out: Path, data: dict[str, Any], minutes: float, seed: int, most_steps: int | None = None) -> Plan:
    """The plan of a tour that has a trained model, or a new one.

    Raises:
        InputError: ``out`` holds a tour with other settings, or something else.
    """
    plan, file = Plan(out, data, minutes, seed, most_steps or sys.maxsize), out / "tour.json"
    if file.is_file():
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            plan.steps, plan.codes_of = stored["steps"], stored["codes_of"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{file}: damaged; give another --out, or remove it to plan the tour anew") from None
        there = stored.get("data")
        if isinstance(there, dict) and same_place(str(there.get("source")), data["source"]):
            stored["data"] = there | {"source": data["source"]}
        for key in ("data", "minutes", "seed") if stored["steps"] else ():  # before the first one nothing is decided
            if stored.get(key) != getattr(plan, key):
                raise InputError(
                    f"--out {out}: holds a tour with {key} {stored.get(key)}, not {getattr(plan, key)}; "
                    "give the same values to resume, or another --out"
                )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: exists and holds no tour; give another --out")
    else:
        out.mkdir(parents=True, exist_ok=True)
        plan.save()
    return plan


def network_config(plan: Plan, name: str, seed: int, width: int) -> FeaturesTrainingConfig:
    """A short training of a feature network."""
    steps = min(FEATURE_STEPS, plan.most_steps)
    config = features_config(plan.data["source"], plan.out / name, seed=seed, width=width)
    length = {"epochs": None, "warmup_steps": steps // 10} | every(steps)
    return parse_config(
        FeaturesTrainingConfig,
        merged(config.model_dump(mode="json"), {"data": plan.data, "train": length, "run": {"trackers": []}}),
        "the tour's feature network",
    )


def every(steps: int) -> dict[str, int]:
    """The length of a training that is measured once, at its end, and saved at its half too."""
    return {"max_steps": steps, "validate_every": steps, "checkpoint_every": max(1, steps // 2)}


def train(plan: Plan, name: str, run: Path, steps: int, changes: dict[str, Any] | None = None) -> BaseRun[Any]:
    """Trains one model, going on where it was stopped.

    Args:
        changes: of its configuration.
    """
    own: dict[str, Any] = {
        "run": {"dir": str(run), "seed": plan.seed, "trackers": []},
        "train": {"warmup_steps": min(50, steps // 10)} | every(steps),
    }
    if name == "vqgan":
        own["loss"] = {"perceptual": {"path": str(plan.out / "critic")}}
    own |= {"codes": str(plan.out / "codes")} if FAMILIES[name].is_prior else {"data": plan.data}
    document = merged(merged(document_of(name), own), changes or {})
    if FAMILIES[name].is_prior:
        return train_prior(parse_config(PriorTrainingConfig, document, f"the tour's {name}"))
    return train_tokenizer(parse_config(TokenizerConfig, document, f"the tour's {name}"))


def steps_for(plan: Plan, name: str) -> int:
    """How many steps of a model fit the budget, measured once.

    Raises:
        InputError: not one.
    """
    if name not in plan.steps:
        timing = plan.out / "timing"
        shutil.rmtree(timing, ignore_errors=True)  # of a tour that was stopped here
        # A step of the VQ-GAN with both nets, as in the larger part of its run.
        both = {"loss": {"adversarial": {"start": 0.0}}} if name == "vqgan" else {}
        seconds = seconds_per_step(lambda: train(plan, name, timing, min(TIMED_STEPS, plan.most_steps), both))
        shutil.rmtree(timing)
        steps = min(int(plan.minutes * 60 / seconds), plan.most_steps)
        if not steps:
            raise InputError(
                f"--minutes {plan.minutes:g}: a step of {FAMILIES[name].title} takes {seconds:.2g} s here; give at "
                f"least --minutes {seconds / 60:.1g} (the default is {MINUTES:g}), and another --out where models are "
                "trained already"
            )
        plan.steps[name] = steps
        plan.save()
    return plan.steps[name]


def best_tokenizer(plan: Plan) -> str:
    """Of the two with codes the one whose reconstructions are nearer to the originals by the judge's Frechet distance
    (where there are too few images for one: by PSNR)."""
    network, split, state = OwnFeatures(plan.out / "judge"), held_out(plan), join_processes()
    rows, found = spread(len(split), MEASURED_IMAGES), {}
    for name in ("vqvae", "vqgan"):
        model = Autoencoder.from_pretrained(plan.out / name).to(state.device)
        judge = ReconstructionJudge(network, len(rows), torch.device(state.device or "cpu"))
        figures = measure(model, split, rows, BATCH_SIZE, 0, state, None, judge).figures
        found[name] = figures.get("rfid", -figures["psnr"])
    return min(found, key=found.__getitem__)


def held_out(plan: Plan) -> ImageSplit:
    """The images that no model was trained on."""
    return load_images(parse_config(DataConfig, plan.data, "data")).validation


# --- the story ------------------------------------------------------------------------------------------------------


def write_story(plan: Plan, comparison: Comparison) -> None:
    """Writes compare.html, compare.png and compare.json."""
    out, models = plan.out, {model.name: model for model in comparison.models}
    latents = {
        f"{name}: random latents": random_latents(models[name].tokenizer, comparison, plan.seed)
        for name in ("ae", "dae")
    }
    whole = comparison_sheet(comparison, latents)
    report = Report(f"From blurry to sharp: {len(FAMILIES)} models of {plan.data['source']}")
    report.text(opening(plan, comparison))
    for number, (name, family) in enumerate(FAMILIES.items(), 1):
        report.heading(f"{number}. {family.title}")
        report.text(family.what)
        report.text(family.equation)
        report.text(family.change)
        if family.is_prior and number == first_prior():
            report.text(f"All three priors learn the codes of the {FAMILIES[str(plan.codes_of)].title}: {why(models)}")
        strips = strips_of(models[name], comparison, latents)
        named = [title for title in strips if title == "new images" and shows_classes(models[name])]
        report.image(sheet(strips, column_labels(comparison), named), caption(name, family, models[name]))
        (row,) = figure_rows([models[name]])
        report.table({key: title for key, title in COLUMNS.items() if key in row}, [row])
        report.text(f"{plan.steps[name]:,} steps in {plan.minutes:g} minutes. Implemented in {family.file}.")
        changed = yaml.safe_dump(dict(family.document), sort_keys=False)
        against = f" of {FAMILIES[family.parent].title}'s" if family.parent else ""
        report.details(f"What its configuration changes{against} (the whole is in {name}/config.yaml)", changed)
    report.heading("All of them")
    report.text(ranking(comparison))
    report.table(COLUMNS, figure_rows(comparison.models))
    report.image(whole, "the same held-out images through every tokenizer, and what each model makes by itself")
    report.details("How this was measured", json.dumps(comparison.protocol, indent=2))
    report.save(out / "compare.html")
    save_image(whole, out / "compare.png")
    decided = {"minutes": plan.minutes, "steps": plan.steps, "codes_of": plan.codes_of}
    write_json(out / "compare.json", comparison_document(comparison) | {"tour": decided})


def opening(plan: Plan, comparison: Comparison) -> str:
    """What was done, in words."""
    about = comparison.protocol["data"]
    accuracy = read_metrics(RunFolder(plan.out / "judge").metrics_file)[-1]["accuracy"]
    return (
        f"Every model was trained on the same images for the same {plan.minutes:g} minutes on this machine "
        f"(threads: {comparison.protocol['threads']}, {comparison.protocol['device']}); how many steps that is was "
        f"measured before. Figures are of {about['images']:,} held-out images and of "
        f"{comparison.protocol['samples']['measured']:,} new ones. Frechet distances and class accuracy are by a "
        f"feature network trained here (seed {NETWORKS['judge'][0]}, right about {accuracy:.1%} of the held-out "
        "images; another than the one in the VQ-GAN's loss): they compare within this page only. One run of each, so "
        "small differences mean nothing."
    )


def first_prior() -> int:
    """The number of the first section of stage two."""
    return next(number for number, family in enumerate(FAMILIES.values(), 1) if family.is_prior)


def shows_classes(model: Model) -> bool:
    """Whether its new images are of the classes of the columns."""
    return bool(model.pipeline and model.pipeline.class_names)


def why(models: dict[str, Model]) -> str:
    """Why the priors learn the codes that they learn."""
    figure = "rfid" if "rfid" in models["vqvae"].figures else "psnr"
    what = "the Frechet distance of its reconstructions is the lower one" if figure == "rfid" else "its PSNR is higher"
    values = [f"{models[name].figures[figure]:.3g} of the {FAMILIES[name].title}" for name in ("vqvae", "vqgan")]
    return f"{what} ({', '.join(values)})."


def strips_of(model: Model, comparison: Comparison, latents: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of pictures of one section."""
    strips = {}
    if model.reconstructions is not None:
        strips["original"] = comparison.originals
        if corruption := model.tokenizer.config.loss.corruption:
            random = RowRandom(0, torch.arange(len(comparison.originals)))
            strips["damaged"] = to_uint8(corrupt(to_float(comparison.originals), corruption, random))
            strips["mended"] = edits.rebuild_images(model.tokenizer, strips["damaged"])
        strips["reconstruction"] = model.reconstructions
    title = f"{model.name}: random latents"
    strips |= {"random latents": latents[title]} if title in latents else {}
    strips |= {"new images": model.samples} if model.samples is not None else {}
    return strips


def caption(name: str, family: Family, model: Model) -> str:
    """What a section's picture shows."""
    if family.is_prior:
        return "New images, each column of its class, drawn code by code and decoded."
    words = "Held-out images and what comes back."
    if name in ("ae", "dae"):
        words += (
            " Random latents: each number drawn from a Gaussian with the mean and the deviation that it has over "
            "training images. Its decoder makes no images of them: where latents lie together nobody taught it. That "
            "is what the VAE is for."
        )
    if model.samples is not None:
        words += " New images: drawn from its prior."
    return words


def ranking(comparison: Comparison) -> str:
    """The models that make images, in the order of a measured distance."""
    found = {m.name: m.figures["frechet_distance"] for m in comparison.models if "frechet_distance" in m.figures}
    if not found:
        return "There are too few held-out images for Frechet distances of samples."
    ordered = sorted(found.items(), key=lambda pair: -pair[1])
    listed = ", ".join(f"{FAMILIES[name].title} {distance:.3g}" for name, distance in ordered)
    return f"New images by their Frechet distance to the training images, from the farthest to the nearest: {listed}."


@torch.no_grad()
def random_latents(model: Autoencoder, comparison: Comparison, seed: int) -> Tensor:
    """What a decoder makes of latents of which each number is drawn from a Gaussian fitted to the training images',
    as many as there are originals, (n, C, H, W) uint8."""
    split = comparison.data.splits["train"]
    device = next(model.parameters()).device
    z = model.encode(to_float(split.read(spread(len(split), LATENTS))).to(device)).z
    noise = torch.randn(len(comparison.originals), *z.shape[1:], generator=torch.Generator().manual_seed(seed))
    return to_uint8(model.decode(z.mean(0) + z.std(0) * noise.to(device))).cpu()
