"""Look up facts in a configuration's schema: whether a key is text, which groups a tagged union has."""

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from twostage.core.config.registry import is_open

__all__ = ["Group", "alternatives", "annotations_at", "groups", "is_optional", "is_text", "item_annotation", "tag"]

Group = type[BaseModel]


def alternatives(annotation: Any) -> list[Any]:
    """Members of a union (nested and registered ones too), without `Annotated`; [annotation] without a union."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [one for member in get_args(annotation) for one in alternatives(member)]
    if is_open(annotation):
        return list(annotation.members())
    return [annotation]


def is_optional(annotation: Any) -> bool:
    """Whether None is allowed."""
    return type(None) in alternatives(annotation)


def is_text(annotation: Any) -> bool:
    """Whether all values are text, one of several words, or None."""
    kinds = [one for one in alternatives(annotation) if one is not type(None)]
    return bool(kinds) and all(
        one is str or (get_origin(one) is Literal and all(isinstance(word, str) for word in get_args(one)))
        for one in kinds
    )


def item_annotation(annotation: Any, index: int) -> Any:
    """The annotation of the item at ``index``; None if the value is neither a list nor a tuple."""
    for one in alternatives(annotation):
        items = get_args(one)
        if get_origin(one) is list:
            return items[0]
        if get_origin(one) is tuple and index < len(items):
            return items[index]
    return None


def tag(member: Any) -> str | None:
    """The `type` that distinguishes this group from the others in its union; None without one."""
    if isinstance(member, type) and issubclass(member, BaseModel) and "type" in member.model_fields:
        return get_args(member.model_fields["type"].annotation)[0]
    return None


def groups(annotation: Any, document: Any = None) -> list[Group]:
    """The groups that a value may be; if ``document`` has a known `type`, only that group."""
    found = [one for one in alternatives(annotation) if isinstance(one, type) and issubclass(one, BaseModel)]
    named = document.get("type") if isinstance(document, dict) else None
    return [one for one in found if len(found) > 1 and tag(one) == named] or found


def annotations_at(schema: Group, document: Any, keys: list[str]) -> list[Any]:
    """The annotations of the key at a path, [] for an unknown key.

    They come from the types that ``document`` names or, if these do not have the key, from every type that has it.
    """
    by_type, by_any = [schema], [schema]
    for depth, key in enumerate(keys):
        found = [[one.model_fields[key].annotation for one in known if key in one.model_fields]
                 for known in (by_type, by_any)]  # fmt: skip
        if depth == len(keys) - 1:
            return found[0] or found[1]
        document = document.get(key) if isinstance(document, dict) else None
        by_type = [group for annotation in found[0] for group in groups(annotation, document)]
        by_any = [group for annotation in found[1] for group in groups(annotation)]
    return []
