"""The interface of every prior's network and its configuration. Code that uses a prior never checks its type. So a new
prior is one new file, and other packages can register their own priors (docs/extending.md).

Axes: B images, N cells of a code grid.
"""

import math
from collections.abc import Callable
from typing import ClassVar, Protocol, Self

from torch import Tensor

from stage2_prior.sampling import Branches
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.conditions.context import Context, ContextForm, ContextSpace
from twostage.core.config.registry import OpenUnion
from twostage.core.config.sections import Section
from twostage.core.scales import Scales
from twostage.core.training.random import BatchRandom

__all__ = ["COMMON_SETTINGS", "NetworkConfig", "OnProgress", "PriorNetwork"]

COMMON_SETTINGS = frozenset({"temperature", "top_k", "top_p", "guidance_scale", "guidance_schedule"})

OnProgress = Callable[[int], object]
"""Receives how many codes were sampled since its last call."""


class NetworkConfig(OpenUnion, Section):
    """The configuration of a network: the key `model`. Each member of this union adds its `type` and its settings."""

    sampling_settings: ClassVar[frozenset[str]] = COMMON_SETTINGS
    """The settings of `SamplingConfig` that the network understands."""
    shardable: ClassVar[bool] = False
    """Whether training can share the weights among processes (FSDP)."""
    draws_alone: ClassVar[bool] = False
    """Whether the network draws a single image with the same codes, to the last bit, as in a batch of several."""

    @property
    def ranks_codes(self) -> bool:
        """Whether it predicts a probability for every code at once, which top-k needs."""
        return True

    def for_codes(self, codebook_size: int, digits: list[int] | None, scales: Scales = ()) -> Self:
        """This configuration with what it learns from the codes that it is trained on. By default, that is nothing.

        Args:
            digits: see `Manifest.digits`.
            scales: see `Manifest.scales`; the N codes of all scales are seen as a grid (1, N).

        Raises:
            InputError: it does not fit to these codes.
        """
        return self

    def build(self, codebook_size: int, grid: tuple[int, int], form: ContextForm) -> "PriorNetwork":
        """The network, an `nn.Module`, for codes 0 to ``codebook_size - 1`` on a ``grid`` (h, w), and for contexts of
        this ``form``."""
        raise NotImplementedError

    def context_space(self, grid: tuple[int, int]) -> ContextSpace:
        """The vectors that the network wants for its contexts."""
        raise NotImplementedError

    def per_process_setting(self) -> str:
        """The setting by which each process draws random numbers of its own, such as "model.dropout=0.1", or "". A run
        that has one cannot be resumed with another number of processes. By default, a key `dropout` above 0 is one."""
        dropout = getattr(self, "dropout", None)
        return f"model.dropout={dropout}" if dropout else ""

    def default_steps(self, grid: tuple[int, int]) -> int:
        """The number of steps in which an image is sampled by default: by default one for each code."""
        return math.prod(grid)

    def likelihood(self, grid: tuple[int, int]) -> str:
        """For a network with an exact likelihood, what reports call it."""
        return "exact"

    def codes_at_once(self, grid: tuple[int, int]) -> int:
        """The number of codes of an image that one sampling step predicts."""
        return 1

    def floats_per_code(self, codebook_size: int) -> int:
        """The numbers that predicting a code computes: its logits."""
        return codebook_size

    def sampling_floats(self, grid: tuple[int, int], form: ContextForm) -> int:
        """Upper estimate of the numbers that sampling keeps per image: caches and activations, not logits."""
        return 0


class PriorNetwork(Protocol):
    """A network that predicts codes (B, N), stored row by row, from what their images' conditions say."""

    @property
    def exact_likelihood(self) -> bool:
        """Whether :meth:`nats_per_image` is exact; otherwise it is an upper bound."""
        ...

    @property
    def keeps(self) -> str:
        """The known codes that sampling can keep, in words such as "any codes"."""
        ...

    def loss(self, codes: Tensor, context: Context, inputs: Tensor, random: BatchRandom) -> Tensor:
        """The training loss, a scalar, of predicting ``codes`` from ``inputs``, in which some codes are replaced."""
        ...

    def nats_per_image(self, codes: Tensor, context: Context, random: BatchRandom) -> Tensor:
        """-log p(codes | conditions), or an upper bound on it: (B,)."""
        ...

    def can_keep(self, known: Tensor) -> bool:
        """Whether sampling can keep the codes of the cells that are True in ``known`` (B, N)."""
        ...

    def sample(
        self,
        branches: Branches,
        sampling: SamplingConfig,
        seeds: list[int],
        known: Tensor | None,
        on_progress: OnProgress | None,
    ) -> Tensor:
        """Codes (B, N) int64. Image i depends on its conditions, ``seeds[i]`` and ``known[i]`` only; ``known`` (B, N)
        has -1 where a code is to be sampled."""
        ...
