"""Typed configuration: a YAML file plus ``key=value`` overrides, validated once, with all errors in one message."""

import difflib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from twostage.core.config.overrides import apply_overrides
from twostage.core.config.registry import PLUGINS_VARIABLE, OpenUnion, is_open, load_plugins
from twostage.core.config.schema import alternatives, groups, item_annotation, tag
from twostage.core.config.yaml_text import read_yaml, with_texts
from twostage.core.errors import InputError
from twostage.core.files import expand_home
from twostage.core.wording import short_repr

__all__ = [
    "CHANGES_NO_NUMBER",
    "MAY_CHANGE",
    "Count",
    "Depth",
    "Flag",
    "Number",
    "PathName",
    "Plugins",
    "RunConfig",
    "Section",
    "Seed",
    "Share",
    "Sides",
    "Size",
    "Width",
    "describe_differences",
    "dump_config",
    "keys_marked",
    "load_config",
    "parse_config",
    "path_values",
    "summarize_differences",
]

MAX_SHOWN = 4  # differences in a one-line message

# Integers and booleans are strict (`true` is not 1); floats are lax, because YAML reads `1e-4` as text.
# Upper bounds only catch certain mistakes; memory is checked later, once the whole model is known.
Count = Annotated[int, Field(strict=True, gt=0, le=2**31 - 1)]
Size = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
Width = Annotated[int, Field(strict=True, gt=0, le=65_536)]
Depth = Annotated[int, Field(strict=True, gt=0, le=1_024)]
Seed = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, BeforeValidator(lambda value: str(value) if isinstance(value, bool) else value)]
Share = Annotated[Number, Field(ge=0.0, le=1.0)]
Flag = Annotated[bool, Field(strict=True)]
Sides = Annotated[tuple[Count, Count], BeforeValidator(lambda value: (value, value) if type(value) is int else value)]
"""(height, width); one number for squares."""


def _can_be_a_path(value: str) -> str:
    if "\0" in value or any(len(os.fsencode(part)) > 255 for part in Path(value).parts):
        raise ValueError(f"expected a valid file or folder name, got {short_repr(value)}")
    return expand_home(value)


_IS_PATH = AfterValidator(_can_be_a_path)
PathName = Annotated[str, Field(min_length=1), _IS_PATH]
"""A file, a folder, or another name for data; `~` becomes the user's home folder."""

MAY_CHANGE = "may change when a run resumes"
"""Marks a key, by `Annotated[..., MAY_CHANGE]`, that a resumed run may change: the steps already taken do not depend on
it."""
CHANGES_NO_NUMBER = "changes no number of a run"
"""Marks a key on which no result depends. A resumed run may change it too, and there is nothing to compare by it."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _loaded(names: list[str]) -> list[str]:
    load_plugins(names)
    return names


Plugins = Annotated[list[str], MAY_CHANGE, BeforeValidator(_as_list), AfterValidator(_loaded)]
"""Modules that register types, or one. This key must come before those that use the types: keys are read in order."""


class Section(BaseModel):
    """A group of a configuration: immutable; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    exclusive_keys: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Groups of keys that exclude each other; the last override wins."""


class RunConfig(Section):
    """The run's folder, seed and trackers."""

    dir: PathName
    """The run folder; run the same command with the same folder to resume."""
    seed: Seed = 0
    """Determines every random number of the run."""
    trackers: Annotated[list[Literal["tensorboard", "wandb"]], BeforeValidator(_as_list), CHANGES_NO_NUMBER] = [
        "tensorboard"
    ]
    """`tensorboard`, `wandb` or a list of both; `[]`: none. `metrics.jsonl` is written in any case."""
    project: Annotated[str, Field(min_length=1), CHANGES_NO_NUMBER] = "twostage"
    """The project in which wandb shows the run, by the name of its folder."""


ConfigT = TypeVar("ConfigT", bound=Section)


def load_config(
    schema: type[ConfigT],
    path: str | Path,
    overrides: list[str] | None = None,
    on_notice: Callable[[str], object] = lambda line: None,
) -> ConfigT:
    """Read a YAML file, merge ``group.key=value`` overrides, then validate.

    If the schema expects text, the value is everything after the first `=` (`null` is None if the key is optional); all
    other values are YAML.

    Args:
        on_notice: called with a sentence about every further key that an override replaces or drops.

    Raises:
        InputError: the file is missing or not YAML, an override is malformed, or keys or values are wrong. One message
            lists all wrong keys and values.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=3, cutoff=0.6)
        hint = f"Did you mean {' or '.join(near)}?" if near else "Fix the path"
        raise InputError(f"config {path}: no such file. {hint}")
    try:
        document, texts = read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bytes that are not UTF-8 too
        why = " ".join(str(error).split())
        raise InputError(f"config {path}: not valid YAML: {why}. Fix the syntax") from None
    document = {} if document is None else document
    if not isinstance(document, dict):
        raise InputError(f"config {path}: expected groups such as `data:` and `train:`, got {short_repr(document)}")
    if "plugins" in schema.model_fields:  # first, because they define what other keys may be
        named = [each for each in overrides or [] if each.partition("=")[0].strip() == "plugins"]
        names = _as_list(apply_overrides(schema, document, named, lambda line: None).get("plugins"))
        load_plugins([name for name in names if isinstance(name, str)] if isinstance(names, list) else [], path.parent)
    document = with_texts(schema, document, texts) if document else document
    document = apply_overrides(schema, document, overrides or [], on_notice)
    return parse_config(schema, document, f"config {path}")


def parse_config(schema: type[ConfigT], document: dict[str, Any], name: str) -> ConfigT:
    """Validate a document (nested dicts) that messages call ``name``.

    Raises:
        InputError: keys or values are wrong; one message lists them all.
    """
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        lines = [_describe(schema, details) for details in error.errors()]
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise InputError(f"{name} has {count}:\n  " + "\n  ".join(lines)) from None


def dump_config(config: Section) -> str:
    """The whole configuration as YAML, including defaults."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def path_values(config: Section) -> dict[str, str | None]:
    """The values of all :data:`PathName` keys, by their full names such as `data.source`."""
    return {
        name: value
        for name, field, value in _keys(config)
        if _IS_PATH in field.metadata or any(_IS_PATH in get_args(one)[1:] for one in get_args(field.annotation))
    }


def keys_marked(config: Section, *marks: str) -> set[str]:
    """The full names, such as `train.log_every`, of all keys that have one of the marks, such as :data:`MAY_CHANGE`."""
    return {name for name, field, _ in _keys(config) if any(mark in field.metadata for mark in marks)}


def _keys(config: Section, prefix: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
    """The full name, the declaration and the value of each key."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Section):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field, value


def describe_differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """One line for each key whose value differs: ``train.lr: was 0.001, now 0.002``."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(before, dict) and isinstance(after, dict):
            lines += describe_differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: was {before!r}, now {after!r}")
    return lines


def summarize_differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first lines of :func:`describe_differences` as one line with short hashes; empty without differences."""
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
        where = f" for type {tag(group)!r}" if tag(group) else ""
        hint = f"did you mean {near[0]!r}?" if near else f"known keys{where}: {', '.join(known)}"
        return f"{path}: unknown key; {hint}"
    if kind == "missing":
        return f"{path}: required but missing"
    if kind == "union_tag_not_found":
        meant = difflib.get_close_matches("type", [key for key in got if isinstance(key, str)], n=1)
        hint = f" (got {meant[0]!r})" if meant else ""
        return f"{path}.type: required but missing{hint}; expected one of {_quoted(tags)}"
    if kind == "union_tag_invalid":
        got_tag = got["type"]
        near = difflib.get_close_matches(str(got_tag), tags, n=1)
        from_plugins = not tags or any(
            isinstance(one, type) and issubclass(one, OpenUnion) for one in alternatives(annotation)
        )
        plugin = (
            "; if a plugin defines it, add its module to `plugins` in the config, set the environment variable "
            f"{PLUGINS_VARIABLE}, or install it"
        )
        hint = f"; did you mean {near[0]!r}?" if near else plugin if from_plugins else ""
        expected = f"expected one of {_quoted(tags)}" if tags else "but twostage has none of its own"
        return f"{path}.type: got {short_repr(got_tag)}, {expected}{hint}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{path}: expected a group of keys, got {short_repr(got)}"
    if kind == "string_too_short":
        return f"{path}: expected text, got ''"
    if kind == "string_type":
        return f"{path}: expected text, got {short_repr(got)}; put it in quotes if it is meant as text"
    message = details["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if kind in ("value_error", "assertion_error"):
        return f"{path}: {message}" if path else message
    return f"{path}: {message}, got {short_repr(got)}"


def _quoted(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _locate(schema: type[Section], location: tuple[int | str, ...]) -> tuple[str, type[BaseModel] | None, Any]:
    """The path as the user writes it (without union tags), the group with its last key, and that key's annotation."""
    shown: list[str] = []
    group: Any = schema
    holder: type[BaseModel] | None = schema
    for part in location:
        members = groups(group)
        tagged = [m for m in members if (len(members) > 1 or is_open(group)) and tag(m) == part]
        if tagged:
            group = tagged[0]
            continue
        shown.append(str(part))
        if isinstance(part, int):
            holder, group = None, item_annotation(group, part)
            continue
        holder = members[0] if members else None
        field = holder.model_fields.get(str(part)) if holder else None
        group = field.annotation if field else None
    return ".".join(shown), holder, group
