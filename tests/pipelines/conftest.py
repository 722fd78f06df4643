"""What the tests of the pipelines share: the trained pipeline, and a tokenizer of which one part is another."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipelines.two_stage import TwoStagePipeline
from stage1_tokenizer.autoencoder import Autoencoder


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
