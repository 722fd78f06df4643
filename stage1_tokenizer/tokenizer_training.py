"""The training of tokenizers and other autoencoders; `train_tokenizer` is its command."""

import math
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from pydantic import Field, model_validator
from torch import Tensor

from stage1_tokenizer.augmentation import crop, flip_half
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.autoencoder_config import AutoencoderConfig, ModelConfig, PerceptualNetwork
from stage1_tokenizer.diagnosis import Diagnosis
from stage1_tokenizer.losses.discriminator import Discriminator, discriminator_loss, r1_penalty
from stage1_tokenizer.losses.latent_term import LatentTerms, latent_gradient
from stage1_tokenizer.losses.perceptual import FeaturePerceptualConfig
from stage1_tokenizer.sample_sheets import draw_images
from stage1_tokenizer.training_losses import ImageLosses, LossConfig
from stage1_tokenizer.validation import validate
from twostage.core.conditions.condition import ConditionSource
from twostage.core.conditions.map_condition import MapConditionConfig
from twostage.core.config.sections import (
    PathName,
    Plugins,
    RunConfig,
    Section,
    describe_differences,
    parse_config,
)
from twostage.core.data.captions import sided_captions
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images, load_larger
from twostage.core.data.image_data import ImageData, ImageSplit
from twostage.core.errors import InputError
from twostage.core.files import expand_home
from twostage.core.images.conversion import to_float
from twostage.core.machine.memory import check_model
from twostage.core.runs.contents import Contents, weights_at
from twostage.core.runs.model_folder import fill, load_model_folder
from twostage.core.training.base_run import BaseRun
from twostage.core.training.batches import Batches
from twostage.core.training.dry_run import DryRun
from twostage.core.training.optimizer import TrainedNetwork
from twostage.core.training.random import seed_for
from twostage.core.training.train_config import TrainConfig
from twostage.core.training.training_run import TrainingRun

__all__ = [
    "TokenizerConfig",
    "TokenizerTrainConfig",
    "autoencoder_config",
    "train",
]

VECTORS_PER_CODE = 32
"""Encoded vectors per code from which k-means starts the codebook."""
LATENT_TERMS_LR = 1e-3
"""The learning rate of the networks of `loss.latents`, which AdamW trains whatever trains the autoencoder."""
MAX_DISTANCES = 1 << 30
"""Distances that one round of k-means may compute."""


class TokenizerTrainConfig(TrainConfig):
    """The `train` group of tokenizers."""

    parts: Literal["all", "decoder"] = "all"
    """The parts to train. `decoder` keeps the encoder and the codebook of `init_from`, so that its codes and the
    priors trained on them stay valid."""


class TokenizerConfig(Section):
    """A file of `configs/tokenizer/`."""

    run: RunConfig
    plugins: Plugins = Field(default=[])
    """Modules with quantizers, backbones or loss terms of your own, such as `[my_module]` for a my_module.py beside
    this file or in the current folder (docs/extending.md)."""
    init_from: PathName | None = None
    """A trained model to start from: a run, or a model folder, for example from `twostage import`. If the config has no
    `model` group, this model's group is used."""
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
    def _needs_init_from(self) -> "TokenizerConfig":
        if self.train.parts == "decoder" and self.init_from is None:
            raise ValueError("train.parts 'decoder': needs a trained encoder; set init_from=RUN")
        return self

    @property
    def fully_connected(self) -> bool:
        """Whether the network consists of fully connected layers, see `BackboneConfig`."""
        return self.model.backbone.fully_connected


def autoencoder_config(config: TokenizerConfig, data: ImageData) -> AutoencoderConfig:
    """The trained model's config, from the run's configuration and the data."""
    return AutoencoderConfig(
        image_size=config.data.size,
        channels=config.data.channels,
        bits=data.validation.bits,
        shown_channels=config.data.shown_channels,
        class_names=data.class_names,
        untrained_classes=tuple(data.untrained_classes),
        value_range=config.data.value_range,
        model=learned_model(config, data),
        loss=config.loss.objective(),
        adversarial=config.loss.adversarial is not None,
    )


def learned_model(config: TokenizerConfig, data: ImageData) -> ModelConfig:
    """The `model` group with what its condition learns from the data, such as a vocabulary.

    Raises:
        InputError: the data lacks the condition, or training changes images in ways that their maps do not follow.
    """
    condition = config.model.condition
    if condition is None or condition.type == "class":
        return config.model
    if condition.type == "map" and (config.data.horizontal_flip or config.data.random_crop):
        name = "horizontal_flip" if config.data.horizontal_flip else "random_crop"
        raise InputError(
            f"data.{name} {getattr(config.data, name)}: changes images but not their maps, which this model sees "
            f"(model.condition 'map'). Remove data.{name}"
        )
    return config.model.model_copy(update={"condition": condition.learned_from(images_as_source(data))})


def condition_notices(model: AutoencoderConfig, config: DataConfig, data: ImageData) -> list[str]:
    """What to know about the model's condition in the data: one sentence each."""
    found = [notice for condition in model.conditions for notice in condition.notices(images_as_source(data))]
    mirrors = config.horizontal_flip and any(condition.type == "text" for condition in model.conditions)
    if mirrors and (notice := sided_captions(data.splits["train"].captions or [])):
        found.append(f"{notice}; to avoid that, set data.horizontal_flip=false")
    return found


def images_as_source(data: ImageData) -> ConditionSource:
    """What conditions learn from."""
    train = data.splits["train"]
    name = f"data.source {train.config.source}"
    return ConditionSource(
        name, data.splits, data.validation, len(train), train.config.size, data.class_names, map_names=data.map_names
    )


def train(
    config: TokenizerConfig, weights_dir: Path | None = None, dry_run: bool = False, time_limit: float | None = None
) -> BaseRun[TokenizerConfig]:
    """Trains into ``config.run.dir``, or resumes from its latest checkpoint.

    Args:
        weights_dir: the folder of LPIPS's VGG weights; None: torch's cache.
        dry_run: measure a few steps and write nothing.
        time_limit: minutes after which the run saves and stops; None: no limit.

    Returns:
        The finished run.

    Raises:
        StopAsked: the run was asked to stop, and has saved.
    """
    run = DryRun(config) if dry_run else TrainingRun(config, time_limit=time_limit)
    config, accelerator = run.config, run.accelerator

    # 1. The images.
    data = load_images(config.data)
    split = data.splits["train"]
    larger = split if config.data.random_crop is None else larger_images(data, config.data.random_crop)
    run.report(data.description, *data.notices)
    batches = Batches(len(split), config.train, run.seed, accelerator, "images (data.num_images)")

    # 2. The autoencoder, its average, its discriminator, and their optimizers.
    autoencoder = make_autoencoder(config, data, accelerator)
    network = TrainedNetwork(autoencoder, config.train, accelerator, ema_decay=config.train.ema_decay)
    discriminator = make_discriminator(config, accelerator) if config.loss.adversarial else None
    latent_terms = make_latent_terms(config, autoencoder, accelerator) if config.loss.latents else None
    networks = [network, *filter(None, (discriminator, latent_terms))]
    image_losses = ImageLosses(
        config.loss, autoencoder, discriminator and discriminator.module, weights_dir, accelerator
    )
    run.report(f"latent grid {autoencoder.grid[0]}x{autoencoder.grid[1]}", *image_losses.notices())
    run.report(*condition_notices(autoencoder.config, config.data, data))

    # 3. The weights: those of the latest checkpoint, or new ones.
    sources = {"data.source": data.contents("text" in autoencoder.conditions), **other_sources(config)}
    run.attach(batches, networks, sources, split.names)
    if isinstance(run, TrainingRun) and (checkpoint := run.latest_checkpoint()):
        run.load(checkpoint, shares=settings_in_shares(config))
    else:
        if config.init_from:
            earlier = start_from(autoencoder, config.init_from, config.train.parts)
            run.facts["trained_against"] = [perceptual.model_dump() for perceptual in earlier]
        else:
            initialize_codebook(autoencoder, split, batches, accelerator)
        network.restart_average()
    trained_against = [PerceptualNetwork(**perceptual) for perceptual in run.facts.get("trained_against", [])]
    trained_against += [perceptual for perceptual in image_losses.networks() if perceptual not in trained_against]
    final = network.final
    final.config = final.config.model_copy(update={"trained_against": trained_against})
    diagnosis = Diagnosis(config.model.bottleneck.collapse_remedy, run.facts, run.report)

    def read(rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return larger.read(rows), autoencoder.read_given(split, rows)

    # 4. The training.
    for batch in run.steps(read, read_ahead=not larger.in_memory):
        network.wrapped.train()
        autoencoder.bottleneck.progress = run.progress
        if config.train.parts == "decoder":
            autoencoder.bottleneck.eval()
        adversary = discriminator if discriminator and run.progress >= discriminator.module.config.start else None
        for (pixels, given), random in batch:
            images = to_float(pixels.to(accelerator.device, non_blocking=True))
            given = None if given is None else given.to(accelerator.device, non_blocking=True)
            if config.data.random_crop:
                images = crop(images, config.data.size, config.data.random_crop, random)
            if config.data.horizontal_flip:
                images = flip_half(images, random)
            with accelerator.accumulate(*[each.wrapped for each in networks]):  # once for both: it counts
                output = network.wrapped(images, given, random, config.loss.perturbation, config.loss.equivariance)
                gradient, terms = image_losses.pixel_gradient(output, output.target, run.progress, random)
                loss = output.loss if gradient is None else output.loss + (output.decoded * gradient).sum()
                if latent_terms:
                    pull, own_loss, found = latent_gradient(latent_terms, output.encoded, images, run.progress)
                    loss, terms = loss + (output.encoded * pull).sum(), terms | found
                    run.update(latent_terms, own_loss)
                run.update(network, loss)
                if adversary:
                    fake = autoencoder.to_pixels(output.decoded.detach())
                    loss, logits = adversary_loss(adversary, output.target, fake)
                    run.update(adversary, loss)
                    terms |= adversary.module.observe(loss, *logits)
            run.record(output.metrics | terms)
        if config.train.parts == "all":
            autoencoder.update_codebook(run.sum)
        if adversary:
            adversary.module.update_statistics(run.sum)
        network.update_average()
        if metrics := run.advance():
            diagnosis.observe(run.step, metrics)
        if isinstance(run, DryRun):
            continue  # it measures the lines above, and neither validates nor saves

        # 5. From time to time: validate, draw, save.
        if run.due("validate"):
            metrics = validate(final, data.validation, config.train.batch_size, run.seed, accelerator)
            run.log_validation(metrics)
            if "active_share" in metrics:
                diagnosis.observe(run.step, {"active_share": metrics["active_share"]})
            if accelerator.is_main_process:
                for name, image in draw_images(final, data, run.seed).items():
                    run.show_image(image, name or "reconstructions", name)
        if run.due("checkpoint"):
            # The held-out loss has only the model's own terms, so a metric of both splits is drawn.
            curve = "reconstruction" if config.loss.perceptual or config.loss.terms or discriminator else "loss"
            title = f"{run.folder.path.name}: {config.model.bottleneck.type} autoencoder"
            run.save(title, curve=curve, write_model=final.save_pretrained)
    if isinstance(run, DryRun):
        run.end(num_held_out=len(data.validation))
    else:
        run.report(f"samples: {run.folder.samples}; {run.folder.results}")
    return run


def settings_in_shares(config: TokenizerConfig) -> str:
    """The settings, if any, that count in shares of the planned steps."""
    settings = {
        config.model.bottleneck.scheduled: True,
        "loss.adversarial.start and ramp": config.loss.adversarial is not None,
        "loss.latents ramp": any(term.ramp for term in config.loss.latents),
    }
    return ", ".join(name for name, used in settings.items() if name and used)


def larger_images(data: ImageData, min_share: float) -> ImageSplit:
    """The training images at the size from which `data.random_crop` cuts its windows."""
    height, width = (math.ceil(side / min_share) for side in data.splits["train"].config.size)
    return load_larger(data, (height, width))


def make_autoencoder(config: TokenizerConfig, data: ImageData, accelerator: Accelerator) -> Autoencoder:
    """The untrained autoencoder, with the parts frozen that are not trained.

    Raises:
        InputError: it does not fit into memory.
    """
    form = autoencoder_config(config, data)
    check_model(lambda: Autoencoder(form), config.model.model_dump(), "model", accelerator.device)
    autoencoder = Autoencoder(form).to(accelerator.device)
    if config.loss.perturbation:
        config.loss.perturbation.check(autoencoder.bottleneck, config.model.bottleneck.type)
    if config.loss.equivariance:
        bottleneck, sees_map = autoencoder.bottleneck, isinstance(config.model.condition, MapConditionConfig)
        fixed_grid = bool(bottleneck.num_classes or bottleneck.scales)
        config.loss.equivariance.check(config.data.size, autoencoder.grid, autoencoder.factor, fixed_grid, sees_map)
    if config.train.parts == "decoder":
        autoencoder.encoder.requires_grad_(False)
        autoencoder.bottleneck.requires_grad_(False)
    return autoencoder


def other_sources(config: TokenizerConfig) -> dict[str, Contents]:
    """The content behind each path in a configuration except `data.source`."""
    sources = {}
    if config.init_from and Path(config.init_from).exists():  # a resumed run no longer needs it
        sources["init_from"] = weights_at(config.init_from, only_to_begin=True)
    if isinstance(config.loss.perceptual, FeaturePerceptualConfig):
        sources["loss.perceptual.path"] = weights_at(config.loss.perceptual.path)
    return sources


def open_source(source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the weights at `init_from`."""
    try:
        return load_model_folder(source, "tokenizer")
    except InputError as error:
        raise InputError(f"init_from: {error}") from None


def start_from(autoencoder: Autoencoder, source: str, parts: Literal["all", "decoder"]) -> list[PerceptualNetwork]:
    """Loads a trained model's weights into a new autoencoder; returns the perceptual networks that it was trained with.

    Raises:
        InputError: a different architecture; lists the differences.
    """
    document, state = open_source(source)
    document.pop("hash", None)
    earlier = parse_config(AutoencoderConfig, document, f"init_from {source}: config.json")
    compared = ["model"]
    compared += ["image_size", "channels"] if parts == "decoder" else []  # codes belong to images of one form
    compared += ["class_names"] if autoencoder.class_conditional else []
    own = autoencoder.config
    source_form, own_form = (config.model_dump(mode="json", include={*compared}) for config in (earlier, own))
    if differences := describe_differences(source_form, own_form):
        raise InputError(
            f"init_from {source}: is a different model:\n  "
            + "\n  ".join(differences)
            + "\nSet the same values, or choose another init_from="
        )
    fill(autoencoder, state, f"init_from {source}")
    return earlier.trained_against


def make_discriminator(config: TokenizerConfig, accelerator: Accelerator) -> TrainedNetwork[Discriminator]:
    """The discriminator of ``loss.adversarial``.

    Raises:
        InputError: batch statistics that torch cannot share between processes on a CPU, or no memory for it.
    """
    adversarial = config.loss.adversarial
    assert adversarial is not None
    if adversarial.norm == "sync_batch" and accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        raise InputError(
            "loss.adversarial.norm 'sync_batch': torch only shares batch statistics between GPUs, and this run has "
            f"{accelerator.num_processes} processes on the CPU. Set loss.adversarial.norm=group"
        )

    size = config.data.size
    size = config.loss.equivariance.smallest(size) if config.loss.equivariance else size

    def build() -> Discriminator:
        return Discriminator(adversarial, config.data.channels, size)

    check_model(build, adversarial.model_dump(), "loss.adversarial", accelerator.device)
    return TrainedNetwork(
        build().to(accelerator.device),
        config.train,
        accelerator,
        name="discriminator",
        muon=False,
        lr=adversarial.lr,
        betas=adversarial.betas,
    )


def make_latent_terms(
    config: TokenizerConfig, autoencoder: Autoencoder, accelerator: Accelerator
) -> TrainedNetwork[LatentTerms]:
    """The networks of ``loss.latents``.

    Raises:
        InputError: the encoder is not trained, or a term does not take its output.
    """
    if config.train.parts == "decoder":
        raise InputError(
            "loss.latents: its terms train the encoder, and train.parts is 'decoder'. Set loss.latents=[] or "
            "train.parts=all"
        )
    encoded = (autoencoder.bottleneck.encoded_channels, *autoencoder.grid)
    terms = LatentTerms(config.loss.latents, encoded, (config.data.channels, *config.data.size))
    return TrainedNetwork(
        terms.to(accelerator.device), config.train, accelerator, name="latent_terms", muon=False, lr=LATENT_TERMS_LR
    )


def adversary_loss(
    adversary: TrainedNetwork[Discriminator], images: Tensor, fake: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The discriminator's loss for real and fake images (B, C, H, W), and the logits of both."""
    config = adversary.module.config
    real = images.requires_grad_(config.r1_weight > 0)
    logits_real, logits_fake = adversary.wrapped(real, fake)
    loss = discriminator_loss(logits_real, logits_fake, config, adversary.module.ema_logits)
    if config.r1_weight:
        loss = loss + config.r1_weight * r1_penalty(logits_real, real)
    return loss, (logits_real, logits_fake)


@torch.no_grad()
def initialize_codebook(
    autoencoder: Autoencoder, split: ImageSplit, batches: Batches, accelerator: Accelerator
) -> None:
    """Starts a codebook from randomly chosen training images, the same in every process."""
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
    for tensor in quantizer.state_dict().values():  # sums on GPUs may differ in the last bit between processes
        tensor.copy_(broadcast(tensor))
