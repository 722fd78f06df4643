"""Vectors as a condition, such as the features of another network.

Axes: B images, V numbers of a vector, D the width of a network's contexts.
"""

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twostage.core.conditions.condition import Condition, ConditionConfig, ConditionedSplit, ConditionSource
from twostage.core.conditions.context import Context, ContextForm, ContextSpace
from twostage.core.config.sections import Number
from twostage.core.errors import InputError
from twostage.core.wording import short_repr

__all__ = ["VectorCondition", "VectorConditionConfig"]

MIN_STD = 1e-6
"""Numbers that vary less than this in training are only shifted."""


@ConditionConfig.register
class VectorConditionConfig(ConditionConfig):
    """The image's vector."""

    plural = "vectors"

    type: Literal["vector"] = "vector"
    mean: tuple[Number, ...] = ()
    """That of the training vectors."""
    std: tuple[Number, ...] = ()
    """That of the training vectors."""

    @property
    def form(self) -> ContextForm:
        return ContextForm(pooled=True)

    def learned_from(self, source: ConditionSource) -> "VectorConditionConfig":
        vectors = source.splits["train"].read_vectors(torch.arange(source.num_images))
        if vectors is None:
            raise InputError(
                f"condition.type 'vector': no vectors in {source.name}. Use images with vectors "
                "(data.vector_column=NAME)"
            )
        std, mean = torch.std_mean(vectors.double(), 0, correction=0)
        std = torch.where(std < MIN_STD, 1.0, std)
        return self.model_copy(update={"mean": tuple(mean.tolist()), "std": tuple(std.tolist())})

    def build(self, space: ContextSpace) -> "VectorCondition":
        return VectorCondition(self, space)


class VectorCondition(Condition):
    """Values are vectors (B, V) float32; NaN for an image without one."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: VectorConditionConfig, space: ContextSpace) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(config.mean), persistent=False)
        self.register_buffer("std", torch.tensor(config.std), persistent=False)
        self.hidden = nn.Linear(len(config.mean), 2 * space.width)
        self.pooled_out = nn.Linear(2 * space.width, space.width)
        nn.init.normal_(self.pooled_out.weight, std=space.std * (2 * space.width) ** -0.5)
        nn.init.zeros_(self.pooled_out.bias)

    @property
    def length(self) -> int:
        """V."""
        return self.hidden.in_features

    def nothing(self, count: int) -> Tensor:
        return torch.full((count, self.length), torch.nan)

    def read(self, split: ConditionedSplit, rows: Tensor) -> Tensor | None:
        return split.read_vectors(rows)

    def parse(self, value: Any) -> Tensor:
        try:
            vector = torch.from_numpy(np.array(value, dtype=np.float32))
        except (TypeError, ValueError):
            raise InputError(f"vector: expected {self.length} numbers, got {short_repr(value)}") from None
        if vector.shape != (self.length,) or not vector.isfinite().all():
            raise InputError(
                f"vector: expected {self.length} finite numbers, got the shape {tuple(vector.shape)}. Give a vector "
                "like those that the model was trained with"
            )
        return vector[None]

    def check(self, values: Tensor) -> None:
        if values.shape[1:] != (self.length,) or not values.is_floating_point():
            raise InputError(
                f"condition 'vector': expected the shape (images, {self.length}), got {values.dtype} of the shape "
                f"{tuple(values.shape)}"
            )

    def taken_over(self, earlier: "VectorCondition") -> tuple[dict[str, Tensor], str]:
        """The same function of a vector, whose mean and deviation are now those of these training vectors."""
        state = earlier.state_dict()
        if earlier.length == self.length:  # otherwise the shapes are refused
            weight = state["hidden.weight"] / earlier.std
            state["hidden.bias"] = state["hidden.bias"] + weight @ (self.mean - earlier.mean)
            state["hidden.weight"] = weight * self.std
        return state, ""

    def forward(self, values: Tensor) -> Context:
        missing = values.isnan().any(1, keepdim=True)
        standard = ((values - self.mean) / self.std).masked_fill(missing, 0.0)
        pooled = self.pooled_out(F.silu(self.hidden(standard.to(self.hidden.weight.dtype))))
        return Context(len(values), pooled=pooled * ~missing)
