"""Serves a page to play with a trained model in the browser, to this machine alone.

twostage app runs/PRIOR
"""

import importlib.util
import ipaddress
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.files.given_images import MAX_BYTES
from pipelines.saved.proxies import broken_proxy
from twostage.core.errors import InputError
from twostage.core.machine.command import run_command
from twostage.core.machine.processes import join_processes

__all__ = ["serve"]

POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
"""Lets the page fetch from its own server only: the browser itself refuses the rest."""


def serve(model: str, host: str, port: int, tokenizer: str | None = None) -> None:
    """Serves the page of a pipeline folder, or of the run of a prior or a variational autoencoder, until it is stopped.

    Nothing is sent to anyone else, and the browser is told to fetch nothing from elsewhere. What is uploaded and drawn
    lies in a temporary folder, which goes when the page does.

    Raises:
        InputError: Gradio is not installed, no such model, an address that cannot be had.
    """
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the page needs gradio, which is not installed: pip install 'twostage[app]'")
    _check_address(host, port)
    pipeline = TwoStagePipeline.from_pretrained(model, tokenizer)
    pipeline.to(join_processes().device or "cpu")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder goes then, too
    with tempfile.TemporaryDirectory(prefix="twostage_app_") as folder:
        _set_environment(host, folder)
        from starlette.middleware import Middleware

        from pipelines.page.app_page import CSS, THEME, build_page

        page = build_page(pipeline, Path(model).resolve().name if Path(model).exists() else model)
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            max_file_size=MAX_BYTES,
            app_kwargs={"middleware": [Middleware(_OwnFilesOnly)]},
            theme=THEME,
            css=CSS,
            footer_links=[],
            share=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            show_error=True,
            quiet=True,
            prevent_thread_lock=True,
        )
        if not _is_loopback(host):
            print(f"warning: --host {host}: anyone who reaches this machine can use the page", file=sys.stderr)
        print(f"{address} shows {model}; Ctrl-C stops it", flush=True)
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)  # or it might write into the folder while that is removed


def _set_environment(host: str, folder: str) -> None:
    """What Gradio reads from the environment, some of it while it is imported."""
    os.environ |= {
        "GRADIO_TEMP_DIR": folder,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_RUN_HISTORY": "False",
    }
    # Gradio asks its own server whether it is there, which must not go through a proxy, and stops at one that cannot
    # be used.
    exempt = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = "*" if broken_proxy() else ",".join(filter(None, [exempt, host, "localhost"]))


def _check_address(host: str, port: int) -> None:
    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
            trial.bind((host, port))
    except OSError as error:
        raise InputError(f"--host {host}, --port {port}: cannot be had ({error.strerror}); give another") from None


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback


class _OwnFilesOnly:
    """Sends `POLICY` with every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def command(
    model: Annotated[str, typer.Argument(help="A pipeline folder, or runs/NAME of a prior or a VAE.")],
    host: Annotated[str, typer.Option(help="Where to listen; this machine alone by default.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    tokenizer: Annotated[str | None, typer.Option(help="runs/TOKENIZER, where it has moved.")] = None,
) -> None:
    """Open a page in the browser to play with a trained model."""
    serve(model, host, port, tokenizer)


if __name__ == "__main__":
    run_command(command)
