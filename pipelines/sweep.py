"""Trains every combination of some settings, each in its own run folder, and shows one table.

twostage sweep configs/tokenizer/vqvae_shapes.yaml train.lr=1e-4,1e-3 model.bottleneck.codebook_size=64,256
"""

from pathlib import Path
from typing import Annotated

import typer

from twostage.core.errors import InputError
from twostage.core.files import write_json
from twostage.core.machine.command import is_first_process, print_once, run_command

__all__ = ["command"]


def command(
    config: Annotated[Path, typer.Argument(help="A config file of a tokenizer or a prior.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="key=a,b,c for each setting to vary, and key=value for what is the same in all runs."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder of all run folders; by default runs/NAME_sweep of the config's run.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the table to this file.")] = None,
) -> None:
    """Train every combination of some settings, and show one table. Each run has its own folder. Run the same command
    again to resume; finished runs are not trained again."""
    from pipelines.comparison.combinations import combinations
    from pipelines.comparison.sweep_runs import open_sweep, sweep_document, sweep_table, train_all
    from twostage.core.machine.stopping import resumable

    if json_file and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise InputError(f"--json {json_file}: expected a file in an existing folder")
    found, fixed = combinations(settings or [])
    runs = open_sweep(config, found, fixed, out)
    with resumable():
        train_all(runs)
    print_once(sweep_table(runs))
    if json_file and is_first_process():
        write_json(json_file, sweep_document(runs))
    if failed := [run for run in runs if run.error]:
        lines = "\n  ".join(f"{run.label}: {run.error}" for run in failed)
        raise InputError(
            f"{len(failed)} of {len(runs)} combinations failed:\n  {lines}\nFix them or remove their values, then run "
            "the same command again: finished runs are not trained again"
        )


if __name__ == "__main__":
    run_command(command)
