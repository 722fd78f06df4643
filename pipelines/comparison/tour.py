"""The tour: trains every family on the same images with the same budget of time, and compares them.

Run the same call again to resume: steps are only timed once, trainings resume, and finished ones are kept.
"""

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.comparison.side_by_side import NUM_MEASURED_IMAGES, Comparison, compare_models
from pipelines.comparison.step_budget import TIMED_STEPS, seconds_per_step
from pipelines.comparison.tour_families import FAMILIES, document_of, merged
from pipelines.comparison.tour_page import write_tour
from pipelines.encoding.dataset_codes import encode_dataset
from pipelines.evaluation.judges import OwnFeatures
from pipelines.evaluation.measurement import HeldOutImages, figures_of
from pipelines.evaluation.reconstructions import measure_reconstructions
from pipelines.evaluation.samples import SampleRequest
from pipelines.evaluation.shared_work import SharedWork
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.features.feature_network import WIDTHS
from stage1_tokenizer.features.feature_training import FeaturesTrainingConfig, features_config
from stage1_tokenizer.features.feature_training import train as train_features
from stage1_tokenizer.tokenizer_training import TokenizerConfig
from stage1_tokenizer.tokenizer_training import train as train_tokenizer
from stage2_prior.prior_training import PriorTrainingConfig
from stage2_prior.prior_training import train as train_prior
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.config.sections import parse_config
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.drawn_sources import DRAWN_SOURCES
from twostage.core.data.survey import survey
from twostage.core.errors import InputError
from twostage.core.files import write_json
from twostage.core.runs.contents import same_place
from twostage.core.training.base_run import BaseRun

__all__ = ["DEFAULT_MINUTES", "take_tour"]

DEFAULT_MINUTES = 1.0
"""Training time per model."""
MAX_FEATURE_STEPS = 300
MAX_SIDE = 64
"""Maximum side of images; larger ones are cropped and resized."""
NUM_SHAPES = 8000
"""Training images of a source that twostage draws."""
DEFAULT_SAMPLING = SamplingConfig(guidance_scale=2.0)
OVERHEAD_SECONDS = 8.0
"""Time per model besides training: reading data, timing steps, writing, measuring."""
NETWORKS = {"judge": (1, WIDTHS[0]), "critic": (0, WIDTHS[0] // 2)}
"""The seed and the width of each feature network."""


@dataclass
class Plan:
    """The settings that all parts of a tour share; stored in ``out``/tour.json."""

    out: Path
    data: dict[str, Any]
    """The `data` group of every training."""
    minutes: float
    seed: int
    max_steps: int
    """Maximum steps of each training."""
    steps: dict[str, int] = field(default_factory=dict)
    """Steps of each model, measured just before its training."""
    codes_of: str | None = None
    """The tokenizer whose codes the priors learn."""

    def save(self) -> None:
        """Writes the settings decided so far."""
        decided = {key: getattr(self, key) for key in ("data", "minutes", "seed", "steps", "codes_of")}
        write_json(self.out / "tour.json", decided)


def take_tour(
    out: Path,
    source: str = "shapes",
    minutes: float = DEFAULT_MINUTES,
    num_images: int = 12,
    request: SampleRequest = SampleRequest(),  # noqa: B008 (immutable)
    *,
    max_steps: int | None = None,
    data: dict[str, Any] | None = None,
) -> Comparison:
    """Trains all `FAMILIES` into ``out``, measures them, and writes ``out``/compare.html, compare.png, compare.json.

    Args:
        source: images with classes.
        minutes: training time per model (wall time).
        num_images: images to show of each model.
        request: the samples of each model that are measured; its seed is also the seed of all trainings.
        max_steps: maximum steps of each training; None: no limit.
        data: more keys of the `data` group; by default the form of the first image, at most 64 pixels per side.

    Raises:
        InputError: the time is too short for a step, the images have no classes, or ``out`` holds something else.
    """
    if request.sampling == SamplingConfig():
        request = SampleRequest(request.num_samples, request.seed, DEFAULT_SAMPLING)
    plan = open_plan(out, _data_group(source) | (data or {}), minutes, request.seed, max_steps)
    countdown = Countdown(minutes)
    for name, (seed, width) in NETWORKS.items():
        countdown.begin(f"a feature network {'that judges' if name == 'judge' else 'for the loss of the VQ-GAN'}")
        train_features(_network_config(plan, name, seed, width))
    for name, family in FAMILIES.items():
        if family.is_prior:
            if plan.codes_of is None:
                plan.codes_of = _best_tokenizer(plan)
                plan.save()
            encode_dataset(out / plan.codes_of, out / "codes")
        steps = steps_for(plan, name)
        countdown.begin(f"{family.title}: {steps:,} steps")
        _train_family(plan, name, out / name, steps)
    countdown.begin("measuring all models")
    runs = [out / name for name in FAMILIES]
    comparison = compare_models(runs, num_images=num_images, features=out / "judge", request=request)
    decided = {"minutes": plan.minutes, "steps": plan.steps, "codes_of": plan.codes_of}
    write_tour(comparison, out, plan.data["source"], NETWORKS["judge"][0], request.seed, decided)
    return comparison


class Countdown:
    """Prints what begins, and about how long the rest of the tour takes."""

    def __init__(self, minutes: float) -> None:
        networks = [minutes * 30] * len(NETWORKS)
        self._left = [*networks, *[minutes * 60 + OVERHEAD_SECONDS] * len(FAMILIES), 10 * OVERHEAD_SECONDS]
        self._count = len(self._left)

    def begin(self, part: str) -> None:
        """Call it at the beginning of every part."""
        number = self._count - len(self._left) + 1
        print(f"[{number}/{self._count}] {part}; about {sum(self._left) / 60:.0f} minutes left", flush=True)
        self._left.pop(0)


# --- the plan -------------------------------------------------------------------------------------------------------


def _data_group(source: str) -> dict[str, Any]:
    """The `data` group for a source, in the usual form of its images."""
    usual = survey(source, None)
    group = {"source": source, "image_size": [min(side, MAX_SIDE) for side in usual.size], "channels": usual.channels}
    return group | ({"num_images": NUM_SHAPES} if source in DRAWN_SOURCES else {})


def open_plan(out: Path, data: dict[str, Any], minutes: float, seed: int, max_steps: int | None = None) -> Plan:
    """The stored plan of an unfinished or finished tour, or a new one.

    Raises:
        InputError: ``out`` holds a tour with other settings, or something else.
    """
    plan, file = Plan(out, data, minutes, seed, max_steps or sys.maxsize), out / "tour.json"
    if file.is_file():
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            plan.steps, plan.codes_of = stored["steps"], stored["codes_of"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{file}: damaged. Choose another --out, or delete this file to plan again.") from None
        there = stored.get("data")
        if isinstance(there, dict) and same_place(str(there.get("source")), data["source"]):
            stored["data"] = there | {"source": data["source"]}
        for key in ("data", "minutes", "seed") if stored["steps"] else ():  # nothing is decided before the first model
            if stored.get(key) != getattr(plan, key):
                raise InputError(
                    f"--out {out}: holds a tour with {key} {stored.get(key)}, not {getattr(plan, key)}. Use the same "
                    "values to resume, or choose another --out."
                )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: exists but is not a tour. Choose another --out.")
    else:
        out.mkdir(parents=True, exist_ok=True)
        plan.save()
    return plan


def steps_for(plan: Plan, name: str) -> int:
    """The number of a model's steps that fit the time budget; steps are timed once.

    Raises:
        InputError: not even one step fits.
    """
    if name not in plan.steps:
        timing = plan.out / "timing"
        shutil.rmtree(timing, ignore_errors=True)  # left by a tour that was stopped here
        # A step of the VQ-GAN trains both networks, as in most of its run.
        both = {"loss": {"adversarial": {"start": 0.0}}} if name == "vqgan" else {}
        seconds = seconds_per_step(lambda: _train_family(plan, name, timing, min(TIMED_STEPS, plan.max_steps), both))
        shutil.rmtree(timing)
        steps = min(int(plan.minutes * 60 / seconds), plan.max_steps)
        if not steps:
            raise InputError(
                f"--minutes {plan.minutes:g}: too short for a step of {FAMILIES[name].title}, which takes "
                f"{seconds:.2g} s here. Use at least --minutes {seconds / 60:.1g} (default: {DEFAULT_MINUTES:g}), and "
                "another --out if this one already has trained models."
            )
        plan.steps[name] = steps
        plan.save()
    return plan.steps[name]


def _best_tokenizer(plan: Plan) -> str:
    """The tokenizer with codes whose reconstructions are closer to the originals: by the Frechet distance in the
    judging network, or by PSNR if there are too few images for a distance."""
    network, work, scores = OwnFeatures(plan.out / "judge"), SharedWork(), {}
    config = parse_config(DataConfig, plan.data, "data")
    images = HeldOutImages.choose(config, load_images(config), None, NUM_MEASURED_IMAGES)
    for name in ("vqvae", "vqgan"):
        model = Autoencoder.from_pretrained(plan.out / name).to(work.device)
        figures = figures_of(measure_reconstructions(model, images, work, network).measurements)
        scores[name] = figures.get("rfid", -figures["psnr"])
    return min(scores, key=scores.__getitem__)


# --- the trainings --------------------------------------------------------------------------------------------------


def _network_config(plan: Plan, name: str, seed: int, width: int) -> FeaturesTrainingConfig:
    """A short training of a feature network."""
    steps = min(MAX_FEATURE_STEPS, plan.max_steps)
    config = features_config(plan.data["source"], plan.out / name, seed=seed, width=width)
    length = {"epochs": None, "warmup_steps": steps // 10} | _length(steps)
    return parse_config(
        FeaturesTrainingConfig,
        merged(config.model_dump(mode="json"), {"data": plan.data, "train": length, "run": {"trackers": []}}),
        "the tour's feature network",
    )


def _length(steps: int) -> dict[str, int]:
    """The keys for a training that validates at its end, and stores a checkpoint half-way too."""
    return {"max_steps": steps, "validate_every": steps, "checkpoint_every": max(1, steps // 2)}


def _train_family(plan: Plan, name: str, run: Path, steps: int, changes: dict[str, Any] | None = None) -> BaseRun[Any]:
    """Trains one model, with ``changes`` to its configuration, or resumes its training."""
    own: dict[str, Any] = {
        "run": {"dir": str(run), "seed": plan.seed, "trackers": []},
        "train": {"warmup_steps": min(50, steps // 10)} | _length(steps),
    }
    if name == "vqgan":
        own["loss"] = {"perceptual": {"path": str(plan.out / "critic")}}
    own |= {"codes": str(plan.out / "codes")} if FAMILIES[name].is_prior else {"data": plan.data}
    document = merged(merged(document_of(name), own), changes or {})
    if FAMILIES[name].is_prior:
        return train_prior(parse_config(PriorTrainingConfig, document, f"the tour's {name}"))
    return train_tokenizer(parse_config(TokenizerConfig, document, f"the tour's {name}"))
