"""A finished run answers its command without torch, and only as long as nothing has changed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from twostage.core.runs import finished_answer
from twostage.core.runs.finished_answer import FinishedAnswer, stamp

LOADED = """
import runpy, sys
module = sys.argv.pop(1)
try:
    runpy.run_module(module, run_name="__main__")
finally:
    print("torch" in sys.modules)
"""


@pytest.fixture
def project(tmp_path, monkeypatch, configs) -> Path:
    """A folder, the current one, with images and a config; and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("images/a").mkdir(parents=True)
    for shade in range(40):
        Image.new("L", (16, 16), 6 * shade).save(f"images/a/{shade}.png")
    document = yaml.safe_load((configs / "tokenizer.yaml").read_text())
    document["run"]["dir"], document["data"] = "run", {"source": "images", "image_size": 16, "channels": 1}
    document["train"] = {"batch_size": 16, "max_steps": 2}
    Path("config.yaml").write_text(yaml.safe_dump(document))
    return tmp_path


def answered(*overrides: str) -> bool:
    return bool(FinishedAnswer(Path("config.yaml"), overrides).lines())


def test_the_same_command_is_answered_without_torch(project, works):
    assert not answered()
    works("train-tokenizer", "config.yaml")
    (line, results) = FinishedAnswer(Path("config.yaml"), []).lines()
    assert line == "run: finished at step 2 (all steps done); nothing left to do"
    assert "model: run/model" in results
    Path("run/stopped.txt").touch()
    for rank in ("0", "1"):
        for module in ("pipelines.train_tokenizer", "stage1_tokenizer.train_tokenizer"):
            environment = os.environ | {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            words = [sys.executable, "-c", LOADED, module, "config.yaml"]
            ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
            said = [line, results] if rank == "0" else []
            assert ended.stdout.splitlines() == [*said, "False"], "each of two processes knows it by itself"


def test_other_commands_are_not_answered(project, works, monkeypatch):
    works("train-tokenizer", "config.yaml", "train.max_steps=3")
    assert answered("train.max_steps=3")
    assert not answered()
    assert not answered("train.max_steps=4")
    assert not answered("train.max_steps=3", "run.seed=1")
    assert "Resuming from step 3" in works("train-tokenizer", "config.yaml", "train.max_steps=4")
    assert not answered("train.max_steps=3"), "the run is longer now"
    assert answered("train.max_steps=4")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not answered("train.max_steps=4"), "the other machine may have no answer"


def add_an_image() -> None:
    Image.new("L", (16, 16)).save("images/a/new.png")


def change_an_image() -> None:
    Image.new("L", (16, 16), 200).save("images/a/0.png")


def change_the_config() -> None:
    Path("config.yaml").write_text(Path("config.yaml").read_text() + "# a note\n")


def damage_a_checkpoint() -> None:
    next(Path("run/checkpoints").glob("*/model.safetensors")).write_bytes(b"")


def damage_the_answer() -> None:
    next(Path("cache/twostage/finished").glob("*.json")).write_text('{"stamps": 5')


@pytest.mark.parametrize(
    "change",
    [
        add_an_image,
        change_an_image,
        change_the_config,
        damage_a_checkpoint,
        damage_the_answer,
        lambda: shutil.rmtree("run"),
        lambda: shutil.rmtree("images"),
        lambda: shutil.rmtree("cache"),
        lambda: Path("run/config.yaml").unlink(),
    ],
)
def test_nothing_is_answered_after_a_change(project, works, change):
    works("train-tokenizer", "config.yaml")
    assert answered()
    change()
    assert not answered()


def test_images_that_changed_during_training_are_not_trained_on(project, works, twostage, monkeypatch):
    def draw(*_):
        add_an_image()
        return {}

    monkeypatch.setattr("stage1_tokenizer.tokenizer_training.draw_images", draw)
    works("train-tokenizer", "config.yaml")
    assert not answered()
    assert "holds different images" in twostage("train-tokenizer", "config.yaml").err


def test_stamps(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").write_text("text")
    before = stamp(folder)
    assert before == stamp(folder)
    assert stamp(tmp_path / "nothing") is None
    monkeypatch.setattr(finished_answer, "MAX_FILES", 0)
    assert stamp(folder) is None, "too many files"
    monkeypatch.undo()
    (folder / "linked").symlink_to(folder)
    assert stamp(folder) is None, "a circle"
    (folder / "linked").unlink()
    (folder / "inner" / "file").rename(folder / "inner" / "renamed")
    assert stamp(folder) not in (None, before)
