"""`group.key=value` on the command line: typed by the schema and merged over a file; nothing is lost silently."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

from twostage.core.config.schema import Group, annotations_at, groups, is_optional, is_text, tag
from twostage.core.config.yaml_text import has_comment, read_yaml, with_texts
from twostage.core.errors import InputError

__all__ = ["apply_overrides"]

Keys = tuple[str, ...]


def apply_overrides(
    schema: Group, document: dict[str, Any], overrides: list[str], on_notice: Callable[[str], object]
) -> dict[str, Any]:
    """``document`` with the overrides applied in order; the last one for a key wins.

    If the type of a group changes, keys of the document that the new type does not have are dropped. Keys that an
    override sets are never dropped: validation reports them.

    Args:
        document: nested dicts; not changed.
        on_notice: called with a sentence about every further key that an override replaces or drops.

    Raises:
        InputError: an override is malformed, or a later one would discard it.
    """
    merged = _Merged(schema, copy.deepcopy(document), on_notice)
    for override in overrides:
        merged.apply(override)
    _drop_keys_of_other_types([schema], document, merged.document, merged.given, (), on_notice)
    return merged.document


class _Merged:
    """A document, and which overrides set which of its keys."""

    def __init__(self, schema: Group, document: dict[str, Any], on_notice: Callable[[str], object]) -> None:
        self.schema, self.document, self.on_notice = schema, document, on_notice
        self.given: dict[Keys, str] = {}
        """The override that set the value at each path."""

    def apply(self, override: str) -> None:
        name, separator, text = override.partition("=")
        keys = name.strip().split(".")
        if not separator or not all(keys):
            raise InputError(f"override {override!r}: expected key=value, such as train.lr=1e-4")
        value = _read_value(override, text, annotations_at(self.schema, self.document, keys))
        group = self.document
        for depth, key in enumerate(keys[:-1], 1):
            inner = group.get(key)
            if inner is not None and not isinstance(inner, dict):
                raise InputError(
                    f"override {override!r}: expected {'.'.join(keys[:depth])} to be a group of keys, got {inner!r}"
                )
            group[key] = inner or {}
            group = group[key]
        self._drop_alternatives(override, keys, group, value)
        self._replace(override, tuple(keys), group.get(keys[-1]), value)
        group[keys[-1]] = value

    def _replace(self, override: str, path: Keys, old: Any, value: Any) -> None:
        """Remember what the override sets; warn if it replaces a group, fail if it discards an earlier override."""
        leaves = set(_leaves(value, path))
        for other in [other for other in self.given if other[: len(path)] == path]:
            earlier = self.given.pop(other)
            if len(other) > len(path) and not any(leaf[: len(other)] == other for leaf in leaves):
                raise InputError(
                    f"override {override!r}: replaces the whole group {'.'.join(path)} and would discard {earlier!r} "
                    f"before it. Move {earlier!r} after it"
                )
        if isinstance(old, dict) and (lost := old.keys() - (value.keys() if isinstance(value, dict) else set())):
            shown = ", ".join(f"{key}: {old[key]!r}" for key in old if key in lost)
            self.on_notice(f"{override}: replaces the whole group; the config had {shown}")
        self.given |= dict.fromkeys(leaves, override)

    def _drop_alternatives(self, override: str, keys: list[str], group: dict[str, Any], value: Any) -> None:
        """Drop the keys that this one excludes: `train.epochs` for `train.max_steps`."""
        if value is None:
            return
        holders = _groups_at(self.schema, self.document, keys[:-1])
        exclusive = {name for holder in holders for names in getattr(holder, "exclusive_keys", ())
                     if keys[-1] in names for name in names if name != keys[-1]}  # fmt: skip
        for name in exclusive:
            if group.get(name) is not None:
                path = (*keys[:-1], name)
                self.on_notice(f"{override}: replaces {'.'.join(path)}={group[name]}")
                group.pop(name)
                self.given.pop(path, None)


def _groups_at(schema: Group, document: Any, keys: list[str]) -> list[Group]:
    """The groups that are allowed at a path."""
    if not keys:
        return [schema]
    return [group for annotation in annotations_at(schema, document, keys) for group in groups(annotation)]


def _read_value(override: str, text: str, annotations: list[Any]) -> Any:
    """Read a value as text if its key is text, else as YAML. Unknown keys are read too: validation reports them."""
    if all(map(is_text, annotations)):
        return None if text == "null" and any(map(is_optional, annotations)) else text
    if not text.strip():
        raise InputError(f"override {override!r}: expected key=value, or key=null, got no value")
    try:
        value, texts = read_yaml(text)
        if has_comment(text):
            raise ValueError("YAML would drop everything after # as a comment")
    except ValueError as error:
        raise InputError(f"override {override!r}: the value is not valid YAML: {error}. Fix the value") from None
    return with_texts(annotations[0], value, texts)


def _leaves(value: Any, path: Keys) -> Iterator[Keys]:
    """The paths of all values inside ``value``, which is at ``path``."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))
    else:
        yield path


def _drop_keys_of_other_types(
    known: list[Group], before: Any, now: dict[str, Any], given: dict[Keys, str], path: Keys,
    on_notice: Callable[[str], object],
) -> None:  # fmt: skip
    """Where a group's type changed from ``before`` (the file), drop the file's keys that the new type lacks."""
    by_tag = {tag(group): group for group in known}
    old, new = (str(one.get("type")) if isinstance(one, dict) else "" for one in (before, now))
    if old != new and {old, new} <= by_tag.keys():
        rest = [key for key in now if not any(one[: len(path) + 1] == (*path, key) for one in given)]
        dropped = [key for key in rest if key not in by_tag[new].model_fields]
        kept = [key for key in rest if key in by_tag[new].model_fields]
        for key in dropped:
            del now[key]
        if rest:
            words = {"dropped": dropped, "kept": kept}
            shown = "; ".join(f"{what} {', '.join(map(str, keys))}" for what, keys in words.items() if keys)
            on_notice(f"{'.'.join(path)}.type={new}: the config had type {old}; {shown}")
    holders = [by_tag[new]] if new in by_tag else known
    for key, value in now.items():
        here = [one.model_fields[key].annotation for one in holders if key in one.model_fields]
        if isinstance(value, dict) and here:
            inner = before.get(key) if isinstance(before, dict) else None
            _drop_keys_of_other_types(groups(here[0]), inner, value, given, (*path, key), on_notice)
