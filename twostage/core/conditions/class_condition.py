"""The class of an image as a condition.

Axes: B images.
"""

from typing import Literal

import torch
from torch import Tensor

from twostage.core.conditions.condition import Condition, ConditionConfig, ConditionedSplit, ConditionSource
from twostage.core.conditions.context import Context, ContextForm, ContextSpace
from twostage.core.config.sections import Size
from twostage.core.errors import InputError

__all__ = ["ClassCondition", "ClassConditionConfig"]


@ConditionConfig.register
class ClassConditionConfig(ConditionConfig):
    """The image's class."""

    plural = "classes"

    type: Literal["class"] = "class"
    num_classes: Size | None = None
    """Set from the data."""

    @property
    def form(self) -> ContextForm:
        return ContextForm(num_classes=self.num_classes or 0)

    def learned_from(self, source: ConditionSource) -> "ClassConditionConfig":
        names = source.class_names
        if not names:
            raise InputError(
                f"condition.type 'class': no classes in {source.name}. Use images with classes (a folder for each, or "
                "a column `label`), or remove this condition"
            )
        return self.model_copy(update={"num_classes": len(names)})

    def build(self, space: ContextSpace) -> "ClassCondition":
        return ClassCondition(self.num_classes or 0)


class ClassCondition(Condition):
    """Values are labels (B,) int64 in [0, num_classes]; ``num_classes`` means "no class". The network holds a vector
    for each of them."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def nothing(self, count: int) -> Tensor:
        return torch.full((count,), self.num_classes)

    def read(self, split: ConditionedSplit, rows: Tensor) -> Tensor | None:
        return split.read_labels(rows)

    def parse(self, value: int) -> Tensor:
        return torch.tensor([value])

    def check(self, values: Tensor) -> None:
        if values.ndim != 1 or values.is_floating_point():
            raise InputError(f"labels: expected whole numbers of the shape (images,), got {tuple(values.shape)}")
        wrong = values[(values < 0) | (values > self.num_classes)]
        if len(wrong):
            raise InputError(
                f"labels: got {wrong[0].item()}, expected 0 to {self.num_classes - 1}, or {self.num_classes} for no "
                "class"
            )

    def forward(self, values: Tensor) -> Context:
        return Context(len(values), labels=values)
