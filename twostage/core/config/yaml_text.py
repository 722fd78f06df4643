"""YAML without loss or guessing: the text of every scalar is kept along with its value."""

import re
from typing import Any

import yaml

from twostage.core.config.schema import groups, is_text, item_annotation

__all__ = ["has_comment", "read_yaml", "with_texts"]

QUOTING = ("mapping values are not allowed", "cannot start any token", "undefined alias", "for the tag '!")
"""Parts of error messages about text that needs quotes."""


class _Loader(yaml.SafeLoader):
    """A loader that rejects duplicate keys and reads dates as text. Numbers are decimal or hexadecimal: `12:30` is not
    750 and `010` is not 8."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = []
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if key.tag != "tag:yaml.org,2002:merge" and name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {name!r}", key.start_mark)
            seen.append(name)
        return super().construct_mapping(node, deep)


class _TextLoader(_Loader):
    """A loader that reads every scalar except `null` as text."""


YAML_1_1 = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp", "value")}
_Loader.yaml_implicit_resolvers = {
    first: [(kind, form) for kind, form in resolvers if kind not in YAML_1_1]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?((0|[1-9][0-9_]*)\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
for kind in ("bool", "int", "float", "timestamp"):
    _TextLoader.add_constructor(f"tag:yaml.org,2002:{kind}", yaml.SafeLoader.construct_yaml_str)


def read_yaml(text: str) -> tuple[Any, Any]:
    """The values of a YAML document, and the same document with the text of every scalar.

    Raises:
        ValueError: not valid YAML; one line says why and where.
    """
    try:
        return yaml.load(text, _Loader), yaml.load(text, _TextLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: characters not allowed in YAML
        why = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        hint = "; put text with special characters in quotes" if any(problem in why for problem in QUOTING) else ""
        raise ValueError(f"{why}{hint}") from None


def with_texts(annotation: Any, value: Any, texts: Any) -> Any:
    """``value`` with the scalar's text at every key that the schema expects text for: `dir: 2024` is "2024".

    Args:
        annotation: the annotation of ``value`` in the schema.
        texts: ``value`` with the text of every scalar, from :func:`read_yaml`.
    """
    if isinstance(value, dict) and isinstance(texts, dict) and len(value) == len(texts):
        known = groups(annotation, texts)
        found = {}
        for (key, item), text in zip(value.items(), texts.values(), strict=True):
            here = [one.model_fields[key].annotation for one in known if key in one.model_fields]
            found[key] = with_texts(here[0], item, text) if here else item
        return found
    if isinstance(value, list) and isinstance(texts, list):
        pairs = enumerate(zip(value, texts, strict=True))
        return [with_texts(item_annotation(annotation, index), item, text) for index, (item, text) in pairs]
    return texts if isinstance(value, bool | int | float) and is_text(annotation) else value


def has_comment(text: str) -> bool:
    """Whether YAML would skip a part of ``text`` as a comment."""
    end = 0
    for token in yaml.scan(text):
        if "#" in text[end : token.start_mark.index]:
            return True
        end = token.end_mark.index
    return False
