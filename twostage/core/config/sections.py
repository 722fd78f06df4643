"""Typed configuration: a YAML file plus ``key=value`` overrides, validated once, with every error told at once."""

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from twostage.core.config.overrides import apply_overrides
from twostage.core.config.registry import OpenUnion
from twostage.core.config.schema import alternatives, groups, tag
from twostage.core.config.yaml_text import read_yaml, with_texts
from twostage.core.errors import InputError
from twostage.core.files import expand_home

__all__ = [
    "Count",
    "Depth",
    "Flag",
    "Number",
    "PathName",
    "RunConfig",
    "Section",
    "Seed",
    "Share",
    "Size",
    "Width",
    "describe_differences",
    "dump_config",
    "load_config",
    "parse_config",
    "path_values",
    "summarize_differences",
]

MAX_SHOWN = 4
"""Differences in a message of one line."""

# Integers and booleans are taken as written (`true` is no 1); floats stay lax, because YAML reads `1e-4` as text.
# Upper bounds are where a mistake is certain: what memory allows is looked at once the whole model is known.
Count = Annotated[int, Field(strict=True, gt=0, le=2**31 - 1)]
Size = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
Width = Annotated[int, Field(strict=True, gt=0, le=65_536)]
Depth = Annotated[int, Field(strict=True, gt=0, le=1_024)]
Seed = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, BeforeValidator(lambda value: str(value) if isinstance(value, bool) else value)]
Share = Annotated[Number, Field(ge=0.0, le=1.0)]
Flag = Annotated[bool, Field(strict=True)]


def shortened(value: Any, most: int = 120) -> Any:
    """``value``, or, where it would fill the screen, the beginning of what it looks like."""
    text = value if isinstance(value, str) else repr(value)
    return value if len(text) <= most else f"{text[:most]} ..."


def _can_be_a_path(value: str) -> str:
    if "\0" in value or any(len(os.fsencode(part)) > 255 for part in Path(value).parts):
        raise ValueError(f"no file or folder can have the name {shortened(value)!r}; give a shorter one")
    return expand_home(value)


_IS_PATH = AfterValidator(_can_be_a_path)
PathName = Annotated[str, Field(min_length=1), _IS_PATH]
"""A file, a folder, or another name of data; `~` is the home of who runs it."""


class Section(BaseModel):
    """A group of a configuration: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    exclusive_keys: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Keys of which only one can be given; of several overrides the last one stays."""


class RunConfig(Section):
    """Where a run writes and what it starts from."""

    dir: PathName
    """The run folder; the same command with the same folder resumes."""
    seed: Seed = 0
    """Every random number of the run follows from it."""
    trackers: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    """Accelerate's trackers; `metrics.jsonl` is always written."""


ConfigT = TypeVar("ConfigT", bound=Section)


def load_config(
    schema: type[ConfigT],
    path: str | Path,
    overrides: list[str] | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> ConfigT:
    """Reads a YAML file, merges ``group.key=value`` overrides, then validates.

    Where the schema wants text, the whole text after the first `=` is the value, as it stands (`null` is None where
    that is allowed); all other values are YAML.

    Args:
        say: called with a sentence about everything that an override replaced or dropped besides its own key.

    Raises:
        InputError: the file is missing or not YAML, an override is malformed, or any key or value is wrong. All wrong
            keys and values are listed in one message.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=3, cutoff=0.6)
        hint = f"; in {path.parent} there is {', '.join(near)}" if near else ""
        raise InputError(f"config {path}: no such file{hint}")
    try:
        document, texts = read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also for other bytes than UTF-8
        raise InputError(f"config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    document = {} if document is None else with_texts(schema, document, texts)
    if not isinstance(document, dict):
        raise InputError(f"config {path}: expected groups such as `data:` and `train:`, got {document!r}")
    document = apply_overrides(schema, document, overrides or [], say)
    return parse_config(schema, document, f"config {path}")


def parse_config(schema: type[ConfigT], document: dict[str, Any], name: str) -> ConfigT:
    """Validates a document (nested dicts); ``name`` says in the message where it came from."""
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        lines = [_describe(schema, details) for details in error.errors()]
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise InputError(f"{name} has {count}:\n  " + "\n  ".join(lines)) from None


def dump_config(config: Section) -> str:
    """The whole configuration, defaults included, as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def path_values(config: Section, prefix: str = "") -> dict[str, str | None]:
    """The values of all keys that are a :data:`PathName`, by their whole names such as `data.source`."""
    found: dict[str, str | None] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Section):
            found |= path_values(value, f"{prefix}{name}.")
        elif _IS_PATH in field.metadata or any(_IS_PATH in get_args(one)[1:] for one in get_args(field.annotation)):
            found[f"{prefix}{name}"] = value
    return found


def describe_differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """One line a key whose value differs: ``train.lr: 0.001 there, 0.002 now``."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(before, dict) and isinstance(after, dict):
            lines += describe_differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} there, {after!r} now")
    return lines


def summarize_differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first of :func:`describe_differences` on one line, with hashes cut short; empty where there are none."""
    lines = describe_differences(old, new)
    more = f"; and {len(lines) - MAX_SHOWN} more" if len(lines) > MAX_SHOWN else ""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", "; ".join(lines[:MAX_SHOWN])) + more


def _describe(schema: type[Section], details: ErrorDetails) -> str:
    path, group, annotation = _locate(schema, details["loc"])
    tags = [name for one in alternatives(annotation) if (name := tag(one))]
    kind, got = details["type"], details["input"]
    if kind == "extra_forbidden":
        known = list(group.model_fields) if group else []
        near = difflib.get_close_matches(path.rpartition(".")[2], known, n=1, cutoff=0.5)
        here = f"of type {tag(group)!r} are" if tag(group) else "here:"
        hint = f"did you mean {near[0]!r}?" if near else f"known {here} {', '.join(known)}"
        return f"{path}: unknown key; {hint}"
    if kind == "missing":
        return f"{path}: required, but not given"
    if kind == "union_tag_not_found":
        meant = difflib.get_close_matches("type", [key for key in got if isinstance(key, str)], n=1)
        hint = f" (there is {meant[0]!r})" if meant else ""
        return f"{path}.type: required, but not given{hint}; expected one of {_quoted(tags)}"
    if kind == "union_tag_invalid":
        got_tag = got["type"]
        near = difflib.get_close_matches(str(got_tag), tags, n=1)
        is_open = any(isinstance(one, type) and issubclass(one, OpenUnion) for one in alternatives(annotation))
        plugin = "; if a plugin defines it, install that plugin" if is_open else ""
        hint = f"; did you mean {near[0]!r}?" if near else plugin
        return f"{path}.type: got {shortened(got_tag)!r}, expected one of {_quoted(tags)}{hint}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{path}: expected a group of keys, got {shortened(got)!r}"
    if kind == "string_too_short":
        return f"{path}: expected text, got none"
    if kind == "string_type":
        return f"{path}: expected text, got {shortened(got)!r}; quote it if that is its name"
    message = details["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if kind in ("value_error", "assertion_error"):
        return f"{path}: {message}" if path else message
    return f"{path}: {message}, got {shortened(got)!r}"


def _quoted(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _locate(schema: type[Section], location: tuple[int | str, ...]) -> tuple[str, type[BaseModel] | None, Any]:
    """The path as the user writes it (a union's tag is no part of it), the group that holds its last key, and that
    key's annotation."""
    shown: list[str] = []
    group: Any = schema
    holder: type[BaseModel] | None = schema
    for part in location:
        members = groups(group)
        tagged = [m for m in members if len(members) > 1 and tag(m) == part]
        if tagged:
            group = tagged[0]
            continue
        shown.append(str(part))
        holder = members[0] if members else None
        field = holder.model_fields.get(str(part)) if holder else None
        group = field.annotation if field else None
    return ".".join(shown), holder, group
