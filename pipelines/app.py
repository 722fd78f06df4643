"""Serves a page to play with a trained model in the browser, for this machine alone.

twostage app runs/PRIOR
"""

from pathlib import Path
from typing import Annotated

import typer

from twostage.core.machine.command import run_command

__all__ = ["command"]


def command(
    model: Annotated[str, typer.Argument(help="A pipeline folder, runs/NAME of a prior or a VAE, or a hub id.")],
    host: Annotated[str, typer.Option(help="The address to listen on; by default only this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    tokenizer: Annotated[str | None, typer.Option(help="runs/TOKENIZER, if it has moved.")] = None,
) -> None:
    """Open a page in the browser to try a trained model."""
    from pipelines.drawing.two_stage import TwoStagePipeline
    from pipelines.page.server import check_server, serve
    from twostage.core.machine.processes import join_processes

    check_server(host, port)
    pipeline = TwoStagePipeline.from_pretrained(model, tokenizer).to(join_processes().device or "cpu")
    name = Path(model).resolve().name if Path(model).exists() else model
    serve(pipeline, name, model, host, port)


if __name__ == "__main__":
    run_command(command)
