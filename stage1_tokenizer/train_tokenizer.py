"""Trains a tokenizer, or one of the baselines that it grew out of.

accelerate launch -m stage1_tokenizer.train_tokenizer configs/tokenizer/vqvae_cifar10.yaml [key=value ...]
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from accelerate import Accelerator
from accelerate.utils import broadcast
from PIL import Image
from torch import Tensor

from core.command import run_command
from core.config import RunConfig, Section, load_config
from core.data import DataConfig, ImageData, ImageSplit, load_images
from core.ema import averaged_copy
from core.images import to_float, to_uint8
from core.pictures import contact_sheet, save_picture
from core.random import BatchRandom, seed_for
from core.training import Batches, TrainConfig, TrainingRun, make_optimizer
from stage1_tokenizer.autoencoder import Autoencoder, AutoencoderConfig, ModelConfig
from stage1_tokenizer.losses import LossConfig
from stage1_tokenizer.metrics import psnr
from stage1_tokenizer.vector_quantizer import VectorQuantizer

__all__ = ["TokenizerConfig", "autoencoder_config", "train"]

NUM_PICTURED = 12
VECTORS_PER_CODE = 32  # what k-means starts the codebook from


class TokenizerConfig(Section):
    """A file of `configs/tokenizer/`."""

    run: RunConfig
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig


def autoencoder_config(config: TokenizerConfig) -> AutoencoderConfig:
    """What of a training's configuration the trained model keeps."""
    return AutoencoderConfig(
        image_size=config.data.size, channels=config.data.channels, model=config.model, loss=config.loss
    )


def train(config: TokenizerConfig) -> None:
    """Trains into ``config.run.dir``, going on from its last checkpoint where there is one."""
    run = TrainingRun(config)
    config, accelerator = run.config, run.accelerator

    # 1. The images.
    data = load_images(config.data)
    for line in [data.description, *data.notices]:
        run.say(line)
    split = data.splits["train"]
    batches = Batches(len(split), config.train, run.seed, accelerator, "images")

    # 2. The model, its average, its optimizer.
    autoencoder = Autoencoder(autoencoder_config(config)).to(accelerator.device)
    averaged = averaged_copy(autoencoder, config.train.ema_decay) if config.train.ema_decay else None
    optimizer = make_optimizer(autoencoder, config.train)
    model, prepared_optimizer = accelerator.prepare(autoencoder, optimizer)
    modules = {"model": autoencoder} | ({"ema": averaged} if averaged else {})
    final = averaged.module if averaged else autoencoder  # what validation measures and inference loads
    assert isinstance(final, Autoencoder)
    parameters = sum(p.numel() for p in autoencoder.parameters())
    run.say(
        f"{parameters:,} parameters, latent grid {autoencoder.grid[0]}x{autoencoder.grid[1]}, "
        f"{batches.steps_per_epoch} steps an epoch, {batches.max_steps} in all"
    )
    if not run.restore(batches, modules, {"optimizer": (autoencoder, optimizer)}):
        initialize_codebook(autoencoder, split, batches, accelerator)

    def read(rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return split.read(rows), split.read_labels(rows)

    # 3. The training.
    for batch in run.steps(read, read_ahead=not split.in_memory):
        model.train()
        for (pixels, labels), random in batch:
            images = to_float(pixels.to(accelerator.device, non_blocking=True))
            labels = None if labels is None else labels.to(accelerator.device, non_blocking=True)
            if config.data.horizontal_flip:
                images = flip_half(images, random)
            with accelerator.accumulate(model):
                output = model(images, labels, random)
                accelerator.backward(output.loss)
                if accelerator.sync_gradients and config.train.max_grad_norm:
                    accelerator.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
                prepared_optimizer.step()
                prepared_optimizer.zero_grad()
            run.record(output.metrics)
        if isinstance(autoencoder.bottleneck, VectorQuantizer):
            autoencoder.bottleneck.update_codebook(lambda statistics: accelerator.reduce(statistics, "sum"))  # type: ignore[arg-type,return-value]
        if averaged:
            averaged.update_parameters(autoencoder)
        run.advance()

        # 4. Once in a while: measure, picture, save.
        if run.due("validate"):
            run.log_validation(validate(final, data.validation, config.train.batch_size, run.seed, accelerator))
            if accelerator.is_main_process:
                path = run.folder.samples / f"step_{run.step:08d}.png"
                save_picture(picture(final, data, run.seed), path)
        if run.due("checkpoint"):
            if accelerator.is_main_process:
                final.save_pretrained(run.folder.model)
            run.save(title=f"{run.folder.path.name}: {config.model.bottleneck.type} autoencoder")
    run.say(f"model: {run.folder.model}; pictures: {run.folder.samples}; curves: {run.folder.path / 'losses.png'}")


def flip_half(images: Tensor, random: BatchRandom) -> Tensor:
    """Mirrors each image (B, C, H, W) with probability 1/2."""
    mirrored = random.uniform("horizontal flip", (1, 1, 1), images.device) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


@torch.no_grad()
def initialize_codebook(
    autoencoder: Autoencoder, split: ImageSplit, batches: Batches, accelerator: Accelerator
) -> None:
    """Starts a codebook from the first training images, the same ones in every process."""
    quantizer = autoencoder.bottleneck
    if not isinstance(quantizer, VectorQuantizer):
        return
    cells = autoencoder.grid[0] * autoencoder.grid[1]
    wanted = min(len(split), 4096, -(-VECTORS_PER_CODE * quantizer.config.codebook_size // cells))
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed_for(batches.seed, "codebook")))
    encoded = [
        autoencoder.encoder(to_float(split.read(rows).to(accelerator.device)))
        for rows in order[:wanted].split(batches.batch_size)
    ]
    quantizer.initialize(torch.cat(encoded), torch.Generator().manual_seed(seed_for(batches.seed, "k-means")))
    for tensor in quantizer.state_dict().values():  # on a GPU sums may differ in the last bit between processes
        tensor.copy_(broadcast(tensor))


@torch.no_grad()
def validate(
    model: Autoencoder, split: ImageSplit, batch_size: int, seed: int, accelerator: Accelerator
) -> dict[str, float]:
    """The mean metrics over a split, the batches shared by the processes; PSNR in dB of 8-bit images; for codes the
    share of the codebook in use and its perplexity, over the whole split."""
    model.eval()
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(model.codebook_size or 1, device=accelerator.device)
    parts = list(torch.arange(len(split)).split(batch_size))
    for number in range(accelerator.process_index, len(parts), accelerator.num_processes):
        rows = parts[number]
        pixels = split.read(rows).to(accelerator.device)
        labels = split.read_labels(rows)
        random = BatchRandom(seed_for(seed, "validation", number), slice(0, len(rows)), len(rows))
        output = model(to_float(pixels), None if labels is None else labels.to(accelerator.device), random)
        ratios = psnr(to_uint8(model.to_images(output.decoded)), pixels)
        values = {name: value * len(rows) for name, value in output.metrics.items() if name != "perplexity"}
        for name, value in (values | {"psnr": ratios.sum()}).items():
            sums[name] = sums.get(name, torch.zeros((), device=accelerator.device)) + value
        if output.bottleneck.indices is not None:
            counts += torch.bincount(output.bottleneck.indices.flatten(), minlength=len(counts))
    # A process without a batch of its own still takes part in the sums: the names are the same everywhere.
    names = _metric_names(model)
    totals = torch.stack([sums.get(name, torch.zeros((), device=accelerator.device)) for name in names])
    totals = accelerator.reduce(totals, "sum") / len(split)  # type: ignore[operator]
    metrics = dict(zip(names, totals.tolist(), strict=True))
    if model.codebook_size:
        counts = accelerator.reduce(counts, "sum")
        assert isinstance(counts, Tensor)
        metrics["codebook_usage"] = (counts > 0).float().mean().item()
        metrics["perplexity"] = torch.special.entr(counts / counts.sum()).sum().exp().item()
    return metrics


def _metric_names(model: Autoencoder) -> list[str]:
    if model.variational:
        return ["loss", "nats_per_image", "bits_per_dim", "reconstruction", "kl", "psnr"]
    names = ["loss", "reconstruction"]
    if isinstance(model.bottleneck, VectorQuantizer):
        names += ["commitment", "codebook"] if model.bottleneck.config.codebook == "learned" else ["commitment"]
    return [*names, "psnr"]


def picture(model: Autoencoder, data: ImageData, seed: int) -> Image.Image:
    """The same held-out images each time, originals over reconstructions; samples under them, where it has any."""
    model.eval()
    rows = torch.arange(min(NUM_PICTURED, len(data.validation)))
    pixels = data.validation.read(rows)
    device = next(model.parameters()).device
    parts = [pixels, to_uint8(model.reconstruct(to_float(pixels.to(device)))).cpu()]
    titles = ["original", "reconstruction"]
    if model.variational:
        generator = torch.Generator(device).manual_seed(seed_for(seed, "samples"))
        parts.append(to_uint8(model.sample(len(rows), generator)).cpu())
        titles.append("sample")
    return contact_sheet(torch.cat(parts), columns=len(rows), row_titles=titles)


def command(
    config: Annotated[Path, typer.Argument(help="A file of configs/tokenizer/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as train.lr=1e-4.")] = None,
) -> None:
    """Train a tokenizer (or AE, VAE ...) from a config. The same command resumes."""
    train(load_config(TokenizerConfig, config, overrides))


if __name__ == "__main__":
    run_command(command)
