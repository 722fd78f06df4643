"""The one result of all bottlenecks."""

from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["BottleneckOutput"]


@dataclass
class BottleneckOutput:
    """What every bottleneck returns."""

    z: Tensor
    """(B, C, h, w): what the decoder gets."""
    indices: Tensor | None = None
    """int64 codes of the discrete bottlenecks: (B, h, w), or (B, h, w * depth) where a cell has `depth` codes."""
    mean: Tensor | None = None
    """(B, C, h, w): the posterior's mean, of the variational bottlenecks."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Scalars to be added to the reconstruction loss."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Scalars to be looked at."""
