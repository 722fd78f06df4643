"""Does the distance of images from perturbed codes predict how well a prior will generate?

python -m benchmarks.generation_prediction [--steps 300 300] [--dir runs/prediction] [--results docs/results.md]

Trains tokenizers on CIFAR-10 that differ in codebook, losses and training, then the same prior on the codes of each.
`evaluate` gives each tokenizer's distance of reconstructions, of images from perturbed codes, and of the prior's
samples, all in ImageNet features. The rank correlation says whether the order of the first or second predicts that of
the third. What exists is reused.
"""

import json
from pathlib import Path

from scipy.stats import spearmanr

from benchmarks.reporting import Row, described_machine, markdown_table, parser, report, write_section
from pipelines.encoding.dataset_codes import encode_dataset
from pipelines.evaluation.evaluate_prior import evaluate_prior
from pipelines.evaluation.evaluate_tokenizer import evaluate_tokenizer
from pipelines.evaluation.samples import SampleRequest
from stage1_tokenizer.train_tokenizer import TokenizerConfig
from stage1_tokenizer.train_tokenizer import train as train_tokenizer
from stage2_prior.sampling_config import SamplingConfig
from stage2_prior.train_prior import PriorTrainingConfig
from stage2_prior.train_prior import train as train_prior
from twostage.core.config.sections import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
PERTURBATION = "loss.perturbation={image_share: 0.5, code_share: 0.5, neighbours: 16}"
TOKENIZERS: dict[str, list[str]] = {
    "plain": [],
    "64 codes": ["model.bottleneck.codebook_size=64"],
    "2,048 codes": ["model.bottleneck.codebook_size=2048"],
    "8 channels": ["model.latent_channels=8"],
    "learned codebook": ["model.bottleneck.codebook=learned"],
    "finite scalars": ["model.latent_channels=3", "model.bottleneck={type: finite_scalar, levels: [8, 8, 8]}"],
    "l1": ["loss.reconstruction=l1"],
    "adversarial": ["loss.reconstruction=l1", "loss.adversarial={weight: 0.02, start: 0.3, channels: 32, lr: 1e-3}"],
    "perturbed": [PERTURBATION],
    "equivariant": ["loss.equivariance={}"],
    "causal": ["loss.latents=[{type: causal}]"],
    "semantic": ["loss.latents=[{type: semantic}]"],
    "a third of the steps": [],
}
COLUMNS = {
    "name": "tokenizer",
    "psnr": "PSNR, dB",
    "perplexity": "perplexity",
    "rfid": "distance of reconstructions",
    "rfid_perturbed": "of images from perturbed codes",
    "distance": "of samples",
    "accuracy": "class accuracy of samples",
}


def train_and_measure(name: str, overrides: list[str], steps: list[int], folder: Path) -> Row:
    """Train whatever is missing of a tokenizer and its prior, and return its row of the table."""
    tokenizer, codes, prior = folder / "tokenizer", folder / "codes", folder / "prior"
    length = steps[0] // 3 if name == "a third of the steps" else steps[0]
    file = CONFIGS / "tokenizer" / "vqvae_cifar10.yaml"
    train_tokenizer(load_config(TokenizerConfig, file, [*overrides, *_settings(tokenizer, length)]))
    if not codes.exists():
        encode_dataset(tokenizer, codes)
    settings = [f"codes={codes}", *_settings(prior, steps[1])]
    train_prior(load_config(PriorTrainingConfig, CONFIGS / "prior" / "gpt_cifar10.yaml", settings))
    if not (tokenizer / "evaluation").exists():
        evaluate_tokenizer(tokenizer, features="imagenet", num_images=5_000).write(tokenizer / "evaluation")
    if not (prior / "evaluation").exists():
        samples = SampleRequest(sampling=SamplingConfig(guidance_scale=2.0))
        found = evaluate_prior(prior, features="imagenet", samples=samples, num_images=1_000)
        found.write(prior / "evaluation")
    first, second = (
        json.loads((run / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))["figures"]
        for run in (tokenizer, prior)
    )
    row = {"name": name} | {key: first[key] for key in COLUMNS if key in first}
    return row | {"distance": second["frechet_distance"], "accuracy": f"{second['class_accuracy']:.1%}"}


def _settings(run: Path, steps: int) -> list[str]:
    length = [f"train.{key}={steps}" for key in ("max_steps", "validate_every", "checkpoint_every")]
    return [f"run.dir={run}", "run.trackers=[]", *(["data.source=cifar10"] if run.name == "tokenizer" else []), *length]


HEAD = """## Which figure of a tokenizer predicts its prior's samples?

Written by `python -m benchmarks.generation_prediction`, on {machine}. {device} Tokenizers for CIFAR-10 (re-encoded as
JPEG), trained for {first} steps each, and the same GPT over the codes of each for {second} steps. All distances are
Frechet distances in the ImageNet features of EfficientNet-lite2; samples are drawn with guidance 2. One run each,
seed 0.
"""


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--steps", type=int, nargs=2, default=[300, 300], metavar=("TOKENIZER", "PRIOR"))
    arguments.add_argument("--dir", type=Path, default=Path("runs/prediction"))
    arguments.add_argument("--results", type=Path, default=Path("docs/results.md"))
    options = arguments.parse_args()
    rows = [
        train_and_measure(name, overrides, options.steps, options.dir / name.replace(" ", "_").replace(",", ""))
        for name, overrides in TOKENIZERS.items()
    ]
    samples = [row["distance"] for row in rows]
    found = {key: float(spearmanr([row[key] for row in rows], samples)[0]) for key in ("rfid", "rfid_perturbed")}
    words = (
        f"Rank correlation with the distance of samples, over {len(rows)} tokenizers: {found['rfid']:.2f} for "
        f"reconstructions, {found['rfid_perturbed']:.2f} for images from perturbed codes."
    )
    head = HEAD.format(**described_machine(), first=options.steps[0], second=options.steps[1])
    write_section(options.results, "prediction", "\n\n".join([head, markdown_table(COLUMNS, rows), words]))
    report({"steps": options.steps, **found}, rows, options.json)


if __name__ == "__main__":
    main()
