"""Every tokenizer with the same prior, and every prior on the same tokenizer, each with the same training time.

python -m benchmarks.family [--sets mnist cifar10 emoji] [--minutes 1 2] [--seeds 0 1 2] [--only vector gpt]
                            [--finished] [--dir runs/family] [--results docs/results.md] [--json FILE]

For each dataset and seed: train each tokenizer for as many steps as fit the first time, encode, and train the dataset's
GPT on its codes for the second time. On the codes of the first tokenizer, all other priors are trained too; tokenizers
of several scales have priors of their own. All tokenizers spend about the same number of bits on an image. Times are
processor time, so other programs on the machine hardly matter. What exists is reused: the same command resumes, and
more seeds add to what is there. `--finished` shows the rows that are finished and trains nothing.
"""

import json
import math
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from pyarrow import parquet
from torch import Tensor

from benchmarks.reporting import Row, described_machine, markdown_table, parser, report, set_title, write_section
from pipelines.comparison.step_budget import TIMED_STEPS, seconds_per_step
from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.encoding.dataset_codes import encode_dataset
from pipelines.evaluation.distances import frechet_distance
from pipelines.evaluation.judged_images import judge_training_images
from pipelines.evaluation.judges import Judge, open_judge
from pipelines.evaluation.measurement import HeldOutImages
from pipelines.evaluation.shared_work import SharedWork
from stage1_tokenizer.features.feature_training import features_config
from stage1_tokenizer.features.feature_training import train as train_features
from stage1_tokenizer.tokenizer_training import TokenizerConfig
from stage1_tokenizer.tokenizer_training import train as train_tokenizer
from stage2_prior.prior_training import PriorTrainingConfig
from stage2_prior.prior_training import train as train_prior
from twostage.core.config.sections import load_config
from twostage.core.data.dataset import load_images
from twostage.core.data.sources import find_local
from twostage.core.data.spread import spread
from twostage.core.images.sheets import contact_sheet, save_image
from twostage.core.runs.run_folder import read_metrics
from twostage.core.training.dry_run import DryRun

CONFIGS = Path(__file__).parents[1] / "configs"
GUIDANCE = 2.0
NUM_SAMPLES, BATCH = 1_000, 32
"""Samples that are judged, and how many of them are drawn at a time."""


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
CODED_IMAGES = {"train": 25_000, "test": 2_000}
"""Images, at most, whose codes priors learn, and are measured on; they are spread evenly over a split."""
SAMPLED = "sampled.json"
"""The file in a prior's run with the figures of its samples."""
BASE = "vector"
PRIORS = {
    BASE: ("gpt", "maskgit", "parallel", "pixelcnn"),
    "two_level": ("scale_by_scale",),
    "multi_scale": ("scale_transformer", "gpt"),
}
"""The priors that learn a tokenizer's codes; those of the others are only learnt by the GPT."""
COLUMNS = {
    "name": "tokenizer",
    "prior": "prior",
    "steps": "steps, one and two",
    "bits": "bits per image",
    "psnr": "PSNR, dB",
    "perplexity": "perplexity",
    "nats": "nats per image",
    "bits_per_dim": "bits per dimension",
    "accuracy": "class accuracy",
    "distance": "Frechet distance",
    "per_s_1": "images/s, batch 1",
    "per_s_32": "batch 32",
    "memory": "MiB of a step",
}


def tokenizers(images: ImageSet) -> dict[str, list[str]]:
    """The changes to a dataset's config that make each tokenizer, all with about as many bits per image."""
    bits, codes, sides = round(math.log2(images.codes)), images.codes, images.scales
    cells = sides[-1] ** 2

    def size(num_codes: int) -> int:
        """Of the codebook for images of so many codes."""
        return round(codes ** (cells / num_codes))

    def bottleneck(settings: str, channels: int | None = None) -> list[str]:
        return [f"model.bottleneck={{{settings}}}", *([f"model.latent_channels={channels}"] if channels else [])]

    of_scales = (
        f"{{type: vector, codebook_size: {size(sum(side**2 for side in sides))}, commitment_weight: 1.0, "
        "ema_decay: 0.95, revive_below: 0.2}"
    )
    return {
        BASE: [],
        "vector, learned": ["model.bottleneck.codebook=learned"],
        "vector, equivariance": ["loss.equivariance={}"],
        "vector, causal": ["loss.latents=[{type: causal}]"],
        "vector, semantic": ["loss.latents=[{type: semantic}]"],
        "finite_scalar": bottleneck(f"type: finite_scalar, levels: {list(images.levels)}", len(images.levels)),
        "lookup_free": bottleneck("type: lookup_free", bits),
        "binary_spherical": bottleneck("type: binary_spherical", bits),
        "residual": bottleneck(f"type: residual, depth: 2, codebook_size: {size(2 * cells)}"),
        "product": bottleneck(f"type: product, groups: 2, each: {{type: vector, codebook_size: {size(2 * cells)}}}"),
        "gumbel_softmax": bottleneck(f"type: gumbel_softmax, codebook_size: {codes}"),
        "index_backpropagation": bottleneck(
            f"type: index_backpropagation, codebook_size: {codes}, entropy_weight: 0.001"
        ),
        "diveq": bottleneck(f"type: diveq, codebook_size: {codes}"),
        "projected": bottleneck(f"type: projected, codebook_size: {codes}"),
        "two_level": bottleneck(f"type: two_level, codebook_size: {size(cells + math.ceil(sides[-1] / 2) ** 2)}"),
        "multi_scale": bottleneck(f"type: multi_scale, scales: {list(sides)}, codes: {of_scales}"),
    }


def priors(images: ImageSet) -> dict[str, list[str]]:
    """The changes to a dataset's GPT config that make each prior of about the same size."""
    gpt = yaml.safe_load(_file("prior", images.gpt).read_text(encoding="utf-8"))["model"]
    half = gpt | {"depth": math.ceil(gpt["depth"] / 2)}
    return {
        "gpt": [],
        "maskgit": ["model.type=masked_transformer"],
        "parallel": ["model.type=parallel_transformer"],
        "pixelcnn": [
            f"model={images.pixelcnn}", "train.optimizer=adamw", "train.lr=1.5e-3", "train.weight_decay=0.01",
        ],
        "scale_transformer": ["model.type=scale_transformer", "model.positions=both"],
        "scale_by_scale": [f"model={json.dumps({'type': 'scale_by_scale', 'networks': [half, half]})}"],
    }  # fmt: skip


def _file(stage: str, name: str) -> Path:
    return CONFIGS / stage / f"{name}.yaml"


class Runs:
    """The trainings and evaluations of one dataset and one seed, in one folder."""

    def __init__(self, name: str, seed: int, minutes: list[float], folder: Path) -> None:
        self.name, self.images, self.minutes, self.shared = name, SETS[name], minutes, folder
        self.seed, self.folder = seed, folder / f"seed_{seed}"

    @property
    def judge(self) -> Path | str:
        """The feature network that judges, trained if it is missing; or ImageNet features."""
        if self.images.judge is None:
            return "imagenet"
        if not (self.shared / "judge" / "model").exists():
            train_features(features_config(self.name, self.shared / "judge", seed=1, **self.images.judge))
        return self.shared / "judge"

    @property
    def coded_images(self) -> Path:
        """A folder with the images that are encoded, made if it is missing."""
        folder, found = self.shared / "images", find_local(self.name)
        assert found, f"{self.name}: put train.parquet and test.parquet into $TWOSTAGE_DATA/{self.name}"
        for split, count in CODED_IMAGES.items():
            if not (folder / f"{split}.parquet").exists():
                folder.mkdir(parents=True, exist_ok=True)
                table = parquet.read_table(found / f"{split}.parquet")
                parquet.write_table(table.take(spread(len(table), count).numpy()), folder / f"{split}.parquet")
        return folder

    def run(self, name: str) -> Path:
        """The run folder of a tokenizer; those of its priors are inside."""
        return self.folder / name.replace(", ", "_")

    def tokenizer(self, name: str) -> Path:
        """The run of a tokenizer, trained and encoded."""
        run = self.run(name)
        file, changes = _file("tokenizer", self.images.tokenizer), tokenizers(self.images)[name]
        changes = [*changes, f"data.source={self.name}"]

        def train(*overrides: str, dry_run: bool = False) -> Any:
            return train_tokenizer(load_config(TokenizerConfig, file, [*changes, *overrides]), dry_run=dry_run)

        self._train(run, self.minutes[0], train)
        if not (run / "codes").exists():
            encode_dataset(run, run / "codes", str(self.coded_images))
        return run

    def prior(self, name: str, tokenizer: Path) -> Path:
        """The run of a prior over a tokenizer's codes, trained, with its samples judged."""
        run = tokenizer / name
        file, changes = _file("prior", self.images.gpt), priors(self.images)[name]
        changes = [*changes, f"codes={tokenizer / 'codes'}"]

        def train(*overrides: str, dry_run: bool = False) -> Any:
            return train_prior(load_config(PriorTrainingConfig, file, [*changes, *overrides]), dry_run=dry_run)

        self._train(run, self.minutes[1], train)
        if not (run / SAMPLED).exists():
            figures = judge_samples(TwoStagePipeline.from_runs(run), *judge_and_features(self.name, self.judge))
            (run / SAMPLED).write_text(json.dumps(figures), encoding="utf-8")
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
        first, second = (read_metrics(run / "metrics.jsonl")[-1] for run in (tokenizer, prior))  # of held-out images
        plans = [
            json.loads(run.with_name(f"{run.name}_plan.json").read_text(encoding="utf-8")) for run in (tokenizer, prior)
        ]
        sampled = json.loads((prior / SAMPLED).read_text(encoding="utf-8"))
        config = load_config(TokenizerConfig, _file("tokenizer", self.images.tokenizer))
        values, nats = config.data.channels * math.prod(config.data.size), second["loss"] * sampled["codes"]
        of_pixel = nats_per_value(config.loss.reconstruction, first["reconstruction"])
        return {
            "steps": [plan["steps"] for plan in plans],
            "psnr": first["psnr"],
            "perplexity": first["perplexity"],
            "nats": nats,
            "bits_per_dim": (of_pixel + nats / values) / math.log(2),
            "memory": plans[1]["bytes"] / 2**20,
            **sampled,
        }


# --- samples ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def judge_and_features(name: str, judge: Path | str) -> tuple[Judge, Tensor]:
    """The network that judges, and its features of a dataset's training images, (n, F)."""
    config = load_config(TokenizerConfig, _file("tokenizer", SETS[name].tokenizer), [f"data.source={name}"]).data
    network = open_judge(None, judge, config.channels)
    assert network
    images = HeldOutImages.choose(config, load_images(config), None, None)
    return network, judge_training_images(network, images, SharedWork())[0].features


@torch.no_grad()
def judge_samples(pipeline: TwoStagePipeline, judge: Judge, training: Tensor) -> dict[str, Any]:
    """Draws samples and judges them by training images' features (n, F). Seconds are processor time of all threads."""
    prior = pipeline.prior
    assert prior
    options: dict[str, Any] = {"output_type": "pt", "guidance_scale": GUIDANCE}
    start = time.process_time()
    drawn = pipeline(NUM_SAMPLES, batch_size=BATCH, **options)
    together = time.process_time() - start
    start, alone = time.process_time(), 0
    while time.process_time() - start < 3:
        pipeline(1, seed=alone, batch_size=1, **options)
        alone += 1
    one_by_one = time.process_time() - start
    features = torch.cat([judge(part) for part in drawn.images.split(64)])
    right = judge.logits(features).argmax(1) == torch.tensor(drawn.labels)
    return {
        "codes": math.prod(prior.config.grid),
        "bits": math.prod(prior.config.grid) * math.log2(prior.config.codebook_size),
        "bound": not prior.exact_likelihood,
        "accuracy": 100 * right.double().mean().item(),
        "distance": frechet_distance(features, training, features.device),
        "per_s_1": alone / one_by_one,
        "per_s_32": NUM_SAMPLES / together,
    }


# --- the results -----------------------------------------------------------------------------------------------------


def nats_per_value(reconstruction: str, error: float) -> float:
    """-log p(a value of an image | its codes) for a mean reconstruction loss. Gaussian and Laplace have the most likely
    scale; their density is over [-1, 1], so the width of a grey level is added."""
    level = math.log(2 / 255)
    densities = {"l2": math.log(2 * math.pi * math.e * error) / 2, "l1": math.log(2 * math.e * error)}
    return error if reconstruction == "bce" else densities[reconstruction] - level


def over_seeds(name: str, prior: str, rows: list[Row]) -> Row:
    """One row of the table: means over the seeds, and their range where there are several."""

    def shown(key: str) -> str:
        values = [row[key] for row in rows]
        low, mean, high = (f"{f(values):.3g}" for f in (min, statistics.fmean, max))
        return mean if len(values) == 1 else f"{mean} ({low} to {high})"

    row = {key: shown(key) for key in COLUMNS if key in rows[0] and key != "steps"}
    if rows[0]["bound"]:
        row |= {key: f"at most {row[key]}" for key in ("nats", "bits_per_dim")}
    return {"name": name, "prior": prior, "steps": " / ".join(f"{each:,}" for each in rows[0]["steps"])} | row


def picture(pairs: dict[str, Path], out: Path) -> None:
    """A row of samples for each pair of tokenizer and prior, one class per column where there are classes."""
    strips, names = [], []
    for run in pairs.values():
        pipeline = TwoStagePipeline.from_runs(run)
        names = (pipeline.class_names or [])[:10]
        strips.append(pipeline(10, seed=0, output_type="pt", guidance_scale=GUIDANCE).images)
    sheet = contact_sheet(torch.cat(strips), 10, names * len(strips), row_titles=list(pairs))
    save_image(sheet.convert("L") if strips[0].shape[1] == 1 else sheet, out)


TEXT = """## The family on {title}

Written by `python -m benchmarks.family`, on {machine}. {device} Every tokenizer has {first:g} minutes of processor
time, and every prior {second:g} on codes of up to {train:,} images. PSNR and perplexity are those of all held-out
images. Nats are the cost of the codes of up to {test:,} of them, and compare priors over the same codes. Bits per
dimension add the cost of the pixels given the codes, so they compare all rows. {samples:,} samples are drawn with
guidance {guidance:g} and judged by {judge}, whose distances are not FIDs. Images per second count the processor
time of all threads. {seeds}

{table}

![Samples of each tokenizer and prior](images/family_{name}.png)
"""


def measure(name: str, options: Any) -> list[Row]:
    """Everything about one dataset: its rows, which are also written into the results."""
    found: dict[tuple[str, str], list[Row]] = {}
    runs: dict[str, Path] = {}
    pairs = [(each, prior) for each in tokenizers(SETS[name]) for prior in PRIORS.get(each, ("gpt",))]
    for seed in options.seeds:
        there = Runs(name, seed, options.minutes, options.dir / name)
        for first, second in pairs:
            if options.only and not (first in options.only and second in options.only):
                continue
            tokenizer, prior = there.run(first), there.run(first) / second
            if not options.finished:
                there.prior(second, there.tokenizer(first))
            elif not (prior / SAMPLED).exists():
                continue
            found.setdefault((first, second), []).append(there.row(tokenizer, prior))
            runs.setdefault(f"{first}\n{second}", prior)
    rows = [over_seeds(*pair, each) for pair, each in sorted(found.items(), key=lambda item: pairs.index(item[0]))]
    picture(runs, options.results.parent / "images" / f"family_{name}.png")
    judge = "a network trained here" if SETS[name].judge else "a linear probe on ImageNet features"
    text = TEXT.format(
        title=set_title(name), **described_machine(), first=options.minutes[0], second=options.minutes[1],
        guidance=GUIDANCE, judge=judge, samples=NUM_SAMPLES, **CODED_IMAGES, name=name,
        seeds=_described_seeds(list(found.values())), table=markdown_table(COLUMNS, rows),
    )  # fmt: skip
    write_section(options.results, f"family {name}", text)
    return [row | {"name": f"{name} {row['name']}"} for row in rows]


def _described_seeds(rows: list[list[Row]]) -> str:
    counts = {len(each) for each in rows}
    if counts == {1}:
        return "One run each."
    return f"Means and ranges over {max(counts)} seeds." + (" Rows without a range are one run." if 1 in counts else "")


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    arguments.add_argument("--minutes", type=float, nargs=2, default=[1.0, 2.0], metavar=("TOKENIZER", "PRIOR"))
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--only", nargs="+", default=[], help="tokenizers and priors to train; all by default")
    arguments.add_argument("--finished", action="store_true", help="show what is finished, and train nothing")
    arguments.add_argument("--dir", type=Path, default=Path("runs/family"))
    arguments.add_argument("--results", type=Path, default=Path("docs/results.md"))
    options = arguments.parse_args()
    (options.results.parent / "images").mkdir(parents=True, exist_ok=True)
    rows = [row for name in options.sets for row in measure(name, options)]
    report({"minutes": options.minutes, "seeds": options.seeds}, rows, options.json)


if __name__ == "__main__":
    main()
