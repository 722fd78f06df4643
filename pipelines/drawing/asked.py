"""What images are asked to show, and the same as values of a prior's conditions."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.files.given_conditions import read_map_file, read_vector_file, with_lines
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.prior import Prior
from twostage.core.conditions.conditions import NAMES
from twostage.core.errors import InputError

__all__ = ["Asked", "Cycle", "check_needed", "read_asked", "values_of"]

OPTIONS = {"class": "--class-name", "text": "--prompt", "map": "--map", "vector": "--vector"}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What images are to show. They cycle through each list: image i gets entry i modulo its length.

    If nothing is given, they show all classes in turn, or the examples that a model with captions keeps. Otherwise a
    condition that is not given is left out, if the prior can draw without it.
    """

    class_names: list[str] | None = None
    prompts: list[str] | None = None
    negative_prompts: list[str] | None = None
    """What guidance leads away from; None: from no prompt at all."""
    maps: list[Any] | None = None
    """Labels (H, W), or images (C, H, W) uint8."""
    vectors: list[Any] | None = None
    """Lists or arrays of numbers."""

    @property
    def others(self) -> dict[str, list[Any]]:
        """The conditions beside the class that are given, by type."""
        found = {"text": self.prompts, "map": self.maps, "vector": self.vectors}
        return {name: values for name, values in found.items() if values is not None}


def read_asked(
    class_names: list[str] | None,
    prompts: list[str] | None,
    negative_prompt: str | None,
    map_files: list[Path] | None,
    vector_file: Path | None,
    file: Path | None,
    map_channels: int | None,
) -> Asked:
    """What the command line asks for.

    Args:
        file: more of the same, see :func:`pipelines.files.given_conditions.with_lines`.
        map_channels: see :func:`pipelines.files.given_conditions.read_map_file`.
    """
    options = {
        "class": class_names,
        "prompt": prompts,
        "negative_prompt": None if negative_prompt is None else [negative_prompt],
        "map": [read_map_file(path, f"--map {path}", map_channels) for path in map_files or []],
        "vector": None if vector_file is None else read_vector_file(vector_file, f"--vector {vector_file}"),
    }
    given = with_lines(options, file, map_channels)
    return Asked(
        class_names=given.get("class"), prompts=given.get("prompt"), negative_prompts=given.get("negative_prompt"),
        maps=given.get("map"), vectors=given.get("vector"),
    )  # fmt: skip


@dataclass(frozen=True)
class Cycle:
    """:class:`Asked` as a model takes it: image i gets value i modulo their number, of each condition."""

    labels: list[int] | None = None
    """None: no classes."""
    values: Mapping[str, Tensor] = field(default_factory=dict)
    """Of the other conditions, by type: (n, ...) each."""
    negative: Mapping[str, Tensor] = field(default_factory=dict)
    """Those that guidance leads away from: (n, ...) each."""
    captions: Sequence[str] = ()
    """The prompts, to write below images."""

    def labels_of(self, numbers: Sequence[int]) -> list[int] | None:
        """The labels of the images ``numbers``."""
        return None if self.labels is None else [self.labels[i % len(self.labels)] for i in numbers]

    def given(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The values of the images ``numbers``, for `Prior.sample`."""
        labels = self.labels_of(numbers)
        return ({} if labels is None else {"class": torch.tensor(labels)}) | _cycled(self.values, numbers)

    def against(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The values that guidance leads the images ``numbers`` away from."""
        return _cycled(self.negative, numbers)


def _cycled(values: Mapping[str, Tensor], numbers: Sequence[int]) -> dict[str, Tensor]:
    places = torch.tensor(list(numbers))
    return {name: value[places % len(value)] for name, value in values.items()}


def check_needed(model: Prior | Autoencoder, given: Collection[str]) -> None:
    """Refuses to draw without a condition that was never hidden in training; ``given`` are the others' types.

    Raises:
        InputError: such a condition is missing.
    """
    for condition in model.config.conditions:
        if condition.type not in given and model.needs(condition.type):
            trained = [name for name in model.config.class_names or [] if name not in model.config.untrained_classes]
            names = f", one of: {', '.join(trained)}" if condition.type == "class" else ""
            why = "the decoder of this model sees one for every image, so it"
            if isinstance(model, Prior):
                why = f"this prior was trained with {model.dropout_setting(condition)} and"
            raise InputError(
                f"{NAMES.get(condition.type, condition.type)}: missing; {why} cannot draw without a {condition.type}. "
                f"Give {OPTIONS.get(condition.type, condition.type)}{names}"
            )


def values_of(asked: Asked, model: Prior | Autoencoder) -> Cycle:
    """The conditions beside the class that ``asked`` gives, checked.

    Args:
        model: a prior, or a variational autoencoder.

    Raises:
        InputError: one that the model was not trained with, or a value that it cannot have.
    """
    negative = {"text": asked.negative_prompts} if asked.negative_prompts is not None else {}
    if negative and isinstance(model, Autoencoder):
        raise InputError(
            "negative prompt: guidance leads away from it, and this is a variational autoencoder, which has none. Omit "
            "it"
        )
    asks_nothing = asked.class_names is None and not asked.others
    captions = model.example_prompts() if asks_nothing or model.needs("text") else ()
    others = ({"text": captions} if captions else {}) | asked.others
    values = {name: model.parse(name, given) for name, given in others.items()}
    check_needed(model, {"class", *values})  # without a class, all are drawn in turn
    return Cycle(
        values=values,
        negative={name: model.parse(name, values) for name, values in negative.items()},
        captions=asked.prompts or captions,
    )
