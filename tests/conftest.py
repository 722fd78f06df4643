"""Shared fixtures: real data if available, one thread per process, trainings by configuration, and the whole program
with one small tokenizer, its codes and a prior, trained once."""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from pipelines.cli import main
from twostage.core.config.sections import parse_config

REPOSITORY = Path(__file__).parents[1]
SLOW_FILES = ("test_kills.py", "test_tour.py", "test_stopping.py", "test_two_processes.py", "test_fsdp.py",
              "test_hostile_files.py", "test_odd_folders.py", "test_disk.py", "test_environments.py")  # fmt: skip
"""From the slowest on: they come first, so that all workers of a parallel run end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny models are faster on one thread, and tests may share the machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real datasets: $TWOSTAGE_DATA, or `../shared/data` beside the checkout."""
    folder = Path(os.environ.get("TWOSTAGE_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "mnist" / "train.parquet").is_file():
        pytest.skip(f"no real data: {folder / 'mnist' / 'train.parquet'} is missing (set TWOSTAGE_DATA)")
    return folder


@pytest.fixture
def new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Accelerate has one state per process; call this to reset it for another training (the test's end resets it)."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")  # one thread per training
    yield lambda: AcceleratorState._reset_state(reset_partial_state=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def start(new_process, request: pytest.FixtureRequest) -> Callable[[dict], Path]:
    """``start(document)`` trains as a new process would and returns the run folder.

    The test's module has a `TRAINING`: the function and the class of its configuration.
    """
    train, config = request.module.TRAINING

    def start(document: dict) -> Path:
        new_process()
        train(parse_config(config, document, "config"))
        return Path(document["run"]["dir"])

    return start


# --- the whole program ----------------------------------------------------------------------------------------------

TOKENIZER = {
    "run": {"dir": "runs/tokenizer", "trackers": []},
    "data": {"source": "shapes", "image_size": 16, "num_images": 320},
    "model": {
        "latent_channels": 4,
        "backbone": {"type": "conv", "channels": 8, "channel_mult": [1, 1, 1], "num_res_blocks": [0, 0, 0]},
        "bottleneck": {"type": "vector", "codebook_size": 16},
    },
    "train": {"batch_size": 16, "max_steps": 40, "lr": 3e-3, "validate_every": 40, "checkpoint_every": 40},
}
PRIOR = {
    "run": {"dir": "runs/prior", "trackers": []},
    "codes": "codes/tokenizer",
    "model": {"type": "causal_transformer", "hidden_size": 32, "depth": 2, "num_heads": 2, "dropout": 0.0},
    "train": {"batch_size": 16, "max_steps": 40, "lr": 3e-3, "validate_every": 40, "checkpoint_every": 40},
}


@dataclass
class Ended:
    """The exit status and output of a command."""

    code: int
    out: str
    err: str


@dataclass
class Runs:
    """The folders of trained models and their codes."""

    tokenizer: Path
    codes: Path
    prior: Path


def _twostage(*words: object) -> Ended:
    """Run `twostage WORDS` in this process, as a new process would."""
    out, err = io.StringIO(), io.StringIO()
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("LOCAL_WORLD_SIZE", "1000")  # one thread
        patch.setattr(sys, "argv", ["twostage", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
    AcceleratorState._reset_state(reset_partial_state=True)
    return Ended(int(ended.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def twostage() -> Callable[..., Ended]:
    """``twostage("generate", run, "--out", folder)``: its exit status and output."""
    return _twostage


@pytest.fixture(scope="session")
def works(twostage: Callable[..., Ended]) -> Callable[..., str]:
    """``works(*words)``: the output of `twostage WORDS`, which must succeed."""

    def works(*words: object) -> str:
        ended = twostage(*words)
        assert ended.code == 0, ended.err
        assert "Traceback" not in ended.err
        return ended.out

    return works


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tokenizer.yaml` and `prior.yaml`, each with a few small steps."""
    folder = tmp_path_factory.mktemp("configs")
    for name, document in {"tokenizer": TOKENIZER, "prior": PRIOR}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, configs: Path) -> Runs:
    """A tokenizer, its codes and a prior, trained once; tests do not write into them."""
    root = tmp_path_factory.mktemp("whole_program")
    runs = Runs(root / "runs" / "tokenizer", root / "codes" / "tokenizer", root / "runs" / "prior")
    for words in [
        ("train-tokenizer", configs / "tokenizer.yaml", f"run.dir={runs.tokenizer}"),
        ("encode", runs.tokenizer, "--out", runs.codes),
        ("train-prior", configs / "prior.yaml", f"run.dir={runs.prior}", f"codes={runs.codes}"),
    ]:
        ended = _twostage(*words)
        assert ended.code == 0, ended.err
    return runs
