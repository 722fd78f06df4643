"""A long soak: one process trains stage one and stage two alternately, with everything that belongs to them. Its
resident memory and its open files must not grow."""

import gc
import shutil
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.reliability.drawn_images import draw_images
from pipelines.drawing.generated_folder import GenerateRequest, generate_folder
from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.encoding.dataset_codes import encode_dataset
from stage1_tokenizer.tokenizer_training import TokenizerConfig
from stage1_tokenizer.tokenizer_training import train as train_tokenizer
from stage2_prior.prior_training import PriorTrainingConfig
from stage2_prior.prior_training import train as train_prior
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.config.sections import parse_config

__all__ = ["soak"]

SAMPLE_SECONDS = 2.0
CONV = {"type": "conv", "channels": 32, "channel_mult": [1, 2], "num_res_blocks": [0, 1]}
TRAIN = {"batch_size": 32, "log_every": 10, "validate_every": 50, "checkpoint_every": 25, "ema_decay": 0.99}
STEPS = 150


def soak(minutes: float, folder: Path) -> dict[str, Any]:
    """Train alternately for this many minutes, below ``folder``.

    Returns:
        The figures: the number of rounds, and for resident memory (MiB) and open files the means of the first and the
        last quarter, with the growth in percent. The first round is not counted, because it loads and allocates
        everything for the first time.
    """
    images = draw_images(folder / "images", 600)
    process, samples, ended = psutil.Process(), [], threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            samples.append((time.monotonic(), process.memory_info().rss / 2**20, process.num_fds()))

    watcher = threading.Thread(target=watch, daemon=True)
    _round(folder / "round", "shapes")
    watcher.start()
    start, rounds = time.monotonic(), 0
    while time.monotonic() - start < 60 * minutes or rounds % 2:
        _round(folder / "round", str(images) if rounds % 2 else "shapes")
        rounds += 1
        print(f"{(time.monotonic() - start) / 60:.1f} minutes, {rounds} rounds: {process.memory_info().rss >> 20} MiB")
    ended.set()
    watcher.join()
    quarter = len(samples) // 4
    figures: dict[str, Any] = {"minutes": (time.monotonic() - start) / 60, "rounds": rounds, "samples": len(samples)}
    for column, name in ((1, "memory_mib"), (2, "open_files")):
        first, last = (statistics.fmean(s[column] for s in part) for part in (samples[:quarter], samples[-quarter:]))
        figures |= {f"{name}_first": first, f"{name}_last": last, f"{name}_growth": 100 * (last / first - 1)}
    return figures


def _round(folder: Path, source: str) -> None:
    """A VQ-GAN, its codes, a prior and its images; the images of a folder are read from disk for each batch."""
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = {
        "run": {"dir": str(folder / "tokenizer")},
        "data": {"source": source, "num_images": 512, "horizontal_flip": True, "in_memory_gb": 0.0},
        "model": {"latent_channels": 8, "backbone": CONV, "bottleneck": {"type": "vector", "codebook_size": 64}},
        "loss": {"adversarial": {"channels": 16, "num_layers": 2, "start": 0.2, "adaptive": True}},
        "train": TRAIN | {"max_steps": STEPS, "lr": 1e-3},
    }
    train_tokenizer(parse_config(TokenizerConfig, tokenizer, "tokenizer"))
    codes = encode_dataset(folder / "tokenizer", folder / "codes")
    prior = {
        "run": {"dir": str(folder / "prior")},
        "codes": str(codes),
        "model": {"type": "causal_transformer", "hidden_size": 96, "depth": 3, "num_heads": 4},
        "loss": {"class_dropout_prob": 0.1},
        "train": TRAIN | {"max_steps": STEPS, "lr": 1e-3, "max_grad_norm": 1.0},
    }
    train_prior(parse_config(PriorTrainingConfig, prior, "prior"))
    pipeline = TwoStagePipeline.from_runs(folder / "prior")
    request = GenerateRequest(num_images=32, sampling=SamplingConfig(guidance_scale=2.0), batch_size=16)
    generate_folder(pipeline, request, folder / "generated")
    gc.collect()  # a run contains reference cycles, which would not matter with one process per run
