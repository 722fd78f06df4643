"""How fast do the configs train on quiet cores and next to another training, with twostage's threads and with torch's?

python -m benchmarks.busy_cores [FILE ...] [--repeats 3] [--seconds 2] [--spin 500 2000] [--quiet 600] [--json FILE]

FILE is a config of configs/tokenizer/ or configs/prior/; by default vae_mnist. Each measurement is a real training run
in its own process (`train`, without validation and checkpoints). Those of one config stay alive and take turns: on one
of two cores (`pinned`), on both as twostage starts it (`ours`), on both with a thread per core whose waiting spins as
long as OpenMP likes (`default`), and like `ours` with every ``--spin``. Each except `pinned` also runs next to a second
run of its kind. `of_default` and `of_pinned` are speeds relative to those of the same repeat, as medians.

``--quiet`` waits for at most so many seconds, before each measurement, until other programs leave both cores alone;
`others` is the median of how many cores they used. A prior is trained on random codes in the form of its config's
tokenizer. The images must be in $TWOSTAGE_DATA (otherwise they are downloaded).
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

import twostage  # noqa: F401 - limits how long threads spin; the next line imports torch
from benchmarks.reporting import Row, parser, report

CONFIGS = Path(__file__).parents[1] / "configs"
UNLIMITED = "300000"  # libgomp's own default
WARM_UP = 3  # steps
QUIET = 0.1  # cores
CODES = {"train": 2048, "test": 256}  # rows


# --- a training run that waits for its turn ---------------------------------------------------------------------------


def train_in_turns(file: str) -> None:
    """Print `ready` after a warm-up; then, for each number of seconds on stdin, train that long and print the steps per
    second."""
    from twostage.core.training.training_run import TrainingRun

    advance, steps, turn = TrainingRun.advance, [0], [0.0, 0.0]  # from, to

    def timed(self: TrainingRun) -> dict[str, float] | None:
        metrics = advance(self)
        steps[0] += 1
        now = time.perf_counter()
        if steps[0] == WARM_UP or (steps[0] > WARM_UP and now >= turn[1]):
            print("ready" if steps[0] == WARM_UP else json.dumps((steps[0] - WARM_UP) / (now - turn[0])), flush=True)
            if not (line := sys.stdin.readline()):
                raise SystemExit
            steps[0], start = WARM_UP, time.perf_counter()
            turn[:] = start, start + float(line)
        return metrics

    TrainingRun.advance = timed
    rare = ["train.epochs=null", "train.max_steps=100000000", "run.trackers=[]"]
    rare += [f"train.{what}_every=1000000000" for what in ("validate", "checkpoint")]
    with tempfile.TemporaryDirectory() as folder:
        train_config(Path(file), Path(folder), rare)


def train_config(file: Path, folder: Path, settings: list[str]) -> None:
    """Train by a config in ``folder``."""
    from stage1_tokenizer import tokenizer_training
    from stage2_prior import prior_training
    from twostage.core.config.sections import load_config

    settings = [*settings, f"run.dir={folder / 'run'}"]
    if file.parent.name == "prior":
        write_random_codes(load_config(prior_training.PriorTrainingConfig, file).codes, folder / "codes")
        settings.append(f"codes={folder / 'codes'}")
        prior_training.train(load_config(prior_training.PriorTrainingConfig, file, settings))
    else:
        tokenizer_training.train(load_config(tokenizer_training.TokenizerConfig, file, settings))


def write_random_codes(named: str, folder: Path) -> None:
    """Codes as the tokenizer's config would give them whose name the folder ``named`` has, drawn at random."""
    from stage1_tokenizer.autoencoder import Autoencoder
    from stage1_tokenizer.autoencoder_config import AutoencoderConfig
    from stage1_tokenizer.tokenizer_training import TokenizerConfig
    from stage2_prior.codes import Manifest, SplitFiles, TokenizerReference, code_statistics
    from twostage.core.config.sections import load_config
    from twostage.core.files import write_json

    config = load_config(TokenizerConfig, CONFIGS / "tokenizer" / f"{Path(named).name}.yaml")
    classes = [f"class {label}" for label in range(10)]
    tokenizer = Autoencoder(
        AutoencoderConfig(
            image_size=config.data.size, channels=config.data.channels, class_names=classes, model=config.model
        )
    )
    quantizer, draw = tokenizer.bottleneck, np.random.default_rng(0)
    grid = tokenizer.code_grid
    folder.mkdir(parents=True)
    codes = {split: draw.integers(quantizer.codebook_size, size=(rows, *grid)) for split, rows in CODES.items()}
    for split, rows in CODES.items():
        np.save(folder / f"{split}.codes.npy", codes[split].astype(np.uint16))
        np.save(folder / f"{split}.labels.npy", draw.integers(len(classes), size=rows).astype(np.int32))
    manifest = Manifest(
        tokenizer=TokenizerReference(hash="none: drawn codes", path=str(folder)),
        source="random codes",
        image_size=config.data.size,
        channels=config.data.channels,
        grid=grid,
        scales=quantizer.scales,
        codebook_size=quantizer.codebook_size,
        digits=list(quantizer.digits) or None,
        class_names=classes,
        validation_split="test",
        splits={
            split: SplitFiles(rows=rows, codes=f"{split}.codes.npy", labels=f"{split}.labels.npy")
            for split, rows in CODES.items()
        },
        **code_statistics(codes, quantizer.codebook_size),
    )
    write_json(folder / "manifest.json", manifest.model_dump(mode="json"))


# --- their turns ------------------------------------------------------------------------------------------------------


class Turns:
    """A training run in its own process, on ``cores``.

    Args:
        variables: of the environment, in place of those that set threads.
    """

    def __init__(self, config: Path, cores: set[int], variables: dict[str, str]) -> None:
        threads = ("GOMP_SPINCOUNT", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS")
        environment = {name: value for name, value in os.environ.items() if name not in threads} | variables
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)  # inherited by the process
        words = [sys.executable, "-m", "benchmarks.busy_cores", str(config), "--work"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, env=environment, stdin=pipe, stdout=pipe, text=True)
        os.sched_setaffinity(0, before)

    def __enter__(self) -> "Turns":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def wait_until_ready(self) -> None:
        """Wait for the end of the warm-up."""
        self._read("ready")

    def begin(self, seconds: float) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()

    def speed(self) -> float:
        """The steps per second since :meth:`begin`."""
        return float(self._read(""))

    def _read(self, expected: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == expected or (not expected and line[:1].isdecimal()):
                return line
        raise RuntimeError(f"{self.process.args}: exited before it was measured")


def busy_seconds(cores: set[int]) -> float:
    """The seconds for which ``cores`` have worked since the machine started."""
    times = psutil.cpu_times(percpu=True)
    return sum(sum(times[core]) - times[core].idle - times[core].iowait for core in cores)


def wait_until_quiet(cores: set[int], seconds: float) -> None:
    """Wait until other programs use less than `QUIET` cores, for at most ``seconds``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        before = busy_seconds(cores)
        time.sleep(0.5)
        if busy_seconds(cores) - before < 0.5 * QUIET:
            return


def measure(running: list[Turns], seconds: float, cores: set[int]) -> tuple[float, float]:
    """The first one's steps per second while all ``running`` train, and how many cores other programs used."""
    processes = [psutil.Process(each.process.pid) for each in running]
    before, start = busy_seconds(cores) - sum(sum(each.cpu_times()[:2]) for each in processes), time.monotonic()
    for other in running[1:]:
        other.begin(seconds + 1)
    time.sleep(0.5 * (len(running) > 1))
    running[0].begin(seconds)
    speed = running[0].speed()
    for other in running[1:]:
        other.speed()
    others = busy_seconds(cores) - sum(sum(each.cpu_times()[:2]) for each in processes) - before
    return speed, others / (time.monotonic() - start)


def rows_of(config: Path, spins: list[str], repeats: int, seconds: float, quiet: float) -> list[Row]:
    """A row for each way to start ``config``, alone and next to a second run."""
    cores = set(sorted(os.sched_getaffinity(0))[:2])
    kinds = {"default": {"GOMP_SPINCOUNT": UNLIMITED, "OMP_NUM_THREADS": str(len(cores))}, "ours": {}}
    kinds |= {f"spin {count}": {"GOMP_SPINCOUNT": count} for count in spins}
    with contextlib.ExitStack() as running:

        def start(cores: set[int], variables: dict[str, str]) -> Turns:
            turns = running.enter_context(Turns(config, cores, variables))
            turns.wait_until_ready()
            return turns

        cells = {("alone", "pinned"): [start({min(cores)}, {})]}
        for kind, variables in kinds.items():
            pair = [start(cores, variables) for _ in range(2)]
            cells |= {("alone", kind): pair[:1], ("beside", kind): pair}
        measured: dict[tuple[str, str], list[tuple[float, float]]] = {cell: [] for cell in cells}
        for _ in range(repeats):  # alternating, so that noise affects all alike
            for cell, pair in cells.items():
                wait_until_quiet(cores, quiet)
                measured[cell].append(measure(pair, seconds, cores))
    rows: list[Row] = []
    for (where, kind), found in measured.items():
        speeds = [speed for speed, _ in found]
        row = {"name": f"{config.stem}, {where}, {kind}", "steps_per_s": statistics.median(speeds)}
        for other in ("default", "pinned"):
            peers = measured["alone" if other == "pinned" else where, other]
            ratios = [speed / peer for speed, (peer, _) in zip(speeds, peers, strict=True)]
            row[f"of_{other}"] = statistics.median(ratios)
            row |= {f"of_{other}_min": min(ratios), f"of_{other}_max": max(ratios)}
        rows.append(row | {"others": statistics.median(share for _, share in found)})
    return rows


def main() -> None:
    arguments = parser((__doc__ or "").splitlines()[0])
    arguments.add_argument("configs", nargs="*", type=Path, metavar="FILE")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--seconds", type=float, default=2.0)
    arguments.add_argument("--spin", nargs="*", default=[], metavar="COUNT", help="values of GOMP_SPINCOUNT")
    arguments.add_argument("--quiet", type=float, default=0.0, metavar="SECONDS", help="wait for quiet cores")
    arguments.add_argument("--work", action="store_true", help="used internally")
    options = arguments.parse_args()
    configs = options.configs or [CONFIGS / "tokenizer" / "vae_mnist.yaml"]
    if options.work:
        train_in_turns(str(configs[0]))
        return
    rows: list[Row] = []
    for config in configs:
        rows += rows_of(config, options.spin, options.repeats, options.seconds, options.quiet)
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    report({"seconds": options.seconds, "repeats": options.repeats}, rows, options.json)


if __name__ == "__main__":
    main()
