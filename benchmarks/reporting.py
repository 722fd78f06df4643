"""Shared output of all benchmarks: a table on the screen and, with ``--json FILE``, the same as JSON."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments shared by all benchmarks."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--json", type=Path, help="also write the table to this file")
    return arguments


def alternate(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each candidate. They alternate after one warm-up, so that noise affects all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compared(name: str, ours: list[float], peer: list[float]) -> Row:
    """A row: medians, the ratio of medians (above 1: ours is faster), and the range of ratios over the repeats."""
    ratios = [p / o for o, p in zip(ours, peer, strict=True)]
    return {
        "name": name,
        "ours_s": statistics.median(ours),
        "peer_s": statistics.median(peer),
        "ratio": statistics.median(peer) / statistics.median(ours),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def report(settings: dict[str, Any], rows: list[Row], file: Path | None) -> None:
    """Print the rows, and write {"settings": ..., "rows": [...]} to ``file`` if it is given."""
    settings = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        **settings,
    }
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_shown(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    print(", ".join(f"{key} {value}" for key, value in settings.items()))
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    if file:
        file.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n", encoding="utf-8")


def set_title(name: str) -> str:
    """A dataset's name in results."""
    return name.upper().replace("CIFAR10", "CIFAR-10")


def described_machine() -> dict[str, str]:
    """`machine` and `device` for the introduction of a section."""
    accelerated = torch.accelerator.is_available()
    return {
        "machine": f"threads: {torch.get_num_threads()}, {platform.processor() or platform.machine()}",
        "device": "A GPU was used." if accelerated else "No GPU was used.",
    }


def write_section(file: Path, name: str, text: str) -> None:
    """Write ``text`` (Markdown) into ``file`` between the marks of section ``name``; keep all other sections."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before = file.read_text(encoding="utf-8") if file.is_file() else "# Results\n"
    section = f"{begin}\n{text.strip()}\n{end}"
    if begin in before:
        head, _, rest = before.partition(begin)
        after = head + section + rest.partition(end)[2]
    else:
        after = f"{before.rstrip()}\n\n{section}\n"
    file.write_text(after, encoding="utf-8")


def markdown_table(columns: dict[str, str], rows: list[Row]) -> str:
    """The rows as a table; ``columns`` maps keys to titles. Three significant digits; missing values are empty."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [_in_table(row.get(key)) for key in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _in_table(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
