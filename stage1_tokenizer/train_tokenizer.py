"""Trains a tokenizer, or one of the baselines that it grew out of.

accelerate launch -m stage1_tokenizer.train_tokenizer configs/tokenizer/vqvae_cifar10.yaml [key=value ...]
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from accelerate import Accelerator
from accelerate.utils import broadcast
from pydantic import model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from stage1_tokenizer.augmentation import flip_half
from stage1_tokenizer.autoencoder import Autoencoder, AutoencoderConfig, ModelConfig, PerceptualNetwork
from stage1_tokenizer.diagnosis import Diagnosis
from stage1_tokenizer.discriminator import AdversarialConfig, Discriminator, discriminator_loss, r1_penalty
from stage1_tokenizer.image_losses import ImageLosses, LossConfig
from stage1_tokenizer.perceptual import FeaturePerceptualConfig
from stage1_tokenizer.sample_sheets import draw_images
from stage1_tokenizer.validation import validate
from twostage.core.config.sections import PathName, RunConfig, Section, describe_differences, load_config, parse_config
from twostage.core.data.dataset import DataConfig, ImageData, ImageSplit, load_images
from twostage.core.errors import InputError
from twostage.core.files import expand_home
from twostage.core.images.conversion import to_float
from twostage.core.images.sheets import save_image
from twostage.core.machine.command import print_once, run_command
from twostage.core.machine.memory import check_model
from twostage.core.machine.stopping import TimeLimitOption, going_on_later
from twostage.core.runs.model_folder import fill, load_model_folder
from twostage.core.runs.places import Contents, weights_at
from twostage.core.training.batches import Batches
from twostage.core.training.dry_run import DryRun, DryRunOption, JsonOption, check_json, finish_dry_run
from twostage.core.training.ema import averaged_copy
from twostage.core.training.optimizer import make_optimizer
from twostage.core.training.random import seed_for
from twostage.core.training.run import TrainingRun
from twostage.core.training.train_config import TrainConfig

__all__ = ["TokenizerConfig", "TokenizerTrainConfig", "autoencoder_config", "train"]

VECTORS_PER_CODE = 32  # what k-means starts the codebook from
MAX_DISTANCES = 1 << 30  # and of how many distances it may work out a round


class TokenizerTrainConfig(TrainConfig):
    """As of every training, and which part is trained."""

    parts: Literal["all", "decoder"] = "all"
    """`decoder`: encoder and codebook stay as `init_from` has them, so the codes and the priors trained on them stay
    valid."""


class TokenizerConfig(Section):
    """A file of `configs/tokenizer/`."""

    run: RunConfig
    init_from: PathName | None = None
    """A trained model (a run, or a model folder, such as `twostage import` makes) to start from; its `model` group is
    taken over where none is given."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TokenizerTrainConfig

    @model_validator(mode="before")
    @classmethod
    def _model_of_init_from(cls, document: Any) -> Any:
        if isinstance(document, dict) and isinstance(document.get("init_from"), str) and "model" not in document:
            return document | {"model": open_source(expand_home(document["init_from"]))[0]["model"]}
        return document

    @model_validator(mode="after")
    def _decoder_of_something(self) -> "TokenizerConfig":
        if self.train.parts == "decoder" and self.init_from is None:
            raise ValueError("train.parts 'decoder': needs init_from=RUN, whose encoder and codes are kept")
        return self


def autoencoder_config(config: TokenizerConfig, data: ImageData) -> AutoencoderConfig:
    """What the trained model keeps of a training's configuration and of its data."""
    return AutoencoderConfig(
        image_size=config.data.size,
        channels=config.data.channels,
        class_names=data.class_names,
        untrained_classes=tuple(data.untrained_classes),
        value_range=config.data.value_range,
        model=config.model,
        loss=config.loss.objective(),
        adversarial=config.loss.adversarial is not None,
    )


def train(
    config: TokenizerConfig,
    weights_dir: Path | None = None,
    dry_run: bool = False,
    time_limit: float | None = None,
) -> TrainingRun[TokenizerConfig]:
    """Trains into ``config.run.dir``, going on from its last checkpoint where there is one.

    Args:
        weights_dir: where LPIPS's trunk lies; None: torch's cache.
        dry_run: measures a few steps and writes nothing.
        time_limit: minutes after which the run saves and stops; None: no limit.

    Returns:
        The run as it ended.

    Raises:
        StopAsked: the run was asked to stop, and has saved.
    """
    run = (DryRun if dry_run else TrainingRun)(config, time_limit=time_limit)
    config, accelerator = run.config, run.accelerator

    # 1. The images.
    data = load_images(config.data)
    for line in [data.description, *data.notices]:
        run.say(line)
    split = data.splits["train"]
    run.name_rows = split.names
    batches = Batches(len(split), config.train, run.seed, accelerator, "images (data.num_images)")

    # 2. The model, its average, its opponent, their optimizers.
    check_model(
        lambda: Autoencoder(autoencoder_config(config, data)),
        config.model.model_dump(),
        "model",
        accelerator.device,
    )
    autoencoder = Autoencoder(autoencoder_config(config, data)).to(accelerator.device)
    if config.train.parts == "decoder":
        autoencoder.encoder.requires_grad_(False)
        autoencoder.bottleneck.requires_grad_(False)
    averaged = averaged_copy(autoencoder, config.train.ema_decay) if config.train.ema_decay else None
    final = averaged.module if averaged else autoencoder  # what validation measures and inference loads
    assert isinstance(final, Autoencoder)
    optimizer = make_optimizer(autoencoder, config.train)
    model, prepared_optimizer = accelerator.prepare(autoencoder, optimizer)
    modules = {"model": autoencoder} | ({"ema": averaged} if averaged else {})
    optimizers: dict[str, tuple[nn.Module, Optimizer]] = {"optimizer": (autoencoder, optimizer)}
    opponent = make_opponent(config, accelerator) if config.loss.adversarial else None
    if opponent:
        modules |= {"discriminator": opponent.net}
        optimizers["discriminator_optimizer"] = (opponent.net, opponent.optimizer)
    image_losses = ImageLosses(config.loss, autoencoder, opponent and opponent.net, weights_dir, accelerator)
    parameters = sum(p.numel() for p in autoencoder.parameters())
    run.say(
        f"{parameters:,} parameters, latent grid {autoencoder.grid[0]}x{autoencoder.grid[1]}, "
        f"{batches.steps_per_epoch} steps an epoch, {batches.max_steps} in all"
    )

    def begin() -> None:
        if config.init_from:
            earlier = start_from(autoencoder, config.init_from, config.train.parts)
            run.facts["trained_against"] = [network.model_dump() for network in earlier]
        else:
            initialize_codebook(autoencoder, split, batches, accelerator)
        if averaged:
            averaged.module.load_state_dict(autoencoder.state_dict())

    run.restore(batches, modules, optimizers, begin, {"data.source": data.contents(), **other_sources(config)})
    networks = [PerceptualNetwork(**network) for network in run.facts.get("trained_against", [])]
    networks += [network for network in image_losses.networks() if network not in networks]
    final.config = final.config.model_copy(update={"trained_against": networks})
    diagnosis = Diagnosis(config.model.bottleneck.collapse_remedy, run.facts, run.say)
    nets = [model, opponent.prepared] if opponent else [model]

    def read(rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return split.read(rows), split.read_labels(rows)

    def reduce_sum(statistics: Tensor) -> Tensor:
        return accelerator.reduce(statistics, "sum")  # type: ignore[return-value]

    # 3. The training.
    for batch in run.steps(read, read_ahead=not split.in_memory):
        model.train()
        if config.train.parts == "decoder":
            autoencoder.bottleneck.eval()
        against = opponent if opponent and run.progress >= opponent.config.start else None
        norms: dict[str, Tensor] = {}  # of the gradients, once an update
        for (pixels, labels), random in batch:
            images = to_float(pixels.to(accelerator.device, non_blocking=True))
            labels = None if labels is None else labels.to(accelerator.device, non_blocking=True)
            if config.data.horizontal_flip:
                images = flip_half(images, random)
            with accelerator.accumulate(*nets):  # entered once for both: it counts
                output = model(images, labels, random)
                gradient, terms = image_losses.pixel_gradient(output, images, run.progress)
                loss = output.loss if gradient is None else output.loss + (output.decoded * gradient).sum()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norms = {"grad_norm": run.check_gradient(autoencoder, prepared_optimizer)}
                prepared_optimizer.step()
                prepared_optimizer.zero_grad()

                if against:
                    real = images.requires_grad_(against.config.r1_weight > 0)
                    fake = autoencoder.to_pixels(output.decoded.detach())
                    logits_real, logits_fake = against.prepared(real, fake)
                    loss = discriminator_loss(logits_real, logits_fake, against.config, against.net.ema_logits)
                    if against.config.r1_weight:
                        loss = loss + against.config.r1_weight * r1_penalty(logits_real, real)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        norm = run.check_gradient(against.net, against.prepared_optimizer)
                        norms["discriminator_grad_norm"] = norm
                    against.prepared_optimizer.step()
                    against.prepared_optimizer.zero_grad()
                    terms |= against.net.observe(loss, logits_real, logits_fake)
            run.record(with_terms(output.metrics, terms))
        run.record(norms)
        if config.train.parts == "all":
            autoencoder.bottleneck.update_codebook(reduce_sum)
        if against:
            against.net.update_statistics(reduce_sum)
        if averaged:
            averaged.update_parameters(autoencoder)
        if metrics := run.advance():
            diagnosis.observe(run.step, metrics)

        # 4. Once in a while: measure, picture, save.
        if run.due("validate"):
            metrics = validate(final, data.validation, config.train.batch_size, run.seed, accelerator)
            run.log_validation(metrics)
            if "active_share" in metrics:
                diagnosis.observe(run.step, {"active_share": metrics["active_share"]})
            if accelerator.is_main_process:
                for name, picture in draw_images(final, data, run.seed).items():
                    file = f"step_{run.step:08d}_{name}.png" if name else f"step_{run.step:08d}.png"
                    save_image(picture, run.folder.samples / file)
        if run.due("checkpoint"):
            # The held-out loss has no perceptual and no adversarial term; what both splits have is drawn.
            curve = "reconstruction" if config.loss.perceptual or opponent else "loss"
            title = f"{run.folder.path.name}: {config.model.bottleneck.type} autoencoder"
            run.save(title, curve=curve, write_model=final.save_pretrained)
    if isinstance(run, DryRun):
        run.end(num_held_out=len(data.validation))
        return run
    run.say(f"model: {run.folder.model}; pictures: {run.folder.samples}; curves: {run.folder.path / 'losses.png'}")
    return run


def other_sources(config: TokenizerConfig) -> dict[str, Contents]:
    """What the paths of a configuration besides `data.source` lead to."""
    sources = {}
    if config.init_from and Path(config.init_from).exists():  # a run that has begun no longer needs it
        sources["init_from"] = weights_at(config.init_from, only_to_begin=True)
    if isinstance(config.loss.perceptual, FeaturePerceptualConfig):
        sources["loss.perceptual.path"] = weights_at(config.loss.perceptual.path)
    return sources


def open_source(source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the weights of `init_from`."""
    try:
        return load_model_folder(source, "tokenizer")
    except InputError as error:
        raise InputError(f"init_from: {error}") from None


def start_from(autoencoder: Autoencoder, source: str, parts: Literal["all", "decoder"]) -> list[PerceptualNetwork]:
    """Fills a new autoencoder with the weights of a trained one; returns the networks that this was trained against.

    Raises:
        InputError: another architecture; the differences are named.
    """
    document, state = open_source(source)
    own = autoencoder.config.model_dump(mode="json")
    compared = ["model"]
    compared += ["image_size", "channels"] if parts == "decoder" else []  # the codes are of images of one form
    compared += ["class_names"] if autoencoder.class_conditional else []
    there, here = ({key: group[key] for key in compared} for group in (document, own))
    differences = describe_differences(there, here)
    if differences:
        raise InputError(f"init_from {source}: is another model:\n  " + "\n  ".join(differences))
    fill(autoencoder, state, f"init_from {source}")
    document.pop("hash", None)
    return parse_config(AutoencoderConfig, document, f"init_from {source}: config.json").trained_against


@dataclass
class Opponent:
    """The discriminator as the training step needs it."""

    config: AdversarialConfig
    net: Discriminator
    optimizer: Optimizer
    prepared: nn.Module
    prepared_optimizer: Optimizer


def make_opponent(config: TokenizerConfig, accelerator: Accelerator) -> Opponent:
    """The discriminator of ``loss.adversarial``.

    Raises:
        InputError: statistics that torch cannot share between processes on a CPU.
    """
    adversarial = config.loss.adversarial
    assert adversarial is not None
    if adversarial.norm == "sync_batch" and accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        raise InputError(
            "loss.adversarial.norm 'sync_batch': torch shares these statistics between GPUs only, and this run has "
            f"{accelerator.num_processes} processes on the CPU; use 'group'"
        )
    check_model(
        lambda: Discriminator(adversarial, config.data.channels, config.data.size),
        adversarial.model_dump(),
        "loss.adversarial",
        accelerator.device,
    )
    net = Discriminator(adversarial, config.data.channels, config.data.size).to(accelerator.device)
    optimizer = make_optimizer(net, config.train, lr=adversarial.lr, betas=adversarial.betas)
    return Opponent(adversarial, net, optimizer, *accelerator.prepare(net, optimizer))


def with_terms(metrics: dict[str, Tensor], terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """All metrics of a step; `loss` is what the autoencoder minimised."""
    loss = metrics["loss"] + terms.get("perceptual", 0)
    if "adversarial" in terms:
        loss = loss + terms["adversarial_weight"] * terms["adversarial"]
    return metrics | {"loss": loss} | terms


@torch.no_grad()
def initialize_codebook(
    autoencoder: Autoencoder, split: ImageSplit, batches: Batches, accelerator: Accelerator
) -> None:
    """Starts a codebook from the first training images, the same ones in every process."""
    quantizer = autoencoder.bottleneck
    if not quantizer.starts_from_data:
        return
    cells = autoencoder.grid[0] * autoencoder.grid[1]
    vectors = max(
        quantizer.codebook_size,
        min(VECTORS_PER_CODE * quantizer.codebook_size, MAX_DISTANCES // quantizer.codebook_size),
    )
    wanted = min(len(split), 4096, -(-vectors // cells))
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed_for(batches.seed, "codebook")))
    encoded = [
        autoencoder.run_encoder(to_float(split.read(rows).to(accelerator.device)))
        for rows in order[:wanted].split(batches.batch_size)
    ]
    quantizer.initialize(torch.cat(encoded), torch.Generator().manual_seed(seed_for(batches.seed, "k-means")))
    for tensor in quantizer.state_dict().values():  # on a GPU sums may differ in the last bit between processes
        tensor.copy_(broadcast(tensor))


def command(
    config: Annotated[Path, typer.Argument(help="A file of configs/tokenizer/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as train.lr=1e-4; paths and words as they stand.")
    ] = None,
    weights_dir: Annotated[
        Path | None, typer.Option(help="Where LPIPS's vgg16-397923af.pth lies; torch's cache by default.")
    ] = None,
    dry_run: DryRunOption = False,
    time_limit: TimeLimitOption = None,
    json_file: JsonOption = None,
) -> None:
    """Train a tokenizer (or AE, VAE ...) from a config. The same command resumes."""
    check_json(dry_run, json_file)
    with going_on_later():
        run = train(load_config(TokenizerConfig, config, overrides, print_once), weights_dir, dry_run, time_limit)
    finish_dry_run(run, json_file)


if __name__ == "__main__":
    run_command(command)
