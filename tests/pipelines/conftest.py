"""Fixtures of the pipelines' tests: the trained pipeline, and a tokenizer with one part changed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipelines.drawing.two_stage import TwoStagePipeline
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.autoencoder_config import AutoencoderConfig
from twostage.core.config.sections import parse_config
from twostage.core.data.shapes import CLASS_NAMES


@pytest.fixture(autouse=True)
def _own_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TWOSTAGE_DATA", raising=False)


@pytest.fixture(scope="session")
def pipeline(runs) -> TwoStagePipeline:
    return TwoStagePipeline.from_runs(runs.prior)


@pytest.fixture
def changed_tokenizer(runs, tmp_path: Path) -> Callable[[str], Path]:
    """``changed_tokenizer("encoder")``: the run folder of the tokenizer with other weights in that part."""

    def change(part: str) -> Path:
        run = tmp_path / "changed"
        shutil.copytree(runs.tokenizer, run)
        model = Autoencoder.from_pretrained(run)
        with torch.no_grad():
            for parameter in getattr(model, part).parameters():
                parameter.mul_(1.5)
        model.save_pretrained(run / "model")
        return run

    return change


@pytest.fixture(scope="session")
def variational(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``variational("gaussian")``: the model folder of a small VAE with that bottleneck, untrained; "conditional": one
    that sees the class."""
    root = tmp_path_factory.mktemp("variational")

    def make(family: str) -> Path:
        if not (root / family).exists():
            torch.manual_seed(0)
            document = {
                "image_size": [16, 16],
                "channels": 3,
                "class_names": list(CLASS_NAMES),
                "model": {
                    "latent_channels": 4,
                    "backbone": {"type": "conv", "channels": 8, "channel_mult": [1, 1], "num_res_blocks": [0, 0]},
                    "bottleneck": {"type": "gaussian" if family == "conditional" else family},
                    "condition": "class" if family == "conditional" else None,
                },
                "loss": {"reconstruction": "l2"},
            }
            model = Autoencoder(parse_config(AutoencoderConfig, document, "test"))
            model.save_pretrained(root / family)
        return root / family

    return make
