"""The install command in messages fits how twostage was installed."""

import json
from importlib import metadata

import pytest

from twostage.core.machine import installation
from twostage.core.machine.installation import CHECKOUT, pip_install

GIT = {"url": "https://example.org/twostage.git", "vcs_info": {"vcs": "git", "commit_id": "1"}}


class Installed:
    def __init__(self, **files: str) -> None:
        self.files = files

    def read_text(self, name: str) -> str | None:
        return self.files.get(name.removesuffix(".json"))


@pytest.fixture(autouse=True)
def _no_cache():
    pip_install.cache_clear()
    yield
    pip_install.cache_clear()


def test_a_checkout(monkeypatch):
    monkeypatch.setattr(installation, "distribution", lambda name: Installed())
    assert pip_install("app") == f"pip install --editable '{CHECKOUT}[app]'"


@pytest.mark.parametrize(
    ("files", "command"),
    [
        ({}, "pip install 'twostage[app]'"),
        ({"INSTALLER": "uv\n"}, "uv pip install 'twostage[app]'"),
        ({"direct_url": json.dumps(GIT)}, "pip install 'twostage[app] @ git+https://example.org/twostage.git'"),
    ],
)
def test_an_installed_package(files, command, monkeypatch, tmp_path):
    monkeypatch.setattr(installation, "CHECKOUT", tmp_path)
    monkeypatch.setattr(installation, "distribution", lambda name: Installed(**files))
    assert pip_install("app") == command


def test_a_copy_that_is_not_installed(monkeypatch, tmp_path):
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installation, "CHECKOUT", tmp_path)
    monkeypatch.setattr(installation, "distribution", missing)
    assert pip_install("app", " --upgrade") == "pip install --upgrade 'twostage[app]'"
