"""Does the distance of images from perturbed codes predict how well a prior will generate?

python -m benchmarks.generation_prediction [--set mnist] [--steps 150 200] [--images 10000] [--judge RUN]
                                           [--only plain perturbed] [--dir runs/prediction]
                                           [--results docs/results.md]

Trains tokenizers that differ in codebook, losses and training, then the same prior on the codes of each. `evaluate`
gives each tokenizer's distance of reconstructions, of images from perturbed codes, and of the prior's samples, all in
the features of one network. The rank correlations say which figure's order predicts that of the samples' distances.
What exists is reused.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import spearmanr

from benchmarks.reporting import Row, described_machine, markdown_table, parser, report, set_title, write_section
from pipelines.encoding.dataset_codes import encode_dataset
from pipelines.evaluation.evaluate_prior import evaluate_prior
from pipelines.evaluation.evaluate_tokenizer import evaluate_tokenizer
from pipelines.evaluation.samples import SampleRequest
from stage1_tokenizer.features.feature_training import features_config
from stage1_tokenizer.features.feature_training import train as train_features
from stage1_tokenizer.tokenizer_training import TokenizerConfig
from stage1_tokenizer.tokenizer_training import train as train_tokenizer
from stage2_prior.prior_training import PriorTrainingConfig
from stage2_prior.prior_training import train as train_prior
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.config.sections import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
PERTURBATION = "loss.perturbation={image_share: 0.5, code_share: 0.5, neighbours: 8}"
SAMPLES, HELD_OUT = 500, 2_000


@dataclass(frozen=True)
class ImageSet:
    """A dataset, and the configs that its tokenizers and priors start from."""

    tokenizer: str
    prior: str
    codes: int
    """The codebook's size of the config."""
    levels: tuple[int, ...]
    """Levels of a finite scalar quantizer with as many codes."""
    judge: str | None
    """`imagenet`; None: a feature network that the benchmark trains."""


SETS = {
    "mnist": ImageSet("vqvae_mnist", "gpt_shapes", 128, (8, 4, 4), None),
    "cifar10": ImageSet("vqvae_cifar10", "gpt_cifar10", 512, (8, 8, 8), "imagenet"),
}
COLUMNS = {
    "name": "tokenizer",
    "psnr": "PSNR, dB",
    "perplexity": "perplexity",
    "rfid": "distance of reconstructions",
    "rfid_perturbed": "of images from perturbed codes",
    "nats": "nats per image",
    "distance": "distance of samples",
    "accuracy": "class accuracy of samples",
}
PREDICTORS = {
    "rfid_perturbed": "the distance of images from perturbed codes",
    "rfid": "the distance of reconstructions",
    "psnr": "PSNR (-1 is best)",
    "nats": "nats per image",
}


def tokenizers(images: ImageSet) -> dict[str, list[str]]:
    """The changes to a dataset's config that make each tokenizer."""
    scalars = f"model.bottleneck={{type: finite_scalar, levels: {list(images.levels)}}}"
    adversary = "loss.adversarial={weight: 0.02, start: 0.3, channels: 32, lr: 1e-3}"
    return {
        "plain": [],
        "an eighth of the codes": [f"model.bottleneck.codebook_size={images.codes // 8}"],
        "four times the codes": [f"model.bottleneck.codebook_size={images.codes * 4}"],
        "8 channels": ["model.latent_channels=8"],
        "learned codebook": ["model.bottleneck.codebook=learned"],
        "finite scalars": [f"model.latent_channels={len(images.levels)}", scalars],
        "l1": ["loss.reconstruction=l1"],
        "adversarial": ["loss.reconstruction=l1", adversary],
        "perturbed": [PERTURBATION],
        "equivariant": ["loss.equivariance={}"],
        "causal": ["loss.latents=[{type: causal}]"],
        "semantic": ["loss.latents=[{type: semantic}]"],
        "a third of the steps": [],
    }


class Runs:
    """The trainings and evaluations of one dataset, in one folder."""

    def __init__(self, name: str, steps: list[int], num_images: int, folder: Path, judge: Path | None) -> None:
        self.name, self.images, self.steps = name, SETS[name], steps
        self.num_images, self.folder, self.given_judge = num_images, folder, judge

    @property
    def judge(self) -> Path | str:
        """The network in whose features distances are measured, trained if it is missing."""
        found = self.given_judge or self.images.judge
        if found is None:
            found = self.folder / "judge"
            if not (found / "model").exists():
                train_features(features_config(self.name, found, epochs=3, seed=1))
        return found

    def row(self, name: str, changes: list[str]) -> Row:
        """Trains and evaluates whatever is missing of a tokenizer and its prior, and returns their figures."""
        run = self.folder / name.replace(" ", "_")
        tokenizer, codes, prior = run / "tokenizer", run / "codes", run / "prior"
        length = self.steps[0] // 3 if name == "a third of the steps" else self.steps[0]
        changes = [*changes, f"data.source={self.name}", f"data.num_images={self.num_images}"]
        file = CONFIGS / "tokenizer" / f"{self.images.tokenizer}.yaml"
        train_tokenizer(load_config(TokenizerConfig, file, [*changes, *_settings(tokenizer, length)]))
        if not codes.exists():
            encode_dataset(tokenizer, codes)
        file = CONFIGS / "prior" / f"{self.images.prior}.yaml"
        train_prior(load_config(PriorTrainingConfig, file, [f"codes={codes}", *_settings(prior, self.steps[1])]))
        if not (tokenizer / "evaluation").exists():
            found = evaluate_tokenizer(tokenizer, features=self.judge, num_images=HELD_OUT)
            found.write(tokenizer / "evaluation")
        if not (prior / "evaluation").exists():
            samples = SampleRequest(SAMPLES, sampling=SamplingConfig(guidance_scale=2.0))
            found = evaluate_prior(prior, features=self.judge, samples=samples, num_images=SAMPLES)
            found.write(prior / "evaluation")
        first, second = (
            json.loads((part / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))["figures"]
            for part in (tokenizer, prior)
        )
        row = {"name": name} | {key: first[key] for key in COLUMNS if key in first}
        row |= {"nats": second["nats_per_image"], "distance": second["frechet_distance"]}
        return row | {"accuracy": f"{second['class_accuracy']:.1%}"}


def _settings(run: Path, steps: int) -> list[str]:
    length = [f"train.{key}={steps}" for key in ("max_steps", "validate_every", "checkpoint_every")]
    return [f"run.dir={run}", "run.trackers=[]", *length]


TEXT = """## Which figure of a tokenizer predicts its prior's samples? {title}

Written by `python -m benchmarks.generation_prediction --set {name}`, on {machine}. {device} Each tokenizer trained for
{first} steps on {images:,} images, and the same GPT over the codes of each for {second} steps. All distances are
Frechet distances in the features of {judge}, those of {samples:,} samples with guidance 2. One run each, seed 0.

{table}

Rank correlation (Spearman) with the distance of samples, over {count} tokenizers: {words}.
"""


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--set", choices=SETS, default="mnist")
    arguments.add_argument("--steps", type=int, nargs=2, default=[150, 200], metavar=("TOKENIZER", "PRIOR"))
    arguments.add_argument("--images", type=int, default=10_000, help="training images")
    arguments.add_argument("--judge", type=Path, help="the run of a feature network; by default, one is trained")
    arguments.add_argument("--only", nargs="+", help="tokenizers to train; all by default")
    arguments.add_argument("--dir", type=Path, default=Path("runs/prediction"))
    arguments.add_argument("--results", type=Path, default=Path("docs/results.md"))
    options = arguments.parse_args()
    runs = Runs(options.set, options.steps, options.images, options.dir / options.set, options.judge)
    chosen = {name: given for name, given in tokenizers(runs.images).items() if name in (options.only or [name])}
    rows = [runs.row(name, changes) for name, changes in chosen.items()]
    samples = [row["distance"] for row in rows]
    found = {key: float(spearmanr([row[key] for row in rows], samples)[0]) for key in PREDICTORS}
    text = TEXT.format(
        name=options.set, **described_machine(), title=set_title(options.set), first=options.steps[0],
        second=options.steps[1], images=options.images, samples=SAMPLES, table=markdown_table(COLUMNS, rows),
        judge="EfficientNet-lite2" if runs.judge == "imagenet" else "a network trained here", count=len(rows),
        words=", ".join(f"{found[key]:.2f} for {title}" for key, title in PREDICTORS.items()),
    )  # fmt: skip
    write_section(options.results, f"prediction {options.set}", text)
    report({"steps": options.steps, "images": options.images, **found}, rows, options.json)


if __name__ == "__main__":
    main()
