"""A run that was killed, twice, ends as one that never was: every file bit for bit."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EVERY = 20
TRAINING = [
    *("train.max_steps=160", f"train.checkpoint_every={EVERY}", "train.validate_every=40", "train.log_every=7"),
    *("train.ema_decay=0.9", "train.max_grad_norm=0.5", "train.lr_schedule=cosine", "train.warmup_steps=5"),
]
STAGES = {
    "tokenizer": ["stage1_tokenizer.train_tokenizer", "data.horizontal_flip=true"],
    "prior": ["stage2_prior.train_prior", "model.dropout=0.1", "loss={replace_prob: 0.3, class_dropout_prob: 0.1}"],
}


def start(module: str, *words: object) -> subprocess.Popen:
    command = [sys.executable, "-m", module, *map(str, words)]
    environment = {**os.environ, "LOCAL_WORLD_SIZE": "1000"}  # one thread
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def kill_when(process: subprocess.Popen, condition: Callable[[], bool], delay: float = 0.0) -> None:
    """Sends SIGKILL ``delay`` seconds after ``condition()`` is first true."""
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    process.communicate()
    assert process.returncode == -9, "it ended before it could be killed"


def newest(run: Path) -> int:
    """The step of the last checkpoint."""
    return max((int(path.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*")), default=0)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_ends_as_if_it_had_not_been(stage, runs, configs, tmp_path):
    module, *overrides = STAGES[stage]
    words = [module, configs / f"{stage}.yaml", *TRAINING, *overrides]
    words += [f"codes={runs.codes}"] if stage == "prior" else []
    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    uninterrupted = start(*words, f"run.dir={whole}")
    chance = random.Random(stage)

    checkpoints = chance.randint(1, 3)
    kill_when(start(*words, f"run.dir={killed}"), lambda: newest(killed) >= checkpoints * EVERY, chance.uniform(0, 0.1))
    first = newest(killed)
    assert first < 160

    partial = killed / "checkpoints" / f".step_{first + 2 * EVERY:08d}.partial"
    kill_when(start(*words, f"run.dir={killed}"), partial.exists)
    second = newest(killed)
    assert first < second < 160

    last = start(*words, f"run.dir={killed}")
    said, errors = (text.decode() for text in last.communicate(timeout=120))
    assert last.returncode == 0, errors
    assert f"going on from step {second} " in said
    _, errors = uninterrupted.communicate(timeout=120)
    assert uninterrupted.returncode == 0, errors.decode()

    expected, found = contents(whole), contents(killed)
    assert {"model/model.safetensors", "metrics.jsonl", "checkpoints/step_00000160/state.json"} <= expected.keys()
    for name in ("model", "ema", "optimizer"):
        assert f"checkpoints/step_00000160/{name}.safetensors" in expected
    del expected["config.yaml"], found["config.yaml"]  # their run.dir differs
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
