"""A run's folder: config.yaml, sources.json, metrics.jsonl, samples/, checkpoints/, model/."""

import errno
import fcntl
import json
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from twostage.core.config.sections import (
    Section,
    describe_differences,
    dump_config,
    parse_config,
    path_values,
    summarize_differences,
)
from twostage.core.errors import InputError
from twostage.core.files import read_json, replacing
from twostage.core.runs.model_folder import check_format, write_json
from twostage.core.runs.places import Contents, Record, same_place

__all__ = ["STOPPED", "RunFolder", "read_metrics"]

FORMAT_VERSION = 1
"""Of sources.json, which the first runs did not have."""

STOPPED = "stopped.txt"
"""There while the run waits for the same command: for a script that does not see the command's own exit status."""


class _Sources(Section):
    """`sources.json`."""

    format_version: int = FORMAT_VERSION
    sources: dict[str, Record]


class RunFolder:
    """The folder of one run; opening it checks that it belongs to the same configuration.

    Raises:
        InputError: the folder holds a run with another configuration (the differences are shown; nothing is changed),
            or is a file, or other things are in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.sources_file = self.path / "sources.json"
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
        """Refuses other settings than the stored ones. Where the run lies, and how paths are spelled, does not matter:
        :meth:`check_sources` looks at what lies there."""
        stored = self._stored(config)
        if stored is None:
            return
        there, here = stored.model_dump(mode="json"), config.model_dump(mode="json")
        before, now = path_values(stored), path_values(config)
        for name in before.keys() & now.keys():
            if before[name] is not None and now[name] is not None:
                _drop(there, name)
                _drop(here, name)
        if differences := describe_differences(there, here):
            raise self._refusal(differences)

    def check_sources(
        self,
        config: Section,
        sources: Mapping[str, Contents],
        remembered: Mapping[str, dict[str, Any]] | None = None,
        begun: bool = True,
    ) -> None:
        """Refuses to go on with other content than the run began with.

        Args:
            sources: what the paths of ``config`` lead to now, by their keys.
            remembered: the facts in the checkpoints of runs that have no sources.json; they may be fewer.
            begun: whether there is a checkpoint.

        Raises:
            InputError: other content; or a path that is spelled in another way, of whose content nothing is known.
        """
        stored = self._stored(config)
        if stored is None:
            return
        known, former = self.stored_sources(), remembered or {}
        there, here = path_values(stored), path_values(config)
        for key, value in here.items():
            before, now = there.get(key), sources.get(key)
            if key == "run.dir" or value is None or before is None:
                continue
            same = same_place(before, value)
            if now and begun and now.only_to_begin and same:
                continue
            if now and key in known:
                expected, found = known[key].facts, now.facts
            elif now and key in former and (same or former[key].keys() <= now.facts.keys()):
                found = {name: now.facts[name] for name in former[key] if name in now.facts}
                expected = {name: former[key][name] for name in found}
            elif same if begun else before == value:
                continue
            else:
                raise self._refusal([f"{key}: was {before!r}, now {value!r}"])
            if differences := summarize_differences(expected, found):
                raise InputError(
                    f"{key} {value}: holds other {now.what} than when the run in {self.path} began ({differences}). "
                    "Nothing was changed. Bring the same ones back to resume, or choose another run.dir="
                )

    def stored_sources(self) -> dict[str, Record]:
        """What the paths of the configuration led to when the run began, by keys such as `data.source`; {} for a new
        folder and for those of earlier versions."""
        if not self.sources_file.is_file():
            return {}
        document = read_json(self.sources_file, "put back a copy of it, or remove it")
        check_format(document.get("format_version"), FORMAT_VERSION, self.sources_file)
        return parse_config(_Sources, document, f"{self.sources_file}").sources

    def _stored(self, config: Section) -> Section | None:
        """The stored configuration; settings that the run's version did not have yet are at their defaults."""
        stored = self.stored_config()
        return None if stored is None else parse_config(type(config), stored, f"{self.config_file}")

    def _refusal(self, differences: list[str]) -> InputError:
        return InputError(
            f"run.dir {self.path}: holds a run with another configuration:\n  "
            + "\n  ".join(differences)
            + "\nNothing was changed. Choose another run.dir=, give the same values to resume, or remove the folder"
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

    def create(self, config: Section, sources: Mapping[str, Contents] = MappingProxyType({})) -> None:
        """Makes the folder, its lock, and writes the resolved configuration and what its paths lead to; in a folder
        that is there, where things are now."""
        self.lock()
        self.samples.mkdir(parents=True, exist_ok=True)
        (self.path / STOPPED).unlink(missing_ok=True)
        stored = self._stored(config) if self.config_file.exists() else None
        if stored is None or path_values(stored) != path_values(config):
            with replacing(self.config_file, durable=True) as partial:
                partial.write_text(dump_config(config), encoding="utf-8")
        before = self.stored_sources()
        now = {key: one.record for key, one in sources.items() if not (one.only_to_begin and key in before)}
        if before | now != before:
            write_json(self.sources_file, _Sources(sources=before | now).model_dump(mode="json"))

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


def _drop(document: dict[str, Any], name: str) -> None:
    """Removes the value at a dotted path."""
    *groups, key = name.split(".")
    for group in groups:
        document = document[group]
    del document[key]
