"""All families of stage one with the same training time, in one table and one sheet per dataset.

python -m benchmarks.families [--minutes 1 2] [--dir runs/families] [--results docs/results.md] [--json FILE]

For MNIST, then CIFAR-10: measure the cost of a step for each family (alternating, so that noise affects all alike),
train each config in `configs/tokenizer/` for as many steps as the time allows, evaluate on the test images and write
the results. Missing feature networks are trained first. The network in the VQ-GAN's perceptual loss (seed 0) is not
the one that computes the Frechet distance (seed 1). Run the same command again to resume.
"""

import json
import time
from pathlib import Path

import torch

from benchmarks.reporting import Row, described_machine, markdown_table, parser, report, set_title, write_section
from pipelines.comparison.step_budget import TIMED_STEPS, seconds_per_step
from pipelines.evaluation.evaluate_tokenizer import evaluate_tokenizer
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.features.feature_network import WIDTHS
from stage1_tokenizer.features.feature_training import features_config
from stage1_tokenizer.features.feature_training import train as train_features
from stage1_tokenizer.tokenizer_training import TokenizerConfig
from stage1_tokenizer.tokenizer_training import train as train_tokenizer
from twostage.core.config.sections import load_config
from twostage.core.data.dataset import load_images
from twostage.core.data.image_data import ImageData
from twostage.core.images.conversion import to_float, to_uint8
from twostage.core.images.sheets import contact_sheet, save_image
from twostage.core.runs.run_folder import read_metrics

CONFIGS = Path(__file__).parents[1] / "configs" / "tokenizer"
FAMILIES = ["ae", "dae", "vae", "beta_vae", "cvae", "vqvae", "fsq", "lfq", "rvq", "vqgan"]
SETS = {
    "mnist": {"epochs": 3},
    "cifar10": {"epochs": 3, "horizontal_flip": True},
}  # and how their feature networks are trained
PERCEPTUAL_WIDTH = 16  # of the network in the loss; the network that judges is wider
COLUMNS = {
    "name": "family",
    "steps": "steps",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "rfid": "Frechet distance",
    "nats_per_image": "nats per image",
    "active_units": "active units",
    "codebook_usage": "codes in use",
    "perplexity": "perplexity",
}
# For families without a CIFAR-10 config: overrides of another family's, for 8x8 codes of 512, or 128 numbers.
CORRUPTION = "loss.corruption={masked_share: 0.3, noise_std: 0.1}"
CIFAR = {
    "ae": ("vae_cifar10", ["model.bottleneck={type: identity}"]),
    "dae": ("vae_cifar10", ["model.bottleneck={type: identity}", CORRUPTION]),
    "vae": ("vae_cifar10", []),
    "beta_vae": ("vae_cifar10", ["loss.kl_weight=4"]),
    "cvae": ("vae_cifar10", ["model.bottleneck={type: class_gaussian}"]),
    "vqvae": ("vqvae_cifar10", []),
    "fsq": (
        "vqvae_cifar10",
        ["model.latent_channels=3", "model.bottleneck={type: finite_scalar, levels: [8, 8, 8]}"],
    ),
    "lfq": ("vqvae_cifar10", ["model.latent_channels=9", "model.bottleneck={type: lookup_free}"]),
    "rvq": ("vqvae_cifar10", ["model.bottleneck={type: residual, depth: 2, codebook_size: 256}"]),
    "vqgan": ("vqgan_cifar10", []),
}


def configured(family: str, name: str, folder: Path, extra: list[str]) -> TokenizerConfig:
    """The configuration of one family on one dataset."""
    file, overrides = CIFAR[family] if name == "cifar10" else (f"{family}_mnist", [])
    overrides = [*overrides, f"data.source={name}", "run.trackers=[]", "train.mixed_precision=auto", *extra]
    if family == "vqgan":
        overrides.append(f"loss.perceptual.path={folder / 'features_0'}")
    return load_config(TokenizerConfig, CONFIGS / f"{file}.yaml", overrides)


def steps_for(budget_s: float, name: str, folder: Path) -> dict[str, int]:
    """The number of steps of each family in ``budget_s`` seconds of one thread's processor time, which other programs
    on the machine do not affect."""
    file = folder / f"steps_{round(budget_s)}s.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    length = [f"train.max_steps={TIMED_STEPS}", "train.epochs=null", "train.warmup_steps=0", "data.num_images=2000"]
    length += [f"train.{what}_every={TIMED_STEPS}" for what in ("validate", "checkpoint")]
    seconds = {}
    for family in FAMILIES:
        extra = [f"run.dir={folder / 'timing' / family}", *length]
        # Time a VQ-GAN's step with both networks, as in most of its run.
        extra += ["loss.adversarial.start=0"] if family == "vqgan" else []
        config = configured(family, name, folder, extra)
        seconds[family] = seconds_per_step(lambda config=config: train_tokenizer(config), time.process_time)
    steps = {family: max(50, round(budget_s / each / 50) * 50) for family, each in seconds.items()}
    file.write_text(json.dumps(steps), encoding="utf-8")
    return steps


def train_and_measure(family: str, name: str, steps: int, folder: Path) -> Row:
    """Train if necessary, evaluate, and return a row of the table."""
    run = folder / family
    extra = [f"run.dir={run}", "train.epochs=null", f"train.max_steps={steps}"]
    extra += [f"train.validate_every={steps}", f"train.checkpoint_every={max(1, steps // 2)}"]
    train_tokenizer(configured(family, name, folder, extra))
    file = run / "evaluation" / "evaluation.json"
    if not file.is_file():
        evaluate_tokenizer(run, features=folder / "features_1").write(file.parent)
    figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
    return {"name": family, "steps": steps} | {key: figures[key] for key in COLUMNS if key in figures}


def picture(name: str, folder: Path, data: ImageData, out: Path) -> None:
    """The same test images through every family, above samples from the variational families."""
    rows = torch.arange(12)
    originals, labels = data.validation.read(rows), data.validation.read_labels(rows)
    strips, titles = [originals], ["original"]
    models = {family: Autoencoder.from_pretrained(folder / family) for family in FAMILIES}
    for family, model in models.items():
        strips.append(to_uint8(model.reconstruct(to_float(originals), labels)))
        titles.append(family)
    for family, model in models.items():
        if model.variational:
            strips.append(to_uint8(model.sample(len(rows), generator=torch.Generator().manual_seed(0))))
            titles.append(f"{family} samples")
    save_image(contact_sheet(torch.cat(strips), len(rows), row_titles=titles), out / f"families_{name}.png")


HEAD = """## Every family of stage one

Written by `python -m benchmarks.families`. Every family gets the same processor time for training on the same machine
({machine}), so a family with slower steps takes fewer of them. {device}

`twostage evaluate` measured all figures on the 10,000 test images: 8-bit pixels, PSNR and SSIM as means over images.
The Frechet distance is between test images and their reconstructions, in the features of a network trained here on the
same dataset with `twostage train-features` (seed 1). It is not FID and is only comparable within one table. The
VQ-GAN's perceptual term uses another such network (seed 0). The denoising autoencoder is measured on clean inputs.
CIFAR-10's images were re-encoded as JPEG. One run each, seed 0.
"""


def as_markdown(name: str, minutes: float, rows: list[Row], accuracy: float) -> str:
    """The section of one dataset."""
    judge = f"The feature network classifies {accuracy:.1%} of the test images correctly."
    title = f"### {set_title(name)}, {minutes:g} minutes of processor time each"
    picture = f"![The same test images through every family](images/families_{name}.png)"
    return "\n\n".join([title, markdown_table(COLUMNS, rows), judge, picture])


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--minutes", type=float, nargs=2, default=[1.0, 2.0], metavar=("MNIST", "CIFAR"))
    arguments.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    arguments.add_argument("--dir", type=Path, default=Path("runs/families"))
    arguments.add_argument("--results", type=Path, default=Path("docs/results.md"))
    options = arguments.parse_args()
    write_section(options.results, "families", HEAD.format(**described_machine()))
    rows = []
    for name, minutes in zip(SETS, options.minutes, strict=True):
        if name not in options.sets:
            continue
        folder = options.dir / name
        folder.mkdir(parents=True, exist_ok=True)
        for seed in (0, 1):
            features = folder / f"features_{seed}"
            width = PERCEPTUAL_WIDTH if seed == 0 else WIDTHS[0]
            train_features(features_config(name, features, seed=seed, width=width, **SETS[name]))
        steps = steps_for(minutes * 60, name, folder)
        found = [train_and_measure(family, name, steps[family], folder) for family in FAMILIES]
        data = load_images(configured("ae", name, folder, ["run.dir=x"]).data)
        images = options.results.parent / "images"
        picture(name, folder, data, images)
        accuracy = read_metrics(features / "metrics.jsonl")[-1]["accuracy"]
        write_section(options.results, f"families {name}", as_markdown(name, minutes, found, accuracy))
        rows += [row | {"name": f"{name} {row['name']}"} for row in found]
    report({"minutes": options.minutes}, rows, options.json)


if __name__ == "__main__":
    main()
