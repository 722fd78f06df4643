"""The server of the page, for this machine alone."""

import importlib.util
import ipaddress
import os
import signal
import socket
import sys
import tempfile
from typing import Any

from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.files.given_images import MAX_BYTES
from pipelines.saved.proxies import broken_proxy
from twostage.core.errors import InputError
from twostage.core.machine.installation import pip_install

__all__ = ["check_server", "serve"]

POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
"""A header with which the browser refuses to fetch anything from other servers."""


def check_server(host: str, port: int) -> None:
    """Refuses to start where the page cannot be served.

    Raises:
        InputError: Gradio is not installed, or the address is not available.
    """
    if importlib.util.find_spec("gradio") is None:
        raise InputError(f"the page needs gradio, which is not installed. Run: {pip_install('app')}")
    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
            trial.bind((host, port))
    except OSError as error:
        raise InputError(
            f"--host {host}, --port {port}: not available ({error.strerror}). Choose another port or host"
        ) from None


def serve(pipeline: TwoStagePipeline, name: str, model: str, host: str, port: int) -> None:
    """Serves the page of a pipeline until it is stopped.

    Nothing is sent to anyone else, and the browser fetches nothing from elsewhere. Uploaded and generated
    images are kept in a temporary folder, which is removed with the page.

    Args:
        name: the model's name on the page.
        model: the model as the command names it.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder is removed then, too
    with tempfile.TemporaryDirectory(prefix="twostage_app_") as folder:
        _set_environment(host, folder)
        from starlette.middleware import Middleware

        from pipelines.page.app_page import CSS, THEME, build_page

        page = build_page(pipeline, name)
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
        if not ipaddress.ip_address(socket.gethostbyname(host)).is_loopback:
            print(f"warning: --host {host}: anyone who can reach this machine can use the page", file=sys.stderr)
        print(f"{address} shows {model}; press Ctrl-C to stop", flush=True)
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)  # or it might write into the folder while that is removed


def _set_environment(host: str, folder: str) -> None:
    """Sets what Gradio reads from the environment, some of it when it is imported."""
    os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
    # Gradio calls its own server to see whether it is there. The call must not go through a proxy, and Gradio fails on
    # a proxy that cannot be used.
    exempt = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = "*" if broken_proxy() else ",".join(filter(None, [exempt, host, "localhost"]))


class _OwnFilesOnly:
    """Adds `POLICY` to every response."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)
