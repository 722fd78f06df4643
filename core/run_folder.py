"""A run's folder: config.yaml, metrics.jsonl, samples/, checkpoints/, model/."""

import errno
import fcntl
import json
import os
import weakref
from pathlib import Path
from typing import Any

import yaml

from core.config import Section, describe_differences, dump_config, parse_config
from core.errors import InputError
from core.files import replacing

__all__ = ["STOPPED", "RunFolder", "read_metrics"]

STOPPED = "stopped.txt"
"""There while the run waits for the same command: for a script that does not see the command's own exit status."""


class RunFolder:
    """The folder of one run; opening it checks that it belongs to the same configuration.

    Raises:
        InputError: the folder holds a run with another configuration (the differences are shown; nothing is changed),
            or is a file, or other things are in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self._lock: int | None = None  # a file descriptor

    def stored_config(self) -> dict[str, Any] | None:
        """The configuration that the run was started with, or None for a new folder."""
        if self.config_file.is_file():
            return self._read_config()
        if self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir())):
            raise InputError(f"run.dir {self.path}: exists and is no run of twostage; choose another run.dir=")
        return None

    def _read_config(self) -> dict[str, Any]:
        try:
            document = yaml.safe_load(self.config_file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(f"{self.config_file}: not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(document, dict):
            raise InputError(f"{self.config_file}: damaged: expected the groups of a configuration, got {document!r}")
        return document

    def check(self, config: Section) -> None:
        """Refuses a configuration that is not the stored one."""
        stored = self.stored_config()
        if stored is None:
            return
        # Settings that the run's version did not have yet are at their defaults.
        there = parse_config(type(config), stored, f"{self.config_file}").model_dump(mode="json")
        differences = describe_differences(there, config.model_dump(mode="json"))
        if differences:
            raise InputError(
                f"run.dir {self.path}: holds a run with another configuration:\n  "
                + "\n  ".join(differences)
                + "\nNothing was changed. Choose another run.dir=, give the same values to go on, or remove the folder"
            )

    def lock(self) -> None:
        """Keeps other processes from training into this folder until this one ends, however it ends.

        Raises:
            InputError: another process has the lock.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT)
            weakref.finalize(self, os.close, self._lock)
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP):  # a network disk that has no locks
                return
            raise InputError(
                f"run.dir {self.path}: another process trains into it at this moment; wait for it or stop it, or "
                "choose another run.dir="
            ) from None

    def create(self, config: Section) -> None:
        """Makes the folder, its lock, and writes the resolved configuration."""
        self.lock()
        self.samples.mkdir(parents=True, exist_ok=True)
        (self.path / STOPPED).unlink(missing_ok=True)
        if not self.config_file.exists():
            with replacing(self.config_file, durable=True) as partial:
                partial.write_text(dump_config(config), encoding="utf-8")

    def write_note(self, name: str, lines: list[str]) -> None:
        """A text file for the person who runs it."""
        (self.path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Adds one JSON object to metrics.jsonl."""
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # a full disk does not say of which file
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self.metrics_file)) from None

    def cut_metrics(self, step: int) -> None:
        """Drops what a killed run had logged after the checkpoint that is gone on from, so that no line is doubled."""
        if self.metrics_file.exists():
            kept = [line for line in read_metrics(self.metrics_file) if line["step"] <= step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            if text != self.metrics_file.read_text(encoding="utf-8"):
                with replacing(self.metrics_file) as partial:
                    partial.write_text(text, encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, [] where there is none yet; a last line cut short by a kill is left out."""
    lines = []
    if not path.exists():
        return lines
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
