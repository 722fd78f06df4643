"""Shared by the tests of stage two: codes on disk and tiny priors."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stage2_prior.codes import Manifest, SplitFiles, TokenizerReference
from stage2_prior.networks.causal_transformer import CausalTransformerConfig
from stage2_prior.networks.masked_transformer import MaskedTransformerConfig
from stage2_prior.networks.network import NetworkConfig
from stage2_prior.networks.parallel_transformer import ParallelTransformerConfig
from stage2_prior.networks.pixelcnn import PixelCNNConfig
from stage2_prior.prior import Prior, PriorConfig, PriorLossConfig
from twostage.core.conditions.class_condition import ClassConditionConfig
from twostage.core.training.random import BatchRandom

HASH = "0123456789abcdef" * 4
TINY: dict[str, NetworkConfig] = {
    "causal_transformer": CausalTransformerConfig(hidden_size=16, depth=2, num_heads=2, dropout=0.0),
    "masked_transformer": MaskedTransformerConfig(hidden_size=16, depth=2, num_heads=2, dropout=0.0),
    "parallel_transformer": ParallelTransformerConfig(hidden_size=16, depth=2, num_heads=2, dropout=0.0),
    "pixelcnn": PixelCNNConfig(channels=8, depth=3, first_kernel=5, head_channels=8),
}


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
                trained: bool = True, model: str | NetworkConfig = "causal_transformer",
                **loss: object) -> Prior:  # fmt: skip
    torch.manual_seed(0)
    prior = Prior(
        PriorConfig(
            model=TINY[model] if isinstance(model, str) else model,
            conditions=[ClassConditionConfig(num_classes=len(class_names))] if class_names else [],
            loss=PriorLossConfig.model_validate(loss),
            codebook_size=codebook_size,
            grid=grid,
            class_names=class_names,
            image_size=(8, 8),
            channels=3,
            tokenizer=TokenizerReference(hash=HASH, path="runs/tokenizer"),
            unigram_nats_per_code=1.0,
        )
    )
    if trained:  # so that predictions depend on the class and on all codes, like those of a trained prior
        for parameter in prior.parameters():
            nn.init.normal_(parameter, std=0.4)
    return prior


def _random_codes(count: int, codebook_size: int = 5, grid: tuple[int, int] = (2, 3), seed: int = 0) -> Tensor:
    return torch.randint(codebook_size, (count, *grid), generator=torch.Generator().manual_seed(seed))


def _whole_batch(size: int, seed: int = 0) -> BatchRandom:
    return BatchRandom(seed, slice(0, size), size)


@pytest.fixture(scope="session")
def write_codes() -> Callable[..., Manifest]:
    """``write_codes(folder, splits, codebook_size, class_names, labels, **changes)``: writes a code cache;
    ``changes`` overwrite fields of its manifest."""
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
    """``whole_batch(size, seed=0)``: the random numbers of a batch in a single process."""
    return _whole_batch
