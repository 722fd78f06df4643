"""Every tokenizer with the same prior, and every prior on the same tokenizer, each with the same training time.

python -m benchmarks.family [--sets mnist cifar10 emoji] [--minutes 1 2] [--seeds 0 1 2] [--only vector gpt]
                            [--dir runs/family] [--results docs/results.md] [--json FILE]

For each dataset and seed: train each tokenizer for as many steps as fit the first time, encode, train the dataset's GPT
on its codes for the second time, and evaluate both. (A multi-scale tokenizer has its own kind of prior.) Then train the
other priors on the codes of the first tokenizer for the second time. Times are processor time, so other programs on the
machine hardly matter. What exists is reused: the same command resumes, and more seeds add to what is there.
"""

import json
import math
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.reporting import Row, described_machine, markdown_table, parser, report, set_title, write_section
from pipelines.comparison.step_budget import TIMED_STEPS, seconds_per_step
from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.encoding.dataset_codes import encode_dataset
from pipelines.evaluation.evaluate_prior import evaluate_prior
from pipelines.evaluation.evaluate_tokenizer import evaluate_tokenizer
from pipelines.evaluation.samples import SampleRequest
from stage1_tokenizer.feature_training import features_config
from stage1_tokenizer.feature_training import train as train_features
from stage1_tokenizer.train_tokenizer import TokenizerConfig
from stage1_tokenizer.train_tokenizer import train as train_tokenizer
from stage2_prior.sampling_config import SamplingConfig
from stage2_prior.train_prior import PriorTrainingConfig
from stage2_prior.train_prior import train as train_prior
from twostage.core.config.sections import load_config
from twostage.core.images.sheets import contact_sheet, save_image
from twostage.core.training.dry_run import DryRun

CONFIGS = Path(__file__).parents[1] / "configs"
GUIDANCE = 2.0
HELD_OUT = 2_000
"""Held-out images that are measured, at most."""
BATCHES = (1, 32)
"""Images that are drawn at a time when sampling is timed."""


@dataclass(frozen=True)
class ImageSet:
    """A dataset, the configs that its rows start from, and its judge."""

    tokenizer: str
    gpt: str
    codes: int
    """The codebook's size of the config."""
    levels: tuple[int, ...]
    """Levels of a finite scalar quantizer with about as many codes."""
    scales: tuple[int, ...]
    """Grids of a multi-scale tokenizer; the last one is the config's."""
    judge: dict[str, Any] | None
    """How the network that judges is trained; None: ImageNet features."""
    pixelcnn: str
    """Its model group."""


SETS = {
    "mnist": ImageSet("vqvae_mnist", "gpt_mnist", 128, (8, 4, 4), (1, 2, 4, 7), {"epochs": 3},
                      "{type: pixelcnn, channels: 64, depth: 10, head_channels: 256}"),
    "cifar10": ImageSet("vqvae_cifar10", "gpt_cifar10", 512, (8, 8, 8), (1, 2, 4, 8),
                        {"epochs": 4, "horizontal_flip": True},
                        "{type: pixelcnn, channels: 96, depth: 12, head_channels: 256}"),
    "emoji": ImageSet("emoji_64", "gpt_emoji_64", 512, (8, 8, 8), (1, 2, 4, 8, 16), None,
                      "{type: pixelcnn, channels: 96, depth: 12, head_channels: 256}"),
}  # fmt: skip
BASE = "vector"
"""The tokenizer whose codes all priors learn."""
COLUMNS = {
    "name": "tokenizer",
    "prior": "prior",
    "steps": "steps, one and two",
    "psnr": "PSNR, dB",
    "perplexity": "perplexity",
    "nats": "nats per image",
    "accuracy": "class accuracy",
    "distance": "Frechet distance",
    "per_s_1": "images/s, batch 1",
    "per_s_32": "batch 32",
    "memory": "MiB of a step",
}


def tokenizers(images: ImageSet) -> dict[str, list[str]]:
    """The changes to a dataset's config that make each tokenizer; about as many codes, or bits, per cell in all."""
    bits, codes = round(math.log2(images.codes)), images.codes
    half = 2 ** (bits // 2)

    def bottleneck(settings: str, channels: int | None = None) -> list[str]:
        return [f"model.bottleneck={{{settings}}}", *([f"model.latent_channels={channels}"] if channels else [])]

    return {
        BASE: [],
        "vector, learned": ["model.bottleneck.codebook=learned"],
        "finite_scalar": bottleneck(f"type: finite_scalar, levels: {list(images.levels)}", len(images.levels)),
        "lookup_free": bottleneck("type: lookup_free", bits),
        "binary_spherical": bottleneck("type: binary_spherical", bits),
        "residual": bottleneck(f"type: residual, depth: 2, codebook_size: {half}"),
        "product": bottleneck(f"type: product, groups: 2, each: {{type: vector, codebook_size: {half}}}"),
        "gumbel_softmax": bottleneck(f"type: gumbel_softmax, codebook_size: {codes}"),
        "index_backpropagation": bottleneck(f"type: index_backpropagation, codebook_size: {codes}"),
        "diveq": bottleneck(f"type: diveq, codebook_size: {codes}"),
        "projected": bottleneck(f"type: projected, codebook_size: {codes}"),
        "multi_scale": bottleneck(
            f"type: multi_scale, scales: {list(images.scales)}, codes: {{type: vector, codebook_size: {codes}}}"
        ),
    }


def priors(images: ImageSet) -> dict[str, list[str]]:
    """The changes to a dataset's GPT config that make each prior of about the same size."""
    return {
        "gpt": [],
        "scale": ["model.type=scale_transformer", "model.positions=rotary"],
        "maskgit": ["model.type=masked_transformer"],
        "parallel": ["model.type=parallel_transformer"],
        "pixelcnn": [
            f"model={images.pixelcnn}", "train.optimizer=adamw", "train.lr=1.5e-3", "train.weight_decay=0.01",
        ],
    }  # fmt: skip


class Runs:
    """The trainings and evaluations of one dataset and one seed, in one folder."""

    def __init__(self, name: str, seed: int, minutes: list[float], folder: Path) -> None:
        self.name, self.images, self.minutes, self.judges = name, SETS[name], minutes, folder
        self.seed, self.folder = seed, folder / f"seed_{seed}"

    @property
    def judge(self) -> Path | str:
        """The feature network that judges, trained if it is missing; or ImageNet features."""
        if self.images.judge is None:
            return "imagenet"
        if not (self.judges / "judge" / "model").exists():
            train_features(features_config(self.name, self.judges / "judge", seed=1, **self.images.judge))
        return self.judges / "judge"

    def tokenizer(self, name: str) -> Path:
        """The run of a tokenizer, trained, encoded and evaluated."""
        run = self.folder / name.replace(", ", "_")
        file, changes = CONFIGS / "tokenizer" / f"{self.images.tokenizer}.yaml", tokenizers(self.images)[name]
        changes = [*changes, f"data.source={self.name}"]

        def train(*overrides: str, dry_run: bool = False) -> Any:
            return train_tokenizer(load_config(TokenizerConfig, file, [*changes, *overrides]), dry_run=dry_run)

        self._train(run, self.minutes[0], train)
        if not (run / "codes").exists():
            encode_dataset(run, run / "codes")
        if not (run / "evaluation").exists():
            evaluate_tokenizer(run, features=self.judge, num_images=HELD_OUT).write(run / "evaluation")
        return run

    def prior(self, name: str, tokenizer: Path) -> Path:
        """The run of a prior over a tokenizer's codes, trained and evaluated."""
        run = tokenizer / name
        file, changes = CONFIGS / "prior" / f"{self.images.gpt}.yaml", priors(self.images)[name]
        changes = [*changes, f"codes={tokenizer / 'codes'}"]

        def train(*overrides: str, dry_run: bool = False) -> Any:
            return train_prior(load_config(PriorTrainingConfig, file, [*changes, *overrides]), dry_run=dry_run)

        self._train(run, self.minutes[1], train)
        if not (run / "evaluation").exists():
            samples = SampleRequest(sampling=SamplingConfig(guidance_scale=GUIDANCE))
            given: dict[str, Any] = {"features": self.judge, "samples": samples, "num_images": HELD_OUT}
            evaluate_prior(run, codes=tokenizer / "codes", **given).write(run / "evaluation")
        if not (run / "speed.json").exists():
            pipeline = TwoStagePipeline.from_runs(run)
            speed = {f"per_s_{batch}": images_per_second(pipeline, batch) for batch in BATCHES}
            (run / "speed.json").write_text(json.dumps(speed), encoding="utf-8")
        return run

    def _train(self, run: Path, minutes: float, train: Callable[..., Any]) -> None:
        """Trains ``run`` for as many steps as fit the ``minutes``, if it is not finished."""
        plan = run.with_name(f"{run.name}_plan.json")
        common = ["run.trackers=[]", f"run.seed={self.seed}"]
        if not plan.exists():
            timing = run.with_name(f"{run.name}_timing")
            shutil.rmtree(timing, ignore_errors=True)  # a finished run has no step left to time
            few = [f"train.{key}={TIMED_STEPS}" for key in ("max_steps", "validate_every", "checkpoint_every")]
            few += [*common, f"run.dir={timing}", "train.warmup_steps=0"]
            seconds = seconds_per_step(lambda: train(*few), time.process_time)
            shutil.rmtree(timing)
            dry: DryRun = train(*common, f"run.dir={run}", dry_run=True)
            steps = max(50, round(60 * minutes / seconds / 50) * 50)
            plan.write_text(json.dumps({"steps": steps, "bytes": dry.figures["peak_memory_bytes"]}), encoding="utf-8")
        steps = json.loads(plan.read_text(encoding="utf-8"))["steps"]
        train(*common, f"run.dir={run}", *(f"train.{what}={steps}" for what in ("max_steps", "validate_every")),
              f"train.checkpoint_every={steps // 2}")  # fmt: skip

    def row(self, tokenizer: Path, prior: Path) -> Row:
        """The figures of a finished pair."""
        first, second = (
            json.loads((run / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))["figures"]
            for run in (tokenizer, prior)
        )
        plans = [
            json.loads(run.with_name(f"{run.name}_plan.json").read_text(encoding="utf-8")) for run in (tokenizer, prior)
        ]
        exact = "nats_per_image" in second
        return {
            "steps": [plan["steps"] for plan in plans],
            "psnr": first["psnr"],
            "perplexity": first["perplexity"],
            "nats": second["nats_per_image" if exact else "nats_per_image_bound"],
            "bound": not exact,
            "accuracy": 100 * second["class_accuracy"],
            "distance": second["frechet_distance"],
            "memory": plans[1]["bytes"] / 2**20,
            **json.loads((prior / "speed.json").read_text(encoding="utf-8")),
        }


def images_per_second(pipeline: TwoStagePipeline, batch: int, least_s: float = 3.0) -> float:
    """Images that a second of processor time of all threads draws, codes and pixels, in batches of ``batch``."""
    options: dict[str, Any] = {"batch_size": batch, "output_type": "pt", "guidance_scale": GUIDANCE}
    pipeline(batch, **options)
    start, drawn = time.process_time(), 0
    while time.process_time() - start < least_s:
        pipeline(batch, seed=drawn, **options)
        drawn += batch
    return drawn / (time.process_time() - start)


def over_seeds(name: str, prior: str, rows: list[Row]) -> Row:
    """One row of the table: means over the seeds, and their range where there are several."""

    def shown(key: str) -> str:
        values = [row[key] for row in rows]
        low, mean, high = (f"{f(values):.3g}" for f in (min, statistics.fmean, max))
        return mean if len(values) == 1 else f"{mean} ({low} to {high})"

    row = {key: shown(key) for key in COLUMNS if key in rows[0] and key != "steps"}
    if rows[0]["bound"]:
        row["nats"] = f"at most {row['nats']}"
    return {"name": name, "prior": prior, "steps": " / ".join(f"{each:,}" for each in rows[0]["steps"])} | row


def picture(name: str, pairs: dict[str, Path], out: Path) -> None:
    """A row of samples for each pair of tokenizer and prior, one class per column where there are classes."""
    strips, names = [], []
    for run in pairs.values():
        pipeline = TwoStagePipeline.from_runs(run)
        names = (pipeline.class_names or [])[:10]
        strips.append(pipeline(10, seed=0, output_type="pt", guidance_scale=GUIDANCE).images)
    save_image(contact_sheet(torch.cat(strips), 10, names * len(strips), row_titles=list(pairs)), out)


TEXT = """## The family on {title}

Written by `python -m benchmarks.family`, on {machine}. {device} Every tokenizer has {first:g} minutes of processor
time, and every prior {second:g} on its codes. Nats per image are the cost of held-out code grids: they compare priors
over the same codes, and tokenizers only together with their PSNR. Samples are drawn with guidance {guidance:g}.
1,000 of them are judged by {judge}, whose distances are not FIDs; at most {held_out:,} held-out images are measured.
Images per second count the processor time of all threads. {seeds}

{table}

![Samples of each tokenizer and prior](images/family_{name}.png)
"""


def measure(name: str, options: Any) -> list[Row]:
    """Everything about one dataset: its rows, which are also written into the results."""
    found: dict[tuple[str, str], list[Row]] = {}
    runs: dict[str, Path] = {}
    for seed in options.seeds:
        there = Runs(name, seed, options.minutes, options.dir / name)
        pairs = [(each, "scale" if each == "multi_scale" else "gpt") for each in tokenizers(SETS[name])]
        pairs += [(BASE, each) for each in priors(SETS[name]) if each not in ("gpt", "scale")]
        for first, second in pairs:
            if options.only and not (first in options.only and second in options.only):
                continue
            tokenizer = there.tokenizer(first)
            prior = there.prior(second, tokenizer)
            found.setdefault((first, second), []).append(there.row(tokenizer, prior))
            runs.setdefault(f"{first}\n{second}", prior)
    rows = [over_seeds(*pair, each) for pair, each in found.items()]
    picture(name, runs, options.results.parent / "images" / f"family_{name}.png")
    seeds = f"One run each, seed {options.seeds[0]}." if len(options.seeds) == 1 else "Means and ranges over seeds."
    judge = "a network trained here" if SETS[name].judge else "a linear probe on ImageNet features"
    text = TEXT.format(
        title=set_title(name), **described_machine(), first=options.minutes[0], second=options.minutes[1],
        guidance=GUIDANCE, judge=judge, held_out=HELD_OUT, seeds=seeds, table=markdown_table(COLUMNS, rows), name=name,
    )  # fmt: skip
    write_section(options.results, f"family {name}", text)
    return [row | {"name": f"{name} {row['name']}"} for row in rows]


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    arguments.add_argument("--minutes", type=float, nargs=2, default=[1.0, 2.0], metavar=("TOKENIZER", "PRIOR"))
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--only", nargs="+", default=[], help="tokenizers and priors to train; all by default")
    arguments.add_argument("--dir", type=Path, default=Path("runs/family"))
    arguments.add_argument("--results", type=Path, default=Path("docs/results.md"))
    options = arguments.parse_args()
    (options.results.parent / "images").mkdir(parents=True, exist_ok=True)
    rows = [row for name in options.sets for row in measure(name, options)]
    report({"minutes": options.minutes, "seeds": options.seeds}, rows, options.json)


if __name__ == "__main__":
    main()
