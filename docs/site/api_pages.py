"""The pages `api/python.md` and `api/configuration.md`: the names that they show. mkdocstrings renders them."""

from collections.abc import Iterable, Iterator
from typing import get_args

import twostage
from stage1_tokenizer.tokenizer_training import TokenizerConfig
from stage2_prior.prior_training import PriorTrainingConfig
from twostage.core.config.registry import is_open
from twostage.core.config.sections import Section

__all__ = ["api_pages"]

MORE: dict[str, dict[str, list[str]]] = {
    "Codes and sampling": {
        "stage2_prior.codes": ["CodeCache", "CodeSplit", "Manifest"],
        "stage2_prior.sampling": ["Branches", "image_seeds", "filter_logits", "choose"],
    },
    "Training from Python": {
        "stage1_tokenizer.tokenizer_training": ["train"],
        "stage2_prior.prior_training": ["train"],
    },
}
"""Names that the face `twostage` does not export: by heading and module."""


def api_pages() -> dict[str, str]:
    """Markdown by page."""
    configuration = "# Configuration\n\nThe groups and keys of the YAML files, and their classes in Python.\n\n"
    for heading, root in {"Tokenizers": TokenizerConfig, "Priors": PriorTrainingConfig}.items():
        configuration += f"## {heading}\n\n"
        for model in _models(root):
            name, keys = (
                f"{model.__module__}.{model.__name__}",
                [key for key in model.model_fields if key in vars(model)["__annotations__"]],
            )
            if f"::: {name}\n" not in configuration:
                configuration += f"::: {name}\n    options: {{members: [{', '.join(keys)}]}}\n\n"
    face = [f"{module}.{name}" for name, module in twostage.MODULES.items()]
    python = "# Python\n\n## from twostage import ...\n\n"
    python += _show(name for name in face if f"::: {name}\n" not in configuration)
    for heading, modules in MORE.items():
        python += f"## {heading}\n\n" + _show(f"{module}.{name}" for module, names in modules.items() for name in names)
    return {"api/python.md": python, "api/configuration.md": configuration}


def _show(names: Iterable[str]) -> str:
    return "".join(f"::: {name}\n\n" for name in names)


def _models(annotation: object, seen: set[object] | None = None) -> Iterator[type[Section]]:
    """Every configuration class below a type annotation, the outermost first. A class may hold others of its kind."""
    seen = set() if seen is None else seen
    if isinstance(annotation, type) and issubclass(annotation, Section):
        if annotation in seen:
            return
        seen.add(annotation)
        yield from (base for base in annotation.__mro__ if issubclass(base, Section) and base is not Section)
        for field in annotation.model_fields.values():
            yield from _models(field.annotation, seen)
    if is_open(annotation):
        for member in annotation.registered.values():
            yield from _models(member, seen)
    for part in get_args(annotation):
        yield from _models(part, seen)
