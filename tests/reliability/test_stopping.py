"""A command that is asked to stop saves, says so, exits with the status that asks for a restart, and loses nothing."""

import json
import signal
import time
from pathlib import Path

import pytest
from messages import assert_names
from safetensors.torch import load_file

from benchmarks.reliability.processes import Command

TRAIN = ["train.max_steps=300", "train.log_every=7", "train.checkpoint_every=100", "train.validate_every=50"]
EMA = ["train.ema_decay=0.9", "train.max_grad_norm=0.5", "data.horizontal_flip=true"]


def tokenizer_words(configs: Path, *more: str) -> list[str]:
    return ["train-tokenizer", str(configs / "tokenizer.yaml"), "run.dir=run", *TRAIN, *EMA, *more]


def metrics(folder: Path) -> list[dict]:
    file = folder / "run" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def last_step(folder: Path) -> int:
    return max((line["step"] for line in metrics(folder)), default=0)


def stopped_at(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return max(int(path.name[5:]) for path in (folder / "run" / "checkpoints").glob("step_*"))


def ended(folder: Path) -> dict[str, bytes]:
    """All files of a finished run except its earlier checkpoints."""
    run = folder / "run"
    files = (path for path in run.rglob("*") if path.is_file())
    kept = {str(path.relative_to(run)): path.read_bytes() for path in files}
    last = f"step_{stopped_at(folder):08d}"
    return {name: content for name, content in kept.items() if "step_" not in name or last in name}


def errors(command: Command) -> str:
    """The lines that name an error."""
    return "\n".join(line for line in command.said.splitlines() if "error: " in line)


def new(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name


@pytest.fixture(scope="session")
def whole(configs, done, tmp_path_factory) -> Path:
    """An uninterrupted training of a tokenizer."""
    folder = tmp_path_factory.mktemp("whole")
    done(tokenizer_words(configs), folder)
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_resumes(configs, begin, done, whole, tmp_path, number):
    command = begin(tokenizer_words(configs), tmp_path)
    assert command.wait_until(lambda: last_step(tmp_path) > 10)
    command.process.send_signal(number)
    status, reason = (130, "Ctrl-C") if number == signal.SIGINT else (75, number.name)
    assert command.wait() == status, command.said
    step = stopped_at(tmp_path)
    assert step % 100, "the checkpoint is from the step at which it stopped"
    assert_names(command.said, f"stopped ({reason})", "same command")
    assert ("Ctrl-C again" in command.said) == (number == signal.SIGINT)
    note = (tmp_path / "run" / "stopped.txt").read_text().splitlines()
    assert note == [f"step {step}: {reason}", "Run the same command again to resume."]
    assert f"Resuming from step {step} " in done(tokenizer_words(configs), tmp_path)
    assert ended(tmp_path) == ended(whole), "bit for bit, unfinished means too"


def test_a_second_interrupt_stops_at_once(configs, begin, tmp_path):
    # Long steps, so that the second one arrives before the first is noticed.
    command = begin(tokenizer_words(configs, "train.batch_size=320", "train.checkpoint_every=5"), tmp_path)
    assert command.wait_until(lambda: (tmp_path / "run/checkpoints/step_00000005").exists())
    command.process.send_signal(signal.SIGINT)
    assert command.wait_until(lambda: "Ctrl-C again" in command.said)
    command.process.send_signal(signal.SIGINT)
    assert command.wait() == 130
    assert_names(command.said, "last checkpoint", "same command")


def test_a_time_limit_makes_progress_each_time(configs, here, whole, tmp_path):
    starts = 0
    while True:
        before = stopped_at(tmp_path) if starts else 0
        limit = round(0.02 * 1.5**starts, 2)  # on a busy machine, the shortest one is over after a single step
        stopped = here([*tokenizer_words(configs), "--time-limit", limit], tmp_path)
        starts += 1
        if stopped.code == 0:
            break
        assert stopped.code == 75, stopped.err
        assert f"stopped (the time limit of {limit:g} minutes)" in stopped.out + stopped.err
        assert stopped_at(tmp_path) > before
    assert starts > 1
    assert ended(tmp_path) == ended(whole)


def test_a_signal_before_the_first_step(configs, begin, tmp_path):
    command = begin(tokenizer_words(configs, "data.num_images=100000"), tmp_path)
    assert command.wait_until(lambda: signal.SIGTERM.name in caught(command.process.pid))
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 75, command.said
    assert_names(command.said, "stopped (SIGTERM)", "same command")


def caught(process: int) -> set[str]:
    """The signals that a process has handlers for."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return set()
    mask = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt")), 0)
    return {number.name for number in signal.Signals if mask >> (number - 1) & 1}


def test_two_processes_agree_and_resume(configs, begin, tmp_path):
    whole, stopped = new(tmp_path, "whole"), new(tmp_path, "stopped")
    words = tokenizer_words(configs, "train.max_steps=150")
    uninterrupted = begin(words, whole, processes=2)
    assert uninterrupted.wait() == 0, uninterrupted.said
    command = begin(words, stopped, processes=2)
    assert command.wait_until(lambda: last_step(stopped) > 10)
    command.workers()[1].send_signal(signal.SIGUSR1)  # one of them alone
    command.wait()
    first = stopped_at(stopped)
    assert first % 100
    assert "stopped.txt" in {path.name for path in (stopped / "run").iterdir()}
    assert command.said.count("stopped (") == 1, command.said
    assert "exitcode  : 75" in command.said, "the launcher reports the status of its processes"

    command = begin(words, stopped, processes=2)
    assert command.wait_until(lambda: last_step(stopped) > first + 20)
    command.process.send_signal(signal.SIGTERM)  # to the launcher, which passes it on
    command.wait()
    assert stopped_at(stopped) > first
    assert f"step {stopped_at(stopped)}: " in (stopped / "run" / "stopped.txt").read_text()
    assert begin(words, stopped, processes=2).wait() == 0
    assert ended(stopped) == ended(whole)


def test_encoding_and_generation_resume(runs, begin, done, tmp_path):
    encode = ["encode", str(runs.tokenizer), "--crops", "30", "--out", "codes"]
    generate = ["generate", str(runs.prior), "--num-images", "400", "--batch-size", "8", "--out", "out"]
    for words, begun in [(encode, ".codes.partial/identity.json"), (generate, "out/images/000008.png")]:
        whole, stopped = (new(tmp_path, f"{words[0]}_{name}") for name in ("whole", "stopped"))
        done(words, whole)
        command = begin(words, stopped)
        assert command.wait_until((stopped / begun).exists)
        command.process.send_signal(signal.SIGTERM)
        assert command.wait() == 75, command.said
        assert_names(command.said, "stopped (SIGTERM)", "same command")
        done(words, stopped)
        files = {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
        found = {path.relative_to(stopped): path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
        del found[Path("said.txt")]
        assert found == files


# --- a different number of processes, and a process that dies -------------------------------------------------------


def prior_words(configs: Path, runs, dropout: float) -> list[str]:
    model = f"model={{type: causal_transformer, hidden_size: 32, depth: 2, num_heads: 2, dropout: {dropout}}}"
    return ["train-prior", str(configs / "prior.yaml"), f"codes={runs.codes}", "run.dir=run", *TRAIN, model]


def test_the_number_of_processes_may_change_without_dropout(configs, runs, begin, done, tmp_path):
    whole, changed = new(tmp_path, "whole"), new(tmp_path, "changed")
    words = prior_words(configs, runs, dropout=0.0)
    done(words, whole)
    command = begin([*words, "--time-limit", "0.02"], changed, processes=2)
    command.wait()
    assert 0 < stopped_at(changed) < 300
    said = done(words, changed)
    assert "with 1 process instead of 2" in said
    for name, tensor in load_file(whole / "run/checkpoints/step_00000300/model.safetensors").items():
        found = load_file(changed / "run/checkpoints/step_00000300/model.safetensors")[name]
        # One number alone proves nothing: where gradients are close to 0 it drifts with the order of float32 sums.
        assert (found - tensor).square().mean().sqrt() < 3e-3, name
    losses = [[line["loss"] for line in metrics(folder)] for folder in (whole, changed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_the_number_of_processes_may_not_change_with_dropout(configs, runs, begin, here, tmp_path):
    words = prior_words(configs, runs, dropout=0.1)
    assert here([*words, "--time-limit", "0"], tmp_path).code == 75
    assert stopped_at(tmp_path) == 1
    command = begin(words, tmp_path, processes=2)
    assert command.wait() != 0
    assert_names(errors(command), "run: ", "1 process", "step 1", "2 processes", "model.dropout=0.1")
    assert_names(errors(command), "--num_processes 1")
    assert command.said.count("error: ") == 1
    assert stopped_at(tmp_path) == 1


def test_one_process_dying_ends_the_others(configs, begin, tmp_path):
    command = begin(tokenizer_words(configs, "train.max_steps=100000"), tmp_path, processes=2)
    assert command.wait_until(lambda: last_step(tmp_path) > 10)
    workers, start = command.workers(), time.monotonic()
    workers[1].kill()
    assert command.wait(60) != 0
    for worker in workers:
        worker.wait(max(0.1, 60 - (time.monotonic() - start)))
    assert "Signal 9 (SIGKILL)" in command.said
    said = command.said
    assert "error: " in said or "stopped (SIGTERM)" in said, "the second if the launcher was faster"


def test_an_error_of_one_process_is_printed_once(configs, begin, tmp_path):
    """The images that only the second process reads disappear."""
    from benchmarks.reliability.drawn_images import draw_images

    images = draw_images(tmp_path / "images", 64, 16)
    more = [f"data.source={images}", "data.in_memory_gb=0", "train.max_steps=100000", "data.num_images=null"]
    command = begin(tokenizer_words(configs, *more), tmp_path, processes=2)
    assert command.wait_until(lambda: last_step(tmp_path) > 5)
    for file in images.rglob("*.png"):
        file.unlink()
    start = time.monotonic()
    assert command.wait(60) != 0
    assert time.monotonic() - start < 60
    assert command.said.count("error: ") == 1, command.said
    assert ".png" in errors(command)


def test_two_commands_do_not_train_into_one_folder(configs, begin, tmp_path):
    words = tokenizer_words(configs, "train.max_steps=100000")
    first = begin(words, tmp_path)
    assert first.wait_until(lambda: last_step(tmp_path) > 5)
    second = begin(words, tmp_path)
    assert second.wait() == 2
    assert_names(errors(second), "run.dir run", "another process", "run.dir=")
    assert first.running
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 75
