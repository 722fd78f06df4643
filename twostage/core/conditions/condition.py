"""The interface of a kind of condition. A model never asks which kinds it has, so a new kind is one new file.

Axes: B images, h and w cells of the code grid, D the width of a network's contexts.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from twostage.core.conditions.context import Context, ContextForm, ContextSpace
from twostage.core.conditions.map_form import MapForm
from twostage.core.config.registry import OpenUnion
from twostage.core.config.sections import Section, Share
from twostage.core.training.random import BatchRandom

__all__ = ["Condition", "ConditionConfig", "ConditionSource", "ConditionedSplit"]


class ConditionedSplit(Protocol):
    """Images or their codes with what they are conditioned on."""

    def __len__(self) -> int: ...

    def read_labels(self, rows: Tensor) -> Tensor | None:
        """(B,) int64, or None if there are none."""
        ...

    def read_captions(self, rows: Tensor) -> list[tuple[str, ...]] | None:
        """The captions of each image, or None if there are none."""
        ...

    def read_maps(self, rows: Tensor) -> Tensor | None:
        """(B, H, W) uint8, (B, C, H, W) uint8, or codes (B, h, w); None if there are none."""
        ...

    def read_vectors(self, rows: Tensor) -> Tensor | None:
        """(B, V) float32, or None if there are none."""
        ...


@dataclass(frozen=True)
class ConditionSource:
    """What a condition learns from before training, such as its vocabulary: the images, or the codes, of a model."""

    name: str
    """In messages, such as "codes codes/emoji"."""
    splits: Mapping[str, ConditionedSplit]
    validation: ConditionedSplit
    num_images: int
    """Those of `train`: its first rows, if others are variants of them."""
    image_size: tuple[int, int]
    """(height, width)."""
    class_names: list[str] | None
    maps: MapForm | None = None
    """What the maps are, if that is known already."""
    map_names: tuple[str, ...] = ()
    """The names of the classes of maps, from class 0 on; empty if they are not known."""


class ConditionConfig(OpenUnion, Section):
    """One condition: the key `condition`. Each member of this union adds its `type` and its settings."""

    plural: ClassVar[str]
    """What several images have of it, in messages, such as "classes"."""
    dropout: Share | None = None
    """The share of the images that are trained on without this condition, which guidance needs; null:
    `loss.class_dropout_prob`."""

    @property
    def form(self) -> ContextForm:
        """The parts that it adds to a context."""
        raise NotImplementedError

    def learned_from(self, source: ConditionSource) -> Self:
        """The same with what it has to learn before training, such as a vocabulary.

        Raises:
            InputError: the source lacks this condition.
        """
        raise NotImplementedError

    def notices(self, source: ConditionSource) -> list[str]:
        """What to know about this condition in the source, after :meth:`learned_from`: one sentence each."""
        return []

    def build(self, space: ContextSpace) -> "Condition":
        """The network that writes contexts in ``space``."""
        raise NotImplementedError


class Condition(nn.Module, ABC):
    """Turns the values of one kind of condition into a part of a context.

    Values are one tensor with a row for each image, in which some values mean "none": so hiding a condition is a
    choice between two tensors.
    """

    @abstractmethod
    def nothing(self, count: int) -> Tensor:
        """The values (count, ...) of images without this condition."""

    @abstractmethod
    def read(self, split: ConditionedSplit, rows: Tensor) -> Tensor | None:
        """The values of some rows of a split, or None if it has none."""

    @abstractmethod
    def parse(self, value: Any) -> Tensor:
        """The value (1, ...) of one image as a person gives it, such as a prompt.

        Raises:
            InputError: it is not one that this condition can have.
        """

    @abstractmethod
    def check(self, values: Tensor) -> None:
        """Refuses values that this condition cannot have.

        Raises:
            InputError: of another shape, or out of range.
        """

    @abstractmethod
    def forward(self, values: Tensor) -> Context:
        """What the values (B, ...) say about their images."""

    def one_of_each(self, values: Tensor, random: BatchRandom) -> Tensor:
        """What a training step uses of the values (B, ...), if an image can have several."""
        return values

    def taken_over(self, earlier: Any) -> tuple[dict[str, Tensor], str]:
        """The weights of an ``earlier`` condition of the same type, for this one, and what to know about them or ""."""
        return earlier.state_dict(), ""

    def hide(self, values: Tensor, hidden: Tensor) -> Tensor:
        """The values (B, ...), with nothing where ``hidden`` (B,) is True."""
        nothing = self.nothing(1).to(values.device, non_blocking=True)
        return torch.where(hidden.view(-1, *[1] * (values.ndim - 1)), nothing, values)
