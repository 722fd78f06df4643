"""Commands that are killed at random moments and restarted end with the same bytes as uninterrupted ones."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reliability.drawn_images import draw_images
from benchmarks.reliability.processes import Command, run

__all__ = ["SCENARIOS", "KillHarness", "kill_everywhere"]

WATCHED = Path(__file__).with_name("watched_training.py")
TRAIN = [
    *("train.batch_size=8", "train.log_every=7", "train.checkpoint_every=10", "train.validate_every=40"),
    *("train.ema_decay=0.9", "train.max_grad_norm=0.5", "train.lr_schedule=cosine", "train.warmup_steps=5"),
]
TOKENIZER = """
run: {dir: run}
data: {source: ../images, image_size: 16, horizontal_flip: true, validation_share: 0.1}
model:
  latent_channels: 4
  backbone: {type: conv, channels: 8, channel_mult: [1, 1, 1], num_res_blocks: [0, 0, 0]}
  bottleneck: {type: vector, codebook_size: 16}
loss: {adversarial: {channels: 8, num_layers: 2, start: 0.2, adaptive: true, lecam_weight: 0.01}}
train: {max_steps: 200, lr: 3.0e-3}
"""
PRIOR = """
run: {dir: run}
codes: ../codes
model: {type: causal_transformer, hidden_size: 32, depth: 2, num_heads: 2, dropout: 0.1}
loss: {replace_prob: 0.3, class_dropout_prob: 0.1}
train: {max_steps: 200, lr: 3.0e-3}
"""
EVENTS = "events.out.tfevents"  # TensorBoard's file names contain the time


@dataclass(frozen=True)
class Scenario:
    """A command to kill."""

    words: list[str]
    """After `python`."""
    made: str
    """The folder that it writes."""
    begun: str
    """A pattern of files that exist once the work has started."""
    writing: str
    """A pattern of files that exist while something is written that must appear completely or not at all."""


SCENARIOS = {
    "VQ-GAN": Scenario(
        [str(WATCHED), "stage1_tokenizer.train_tokenizer", "../tokenizer.yaml", *TRAIN, "data.in_memory_gb=0"],
        *("run", "run/metrics.jsonl", "run/checkpoints/.*.partial"),
    ),
    "prior": Scenario(
        [str(WATCHED), "pipelines.train_prior", "../prior.yaml", *TRAIN],
        *("run", "run/metrics.jsonl", "run/checkpoints/.*.partial"),
    ),
    "encode": Scenario(
        ["-m", "pipelines.encode_dataset", "../tokenizer/run", "--data", "../images", "--crops", "3", "--out", "out"],
        *("out", ".out.partial", ".out.partial/codes/manifest.json"),
    ),
    "generate": Scenario(
        ["-m", "pipelines.generate", "../prior/run", "--num-images", "300", "--batch-size", "8", "--out", "out"],
        *("out", "out/images/*.png", "out/images/.*.partial"),
    ),
}


class KillHarness:
    """Prepares a folder once, then kills commands in copies of it.

    Args:
        folder: empty or missing.
        seed: of the random moments.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.chance = folder, random.Random(seed)
        self.whole: dict[tuple[str, int], Path] = {}
        self.seconds: dict[tuple[str, int], float] = {}
        self.single_deaths: list[float] = []
        """Seconds until all processes of a command had exited after one of two was killed."""
        folder.mkdir(parents=True, exist_ok=True)
        draw_images(folder / "images", 1200, 16)
        (folder / "tokenizer.yaml").write_text(TOKENIZER, encoding="utf-8")
        (folder / "prior.yaml").write_text(PRIOR, encoding="utf-8")
        for name, words in {
            "tokenizer": ["-m", "stage1_tokenizer.train_tokenizer", "../tokenizer.yaml", *TRAIN, "train.max_steps=40"],
            "prior": ["-m", "stage2_prior.train_prior", "../prior.yaml", *TRAIN, "train.max_steps=40"],
        }.items():
            (folder / name).mkdir()
            run(words, folder / name)
            if name == "tokenizer":
                run(["-m", "pipelines.encode_dataset", folder / name / "run", "--out", "../codes"], folder / name)

    def chain(self, name: str, processes: int, kills: int) -> int:
        """Start the command in a new folder, kill it and restart it, up to ``kills`` times or until it finishes; then
        compare. Returns the number of kills.

        Raises:
            AssertionError: it does not resume, or does not end like the uninterrupted command.
        """
        whole = self._uninterrupted(name, processes)
        scenario, folder = SCENARIOS[name], self._new_folder(name, processes)
        killed = 0
        for _ in range(kills):
            killed += self._start_and_kill(scenario, folder, processes, self.seconds[name, processes])
        run(scenario.words, folder, processes, self._seen(folder))
        self._compare(whole, folder, scenario.made)
        return killed

    def _uninterrupted(self, name: str, processes: int) -> Path:
        key = (name, processes)
        if key not in self.whole:
            folder = self._new_folder(name, processes)
            start = time.monotonic()
            run(SCENARIOS[name].words, folder, processes, self._seen(folder))
            self.whole[key], self.seconds[key] = folder, time.monotonic() - start
        return self.whole[key]

    def _new_folder(self, name: str, processes: int) -> Path:
        folder = self.folder / f"{name}_{processes}_{len(list(self.folder.iterdir()))}"
        folder.mkdir()
        return folder

    def _seen(self, folder: Path) -> dict[str, str]:
        return {"SEEN": str(folder / "seen")}

    def _start_and_kill(self, scenario: Scenario, folder: Path, processes: int, whole: float) -> bool:
        """Kill the command at a random moment; returns False if it finished before that.

        The moment is drawn from the whole time of the command, from its working time, or from the time in which it
        writes something.
        """
        there = dict.fromkeys(folder.rglob("*"))
        command = Command(scenario.words, folder, processes, self._seen(folder))
        instant = self.chance.choice(["anywhere", "working", "writing"])
        if instant == "writing":
            came = command.wait_until(_appeared(folder, scenario.writing, {}))
            time.sleep(self.chance.uniform(0, 0.03))
        elif instant == "working":
            came = command.wait_until(_appeared(folder, scenario.begun, there))
            time.sleep(self.chance.uniform(0, 0.2 * whole))
        else:
            came = True
            time.sleep(self.chance.uniform(0, 0.8 * whole))
        if not came or not command.running:
            assert command.wait() == 0, command.said[-3000:]
            return False
        workers = command.workers() if processes > 1 and self.chance.random() < 0.3 else []
        if len(workers) == processes:
            start = time.monotonic()
            self.chance.choice(workers).kill()  # kill one; the others have to exit on their own
            command.wait(60)
            for worker in workers:
                worker.wait(max(0.0, 60 - (time.monotonic() - start)))
            self.single_deaths.append(time.monotonic() - start)
        command.kill()
        return True

    def _compare(self, whole: Path, folder: Path, made: str) -> None:
        expected, found = _contents(whole / made), _contents(folder / made)
        assert found.keys() == expected.keys(), f"{folder}: {sorted(found.keys() ^ expected.keys())}"
        different = [name for name in expected if found[name] != expected[name]]
        assert not different, f"{folder}: bytes differ from {whole}: {different}"
        for file in whole.glob("seen_*"):
            assert _batches(folder / file.name) == _batches(file), f"{folder}: it trained on other images"


def kill_everywhere(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill each command, with one and with two processes, until ``kills`` is reached.

    Returns:
        The figures: kills by command and number of processes, and the longest time that a command took to exit after
        one of its processes died.
    """
    harness = KillHarness(folder, seed)
    variants = [(name, processes) for name in SCENARIOS for processes in (1, 2)]
    made = dict.fromkeys(variants, 0)
    while sum(made.values()) < kills:
        variant = min(variants, key=lambda each: made[each])
        made[variant] += harness.chain(*variant, kills=min(4, kills - sum(made.values())))
        print(f"{sum(made.values())} of {kills} kills; {variant[0]} in {variant[1]}: same bytes")
    return {
        "kills": sum(made.values()),
        "bit_equal": sum(made.values()),  # otherwise an AssertionError was raised
        "by_command": {f"{name}, {n} process{'es' * (n > 1)}": count for (name, n), count in made.items()},
        "single_deaths": len(harness.single_deaths),
        "slowest_end_s": max(harness.single_deaths, default=0.0),
    }


def _appeared(folder: Path, pattern: str, there: dict[Path, None]) -> Callable[[], bool]:
    return lambda: any(path not in there for path in folder.glob(pattern))


def _contents(folder: Path) -> dict[str, bytes]:
    """The content of every file below ``folder``, without the folder's own path where a file contains it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and EVENTS not in path.name)
    above = str(folder.absolute().parent).encode()
    return {
        str(path.relative_to(folder)): path.read_bytes().replace(above, b"") if path.suffix == ".json"
        else path.read_bytes() for path in files
    }  # fmt: skip


def _batches(file: Path) -> dict[int, str]:
    """The rows of each step; a repeated step must have used the same rows."""
    seen: dict[int, str] = {}
    for line in _complete_lines(file):
        step, _, rows = line.partition(" ")
        assert seen.setdefault(int(step), rows) == rows, f"{file}: step {step} was repeated with other images"
    return seen


def _complete_lines(file: Path) -> Sequence[str]:
    """The lines without those that a kill truncated and the next start continued."""
    text = file.read_text(encoding="utf-8")
    lengths = [len(line.split()) for line in text.splitlines()]
    usual = max(set(lengths), key=lengths.count)
    return [line for line, length in zip(text.splitlines(), lengths, strict=True) if length == usual]
