"""Are generated digits the digits that were asked for?

python -m benchmarks.mnist_quality [--dir runs/mnist_quality] [--guidance-scale 1.0 ...] [--json FILE]

Trains `configs/tokenizer/vqvae_mnist.yaml`, encodes, trains `configs/prior/gpt_mnist.yaml`, samples 1,000 images of the
ten classes in turn, and lets a small CNN, trained here on the real training images, say what each one is. The same
command goes on where it was stopped; what is trained already is not trained again.
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.reporting import parser, report
from core.config import load_config
from core.data import ImageData, load_images
from core.images import to_float
from core.run_folder import read_metrics
from pipelines.encode_dataset import encode_dataset
from pipelines.two_stage import TwoStagePipeline
from stage1_tokenizer.train_tokenizer import TokenizerConfig
from stage1_tokenizer.train_tokenizer import train as train_tokenizer
from stage2_prior.train_prior import PriorTrainingConfig
from stage2_prior.train_prior import train as train_prior

CONFIGS = Path(__file__).parents[1] / "configs"
NUM_SAMPLES = 1000


def classifier() -> nn.Sequential:
    """Two convolutions, two linear layers; about 99.2% on the test images after three epochs."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(1600, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def train_classifier(data: ImageData, epochs: int = 4) -> tuple[nn.Module, float]:
    """The classifier and its accuracy on the test images."""
    torch.manual_seed(0)
    model, train = classifier(), data.splits["train"]
    assert train.labels is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    steps = epochs * (len(train) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(train)).split(128)[: len(train) // 128]:
            loss = F.cross_entropy(model(to_float(train.read(rows))), train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    test = data.splits["test"]
    assert test.labels is not None
    assert test.pixels is not None
    return model.eval(), accuracy(model.eval(), test.pixels, test.labels)


@torch.no_grad()
def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Share of the pictures that are given their label."""
    predictions = torch.cat([model(to_float(part)).argmax(1) for part in pixels.split(500)])
    return (predictions == labels).float().mean().item()


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--dir", type=Path, default=Path("runs/mnist_quality"))
    arguments.add_argument("--guidance-scale", type=float, nargs="+", default=[1.0, 2.0])
    options = arguments.parse_args()
    start = time.perf_counter()
    tokenizer, codes, prior = options.dir / "tokenizer", options.dir / "codes", options.dir / "prior"
    config = load_config(TokenizerConfig, CONFIGS / "tokenizer" / "vqvae_mnist.yaml", [f"run.dir={tokenizer}"])
    train_tokenizer(config)
    encode_dataset(tokenizer, codes)
    overrides = [f"run.dir={prior}", f"codes={codes}"]
    train_prior(load_config(PriorTrainingConfig, CONFIGS / "prior" / "gpt_mnist.yaml", overrides))
    trained = time.perf_counter() - start

    model, real = train_classifier(load_images(config.data))
    pipeline = TwoStagePipeline.from_runs(prior)
    rows = []
    for scale in options.guidance_scale:
        start = time.perf_counter()
        output = pipeline(NUM_SAMPLES, seed=0, guidance_scale=scale, batch_size=100, output_type="pt")
        seconds = time.perf_counter() - start
        share = accuracy(model, output.images, torch.tensor(output.labels))
        distinct = len(torch.unique(output.codes.flatten(1), dim=0)) / NUM_SAMPLES
        rows.append({"name": f"guidance {scale}", "class_accuracy": share, "distinct": distinct, "sampling_s": seconds})
    metrics = [line for line in read_metrics(prior / "metrics.jsonl") if line["split"] == "val"]
    report(
        {
            "samples": NUM_SAMPLES,
            "classifier_test_accuracy": real,
            "train_s (0 where reused)": round(trained, 1),
            "held_out_nats_per_code": min(line["loss"] for line in metrics),
            "unigram_nats_per_code": metrics[0]["unigram"],
        },
        rows,
        options.json,
    )


if __name__ == "__main__":
    main()
