"""The training of a feature network on labelled images."""

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor

from stage1_tokenizer.augmentation import flip_half, shift
from stage1_tokenizer.features.feature_network import WIDTHS, FeatureNetwork, FeatureNetworkConfig
from twostage.core.config.sections import Count, RunConfig, Section, Size, parse_config
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.image_data import ImageData, ImageSplit
from twostage.core.data.records import AUTO
from twostage.core.data.survey import survey
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_float
from twostage.core.training.base_run import BaseRun
from twostage.core.training.batches import Batches
from twostage.core.training.dry_run import DryRun
from twostage.core.training.optimizer import TrainedNetwork
from twostage.core.training.train_config import TrainConfig
from twostage.core.training.training_run import TrainingRun

__all__ = ["FeaturesTrainingConfig", "features_config", "train"]

MAX_SIDE = 256
"""The longest side of the images, in pixels, if no size is given."""


class FeaturesTrainingConfig(Section):
    """The configuration that `twostage train-features` builds from its options."""

    run: RunConfig
    data: DataConfig = DataConfig()
    widths: list[Count] = Field(default=WIDTHS, min_length=1)
    """Channels of the network at each resolution."""
    max_shift: Size = 2
    """Maximum shift of a training image in pixels, vertically and horizontally."""
    train: TrainConfig


def train(
    config: FeaturesTrainingConfig, dry_run: bool = False, time_limit: float | None = None
) -> BaseRun[FeaturesTrainingConfig]:
    """Trains into ``config.run.dir``, or resumes from its latest checkpoint; returns the finished run.

    Args:
        dry_run: measure a few steps and write nothing.
        time_limit: minutes after which the run saves and stops; None: no limit.

    Raises:
        InputError: the images have no labels, or all have the same.
        StopAsked: the run was asked to stop, and has saved.
    """
    run = DryRun(config) if dry_run else TrainingRun(config, time_limit=time_limit)
    config, accelerator = run.config, run.accelerator

    # 1. The images and their labels.
    data = load_images(config.data)
    run.report(data.description, *data.notices)
    class_names = check_labels(data, config.data.source)
    split = data.splits["train"]
    batches = Batches(len(split), config.train, run.seed, accelerator, "images (data.num_images)")

    # 2. The network and its optimizer, as new or from the latest checkpoint.
    network = TrainedNetwork(make_network(config, class_names).to(accelerator.device), config.train, accelerator)
    run.attach(batches, [network], {"data.source": data.contents()}, split.names)
    if isinstance(run, TrainingRun) and (checkpoint := run.latest_checkpoint()):
        run.load(checkpoint)

    def read(rows: Tensor) -> tuple[Tensor, Tensor]:
        return split.read(rows), read_labels(split, rows)

    # 3. The training.
    for batch in run.steps(read, read_ahead=not split.in_memory):
        network.wrapped.train()
        for (pixels, labels), random in batch:
            images = shift(to_float(pixels.to(accelerator.device, non_blocking=True)), config.max_shift, random)
            if config.data.horizontal_flip:
                images = flip_half(images, random)
            labels = labels.to(accelerator.device, non_blocking=True)
            with accelerator.accumulate(network.wrapped):
                logits = network.wrapped(images)
                loss = F.cross_entropy(logits.float(), labels)
                run.update(network, loss)
            run.record({"loss": loss, "accuracy": (logits.argmax(dim=1) == labels).float().mean()})
        run.advance()
        if isinstance(run, DryRun):
            continue  # it measures the lines above, and neither validates nor saves

        # 4. From time to time: validate, save.
        if run.due("validate"):
            metrics = validate(network.module, data.validation, config.train.batch_size, accelerator)
            run.facts["accuracy"] = metrics["accuracy"]
            run.log_validation(metrics)
        if run.due("checkpoint"):
            run.save(title=f"{run.folder.path.name}: feature network", write_model=network.module.save_pretrained)
    if isinstance(run, DryRun):
        run.end(num_held_out=len(data.validation))
    else:
        images = f"{len(data.validation):,} images of `{data.validation_name}`"
        run.report(f"held-out accuracy {run.facts['accuracy']:.2%} ({images}); {run.folder.results}")
    return run


def make_network(config: FeaturesTrainingConfig, class_names: list[str]) -> FeatureNetwork:
    """The untrained network."""
    form = {"image_size": config.data.size, "channels": config.data.channels, "widths": config.widths}
    return FeatureNetwork(FeatureNetworkConfig(class_names=class_names, **form))


def check_labels(data: ImageData, source: str) -> list[str]:
    """The class names.

    Raises:
        InputError: images without labels, or all of one class.
    """
    if data.class_names is None or any(split.labels is None for split in (data.splits["train"], data.validation)):
        raise InputError(
            f"data.source {source}: its images have no labels, and a feature network learns to tell classes apart. "
            "Use one folder per class, or a table with a column of classes (--label-column)"
        )
    if len(data.class_names) < 2:
        raise InputError(
            f"data.source {source}: all images have the class {data.class_names[0]!r}; expected at least 2 classes"
        )
    return data.class_names


def read_labels(split: ImageSplit, rows: Tensor) -> Tensor:
    """The labels (len(rows),) int64 of a split that has labels."""
    labels = split.read_labels(rows)
    assert labels is not None
    return labels


@torch.no_grad()
def validate(network: FeatureNetwork, split: ImageSplit, batch_size: int, accelerator: Accelerator) -> dict[str, float]:
    """Mean cross-entropy (nats) and accuracy over a split; the processes share the batches."""
    network.eval()
    sums = torch.zeros(2, device=accelerator.device)
    parts = list(torch.arange(len(split)).split(batch_size))
    for rows in parts[accelerator.process_index :: accelerator.num_processes]:
        labels = read_labels(split, rows).to(accelerator.device)
        logits = network(to_float(split.read(rows).to(accelerator.device))).float()
        correct = (logits.argmax(dim=1) == labels).sum()
        sums += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), correct.float()])
    sums = accelerator.reduce(sums, "sum")
    assert isinstance(sums, Tensor)
    loss, accuracy = (sums / len(split)).tolist()
    return {"loss": loss, "accuracy": accuracy}


def features_config(
    data: str,
    out: Path,
    image_size: int | None = None,
    channels: int | None = None,
    epochs: int = 5,
    batch_size: int = 64,
    horizontal_flip: bool = False,
    seed: int = 0,
    width: int = WIDTHS[0],
    label_column: str = AUTO,
    value_range: tuple[float, float] | None = None,
) -> FeaturesTrainingConfig:
    """The recipe with the command's options; size (at most 256 pixels) and channels default to the usual ones."""
    usual = survey(data, None)
    document = {
        "run": {"dir": str(out), "seed": seed},
        "data": {
            "source": data,
            "image_size": image_size or list(usual.size_within(MAX_SIDE)),
            "channels": channels or usual.channels,
            "label_column": label_column,
            "value_range": value_range,
            "horizontal_flip": horizontal_flip,
        },
        "widths": [width, 2 * width, 4 * width],
        "train": {
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": 3e-3,
            "lr_schedule": "cosine",
            "warmup_steps": 20,
            "weight_decay": 0.05,
            "max_grad_norm": 1.0,
            "mixed_precision": "auto",
        },
    }
    return parse_config(FeaturesTrainingConfig, document, "the options")
