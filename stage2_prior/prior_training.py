"""The training of priors over a tokenizer's codes; `train_prior` is its command."""

import math
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from stage2_prior.codes import CodeCache, CodeSplit, Manifest
from stage2_prior.networks.autoregressive import images_at_once
from stage2_prior.networks.causal_transformer import CausalTransformerConfig
from stage2_prior.networks.network import NetworkConfig
from stage2_prior.networks.transformer import TransformerConfig
from stage2_prior.prior import Prior, PriorLossConfig, ReplaceSchedule, prior_config
from stage2_prior.sample_sheets import Decoder, draw_samples
from stage2_prior.start_from import network_of, start_from
from twostage.core.conditions.condition import ConditionConfig
from twostage.core.config.sections import MAY_CHANGE, Count, PathName, Plugins, RunConfig, Section
from twostage.core.errors import InputError
from twostage.core.files import expand_home
from twostage.core.machine.memory import check_model
from twostage.core.machine.sharding import full_tensors
from twostage.core.runs.contents import Contents, weights_at
from twostage.core.scales import describe_grids
from twostage.core.training.base_run import BaseRun
from twostage.core.training.batches import Batches
from twostage.core.training.dry_run import DryRun
from twostage.core.training.optimizer import TrainedNetwork
from twostage.core.training.random import BatchRandom, seed_for
from twostage.core.training.train_config import TrainConfig
from twostage.core.training.training_run import TrainingRun

__all__ = ["PriorTrainConfig", "PriorTrainingConfig", "train"]

MIN_ENTROPY = 0.05
"""Nats per code; below this, all images look the same to the tokenizer."""
OVERFITTING_PATIENCE = 2
"""Validations without improvement that count as overfitting; a single one may be chance."""


class PriorTrainConfig(TrainConfig):
    """The `train` group of priors."""

    patience: Annotated[Count | None, MAY_CHANGE] = None
    """Validations without improvement of the held-out loss after which training stops; None: never."""

    def reason_to_end(self, step: int, max_steps: int, facts: dict[str, Any]) -> str | None:
        """Why a run ends after ``step`` updates, out of patience too; None: it continues."""
        if self.patience is not None and facts.get("validations_since_best", 0) >= self.patience:
            return f"the held-out loss has not improved since step {facts['best_step']}"
        return super().reason_to_end(step, max_steps, facts)


class PriorTrainingConfig(Section):
    """A file of `configs/prior/`."""

    run: RunConfig
    plugins: Plugins = Field(default=[])
    """Modules with priors or conditions of your own, such as `[my_module]` for a my_module.py beside this file or in
    the current folder (docs/extending.md)."""
    codes: PathName
    """The folder that `twostage encode` wrote."""
    init_from: PathName | None = None
    """A trained prior over the same tokenizer's codes to start from: a run or a model folder. If the config has no
    `model` group, this prior's group is used. New classes and words get new rows."""
    model: NetworkConfig = CausalTransformerConfig()
    condition: list[ConditionConfig] | None = None
    """What the codes are predicted from besides each other: `{type: class}`, `{type: text}`, `{type: map}` or
    `{type: vector}`, a list of several, or `{type: none}`. null: the class, if the codes have classes."""
    loss: PriorLossConfig = PriorLossConfig()
    train: PriorTrainConfig

    @model_validator(mode="before")
    @classmethod
    def _model_of_init_from(cls, document: Any) -> Any:
        if isinstance(document, dict) and isinstance(document.get("init_from"), str) and "model" not in document:
            return document | {"model": network_of(expand_home(document["init_from"]))}
        return document

    @field_validator("condition", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        groups = value if isinstance(value, list) or value is None else [value]
        groups = groups and [{"type": each} if isinstance(each, str) else each for each in groups]
        return [] if groups == [{"type": "none"}] else groups

    @field_validator("condition")
    @classmethod
    def _each_once(cls, value: list[ConditionConfig] | None) -> list[ConditionConfig] | None:
        types = [condition.type for condition in value or []]
        if len(set(types)) < len(types):
            raise ValueError(f"got the types {', '.join(types)}, expected each at most once. Remove one")
        return value

    @model_validator(mode="after")
    def _activations_fit(self) -> "PriorTrainingConfig":
        if (
            isinstance(self.model, TransformerConfig)
            and self.model.mlp == "squared_relu"
            and self.train.mixed_precision == "fp16"
        ):
            raise ValueError(
                "train.mixed_precision 'fp16': model.mlp 'squared_relu' squares activations, and the square of "
                "256 or more is infinite in float16. Set train.mixed_precision=bf16 or model.mlp=gelu"
            )
        return self


def train(
    config: PriorTrainingConfig,
    dry_run: bool = False,
    time_limit: float | None = None,
    decode: Decoder | None = None,
) -> BaseRun[PriorTrainingConfig]:
    """Trains into ``config.run.dir``, or resumes from its latest checkpoint; returns the finished run.

    `model/` holds the weights with the best held-out loss, not the last ones. The held-out `loss` is the negative log
    likelihood in nats per code. For a masked transformer it is an upper bound on that, and differs from the training
    loss, which only counts masked codes.

    Args:
        dry_run: measure a few steps and write nothing.
        time_limit: minutes after which the run saves and stops; None: no limit.
        decode: turns codes into images, for a sample sheet at each validation; None: no samples.

    Raises:
        StopAsked: the run was asked to stop, and has saved.
    """
    cache = CodeCache(config.codes)
    check_entropy(cache.manifest, config.codes)
    cache.check_codes()
    shardable = config.model.shardable
    run = DryRun(config, shardable) if dry_run else TrainingRun(config, shardable, time_limit)
    config, accelerator = run.config, run.accelerator

    # 1. The codes.
    split, baseline = cache.splits["train"], describe_codes(cache, run)
    batches = Batches(len(split), config.train, run.seed, accelerator, "code grids")

    # 2. The prior, its average, its optimizer.
    if run.units_to_shard:
        run.report(f"FSDP: the weights are sharded over {accelerator.num_processes} processes")
    network = TrainedNetwork(
        make_prior(config, cache, run),
        config.train,
        accelerator,
        ema_decay=config.train.ema_decay,
        units_to_shard=run.units_to_shard,
        sharded_methods=["nats_per_image"],
    )
    final = network.final
    for condition in final.config.conditions:
        run.report(*condition.notices(cache.condition_source()))
    run.attach(batches, [network], sources_of(config, cache))
    if isinstance(run, TrainingRun) and (checkpoint := run.latest_checkpoint()):
        shares = "loss.replace_prob" if isinstance(config.loss.replace_prob, ReplaceSchedule) else ""
        run.load(checkpoint, config.model.per_process_setting(), shares)
    else:
        if config.init_from:
            run.report(start_from(network.module, config.init_from))
            network.restart_average()
        run.facts |= {"best_loss": math.inf, "best_step": 0, "validations_since_best": 0}

    # 3. The training.
    conditions = final.conditions
    for batch in run.steps(lambda rows: (split.read(rows), conditions.read(split, rows)), read_ahead=False):
        network.wrapped.train()
        for (indices, given), random in batch:
            indices = indices.to(accelerator.device, non_blocking=True)
            with accelerator.accumulate(network.wrapped):
                loss = network.wrapped(indices, given, random, run.progress)
                run.update(network, loss)
            run.record({"loss": loss})
        network.update_average()
        run.advance()
        if isinstance(run, DryRun):
            continue  # it measures the lines above, and neither validates nor saves

        # 4. From time to time: validate, draw samples, keep the best, stop early, save.
        if run.due("validate"):
            loss = validate(final, cache.validation, config.train.batch_size, accelerator)
            figures = {"loss": loss, "unigram": baseline, "uniform": math.log(cache.manifest.codebook_size)}
            run.log_validation(figures, "held out" if final.exact_likelihood else "held out (loss: an upper bound)")
            show_samples(run, final, decode)
            keep_best(run, final, loss)
        if run.due("checkpoint") or run.finished:
            title = "nats per code" if final.exact_likelihood else "nats per code (held out: upper bound)"
            run.save(f"{run.folder.path.name}: {title}", {"unigram": baseline})
    if isinstance(run, DryRun):
        run.end(num_held_out=len(cache.validation))
    else:
        report_result(run, final, baseline)
        if decode:
            run.report(f"samples: {run.folder.samples}")
    return run


def make_prior(config: PriorTrainingConfig, cache: CodeCache, run: BaseRun[PriorTrainingConfig]) -> Prior:
    """The untrained prior.

    Raises:
        InputError: it does not fit into memory.
    """
    form, device = prior_config(config.model, config.condition, config.loss, cache), run.accelerator.device
    processes = run.accelerator.num_processes if run.units_to_shard else 1
    check_model(lambda: Prior(form), config.model.model_dump(), "model", device, processes)
    return Prior(form).to(device)


def sources_of(config: PriorTrainingConfig, cache: CodeCache) -> dict[str, Contents]:
    """The content behind each path in a configuration."""
    found = {"codes": cache.contents()}
    if config.init_from and Path(config.init_from).exists():  # a resumed run no longer needs it
        found["init_from"] = weights_at(config.init_from, only_to_begin=True)
    return found


def check_entropy(manifest: Manifest, codes: str) -> None:
    """Refuses codes that are nearly all the same."""
    if manifest.entropy_nats_per_code < MIN_ENTROPY:
        raise InputError(
            f"codes {codes}: their entropy is {manifest.entropy_nats_per_code:.3f} nats per code "
            f"({manifest.codes_used} of {manifest.codebook_size} codes are used), so the tokenizer's codebook has "
            "collapsed. Train the tokenizer longer or with a lower train.lr, then encode again"
        )


def describe_codes(cache: CodeCache, run: BaseRun[PriorTrainingConfig]) -> float:
    """Reports what the codes are; returns the held-out unigram baseline in nats per code."""
    manifest = cache.manifest
    baseline = manifest.unigram_nats_per_code[manifest.validation_split]
    rows = ", ".join(f"{files.rows:,} {name}" for name, files in manifest.splits.items())
    run.report(
        f"codes {cache.path}: {rows}; grid {describe_grids(manifest.grid, manifest.scales)}, "
        f"{manifest.codes_used} of {manifest.codebook_size} codes used, tokenizer {manifest.tokenizer.hash[:12]}"
    )
    run.report(
        f"baselines in nats per code, held out: uniform {math.log(manifest.codebook_size):.4f}, unigram {baseline:.4f}"
    )
    if untrained := cache.untrained_classes:
        run.report(
            f"{len(untrained)} of {len(manifest.class_names or [])} classes have no training image, so the prior does "
            f"not learn them: {', '.join(untrained)}"
        )
    return baseline


@torch.no_grad()
def validate(prior: Prior, split: CodeSplit, batch_size: int, accelerator: Accelerator) -> float:
    """Held-out nats per code, or an upper bound of them; the processes share the batches."""
    prior.eval()
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    if prior.exact_likelihood:  # no batch is split further: FSDP needs equally many forward passes in each process
        floats = prior.config.model.floats_per_code(prior.config.codebook_size)
        batch_size = min(batch_size, images_at_once(split.codes[0].size, floats))
    parts = list(torch.arange(len(split)).split(batch_size))
    for first in range(0, len(parts), accelerator.num_processes):
        part = first + accelerator.process_index
        rows = parts[min(part, len(parts) - 1)]
        indices = split.read(rows)
        # A bound draws the same random numbers at every validation, so that validations can be compared.
        random = BatchRandom(seed_for("validation", int(rows[0])), slice(0, len(rows)), len(rows))
        nats = prior.nats_per_image(indices.to(accelerator.device), prior.conditions.read(split, rows), random).sum()
        total += nats if part < len(parts) else 0
    total = accelerator.reduce(total, "sum")
    assert isinstance(total, Tensor)
    return total.item() / split.codes.size


def show_samples(run: TrainingRun[PriorTrainingConfig], prior: Prior, decode: Decoder | None) -> None:
    """The main process draws a sample sheet if it can decode; the others wait in the next step that all share."""
    state = None
    if run.units_to_shard:  # sampling reads whole weights, which all processes gather if the main one can decode
        decodes = decode is not None and run.accelerator.is_main_process
        if run.sum(torch.tensor(float(decodes), device=run.accelerator.device)):
            state = full_tensors(prior.state_dict())
    if decode is None or not run.accelerator.is_main_process:
        return
    if state is not None:
        prior = Prior(prior.config)  # on the CPU, because a GPU may not have the memory for all weights
        prior.load_state_dict(state)
    run.show_image(draw_samples(prior, decode, run.seed), "samples")


def keep_best(run: TrainingRun[PriorTrainingConfig], prior: Prior, loss: float) -> None:
    """Writes `model/` if the held-out loss is the best so far; otherwise warns of overfitting."""
    facts = run.facts
    if loss < facts["best_loss"]:
        run.facts |= {"best_loss": loss, "best_step": run.step, "validations_since_best": 0}
        state = full_tensors(prior.state_dict())
        if run.accelerator.is_main_process:
            prior.save_pretrained(run.folder.model, state)
        return
    facts["validations_since_best"] += 1
    if facts["validations_since_best"] == OVERFITTING_PATIENCE:
        run.report(
            f"overfitting: no improvement in {OVERFITTING_PATIENCE} validations since step {facts['best_step']} "
            f"({held_out_loss(prior)} {facts['best_loss']:.4f} nats per code, now {loss:.4f}). model/ keeps the best "
            "weights. Try a higher model.dropout or loss.replace_prob, codes of cropped and flipped images "
            "(twostage encode --crops 4 --horizontal-flip), or a smaller model"
        )


def held_out_loss(prior: Prior) -> str:
    """The name of the result of :func:`validate` in messages."""
    return "held-out loss" if prior.exact_likelihood else "held-out upper bound"


def report_result(run: TrainingRun[PriorTrainingConfig], prior: Prior, baseline: float) -> None:
    """Reports the best loss, its step, and whether the loss rose again."""
    best, step = run.facts["best_loss"], run.facts["best_step"]
    run.report(
        f"best {held_out_loss(prior)} {best:.4f} nats per code at step {step} (unigram baseline {baseline:.4f}); "
        f"{run.folder.results}"
    )
    if step < run.step:
        run.report(
            f"the {held_out_loss(prior)} did not improve from step {step} to step {run.step}, the last; model/ holds "
            f"the weights of step {step}"
        )
