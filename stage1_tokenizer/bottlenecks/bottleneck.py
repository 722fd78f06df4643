"""The interface of every bottleneck, and the base of all quantizers. To write your own, see docs/extending.md.

Axes: B images, C latent channels, h and w cells of the latent grid, N = B h w vectors, D = C dimensions.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twostage.core.config.registry import OpenUnion
from twostage.core.config.sections import Section
from twostage.core.scales import Scales
from twostage.core.training.random import BatchRandom

__all__ = [
    "Bottleneck",
    "BottleneckConfig",
    "BottleneckOutput",
    "GradientRule",
    "Quantizer",
    "code_counts",
    "full_precision",
    "pass_gradient",
]

GradientRule = Literal["straight_through", "rotation"]

TRIAL = 2.0
"""A restarted code has this multiple of the count below which it is dead: without use it restarts again after
ln(TRIAL) / (1 - usage_decay) updates."""


@dataclass
class BottleneckOutput:
    """The result of every bottleneck."""

    z: Tensor
    """(B, C, h, w): the decoder's input."""
    indices: Tensor | None = None
    """int64 codes of the discrete bottlenecks: (B, h, w), (B, h, w * depth) with `depth` codes per cell, or (B, 1, N)
    with `scales`."""
    mean: Tensor | None = None
    """(B, C, h, w): the posterior's mean, from the variational bottlenecks."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Scalars that training adds to the reconstruction loss."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Scalars that training only logs."""


class Bottleneck(nn.Module):
    """The module between encoder and decoder. Subclasses implement ``forward`` and ``encode``; discrete ones also
    ``lookup``, variational ones ``sample``."""

    encoded_channels: int
    """Channels of the encoder's output."""
    codebook_size: int = 0
    """The number of codes; 0: the latent is continuous."""
    digits: tuple[int, ...] = ()
    """If a code is a number whose digits are the channels: the base of each channel, the least significant first. Then
    a prior can predict a code digit by digit (`model.codes`)."""
    depth: int = 1
    """Codes per cell. A prior sees a cell's codes side by side, as a grid (h, w * depth)."""
    scales: Scales = ()
    """The grids of codes, coarse to fine, if there are several. A prior sees their N codes as a grid (1, N)."""
    variational: bool = False
    """Whether it has its own prior: then ``forward`` returns the loss `kl` (nats per image) and ``sample`` works."""
    num_classes: int = 0
    """Classes that the bottleneck's own prior depends on; 0: none."""
    starts_from_data: bool = False
    """Whether training calls ``initialize`` before its first step."""
    progress: float = 1.0
    """The share of the training that is done, in [0, 1], for schedules. Training sets it before each step."""

    def forward(self, encoded: Tensor, labels: Tensor | None, random: BatchRandom) -> BottleneckOutput:
        """The latent of the encoder's output (B, encoded_channels, h, w) with losses and metrics, for training.

        Args:
            labels: (B,) classes, where the data has them.
            random: the source of all random numbers.
        """
        raise NotImplementedError

    def encode(self, encoded: Tensor) -> BottleneckOutput:
        """The latent of the encoder's output (B, encoded_channels, h, w) without losses, for inference."""
        raise NotImplementedError

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes (B, h, w * depth) or (B, 1, N) -> their vectors z (B, C, h, w)."""
        raise NotImplementedError

    def codebook_numbers(self, width: int) -> Tensor:
        """The number of the codebook of each code in a row of ``width`` codes, from 0 on: one codebook per depth."""
        return torch.arange(width) % self.depth

    def sample(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """z (B, C, h, w) from the bottleneck's own prior, for standard normal noise of the same shape.

        Args:
            labels: (B,) classes, needed if ``num_classes`` is above 0.
        """
        raise NotImplementedError

    def initialize(self, encoded: Tensor, generator: torch.Generator) -> None:
        """Starts the codebook from encoded training images (B, encoded_channels, h, w)."""
        raise NotImplementedError

    def update_codebook(self, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Called once per update, after the optimizer; does nothing by default.

        Args:
            reduce_sum: sums a tensor over all processes.
        """


class BottleneckConfig(OpenUnion, Section):
    """The group `model.bottleneck`; its `type` selects the bottleneck."""

    collapse_remedy: ClassVar[str] = ""
    """Keys to set if few codes are in use."""
    scheduled: ClassVar[str] = ""
    """Keys, if any, that count in shares of the planned steps."""

    def build(self, shape: tuple[int, int, int], num_classes: int) -> Bottleneck:
        """The bottleneck for a latent of ``shape`` (C, h, w) and data of ``num_classes`` classes (0: unlabelled)."""
        raise NotImplementedError

    def check_channels(self, latent_channels: int) -> None:
        """Accepts any number by default.

        Raises:
            ValueError: this bottleneck does not work with that many channels.
        """


class Quantizer(Bottleneck):
    """Base class of quantizers: counts how often each code is chosen during training.

    ``count`` collects; ``update_codebook`` sums the counts over all processes, so every process holds the same ones.

    Args:
        codebook_size: codes that a cell chooses from.
        encoded_channels: channels of the encoder's output.
        usage_decay: decay of the counts' moving average, whose window is about 1 / (1 - usage_decay) updates.
    """

    ema_counts: Tensor
    pending_counts: Tensor

    def __init__(self, codebook_size: int, encoded_channels: int, usage_decay: float = 0.99) -> None:
        super().__init__()
        self.codebook_size, self.encoded_channels, self.usage_decay = codebook_size, encoded_channels, usage_decay
        self.register_buffer("ema_counts", torch.ones(codebook_size))
        self.register_buffer("pending_counts", torch.zeros(codebook_size), persistent=False)

    @torch.no_grad()
    def count(self, indices: Tensor, times: Tensor | None = None) -> None:
        """Counts each of the codes ``indices`` (N,) once, or ``times`` (a scalar)."""
        times = torch.ones((), device=indices.device) if times is None else times.float()
        self.pending_counts.index_add_(0, indices, times.expand(len(indices)))

    @torch.no_grad()
    def update_codebook(self, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Moves the average counts towards the counts since the last call."""
        self.ema_counts.lerp_(reduce_sum(self.pending_counts), 1 - self.usage_decay)
        self.pending_counts.zero_()

    @torch.no_grad()
    def restart(self, below: float, possible: Tensor) -> Tensor:
        """Marks (K,) the dead codes, whose count is less than the share ``below`` of the average, and sets their counts
        so that they stay alive for a while. The caller makes sure that they are chosen again.

        Args:
            possible: a scalar or (K,); codes where it is false are left alone.
        """
        least = below * self.ema_counts.mean()
        dead = (self.ema_counts < least) & possible
        self.ema_counts.copy_(torch.where(dead, TRIAL * least, self.ema_counts))
        return dead

    @torch.no_grad()
    def usage_metrics(self) -> dict[str, Tensor]:
        """`perplexity`: exp of the entropy of the average counts. `codebook_usage`: the share of codes chosen more
        than a hundredth as often as the average code."""
        total = self.ema_counts.sum()
        shares = self.ema_counts / total
        used = (self.ema_counts > 0.01 * total / self.codebook_size).float().mean()
        return {"perplexity": torch.special.entr(shares).sum().exp(), "codebook_usage": used}


@torch.no_grad()
def code_counts(bottleneck: Bottleneck, indices: Tensor) -> Tensor:
    """How often each code of each codebook occurs in ``indices`` (B, ..., width): (codebooks, K) int64."""
    codebooks, size = bottleneck.codebook_numbers(indices.shape[-1]), bottleneck.codebook_size
    num_codebooks = int(codebooks.max()) + 1
    numbered = indices + codebooks.to(indices.device, non_blocking=True) * size
    return torch.bincount(numbered.flatten(), minlength=num_codebooks * size).view(num_codebooks, size)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A region without autocast. While a model is exported it does nothing, because torch.export.save cannot write such
    a region in every graph."""
    return nullcontext() if torch.compiler.is_exporting() else torch.autocast(device.type, enabled=False)


def pass_gradient(encoded: Tensor, quantized: Tensor, rule: GradientRule = "straight_through") -> Tensor:
    """``quantized`` (N, D) by value, with a gradient to ``encoded`` (N, D).

    `straight_through`: the gradient unchanged (van den Oord et al. 2017, section 3.2). `rotation`: rotated and scaled
    like ``encoded`` on its way to ``quantized``; the rotation itself is held constant (Fifty et al. 2024,
    arXiv 2410.06424, equation 4 and section 4.3).
    """
    if rule == "straight_through":
        return _StraightThrough.apply(encoded, quantized)  # type: ignore[return-value]
    with torch.no_grad():
        lengths = encoded.norm(dim=1, keepdim=True).clamp(min=1e-6), quantized.norm(dim=1, keepdim=True)
        e_hat, q_hat = encoded / lengths[0], F.normalize(quantized, dim=1)
        r = F.normalize(e_hat + q_hat, dim=1)  # the Householder vector of half the rotation
        scale = lengths[1] / lengths[0]
    reflected = encoded - 2 * (encoded * r).sum(1, keepdim=True) * r
    return scale * (reflected + 2 * (encoded * e_hat).sum(1, keepdim=True) * q_hat)


class _StraightThrough(torch.autograd.Function):
    """Equals `encoded + (quantized - encoded).detach()` without its arithmetic and rounding."""

    @staticmethod
    def forward(ctx: object, encoded: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradients[0], None
