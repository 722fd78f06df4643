"""Run the reliability harness and write its figures into docs/reliability.md.

python -m benchmarks.reliability [PART ...]

Parts: kills images layouts configs soak; all by default. Rows of other parts stay as they are.
"""

import argparse
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.reliability.dataset_layouts import fuzz_layouts
from benchmarks.reliability.kills import kill_everywhere
from benchmarks.reliability.memory_soak import soak
from benchmarks.reliability.mutated_configs import fuzz_configs
from benchmarks.reliability.mutated_images import fuzz_images

DOCS = Path(__file__).parents[2] / "docs"
FIGURES = DOCS / "reliability.json"
HEAD = """# Reliability

`make soak` (`python -m benchmarks.reliability`) writes this page. It runs the same kinds of checks
as the tests, for hours instead of minutes. If a part finds a fault, it stops and its row keeps the earlier result.

"""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("parts", nargs="*", help="kills, images, layouts, configs, soak; all by default")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--kills", type=int, default=50)
    arguments.add_argument("--images", type=int, default=500)
    arguments.add_argument("--layouts", type=int, default=3000)
    arguments.add_argument("--configs", type=int, default=1000)
    arguments.add_argument("--minutes", type=float, default=120, help="length of the soak")
    asked = arguments.parse_args()
    runs: dict[str, Callable[[Path], dict[str, Any]]] = {
        "kills": lambda folder: kill_everywhere(folder, asked.kills, asked.seed),
        "images": lambda folder: fuzz_images(asked.images, asked.seed, folder),
        "layouts": lambda folder: fuzz_layouts(asked.layouts, asked.seed, folder),
        "configs": lambda folder: fuzz_configs(asked.configs, asked.seed, folder),
        "soak": lambda folder: soak(asked.minutes, folder),
    }
    if unknown := set(asked.parts) - runs.keys():
        arguments.error(f"no such part: {', '.join(unknown)}; expected {', '.join(runs)}")
    for part in asked.parts or runs:
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            figures = runs[part](Path(folder))
        seconds = time.monotonic() - start
        record(part, {"seed": asked.seed, **figures, "took_minutes": seconds / 60, "where": where()})


def record(part: str, figures: dict[str, Any]) -> None:
    """Store the figures of a part and rewrite the page."""
    known = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    known[part] = figures
    FIGURES.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    write_page(known)
    print(json.dumps(figures, indent=2))


def write_page(known: dict[str, Any]) -> None:
    """Replace the table of docs/reliability.md; the text below it stays."""
    page = DOCS / "reliability.md"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    _, marker, below = text.partition("## How each promise is tested")
    table = "| what | goal | result | when |\n|---|---|---|---|\n"
    for part, figures in ((part, known[part]) for part in ROWS if part in known):
        when = f"{figures['where']}, {figures['took_minutes']:.1f} min"
        table += f"| {' | '.join([*ROWS[part](figures), when])} |\n"
    page.write_text(f"{HEAD}{table}\n{marker}{below}", encoding="utf-8")


def where() -> str:
    """The date, commit and machine."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=DOCS, capture_output=True, text=True, check=False
    ).stdout.strip()
    return f"{date.today()}, commit {commit}, torch {version('torch')}, {platform.machine()}"


def kills_row(figures: dict[str, Any]) -> tuple[str, str, str]:
    counts = "; ".join(f"{name}: {count}" for name, count in figures["by_command"].items())
    return (
        "commands killed with SIGKILL at random moments, then restarted",
        f"{figures['kills']} of {figures['kills']} end with the same bytes as an uninterrupted run",
        (
            f"{figures['bit_equal']} of {figures['kills']} ({counts}); in {figures['single_deaths']} cases only one of "
            f"two processes was killed, and all processes had exited within {figures['slowest_end_s']:.0f} s"
        ),
    )


def images_row(figures: dict[str, Any]) -> tuple[str, str, str]:
    return (
        "mutated images (PNG, JPEG, GIF, WebP, TIFF, BMP)",
        f"{figures['mutated']} of {figures['mutated']} without a crash; every file is used or reported",
        (
            f"{figures['crashes']} crashes; {figures['files']} files = {figures['used']} used + {figures['skipped']} "
            "reported, the same in `inspect` and in training"
        ),
    )


def layouts_row(figures: dict[str, Any]) -> tuple[str, str, str]:
    return (
        "datasets: layouts x split names x label columns x image modes x stray files",
        "every image has the right split and label, every file is used or reported, training sees no held-out image",
        f"{figures['layouts']:,} of {figures['layouts']:,}",
    )


def configs_row(figures: dict[str, Any]) -> tuple[str, str, str]:
    return (
        "mutated configurations",
        f"{figures['configs']} of {figures['configs']}: one training step, or a one-sentence error that names the key",
        f"{figures['trained']} trained, {figures['refused']} refused with one sentence, 0 anything else",
    )


def soak_row(figures: dict[str, Any]) -> tuple[str, str, str]:
    return (
        "stage one and stage two alternating in one process",
        "two hours; memory and open files change by less than 3% from the first quarter to the last",
        (
            f"{figures['minutes']:.0f} minutes, {figures['rounds']} rounds; memory {figures['memory_mib_first']:.0f} "
            f"to {figures['memory_mib_last']:.0f} MiB ({figures['memory_mib_growth']:+.1f}%), open files "
            f"{figures['open_files_first']:.1f} to {figures['open_files_last']:.1f} "
            f"({figures['open_files_growth']:+.1f}%)"
        ),
    )


ROWS = {"kills": kills_row, "images": images_row, "layouts": layouts_row, "configs": configs_row, "soak": soak_row}

if __name__ == "__main__":
    main()
