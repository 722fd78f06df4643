"""All conditions of a model together."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# These modules register the types of `condition`.
from twostage.core.conditions import class_condition, map_condition, vector_condition  # noqa: F401
from twostage.core.conditions.condition import Condition, ConditionConfig, ConditionedSplit
from twostage.core.conditions.context import Context, ContextForm, ContextSpace, join_contexts, merge_contexts
from twostage.core.conditions.text_condition import TextConditionConfig
from twostage.core.errors import InputError
from twostage.core.training.random import BatchRandom

__all__ = ["NAMES", "Conditions", "Given", "context_form", "examples_of", "parse_values"]

NAMES = {"class": "class name", "text": "prompt", "map": "map", "vector": "vector"}
"""What people call the values."""
Given = Mapping[str, Tensor]
"""The values of each condition, by its type; a condition that is missing has none."""


def context_form(configs: Sequence[ConditionConfig]) -> ContextForm:
    """The parts of the contexts that these conditions make together."""
    forms = [config.form for config in configs]
    return ContextForm(
        sum(form.num_classes for form in forms),
        any(form.pooled for form in forms),
        any(form.cells for form in forms),
        sum(form.sequence for form in forms),
    )


def examples_of(configs: Iterable[ConditionConfig]) -> tuple[str, ...]:
    """Some held-out captions, if captions are among the conditions."""
    return next((config.examples for config in configs if isinstance(config, TextConditionConfig)), ())


def parse_values(conditions: Mapping[str, Condition], name: str, values: Sequence[Any]) -> Tensor:
    """The values (n, ...) of the condition ``name`` as people give them.

    Raises:
        InputError: there is no such condition, no value, or one that it cannot have.
    """
    if name not in conditions:
        raise InputError(f"{NAMES.get(name, name)}: this model was trained without {name} conditions. Omit it")
    if not values:
        raise InputError(f"{NAMES.get(name, name)}: expected at least one, got none. Omit it")
    parsed = []
    for number, value in enumerate(values, 1):
        try:
            parsed.append(conditions[name].parse(value))
        except InputError as error:
            raise (InputError(f"number {number} of {len(values)}: {error}") if len(values) > 1 else error) from None
    return torch.cat(parsed)


class Conditions(nn.ModuleDict):
    """The conditions of a model by type, such as `class` and `text`."""

    def __init__(self, configs: Sequence[ConditionConfig], space: ContextSpace) -> None:
        super().__init__({config.type: config.build(space) for config in configs})
        self.dropouts = {config.type: config.dropout for config in configs}

    def nothing(self, count: int) -> dict[str, Tensor]:
        """The values of ``count`` images without any condition."""
        return {name: condition.nothing(count) for name, condition in self._each()}

    def read(self, split: ConditionedSplit, rows: Tensor) -> dict[str, Tensor]:
        """The values of some rows of a split."""
        found = {name: condition.read(split, rows) for name, condition in self._each()}
        return self.nothing(len(rows)) | {name: value for name, value in found.items() if value is not None}

    def hide(self, given: Given, dropout: float, random: BatchRandom) -> dict[str, Tensor]:
        """Hides each condition from its share of the images, independently of the others; ``dropout`` is the share of
        those that have none of their own.

        Of several conditions, all that are ever hidden are also hidden together from the share ``dropout``: guidance
        needs images without any.
        """
        hidden = {}
        for name, condition in self._each():
            values, share = condition.one_of_each(given[name], random), self.dropouts[name]
            share = dropout if share is None else share
            gone = random.uniform(f"{name} dropout", (), values.device) < share
            if len(self) > 1 and share:
                gone |= random.uniform("dropout of all conditions", (), values.device) < dropout
            hidden[name] = condition.hide(values, gone)
        return hidden

    def parse(self, name: str, values: Sequence[Any]) -> Tensor:
        """The values (n, ...) of the condition ``name`` as people give them.

        Raises:
            InputError: there is no such condition, no value, or one that it cannot have.
        """
        return parse_values(dict(self._each()), name, values)

    def complete(self, given: "Given | Tensor | None", count: int) -> dict[str, Tensor]:
        """The values of all conditions for ``count`` images, with nothing where they are missing.

        Args:
            given: a tensor for each condition, or labels (count,) if the class is the only one.

        Raises:
            InputError: values that a condition cannot have, or of a condition that this model does not have.
        """
        if isinstance(given, Tensor):
            given = {"class": given}
        conditions, values = dict(self._each()), self.nothing(count)
        for name, value in (given or {}).items():
            if name not in self:
                has = f"only {' and '.join(self)}" if self else "no conditions"
                raise InputError(f"condition {name!r}: this model was trained with {has}. Omit it")
            if len(value) != count:
                raise InputError(
                    f"condition {name!r}: expected a value for each of {count} images, got the shape "
                    f"{tuple(value.shape)}"
                )
            conditions[name].check(value)
            values[name] = value
        return values

    def forward(self, given: Given, size: int) -> Context:
        """What the values of ``size`` images say about them."""
        return merge_contexts(size, [condition(given[name]) for name, condition in self._each()])

    @torch.no_grad()
    def encode_each(self, given: Given, count: int) -> Context:
        """:meth:`forward` for sampling: each condition's distinct values are encoded one
        by one, so that an image's context does not depend on its neighbours, not even in the last bit."""
        contexts = []
        for name, condition in self._each():
            distinct, which = given[name].unique(dim=0, return_inverse=True)
            each = join_contexts([condition(value[None]) for value in distinct])
            contexts.append(each.rows(which))
        return merge_contexts(count, contexts)

    def taken_over(self, earlier: "Conditions") -> tuple[dict[str, Tensor], list[str]]:
        """The weights of ``earlier`` conditions of the same types, for these, and what to know about them."""
        before, weights, notes = dict(earlier._each()), {}, []
        for kind, condition in self._each():
            if kind in before:
                state, note = condition.taken_over(before[kind])
                weights |= {f"{kind}.{name}": tensor for name, tensor in state.items()}
                notes += [note] if note else []
        return weights, notes

    def _each(self) -> list[tuple[str, Condition]]:
        return list(self.items())  # type: ignore[arg-type]
