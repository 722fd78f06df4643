"""Trains a prior over the codes of a tokenizer.

accelerate launch -m stage2_prior.train_prior configs/prior/gpt_cifar10.yaml codes=codes/vqvae_cifar10 [key=value ...]
"""

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor

from core.command import run_command
from core.config import Count, RunConfig, Section, load_config
from core.ema import averaged_copy
from core.errors import InputError
from core.random import BatchRandom
from core.training import Batches, TrainConfig, TrainingRun, make_optimizer
from stage2_prior.causal_transformer import CausalTransformerConfig
from stage2_prior.codes import CodeCache, CodeSplit, Manifest
from stage2_prior.prior import Prior, PriorLossConfig, prior_config

__all__ = ["PriorTrainConfig", "PriorTrainingConfig", "train"]

LEAST_ENTROPY = 0.05  # nats per code; below it the images are all the same to the tokenizer


class PriorTrainConfig(TrainConfig):
    """A training with an end before its last step."""

    patience: Count | None = None
    """Validations without a better held-out loss after which training stops; None: never."""


class PriorTrainingConfig(Section):
    """A file of `configs/prior/`."""

    run: RunConfig
    codes: str = Field(min_length=1)
    """The folder that `twostage encode` wrote."""
    model: CausalTransformerConfig = CausalTransformerConfig()
    loss: PriorLossConfig = PriorLossConfig()
    train: PriorTrainConfig


def train(config: PriorTrainingConfig) -> None:
    """Trains into ``config.run.dir``, going on from its last checkpoint where there is one.

    `model/` holds the weights of the best held-out loss, not the last ones.
    """
    cache = CodeCache(config.codes)
    check_entropy(cache.manifest, config.codes)
    run = TrainingRun(config)
    config, accelerator = run.config, run.accelerator

    # 1. The codes.
    split, baseline = cache.splits["train"], describe_codes(cache, run)
    batches = Batches(len(split), config.train, run.seed, accelerator, "code grids")

    # 2. The model, its average, its optimizer.
    prior = Prior(prior_config(config.model, config.loss, cache.manifest)).to(accelerator.device)
    averaged = averaged_copy(prior, config.train.ema_decay) if config.train.ema_decay else None
    optimizer = make_optimizer(prior, config.train)
    model, prepared_optimizer = accelerator.prepare(prior, optimizer)
    modules = {"model": prior} | ({"ema": averaged} if averaged else {})
    final = averaged.module if averaged else prior  # what validation measures and inference loads
    assert isinstance(final, Prior)
    parameters = sum(p.numel() for p in prior.parameters())
    run.say(f"{parameters:,} parameters, {batches.steps_per_epoch} steps an epoch, {batches.max_steps} in all")
    if not run.restore(batches, modules, {"optimizer": (prior, optimizer)}):
        run.facts = {
            "best_loss": math.inf,
            "best_step": 0,
            "validations_since_best": 0,
            "tokenizer_hash": cache.manifest.tokenizer.hash,
        }
    elif run.facts["tokenizer_hash"] != cache.manifest.tokenizer.hash:
        raise InputError(
            f"codes {config.codes}: made by the tokenizer {cache.manifest.tokenizer.hash[:12]}, but the prior in "
            f"{run.folder.path} is trained on codes of {run.facts['tokenizer_hash'][:12]}; choose another run.dir="
        )

    # 3. The training.
    for batch in run.steps(split.read, read_ahead=False):
        model.train()
        for (indices, labels), random in batch:
            indices = indices.to(accelerator.device, non_blocking=True)
            labels = None if labels is None else labels.to(accelerator.device, non_blocking=True)
            with accelerator.accumulate(model):
                output = model(indices, labels, random)
                accelerator.backward(output.loss)
                if accelerator.sync_gradients and config.train.max_grad_norm:
                    accelerator.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
                prepared_optimizer.step()
                prepared_optimizer.zero_grad()
            run.record(output.metrics)
        if averaged:
            averaged.update_parameters(prior)
        run.advance()

        # 4. Once in a while: measure, keep the best, stop early, save.
        if run.due("validate"):
            loss = validate(final, cache.validation, config.train.batch_size, accelerator)
            run.log_validation({"loss": loss, "unigram": baseline})
            keep_best(run, final, loss)
        if run.due("checkpoint") or run.finished:
            run.save(f"{run.folder.path.name}: nats per code", {"unigram": baseline})
    say_result(run, baseline)


def check_entropy(manifest: Manifest, codes: str) -> None:
    """Refuses codes that are nearly all the same: there is nothing to learn from them."""
    if manifest.entropy_nats_per_code < LEAST_ENTROPY:
        raise InputError(
            f"codes {codes}: their entropy is {manifest.entropy_nats_per_code:.3f} nats per code "
            f"({manifest.codes_used} of {manifest.codebook_size} codes are used): the tokenizer's codebook has "
            "collapsed. Train the tokenizer further, or with a lower train.lr, and encode again"
        )


def describe_codes(cache: CodeCache, run: TrainingRun[PriorTrainingConfig]) -> float:
    """Says what the codes are; returns the held-out unigram baseline in nats per code."""
    manifest = cache.manifest
    baseline = manifest.unigram_nats_per_code[manifest.validation_split]
    rows = ", ".join(f"{files.rows:,} {name}" for name, files in manifest.splits.items())
    run.say(
        f"codes {cache.path}: {rows}; grid {manifest.grid[0]}x{manifest.grid[1]}, {manifest.codes_used} of "
        f"{manifest.codebook_size} codes used, tokenizer {manifest.tokenizer.hash[:12]}"
    )
    run.say(
        f"baselines in nats per code, held out: uniform {math.log(manifest.codebook_size):.4f}, unigram {baseline:.4f}"
    )
    return baseline


@torch.no_grad()
def validate(prior: Prior, split: CodeSplit, batch_size: int, accelerator: Accelerator) -> float:
    """Held-out nats per code, the batches shared by the processes; no code replaced, no class hidden."""
    prior.eval()
    total = torch.zeros((), device=accelerator.device)
    parts = list(torch.arange(len(split)).split(batch_size))
    for rows in parts[accelerator.process_index :: accelerator.num_processes]:
        indices, labels = split.read(rows)
        labels = None if labels is None else labels.to(accelerator.device)
        random = BatchRandom(0, slice(0, len(rows)), len(rows))  # nothing is drawn in evaluation
        total += prior(indices.to(accelerator.device), labels, random).loss * len(rows)
    total = accelerator.reduce(total, "sum")
    assert isinstance(total, Tensor)
    return total.item() / len(split)


def keep_best(run: TrainingRun[PriorTrainingConfig], prior: Prior, loss: float) -> None:
    """Writes `model/` where the held-out loss is the best so far; ends the run where it has not been for long."""
    if loss < run.facts["best_loss"]:
        run.facts |= {"best_loss": loss, "best_step": run.step, "validations_since_best": 0}
        if run.accelerator.is_main_process:
            prior.save_pretrained(run.folder.model)
        return
    run.facts["validations_since_best"] += 1
    if run.facts["validations_since_best"] == run.config.train.patience:
        run.finish(f"the held-out loss has not improved since step {run.facts['best_step']}")


def say_result(run: TrainingRun[PriorTrainingConfig], baseline: float) -> None:
    """The last word: the best loss, when it was, and whether the prior went on to overfit."""
    best, step = run.facts["best_loss"], run.facts["best_step"]
    run.say(
        f"best held-out loss {best:.4f} nats per code at step {step} (unigram baseline {baseline:.4f}); "
        f"model: {run.folder.model}; curves: {run.folder.path / 'losses.png'}"
    )
    if step < run.step:
        run.say(
            f"the held-out loss was not better at step {run.step}, the last; model/ holds the weights of step {step}"
        )


def command(
    config: Annotated[Path, typer.Argument(help="A file of configs/prior/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="codes=DIR and further key=value.")] = None,
) -> None:
    """Train a prior over a tokenizer's codes. The same command resumes."""
    train(load_config(PriorTrainingConfig, config, overrides))


if __name__ == "__main__":
    run_command(command)
