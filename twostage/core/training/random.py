"""Random numbers that depend on their purpose, never on when or where they are drawn.

A run keeps no random state: every draw follows from (seed, purpose, step), and within a step from a sample's place in
the global batch. So a resumed run draws the same numbers as an uninterrupted one, and two processes the same as one.
"""

from hashlib import blake2b

import torch
from torch import Tensor

__all__ = ["BatchRandom", "seed_for"]


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed for a purpose, e.g. ``seed_for(seed, "order", epoch)``; different parts give unrelated seeds."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


class BatchRandom:
    """Random numbers for rows of a global batch: each process draws for the whole batch and keeps its own rows.

    Args:
        seed: the seed of the step, from :func:`seed_for`.
        rows: the part of the global batch that this process works on.
        batch_size: samples in the global batch.
    """

    def __init__(self, seed: int, rows: slice, batch_size: int) -> None:
        self.seed, self.rows, self.batch_size = seed, rows, batch_size

    @classmethod
    def from_torch(cls, batch_size: int) -> "BatchRandom":
        """For a training loop of your own in one process: the seed comes from torch's generator, so
        `torch.manual_seed` makes the loop repeatable. The commands never use this."""
        return cls(int(torch.randint(2**62, ())), slice(0, batch_size), batch_size)

    def generator(self, purpose: str, device: torch.device) -> torch.Generator:
        """The generator for a purpose, the same in every process."""
        return torch.Generator(device).manual_seed(seed_for(self.seed, purpose))

    def uniform(self, purpose: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Uniform draws in [0, 1), (rows, *shape) float32."""
        return torch.rand(self.batch_size, *shape, generator=self.generator(purpose, device), device=device)[self.rows]

    def normal(self, purpose: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Standard normal draws, (rows, *shape) float32."""
        return torch.randn(self.batch_size, *shape, generator=self.generator(purpose, device), device=device)[self.rows]
