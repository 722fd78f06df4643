"""The folder of a run: config.yaml, sources.json, metrics.jsonl, samples/, checkpoints/, model/."""

import contextlib
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
    CHANGES_NO_NUMBER,
    MAY_CHANGE,
    Section,
    describe_differences,
    dump_config,
    keys_marked,
    parse_config,
    path_values,
    summarize_differences,
)
from twostage.core.errors import InputError
from twostage.core.files import read_json, replacing, write_json
from twostage.core.runs.contents import Contents, Record, same_place
from twostage.core.runs.model_folder import check_format
from twostage.core.wording import one_line

__all__ = ["STOPPED", "RunFolder", "read_metrics"]

FORMAT_VERSION = 1
"""Version of sources.json, which the first runs did not have."""

STOPPED = "stopped.txt"
"""Exists while a stopped run waits to be resumed, for scripts that do not see the command's exit status."""


class _Sources(Section):
    """`sources.json`."""

    format_version: int = FORMAT_VERSION
    sources: dict[str, Record]


class RunFolder:
    """The folder of one run, which belongs to one configuration."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.sources_file = self.path / "sources.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.curves = self.path / "losses.png"
        self._lock: int | None = None  # a file descriptor

    @property
    def results(self) -> str:
        """The location of the results, for a message."""
        return f"model: {self.model}; curves: {self.curves}"

    def stored_config(self) -> dict[str, Any] | None:
        """The configuration that the run was started with, or None for a new folder.

        Raises:
            InputError: a file, a folder of something else, or a damaged config.yaml.
        """
        if self.config_file.is_file():
            return self._read_config()
        if self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir())):
            raise InputError(f"run.dir {self.path}: exists but is not a twostage run. Choose another run.dir=")
        return None

    def _read_config(self) -> dict[str, Any]:
        try:
            document = yaml.safe_load(self.config_file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(f"{self.config_file}: not valid YAML: {one_line(error)}. Restore the file") from None
        if not isinstance(document, dict):
            raise InputError(f"{self.config_file}: damaged: expected a configuration, got {document!r}")
        return document

    def check(self, config: Section) -> None:
        """Refuses settings that differ from the stored ones, except keys that may change, and paths:
        :meth:`check_sources` compares their content.

        Raises:
            InputError: shows the differences.
        """
        stored = self._stored(config)
        if stored is None:
            return
        old, new = stored.model_dump(mode="json"), config.model_dump(mode="json")
        old_paths, new_paths = path_values(stored), path_values(config)
        moved = {
            name
            for name in old_paths.keys() & new_paths.keys()
            if old_paths[name] is not None and new_paths[name] is not None
        }
        free = [keys_marked(one, MAY_CHANGE, CHANGES_NO_NUMBER) for one in (stored, config)]
        for name in moved | (free[0] & free[1]):
            _drop(old, name)
            _drop(new, name)
        if differences := describe_differences(old, new):
            raise self._refusal(differences)

    def check_sources(
        self,
        config: Section,
        sources: Mapping[str, Contents],
        remembered: Mapping[str, dict[str, Any]] | None = None,
        begun: bool = True,
    ) -> None:
        """Refuses to continue if content has changed since the run began.

        Args:
            sources: the current content behind each path in ``config``, by key.
            remembered: facts from the checkpoint of a run without sources.json; there may be fewer of them.
            begun: whether the run has a checkpoint.

        Raises:
            InputError: different content, or a changed path whose earlier content is unknown.
        """
        stored = self._stored(config)
        if stored is None:
            return
        known, former = self.stored_sources(), remembered or {}
        stored_paths = path_values(stored)
        for key, value in path_values(config).items():
            before, now = stored_paths.get(key), sources.get(key)
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
                    f"{key} {value}: holds different {now.what} than when the run in {self.path} began "
                    f"({differences}). Nothing was changed. Restore the original ones to resume, or choose another "
                    "run.dir="
                )

    def stored_sources(self) -> dict[str, Record]:
        """The content behind each path in the configuration when the run began, by key, such as `data.source`; {} for a
        new folder and for runs of earlier versions."""
        if not self.sources_file.is_file():
            return {}
        document = read_json(self.sources_file, "restore a copy of it, or remove it")
        check_format(document.get("format_version"), FORMAT_VERSION, self.sources_file)
        return parse_config(_Sources, document, f"{self.sources_file}").sources

    def _stored(self, config: Section) -> Section | None:
        """The stored configuration, with defaults for settings that the run's version did not have yet."""
        stored = self.stored_config()
        return None if stored is None else parse_config(type(config), stored, f"{self.config_file}")

    def _refusal(self, differences: list[str]) -> InputError:
        return InputError(
            f"run.dir {self.path}: holds a run with a different configuration:\n  "
            + "\n  ".join(differences)
            + "\nNothing was changed. Choose another run.dir=, give the same values to resume, or remove the folder"
        )

    def lock(self) -> None:
        """Keeps other processes from training into this folder until this one exits.

        Raises:
            InputError: another process holds the lock.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT)
            weakref.finalize(self, os.close, self._lock)
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP):  # a network disk without locks
                return
            raise InputError(
                f"run.dir {self.path}: another process is training into it. Wait for it, stop it, or choose another "
                "run.dir="
            ) from None

    def create(self, config: Section, sources: Mapping[str, Contents] = MappingProxyType({})) -> None:
        """Creates and locks the folder; writes or updates the configuration and the records of its sources."""
        self.lock()
        self.samples.mkdir(parents=True, exist_ok=True)
        (self.path / STOPPED).unlink(missing_ok=True)
        stored = self._stored(config) if self.config_file.exists() else None
        if stored != config:
            with replacing(self.config_file, durable=True) as partial:
                partial.write_text(dump_config(config), encoding="utf-8")
        before = self.stored_sources()
        now = {key: one.record for key, one in sources.items() if not (one.only_to_begin and key in before)}
        if before | now != before:
            write_json(self.sources_file, _Sources(sources=before | now).model_dump(mode="json"))

    def write_note(self, name: str, lines: list[str]) -> None:
        """Writes a text file for the user."""
        (self.path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Adds one JSON object to metrics.jsonl."""
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # the error of a full disk does not name the file
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self.metrics_file)) from None

    def cut_metrics(self, step: int) -> None:
        """Drops lines after ``step``: a killed run logged them after the checkpoint that it resumes from."""
        if self.metrics_file.exists():
            kept = [line for line in read_metrics(self.metrics_file) if line["step"] <= step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            if text != self.metrics_file.read_text(encoding="utf-8"):
                with replacing(self.metrics_file) as partial:
                    partial.write_text(text, encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; [] if there is none yet. A last line that a kill cut short is skipped."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def _drop(document: dict[str, Any], name: str) -> None:
    """Removes the value at a dotted path."""
    *groups, key = name.split(".")
    for group in groups:
        document = document[group]
    del document[key]
