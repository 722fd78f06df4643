"""Full, read-only and faulty disks: one sentence, the last good checkpoint is kept, and the same command resumes."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from messages import assert_names

TRAIN = ["train.max_steps=60", "train.checkpoint_every=10", "train.validate_every=20", "train.log_every=5"]
WIDE = ["model.backbone={type: conv, channels: 48, channel_mult: [1, 1, 1], num_res_blocks: [0, 0, 1]}"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``small_disk("3m")``: an empty folder on a disk of 3 MB."""
    mounted = []

    def mount(size: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("cannot mount a small disk: that needs root and tmpfs")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def tokenizer_words(configs: Path, run_dir: Path, *more: str) -> list[str]:
    return ["train-tokenizer", str(configs / "tokenizer.yaml"), f"run.dir={run_dir}", *TRAIN, *more]


def steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in run_dir.glob("checkpoints/step_*"))


def one_sentence(status: int, said: str) -> str:
    """The error message of a command that fails with exactly one."""
    assert status == 2, said[-3000:]
    assert "Traceback" not in said, said[-3000:]
    errors = [line for line in said.splitlines() if "error: " in line]
    assert len(errors) == 1, said[-3000:]
    return errors[0]


@pytest.fixture
def fails(here) -> Callable[[list[str], Path], str]:
    """``fails(words, folder)``: the error message of that command."""

    def fails(words: list[str], folder: Path) -> str:
        ended = here(words, folder)
        return one_sentence(ended.code, ended.out + ended.err)

    return fails


def weights(run_dir: Path) -> bytes:
    return (run_dir / "checkpoints" / "step_00000060" / "model.safetensors").read_bytes()


def test_a_disk_that_fills_up_while_training(configs, begin, done, fails, small_disk, tmp_path):
    """The disk has space for one or two checkpoints. The file of another program fills the rest, then disappears."""
    disk = small_disk("24m")
    done(tokenizer_words(configs, tmp_path / "whole", *WIDE), tmp_path)
    words = tokenizer_words(configs, disk / "run", *WIDE)
    command = begin(words, tmp_path)
    assert command.wait_until(lambda: steps(disk / "run") == [10, 20])
    with (disk / "other").open("wb") as other:  # fills the disk
        try:
            while True:
                other.write(bytes(1 << 14))
                other.flush()
        except OSError:
            pass
    assert_names(one_sentence(command.wait(), command.said), "No space left on device")
    assert steps(disk / "run")[:1] >= [10], "no checkpoint is left"
    assert not list(disk.glob("run/checkpoints/.*")), "a partial checkpoint still takes space"
    assert_names(fails(words, tmp_path), "No space left on device")  # the disk is still full
    (disk / "other").unlink()
    assert_names(done(words, tmp_path), "Resuming from step")
    assert weights(disk / "run") == weights(tmp_path / "whole")


@pytest.mark.parametrize("size", ["1m", "3m"])
def test_a_disk_that_is_too_small_from_the_start(configs, fails, small_disk, tmp_path, size):
    disk = small_disk(size)
    message = fails(tokenizer_words(configs, disk / "run", *WIDE), tmp_path)
    assert_names(message, "No space left on device", f"error: {disk / 'run'}")


def test_codes_and_images_on_a_full_disk(runs, done, fails, small_disk, tmp_path):
    disk = small_disk("200k")
    words = ["encode", str(runs.tokenizer), "--crops", "60", "--out", str(disk / "codes")]
    assert_names(fails(words, tmp_path), "No space left on device")
    assert not list(disk.iterdir()), "partial codes still take space"
    (disk / "other").write_bytes(bytes(150 << 10))
    words = ["generate", str(runs.prior), "--num-images", "500", "--out", str(disk / "out")]
    assert_names(fails(words, tmp_path), "No space left on device")
    kept = {path: path.read_bytes() for path in disk.glob("out/images/*.png")}
    assert kept
    (disk / "other").unlink()
    words[words.index("500")] = str(len(kept) + 3)
    done(words, tmp_path)
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_read_only_folder(configs, done, fails, small_disk, tmp_path):
    disk = small_disk("8m")
    done(tokenizer_words(configs, disk / "run", "train.max_steps=20"), tmp_path)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for name in ("run", "new"):
        message = fails(tokenizer_words(configs, disk / name, "train.max_steps=40"), tmp_path)
        assert_names(message, "Read-only file system", disk / name)


# --- damaged checkpoints ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def stopped(configs, begin, done, tmp_path_factory) -> Path:
    """`run`: stopped after step 40, with two checkpoints; `whole`: the same run, uninterrupted."""
    folder = tmp_path_factory.mktemp("stopped")
    done(tokenizer_words(configs, Path("whole")), folder)
    command = begin([*tokenizer_words(configs, Path("run")), "--time-limit", "60"], folder)
    assert command.wait_until(lambda: 40 in steps(folder / "run"))
    command.process.terminate()
    assert command.wait() == 75
    assert steps(folder / "run")[0] == 40
    assert len(steps(folder / "run")) == 2
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
    "a flipped bit": (lambda folder: flip(folder / "optimizer.safetensors"), "optimizer.safetensors"),
    "cut short": (lambda folder: os.truncate(folder / "model.safetensors", 1000), "model.safetensors"),
    "a file is missing": (lambda folder: (folder / "state.json").unlink(), "state.json"),
    "not in the manifest": (
        lambda folder: edit_manifest(folder / "manifest.json", lambda m: m["files"].pop("optimizer.safetensors")),
        "optimizer.safetensors",
    ),
    "a wrong hash": (
        lambda folder: edit_manifest(
            folder / "manifest.json", lambda m: m["files"]["state.json"].update(sha256="0" * 64)
        ),
        "state.json",
    ),
    "a path outside": (
        lambda folder: edit_manifest(folder / "manifest.json", lambda m: m["files"].update({"../../config.yaml": {}})),
        "../../config.yaml",
    ),
    "invalid JSON": (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json"),
    "JSON of something else": (lambda folder: (folder / "manifest.json").write_text("[1]"), "manifest.json"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(configs, done, stopped, tmp_path, harm):
    shutil.copytree(stopped / "run", tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    change, file = HARMS[harm]
    change(newest)
    output = done(tokenizer_words(configs, Path("run")), tmp_path)
    assert_names(output, f"{newest.relative_to(tmp_path)}: damaged ({file}", "step 40 ")
    assert weights(tmp_path / "run") == weights(stopped / "whole")


def test_if_all_checkpoints_are_damaged_the_run_stops_and_keeps_them(configs, fails, stopped, tmp_path):
    shutil.copytree(stopped / "run", tmp_path / "run")
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        flip(folder / "model.safetensors")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    message = fails(tokenizer_words(configs, Path("run")), tmp_path)
    assert_names(message, "run/checkpoints", "copy", "remove the run's folder")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_newer_checkpoint_is_refused(configs, fails, stopped, tmp_path):
    shutil.copytree(stopped / "run", tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    edit_manifest(newest / "manifest.json", lambda m: m.update(format_version=99))
    message = fails(tokenizer_words(configs, Path("run")), tmp_path)
    assert_names(message, newest.name, "format 99", "at most 2", "Update twostage")
