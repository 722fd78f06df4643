"""Typed configuration: a YAML file plus ``key=value`` overrides, validated once, with every error told at once."""

import difflib
import os
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from core.errors import InputError

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
]

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
    return value


PathName = Annotated[str, Field(min_length=1), AfterValidator(_can_be_a_path)]


class Section(BaseModel):
    """A group of a configuration: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunConfig(Section):
    """Where a run writes and what it starts from."""

    dir: PathName
    """The run folder; the same command with the same folder resumes."""
    seed: Seed = 0
    """Every random number of the run follows from it."""
    trackers: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    """Accelerate's trackers; `metrics.jsonl` is always written."""


ConfigT = TypeVar("ConfigT", bound=Section)


def load_config(schema: type[ConfigT], path: str | Path, overrides: list[str] | None = None) -> ConfigT:
    """Reads a YAML file, merges ``group.key=value`` overrides (values in YAML syntax), then validates.

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
        document = yaml.load(path.read_text(encoding="utf-8"), _OnceEach)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: other bytes than UTF-8, an odd date
        raise InputError(f"config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise InputError(f"config {path}: expected groups such as `data:` and `train:`, got {document!r}")
    for override in overrides or []:
        _apply_override(document, override)
    return parse_config(schema, document, f"config {path}")


class _OnceEach(yaml.SafeLoader):
    """YAML in which a key that is given twice is a mistake, and not the last one's."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = []
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if key.tag != "tag:yaml.org,2002:merge" and name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is given twice", key.start_mark)
            seen.append(name)
        return super().construct_mapping(node, deep)


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


def _apply_override(document: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise InputError(f"override {override!r}: expected key=value, such as train.lr=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"override {override!r}: the value is not valid YAML; quote it") from None
    group = document
    for key in keys[:-1]:
        if not isinstance(group.get(key), dict):
            group[key] = {}
        group = group[key]
    group[keys[-1]] = value


def _describe(schema: type[Section], details: ErrorDetails) -> str:
    path, group, annotation = _locate(schema, details["loc"])
    kind, got = details["type"], details["input"]
    if kind == "extra_forbidden":
        known = list(group.model_fields) if group else []
        near = difflib.get_close_matches(path.rpartition(".")[2], known, n=1, cutoff=0.5)
        here = f"of type {_tag(group)!r} are" if _tag(group) else "here:"
        hint = f"did you mean {near[0]!r}?" if near else f"known {here} {', '.join(known)}"
        return f"{path}: unknown key; {hint}"
    if kind == "missing":
        return f"{path}: required, but not given"
    if kind == "union_tag_not_found":
        meant = difflib.get_close_matches("type", [key for key in got if isinstance(key, str)], n=1)
        hint = f" (there is {meant[0]!r})" if meant else ""
        return f"{path}.type: required, but not given{hint}; expected one of {_quoted(_tags(annotation))}"
    if kind == "union_tag_invalid":
        tag = got["type"]
        near = difflib.get_close_matches(str(tag), _tags(annotation), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{path}.type: got {shortened(tag)!r}, expected one of {_quoted(_tags(annotation))}{hint}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{path}: expected a group of keys, got {shortened(got)!r}"
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
        members = _members(group)
        tagged = [m for m in members if len(members) > 1 and _tag(m) == part]
        if tagged:
            group = tagged[0]
            continue
        shown.append(str(part))
        owners = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]
        holder = owners[0] if owners else None
        field = holder.model_fields.get(str(part)) if holder else None
        group = field.annotation if field else None
    return ".".join(shown), holder, group


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _tags(annotation: Any) -> list[str]:
    return [tag for member in _members(annotation) if (tag := _tag(member))]


def _tag(member: Any) -> str | None:
    if isinstance(member, type) and issubclass(member, BaseModel) and "type" in member.model_fields:
        return get_args(member.model_fields["type"].annotation)[0]
    return None
