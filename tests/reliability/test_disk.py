"""Full, read-only and lying disks: one sentence, the last good checkpoint kept, and the same command goes on."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.reliability.processes import Command, run

TRAIN = ["train.max_steps=60", "train.checkpoint_every=10", "train.validate_every=20", "train.log_every=5"]
WIDE = ["model.backbone={type: conv, channels: 48, channel_mult: [1, 1, 1], num_res_blocks: [0, 0, 1]}"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``small_disk("3m")``: an empty folder on a disk of that size."""
    mounted = []

    def mount(size: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a small disk cannot be mounted here: that needs root and a tmpfs")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def tokenizer_words(configs: Path, run_dir: Path, *more: str) -> list[str]:
    return ["-m", "stage1_tokenizer.train_tokenizer", str(configs / "tokenizer.yaml"), f"run.dir={run_dir}", *TRAIN,
            *more]  # fmt: skip


def steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in run_dir.glob("checkpoints/step_*"))


def one_sentence(command: Command) -> str:
    """The error of a command that ended with one."""
    assert command.wait() == 2, command.said[-3000:]
    assert "Traceback" not in command.said, command.said[-3000:]
    said = [line for line in command.said.splitlines() if "error: " in line]
    assert len(said) == 1, command.said[-3000:]
    return said[0]


def weights(run_dir: Path) -> bytes:
    return (run_dir / "checkpoints" / "step_00000060" / "model.safetensors").read_bytes()


def test_a_disk_that_fills_up_while_training(configs, small_disk, tmp_path):
    """It has room for a checkpoint or two and no more; another program's file takes the rest, then goes away."""
    disk = small_disk("24m")
    run(tokenizer_words(configs, tmp_path / "whole", *WIDE), tmp_path)
    words = tokenizer_words(configs, disk / "run", *WIDE)
    command = Command(words, tmp_path)
    assert command.wait_until(lambda: steps(disk / "run") == [10, 20])
    with (disk / "other").open("wb") as other:  # all that is left
        try:
            while True:
                other.write(bytes(1 << 14))
                other.flush()
        except OSError:
            pass
    said = one_sentence(command)
    assert "No space left on device" in said
    assert steps(disk / "run")[:1] >= [10], "a checkpoint is still there"
    assert not list(disk.glob("run/checkpoints/.*")), "what was half written has made room again"
    assert "No space left on device" in one_sentence_again(words, tmp_path), "still full: still one sentence"
    (disk / "other").unlink()
    assert "Resuming from step" in run(words, tmp_path)
    assert weights(disk / "run") == weights(tmp_path / "whole")


def one_sentence_again(words: list[str], folder: Path) -> str:
    (folder / "said.txt").unlink()
    return one_sentence(Command(words, folder))


@pytest.mark.parametrize("size", ["1m", "3m"])
def test_a_disk_that_is_too_small_from_the_start(configs, small_disk, tmp_path, size):
    disk = small_disk(size)
    said = one_sentence(Command(tokenizer_words(configs, disk / "run", *WIDE), tmp_path))
    assert "No space left on device" in said
    assert re.search(r"error: /\S*run\S*: ", said), "the place is named"


def test_codes_and_images_on_a_full_disk(runs, small_disk, tmp_path):
    disk = small_disk("200k")
    words = ["-m", "pipelines.encode_dataset", str(runs.tokenizer), "--crops", "60", "--out", str(disk / "codes")]
    said = one_sentence(Command(words, tmp_path))
    assert "No space left on device" in said
    (tmp_path / "said.txt").unlink()
    assert not list(disk.iterdir()), "what was begun has made room again"
    (disk / "other").write_bytes(bytes(150 << 10))
    words = ["-m", "pipelines.generate", str(runs.prior), "--num-images", "500", "--out", str(disk / "out")]
    assert "No space left on device" in one_sentence(Command(words, tmp_path))
    kept = {path: path.read_bytes() for path in disk.glob("out/images/*.png")}
    assert kept
    (disk / "other").unlink()
    words[words.index("500")] = str(len(kept) + 3)
    run(words, tmp_path)
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_read_only_folder(configs, small_disk, tmp_path):
    disk = small_disk("8m")
    run(tokenizer_words(configs, disk / "run", "train.max_steps=20"), tmp_path)
    (tmp_path / "said.txt").unlink()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for name in ("run", "new"):
        said = one_sentence(Command(tokenizer_words(configs, disk / name, "train.max_steps=20"), tmp_path))
        assert "Read-only file system" in said
        assert str(disk / name) in said
        (tmp_path / "said.txt").unlink()


# --- checkpoints that are not what they were ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def stopped(configs, tmp_path_factory) -> Path:
    """A run that was stopped at step 45, with the checkpoints of steps 40 and 45; and beside it one that was not."""
    folder = tmp_path_factory.mktemp("stopped")
    run(tokenizer_words(configs, Path("whole")), folder)
    command = Command([*tokenizer_words(configs, Path("run")), "--time-limit", "60"], folder)
    assert command.wait_until(lambda: 40 in steps(folder / "run"))
    command.process.terminate()
    assert command.wait() == 75
    assert steps(folder / "run")[0] == 40
    assert len(steps(folder / "run")) == 2
    (folder / "said.txt").unlink()
    return folder


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit_manifest(file: Path, change: Callable[[dict], object]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda folder: flip(folder / "optimizer.safetensors"), "optimizer.safetensors is not what was"),
    "cut short": (lambda folder: os.truncate(folder / "model.safetensors", 1000), "model.safetensors is not what was"),
    "a file is missing": (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    "not in the manifest": (
        lambda folder: edit_manifest(folder / "manifest.json", lambda m: m["files"].pop("optimizer.safetensors")),
        "optimizer.safetensors is not in manifest.json",
    ),
    "a wrong hash": (
        lambda folder: edit_manifest(
            folder / "manifest.json", lambda m: m["files"]["state.json"].update(sha256="0" * 64)
        ),
        "state.json is not what was written",
    ),
    "a path outside": (
        lambda folder: edit_manifest(folder / "manifest.json", lambda m: m["files"].update({"../../config.yaml": {}})),
        "../../config.yaml is missing",
    ),
    "no JSON": (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    "another JSON": (lambda folder: (folder / "manifest.json").write_text("[1]"), "manifest.json cannot be read"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(configs, stopped, tmp_path, harm):
    shutil.copytree(stopped / "run", tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    change, said = HARMS[harm]
    change(newest)
    found = run(tokenizer_words(configs, Path("run")), tmp_path)
    assert f"{newest.relative_to(tmp_path)}: damaged ({said}" in found
    assert "Resuming from step 40 " in found
    assert weights(tmp_path / "run") == weights(stopped / "whole")


def test_only_damaged_checkpoints_stop_the_run_and_stay(configs, stopped, tmp_path):
    shutil.copytree(stopped / "run", tmp_path / "run")
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        flip(folder / "model.safetensors")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    said = one_sentence(Command(tokenizer_words(configs, Path("run")), tmp_path))
    assert "run/checkpoints: no checkpoint to resume from: " in said
    assert "Put back a copy of one, or remove the run's folder to begin anew" in said
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_newer_checkpoint_is_refused(configs, stopped, tmp_path):
    shutil.copytree(stopped / "run", tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    edit_manifest(newest / "manifest.json", lambda m: m.update(format_version=99))
    said = one_sentence(Command(tokenizer_words(configs, Path("run")), tmp_path))
    assert "written in format 99, but this version of twostage reads at most 2. Update twostage" in said
