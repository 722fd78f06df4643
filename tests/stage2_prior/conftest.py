"""What the tests of stage two share: codes on disk, written by hand, and tiny priors."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from core.random import BatchRandom
from stage2_prior.causal_transformer import CausalTransformerConfig
from stage2_prior.codes import Manifest, SplitFiles, TokenizerReference
from stage2_prior.prior import Prior, PriorConfig, PriorLossConfig

HASH = "0123456789abcdef" * 4


def _write_codes(folder: Path, splits: dict[str, np.ndarray], codebook_size: int, class_names: list[str] | None = None,
                 labels: dict[str, np.ndarray] | None = None, **changes: object) -> Manifest:  # fmt: skip
    folder.mkdir(exist_ok=True)
    for name, codes in splits.items():
        np.save(folder / f"{name}.codes.npy", codes.astype(np.uint16))
        if labels:
            np.save(folder / f"{name}.labels.npy", labels[name].astype(np.int64))
    counts = np.bincount(splits["train"].ravel(), minlength=codebook_size)
    shares, smoothed = counts / counts.sum(), (counts + 1) / (counts + 1).sum()
    described: dict[str, object] = {
        "tokenizer": TokenizerReference(hash=HASH, path="runs/tokenizer"),
        "source": "numbers",
        "image_size": (8, 8),
        "channels": 3,
        "grid": splits["train"].shape[1:],
        "codebook_size": codebook_size,
        "class_names": class_names,
        "validation_split": "val",
        "splits": {
            name: SplitFiles(
                rows=len(codes), codes=f"{name}.codes.npy", labels=f"{name}.labels.npy" if labels else None
            )
            for name, codes in splits.items()
        },
        "codes_used": int((counts > 0).sum()),
        "entropy_nats_per_code": float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum()),
        "unigram_nats_per_code": {name: float(-np.log(smoothed[codes]).mean()) for name, codes in splits.items()},
    }
    manifest = Manifest.model_validate(described | changes)
    (folder / "manifest.json").write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
    return manifest


def _tiny_prior(codebook_size: int = 5, grid: tuple[int, int] = (2, 3), class_names: list[str] | None = None,
                trained: bool = True, depth: int = 2, dropout: float = 0.0, **loss: float) -> Prior:  # fmt: skip
    torch.manual_seed(0)
    prior = Prior(
        PriorConfig(
            model=CausalTransformerConfig(hidden_size=16, depth=depth, num_heads=2, dropout=dropout),
            loss=PriorLossConfig(**loss),
            codebook_size=codebook_size,
            grid=grid,
            class_names=class_names,
            image_size=(8, 8),
            channels=3,
            tokenizer=TokenizerReference(hash=HASH, path="runs/tokenizer"),
            unigram_nats_per_code=1.0,
        )
    )
    if trained:  # predictions that depend on the class and on all codes, as those of a trained prior do
        for parameter in prior.parameters():
            nn.init.normal_(parameter, std=0.4)
    return prior


def _random_codes(count: int, codebook_size: int = 5, grid: tuple[int, int] = (2, 3), seed: int = 0) -> Tensor:
    return torch.randint(codebook_size, (count, *grid), generator=torch.Generator().manual_seed(seed))


def _whole_batch(size: int, seed: int = 0) -> BatchRandom:
    return BatchRandom(seed, slice(0, size), size)


@pytest.fixture(scope="session")
def write_codes() -> Callable[..., Manifest]:
    """``write_codes(folder, splits, codebook_size, class_names, labels, **changes)``: what stage one hands over;
    ``changes`` overwrite what the manifest says."""
    return _write_codes


@pytest.fixture(scope="session")
def tiny_prior() -> Callable[..., Prior]:
    """``tiny_prior(codebook_size, grid, class_names, trained, ...)``: always with the same weights."""
    return _tiny_prior


@pytest.fixture(scope="session")
def random_codes() -> Callable[..., Tensor]:
    """``random_codes(count, codebook_size, grid, seed)``: (count, h, w) int64."""
    return _random_codes


@pytest.fixture(scope="session")
def whole_batch() -> Callable[..., BatchRandom]:
    """``whole_batch(size, seed=0)``: the random numbers of a batch that one process works on."""
    return _whole_batch


@pytest.fixture
def new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Accelerate's state is one a process; calling this (as the test's end does) lets a training start anew."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")  # one thread a training
    yield lambda: AcceleratorState._reset_state(reset_partial_state=True)
    AcceleratorState._reset_state(reset_partial_state=True)
