"""Trains every combination of a sweep in its own run folder. Finished runs are not trained again."""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.comparison.combinations import Combination
from pipelines.drawing.rebuilt_images import find_decoder
from pipelines.files.text_table import text_table
from pipelines.saved.saved_model import SavedModel
from stage1_tokenizer.tokenizer_training import TokenizerConfig
from stage1_tokenizer.tokenizer_training import train as train_tokenizer
from stage2_prior.prior_training import PriorTrainingConfig
from stage2_prior.prior_training import train as train_prior
from twostage.core.config.sections import CHANGES_NO_NUMBER, keys_marked, load_config
from twostage.core.config.yaml_text import read_yaml
from twostage.core.errors import InputError
from twostage.core.machine.command import print_once
from twostage.core.wording import one_line

__all__ = ["SweptRun", "open_sweep", "sweep_document", "sweep_table", "train_all"]

Config = TokenizerConfig | PriorTrainingConfig
BASELINES = {"unigram", "uniform"}
"""Figures of the codes, not of a prior."""


@dataclass
class SweptRun:
    """One combination, and what became of it."""

    values: dict[str, str]
    config: Config | None
    """None: the combination is refused."""
    step: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    """The held-out figures that `model/` has: a prior's best, a tokenizer's last."""
    error: str | None = None

    @property
    def label(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.values.items())


def open_sweep(config: Path, found: Sequence[Combination], fixed: Sequence[str], out: Path | None) -> list[SweptRun]:
    """Reads the configuration of every combination.

    Args:
        fixed: settings that are the same for all.
        out: the folder of all run folders; None: `NAME_sweep` beside the config's `run.dir`.

    Raises:
        InputError: no combination is valid, or a key has no effect on the results.
    """
    keys = {*found[0].values, *(setting.partition("=")[0] for setting in fixed)}
    schema: type[Config] = PriorTrainingConfig if _is_prior(config, keys) else TokenizerConfig
    notices: dict[str, None] = {}
    folder, runs = out, []
    for one in found:
        settings = [*fixed, *(f"{key}={value}" for key, value in one.values.items())]
        try:
            opened = load_config(schema, config, settings, lambda line: notices.update({line: None}))
            if folder is None:
                usual = Path(opened.run.dir)
                folder = usual.with_name(f"{usual.name}_sweep")
            run = opened.run.model_copy(update={"dir": str(folder / one.name)})
            runs.append(SweptRun(one.values, opened.model_copy(update={"run": run})))
        except InputError as error:
            runs.append(SweptRun(one.values, None, error=str(error)))
    valid = [run for run in runs if run.config]
    if not valid:
        raise InputError(runs[0].error or "")
    for line in notices:
        print_once(line)
    _check_effect(valid)
    return runs


def _is_prior(config: Path, keys: set[str]) -> bool:
    """Whether a config trains a prior: it or the settings name codes."""
    if "codes" in keys:
        return True
    try:
        document, _ = read_yaml(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # load_config explains it
    return isinstance(document, dict) and "codes" in document


def _check_effect(runs: Sequence[SweptRun]) -> None:
    """Refuses a key on which no result depends, and values that mean the same."""
    seen: dict[str, str] = {}
    for run in runs:
        assert run.config
        if useless := run.values.keys() & keys_marked(run.config, CHANGES_NO_NUMBER):
            key = min(useless)
            raise InputError(f"{key}={run.values[key]}: has no effect on the results of a run. Use another key")
        same = run.config.model_copy(update={"run": run.config.run.model_copy(update={"dir": ""})}).model_dump_json()
        if same in seen:
            raise InputError(f"{seen[same]} and {run.label}: are the same configuration. Remove a value of them")
        seen[same] = run.label


def train_all(runs: Sequence[SweptRun]) -> None:
    """Trains the runs one after another; one that fails is noted, and the others are trained."""
    for number, run in enumerate(runs, 1):
        print_once(f"[{number}/{len(runs)}] {run.label}" + (f": {run.error}" if run.error else ""))
        if run.config is None:
            continue
        try:
            _train(run.config)
            run.step, run.figures = _result(run.config)
        except InputError as error:
            run.error = str(error)
        except Exception as error:  # one that is too large for the memory, or a bug: the others can still be trained
            traceback.print_exc()
            run.error = f"{type(error).__name__}: {one_line(error)}"
        if run.error:
            print_once(f"failed: {run.error}")


def _train(config: Config) -> None:
    if isinstance(config, PriorTrainingConfig):
        train_prior(config, decode=find_decoder(config.codes))
    else:
        train_tokenizer(config)


def _result(config: Config) -> tuple[int, dict[str, float]]:
    line = SavedModel.find_run(config.run.dir).held_out_figures()
    return int(line["step"]), {key: value for key, value in line.items() if key not in {"step", *BASELINES}}


def sweep_table(runs: Sequence[SweptRun]) -> str:
    """A row for each combination with its held-out figures, and the one with the lowest loss."""
    keys = list(runs[0].values)
    figures = dict.fromkeys(name for run in runs for name in run.figures)
    columns = {key: key for key in [*keys, "step", *figures, "result"]}
    rows = [
        run.values
        | ({"result": "failed"} if run.error else {"step": f"{run.step:,}"})
        | {name: f"{value:.4g}" for name, value in run.figures.items()}
        for run in runs
    ]
    lines = [text_table({key: title for key, title in columns.items() if any(key in row for row in rows)}, rows)]
    if trained := [run for run in runs if run.config and not run.error]:
        best = min(trained, key=lambda run: run.figures["loss"])
        assert best.config
        lines.append(f"lowest held-out loss: {best.figures['loss']:.4g} with {best.label} ({best.config.run.dir})")
    return "\n".join(lines)


def sweep_document(runs: Sequence[SweptRun]) -> dict[str, Any]:
    """The content of the --json file."""
    return {
        "runs": [
            {
                "values": run.values,
                "dir": run.config and run.config.run.dir,
                "step": run.step,
                "held_out": run.figures,
                "error": run.error,
            }
            for run in runs
        ]
    }
