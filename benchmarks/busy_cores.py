"""How fast does the MNIST VAE train next to another training run on the same two cores?

python -m benchmarks.busy_cores [--repeats 3] [--seconds 4] [--spin 0 500 2000] [--config FILE] [--json FILE]

Each measurement is a real training run in its own process (`train`, without validation and checkpoints). It runs alone
on one of two cores, alone on both, and on both next to a second run that was started the same way. This is repeated
with twostage's default spin limit for OpenMP's waiting threads, with every ``--spin``, and with no limit. `of_pinned`
is the speed relative to the run alone on one core, `of_unlimited` relative to the same measurement without a limit.
The images must be in $TWOSTAGE_DATA/mnist (otherwise they are downloaded as ylecun/mnist).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import twostage  # noqa: F401 - limits how long threads spin; the next line imports torch
from benchmarks.reporting import Row, parser, report

CONFIG = Path(__file__).parents[1] / "configs" / "tokenizer" / "vae_mnist.yaml"
UNLIMITED = "300000"  # libgomp's own default
WARM_UP = 1.0  # seconds


def train_for(seconds: float, config_file: str) -> None:
    """Print `ready` after a warm-up, then train for ``seconds`` and print the steps per second."""
    from stage1_tokenizer.train_tokenizer import TokenizerConfig, train
    from twostage.core.config.sections import load_config
    from twostage.core.training.training_run import TrainingRun

    advance, ended = TrainingRun.advance, []

    class Done(Exception):
        pass

    def timed(run: TrainingRun) -> dict[str, float] | None:
        metrics = advance(run)
        ended.append(time.perf_counter())
        if len(ended) == 1:
            ended.append(ended[0])
        if len(ended) > 2 and ended[1] == ended[0] and ended[-1] - ended[0] > WARM_UP:
            ended[1] = ended[-1]
            del ended[2:]
            print("ready", flush=True)
        if ended[1] != ended[0] and ended[-1] - ended[1] > seconds:
            raise Done
        return metrics

    TrainingRun.advance = timed
    with tempfile.TemporaryDirectory() as folder:
        rare = ["train.epochs=1000000", *(f"train.{what}_every=1000000000" for what in ("validate", "checkpoint"))]
        try:
            train(load_config(TokenizerConfig, config_file, [f"run.dir={folder}/run", "run.trackers=[]", *rare]))
        except Done:
            print(json.dumps((len(ended) - 2) / (ended[-1] - ended[1])), flush=True)


def start(cores: set[int], spin: str | None, seconds: float, config: Path) -> subprocess.Popen[str]:
    """A training run on ``cores``; ``spin`` None: twostage's default."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment |= {"GOMP_SPINCOUNT": spin} if spin else {}
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # inherited by the process
    try:
        words = [sys.executable, "-m", "benchmarks.busy_cores", "--config", str(config), "--work", str(seconds)]
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    finally:
        os.sched_setaffinity(0, before)


def steps_per_second(cores: set[int], spin: str | None, seconds: float, config: Path, beside: bool = False) -> float:
    """Measure one training run; with ``beside``, a second one runs at the same time."""
    other = start(cores, spin, 1e9, config) if beside else None
    try:
        if other:
            _wait_until_ready(other)
        with start(cores, spin, seconds, config) as measured:
            _wait_until_ready(measured)
            assert measured.stdout is not None
            return float([line for line in measured.stdout if line.strip()][-1])
    finally:
        if other:
            other.kill()
            other.wait()


def _wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    if not any(line.strip() == "ready" for line in process.stdout):
        raise RuntimeError("a training run exited before it was measured")


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--seconds", type=float, default=4.0)
    arguments.add_argument("--spin", nargs="*", default=[], metavar="COUNT", help="values of GOMP_SPINCOUNT")
    arguments.add_argument("--config", type=Path, default=CONFIG, help="a file of configs/tokenizer/")
    arguments.add_argument("--work", type=float, help="seconds; used internally")
    options = arguments.parse_args()
    if options.work:
        train_for(options.work, str(options.config))
        return
    both = set(sorted(os.sched_getaffinity(0))[:2])
    one = {min(both)}
    spins: dict[str, str | None] = {"as started now": None, "no limit": UNLIMITED}
    spins |= {f"spin {count}": count for count in options.spin}
    measured: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.repeats):  # alternating, so that noise affects all alike
        found = {("alone on one core", "as started now"): (one, None, False)}
        for name, spin in spins.items():
            found |= {("alone", name): (both, spin, False), ("beside another training", name): (both, spin, True)}
        for key, (cores, spin, beside) in found.items():
            speed = steps_per_second(cores, spin, options.seconds, options.config, beside)
            measured.setdefault(key, []).append(speed)
            print(f"{', '.join(key)}: {speed:.1f} steps per second", file=sys.stderr, flush=True)
    medians = {key: statistics.median(values) for key, values in measured.items()}
    pinned = medians["alone on one core", "as started now"]
    rows: list[Row] = []
    for (where, name), speed in medians.items():
        row = {"name": f"{where}, {name}", "steps_per_s": speed, "of_pinned": speed / pinned}
        if (where, "no limit") in medians:
            row["of_unlimited"] = speed / medians[where, "no limit"]
        values = measured[where, name]
        rows.append(row | {"slowest": min(values), "fastest": max(values)})
    settings = {"config": options.config.stem, "seconds": options.seconds, "repeats": options.repeats}
    report(settings | {"cores": len(both)}, rows, options.json)


if __name__ == "__main__":
    main()
