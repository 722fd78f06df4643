"""Loss terms of one's own: the interface that plugins register with (docs/extending.md)."""

from collections.abc import Callable

from pydantic import Field
from torch import Tensor

from twostage.core.config.registry import OpenUnion
from twostage.core.config.sections import Number, Section

__all__ = ["LossTerm", "LossTermConfig"]

LossTerm = Callable[[Tensor, Tensor], Tensor]
"""Takes reconstructions and the images themselves, both (B, C, H, W) in [-1, 1]; returns a scalar to minimise."""


class LossTermConfig(OpenUnion, Section):
    """One term of `loss.terms`; its `type` selects it. twostage has none: plugins register theirs."""

    weight: Number = Field(default=1.0, ge=0)
    """What the term is multiplied by before it is added to the reconstruction loss."""

    def build(self, image_shape: tuple[int, int, int]) -> LossTerm:
        """The term for images of ``image_shape`` (C, H, W): a function, or a module with weights that stay fixed."""
        raise NotImplementedError
