"""The result of every measurement in an evaluation: its figures, the reasons for missing ones, and its protocol."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from pipelines.evaluation.shared_work import RowDigests
from pipelines.saved.evaluation_figures import Figures
from twostage.core.data.data_config import DataConfig
from twostage.core.data.image_data import ImageData, ImageSplit
from twostage.core.data.spread import spread
from twostage.core.errors import InputError

__all__ = ["HeldOutImages", "Measurement", "chosen_rows", "figures_of"]


FiguresT = TypeVar("FiguresT", bound=Figures)


@dataclass(frozen=True)
class Measurement(Generic[FiguresT]):
    """The result of one measurement."""

    figures: FiguresT
    missing: Mapping[str, str] = field(default_factory=dict)
    """Why a figure is missing, by its key in evaluation.json."""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    """How the figures were measured, as plain JSON: its keys in evaluation.json's `protocol`."""
    subject: Sequence[str] = ()
    """What was measured, one sentence each."""
    notes: Sequence[str] = ()
    """How to read the figures, one sentence each."""


def figures_of(measurements: Iterable[Measurement]) -> dict[str, float]:
    """All figures of some measurements, by their key in evaluation.json."""
    return {name: value for found in measurements for name, value in found.figures.by_key().items()}


def chosen_rows(count: int, total: int) -> str:
    """How :func:`twostage.core.data.spread.spread` chose the rows, in words."""
    return "all" if count == total else f"spread evenly over {total}"


@dataclass(frozen=True)
class HeldOutImages:
    """The images that a model is measured on."""

    config: DataConfig
    data: ImageData
    split_name: str
    rows: Tensor
    """(n,) int64: the rows of the split that are measured."""

    @classmethod
    def choose(cls, config: DataConfig, data: ImageData, split: str | None, num_images: int | None) -> "HeldOutImages":
        """Chooses ``num_images``, spread evenly over a split (None: all); by default over the one for validation.

        Raises:
            InputError: there is no such split (the message lists the existing ones).
        """
        name = split or data.validation_name
        if name not in data.splits:
            raise InputError(
                f"--split {name}: data.source {config.source} has no such split. Choose {' or '.join(data.splits)}."
            )
        return cls(config, data, name, spread(len(data.splits[name]), num_images))

    @property
    def split(self) -> ImageSplit:
        """The split that the images come from."""
        return self.data.splits[self.split_name]

    @property
    def train(self) -> ImageSplit:
        """The images that the model was trained on."""
        return self.data.splits["train"]

    def check_classes(self, class_names: list[str] | None, model: str | Path) -> None:
        """Refuses images with other classes than the ``class_names`` that ``model`` was trained on."""
        if class_names != self.data.class_names:
            raise InputError(
                f"{model}: was trained on the classes {class_names}, but data.source {self.config.source} has "
                f"{self.data.class_names}. Use --data with images of the same classes."
            )

    def protocol(self, digests: RowDigests) -> dict[str, Any]:
        """The images in the protocol."""
        return {
            "source": self.config.source,
            "split": self.split_name,
            "images": len(self.rows),
            "chosen": chosen_rows(len(self.rows), len(self.split)),
            "sha256": digests.sha256,
            "sha256_of": (
                f"the sha256 digests of the images (uint{self.split.bits}, channels x height x width), in order"
            ),
            "duplicates": digests.duplicates,
        }

    def sentence(self, digests: RowDigests) -> str:
        """The images in one line."""
        chosen = chosen_rows(len(self.rows), len(self.split))
        return f"{self.config.source}, {self.split_name}: {len(self.rows):,} images ({chosen}), {digests.sha256[:12]}"
