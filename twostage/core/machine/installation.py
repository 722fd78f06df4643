"""How twostage was installed, so that messages name a command that adds to this installation."""

import json
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

__all__ = ["pip_install"]

CHECKOUT = Path(__file__).parents[3]
"""The folder with pyproject.toml, if these files are those of a checkout."""


@cache
def pip_install(extra: str, options: str = "") -> str:
    """The command that installs an extra: from the checkout, the repository or the index that twostage came from.

    Args:
        options: of pip install, such as " --upgrade".
    """
    try:
        installed = distribution("twostage")
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
        installer = (installed.read_text("INSTALLER") or "pip").strip()
    except (PackageNotFoundError, ValueError):
        origin, installer = {}, "pip"
    command = ("uv pip install" if installer == "uv" else "pip install") + options
    if (CHECKOUT / "pyproject.toml").is_file():
        return f"{command} --editable '{CHECKOUT}[{extra}]'"
    if "vcs_info" in origin:
        return f"{command} 'twostage[{extra}] @ {origin['vcs_info']['vcs']}+{origin['url']}'"
    return f"{command} 'twostage[{extra}]'"
