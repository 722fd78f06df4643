"""The three priors on the same codes with the same training time, in one table and one sheet per dataset.

python -m benchmarks.priors [--minutes 6 8] [--sets mnist cifar10] [--guidance-scale 1 2] [--results docs/results.md]

For MNIST, then CIFAR-10: train the tokenizer (`configs/tokenizer/`), encode, and train the feature network that
judges. Then measure the cost of a step for each prior (processor time, alternating), train each config in
`configs/prior/` for as many steps as the time allows, evaluate 1,000 samples of each and write the results. Anything
that already exists under the configs' names is reused.
"""

import json
import shutil
import time
from pathlib import Path

import torch

from benchmarks.reporting import Row, described_machine, markdown_table, parser, report, set_title, write_section
from pipelines.comparison.step_budget import TIMED_STEPS, seconds_per_step
from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.encoding.dataset_codes import encode_dataset
from pipelines.evaluation.evaluate_prior import evaluate_prior
from pipelines.evaluation.samples import SampleRequest
from stage1_tokenizer.feature_network import WIDTHS
from stage1_tokenizer.feature_training import features_config
from stage1_tokenizer.feature_training import train as train_features
from stage1_tokenizer.train_tokenizer import TokenizerConfig
from stage1_tokenizer.train_tokenizer import train as train_tokenizer
from stage2_prior.sampling_config import SamplingConfig
from stage2_prior.train_prior import PriorTrainingConfig
from stage2_prior.train_prior import train as train_prior
from twostage.core.config.sections import load_config
from twostage.core.images.sheets import contact_sheet, save_image
from twostage.core.runs.run_folder import RunFolder

CONFIGS = Path(__file__).parents[1] / "configs"
PRIORS = ["pixelcnn", "gpt", "maskgit"]
TOKENIZERS = {"mnist": "vqvae_mnist", "cifar10": "vqgan_cifar10"}
JUDGES = {"mnist": {"epochs": 3}, "cifar10": {"epochs": 4, "horizontal_flip": True}}
FEW_IMAGES = 1000  # held out, for the reference distance
COLUMNS = {
    "name": "prior",
    "parameters": "parameters",
    "steps": "steps",
    "nats": "nats per code, held out",
    "guidance": "guidance",
    "accuracy": "class accuracy",
    "distance": "Frechet distance",
    "codes_per_s": "codes/s",
}


def prepare(name: str) -> tuple[Path, Path]:
    """The tokenizer's codes and the run of the feature network that judges; both are created if missing."""
    tokenizer, judge = Path("runs") / TOKENIZERS[name], Path("runs") / f"judge_{name}"
    codes = Path("codes") / TOKENIZERS[name]
    overrides = [f"data.source={name}", f"run.dir={tokenizer}", "run.trackers=[]"]
    if not (tokenizer / "model").exists():
        if name == "cifar10":
            network = Path("runs/features_cifar10")
            train_features(features_config(name, network, epochs=3, horizontal_flip=True, width=16))
        train_tokenizer(load_config(TokenizerConfig, CONFIGS / "tokenizer" / f"{TOKENIZERS[name]}.yaml", overrides))
    if not codes.exists():
        encode_dataset(tokenizer, codes)
    if not (judge / "model").exists():
        train_features(features_config(name, judge, seed=1, width=WIDTHS[0], **JUDGES[name]))
    return codes, judge


def configured(prior: str, name: str, codes: Path, run: Path, *overrides: str) -> PriorTrainingConfig:
    """The configuration of one prior on one dataset."""
    file = CONFIGS / "prior" / f"{prior}_{name}.yaml"
    return load_config(PriorTrainingConfig, file, [f"codes={codes}", f"run.dir={run}", "run.trackers=[]", *overrides])


def steps_for(budget_s: float, name: str, codes: Path, folder: Path) -> dict[str, int]:
    """The number of steps of each prior in ``budget_s`` seconds of processor time, which other programs on the machine
    do not affect."""
    file = folder / f"steps_{round(budget_s)}s.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    length = [f"train.{key}={TIMED_STEPS}" for key in ("max_steps", "validate_every", "checkpoint_every")]
    shutil.rmtree(folder / "timing", ignore_errors=True)  # a finished run has no step left to time
    seconds = {}
    for prior in PRIORS:
        config = configured(prior, name, codes, folder / "timing" / prior, *length, "train.warmup_steps=0")
        seconds[prior] = seconds_per_step(lambda config=config: train_prior(config), time.process_time)
    steps = {prior: max(50, round(budget_s / each / 50) * 50) for prior, each in seconds.items()}
    file.write_text(json.dumps(steps), encoding="utf-8")
    return steps


def check_length(run: Path, steps: int) -> None:
    """Stop the benchmark if ``run`` exists with another length."""
    there = (RunFolder(run).stored_config() or {}).get("train", {}).get("max_steps", steps)
    if there != steps:
        raise SystemExit(f"{run}: has {there:,} steps, expected {steps:,}. Choose another --dir.")


def train_and_measure(
    prior: str, name: str, steps: int, codes: Path, judge: Path, folder: Path, guidance_scales: list[float]
) -> list[Row]:
    """Train if necessary, evaluate, and return a row of the table for each guidance scale. The likelihood does not
    depend on guidance, so all rows show the first one's."""
    run = folder / prior
    check_length(run, steps)
    length = [f"train.max_steps={steps}"]
    length += [f"train.{what}_every={steps // 2}" for what in ("validate", "checkpoint")]
    train_prior(configured(prior, name, codes, run, *length))
    rows: list[Row] = []
    for scale in guidance_scales:
        file = run / f"evaluation_{scale:g}" / "evaluation.json"
        if not file.is_file():
            samples = SampleRequest(sampling=SamplingConfig(guidance_scale=scale))
            held_out = FEW_IMAGES if rows else None
            found = evaluate_prior(run, codes=codes, features=judge, samples=samples, num_images=held_out)
            found.write(file.parent)
        figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
        rows.append(
            {"name": prior, "parameters": figures["parameters"], "steps": steps, "guidance": f"{scale:g}",
             "nats": rows[0]["nats"] if rows else nats_in_words(figures),
             "accuracy": f"{figures['class_accuracy']:.1%}",
             "distance": figures["frechet_distance"], "codes_per_s": round(figures["codes_per_s"])}
        )  # fmt: skip
    return rows


def nats_in_words(figures: dict[str, float]) -> str:
    """Nats per code as text; a bound is marked."""
    if "nats_per_code" in figures:
        return f"{figures['nats_per_code']:.3f}"
    return f"at most {figures['nats_per_code_bound']:.3f}"


def picture(name: str, folder: Path, guidance_scale: float, out: Path) -> None:
    """Three rows of samples from each prior, one class per column."""
    strips, titles, names = [], [], []
    for prior in PRIORS:
        pipeline = TwoStagePipeline.from_runs(folder / prior)
        names = pipeline.class_names or []
        strips.append(pipeline(30, seed=0, output_type="pt", guidance_scale=guidance_scale).images)
        titles += [prior, "", ""]
    save_image(contact_sheet(torch.cat(strips), 10, names * 9, row_titles=titles), out / f"priors_{name}.png")


HEAD = """## The three priors of stage two

Written by `python -m benchmarks.priors`. All three train on the same codes for the same processor time on the same
machine ({machine}), so a prior with slower steps takes fewer of them. {device} One run each,
seed 0. Codes per second were measured while the machine did other work as well.

Nats per code are measured on the codes of the 10,000 held-out images. They are exact for PixelCNN and GPT. The
likelihood of a masked transformer cannot be computed, so its figure is a different quantity: the upper bound from
any-order autoregression.
A feature network trained here (`twostage train-features`, seed 1) judges 1,000 samples, 100 per class. Class accuracy
is the fraction that it assigns to the requested class. The Frechet distance compares its features with those of the
training images; it is not FID and is only comparable within one table. The masked transformer fills its grids in 8
steps; the others sample one code after another. CIFAR-10's images were re-encoded as JPEG.
"""


def as_markdown(name: str, minutes: float, rows: list[Row], figures: dict[str, float], scale: float) -> str:
    """The section of one dataset."""
    title = f"### Priors: {set_title(name)}, {minutes:g} minutes of processor time each"
    baselines = (
        f"Predicting codes uniformly costs {figures['uniform_nats_per_code']:.3f} nats per code; predicting them "
        f"by their frequency costs {figures['unigram_nats_per_code']:.3f}. "
        f"The network assigns {figures['class_accuracy_real']:.1%} of the held-out real images to their class. "
        "An equal number of real images has a Frechet distance of "
        f"{figures['frechet_distance_real']:.3g} to the training images."
    )
    shown = f"![Samples of the three priors, guidance {scale:g}](images/priors_{name}.png)"
    return "\n\n".join([title, markdown_table(COLUMNS, rows), baselines, shown])


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--minutes", type=float, nargs=2, default=[6.0, 8.0], metavar=("MNIST", "CIFAR"))
    arguments.add_argument("--sets", nargs="+", choices=TOKENIZERS, default=list(TOKENIZERS))
    arguments.add_argument("--guidance-scale", type=float, nargs="+", default=[1.0, 2.0])
    arguments.add_argument("--dir", type=Path, default=Path("runs/priors"))
    arguments.add_argument("--results", type=Path, default=Path("docs/results.md"))
    options = arguments.parse_args()
    write_section(options.results, "priors", HEAD.format(**described_machine()))
    rows = []
    for name, minutes in zip(TOKENIZERS, options.minutes, strict=True):
        if name not in options.sets:
            continue
        folder = options.dir / name
        folder.mkdir(parents=True, exist_ok=True)
        codes, judge = prepare(name)
        steps = steps_for(minutes * 60, name, codes, folder)
        scales = options.guidance_scale
        found = [
            row
            for prior in PRIORS
            for row in train_and_measure(prior, name, steps[prior], codes, judge, folder, scales)
        ]
        picture(name, folder, scales[-1], options.results.parent / "images")
        last = folder / PRIORS[-1] / f"evaluation_{scales[-1]:g}" / "evaluation.json"
        figures = json.loads(last.read_text(encoding="utf-8"))["figures"]
        write_section(options.results, f"priors {name}", as_markdown(name, minutes, found, figures, scales[-1]))
        rows += [row | {"name": f"{name} {row['name']}"} for row in found]
    report({"minutes": options.minutes}, rows, options.json)


if __name__ == "__main__":
    main()
