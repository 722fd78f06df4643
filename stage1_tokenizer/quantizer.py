"""What all quantizers share: how often each code is used, and how the decoder's gradient reaches the encoder."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GradientRule", "Quantizer", "pass_gradient"]

GradientRule = Literal["straight_through", "rotation"]


class Quantizer(nn.Module):
    """Counts the codes that are chosen while training.

    ``count`` gathers; ``update_codebook`` takes the counts in, once an update, summed over the processes, so that every
    process has the same ones.

    Args:
        codebook_size: codes that a cell chooses from.
        encoded_channels: of the encoder's output.
        usage_decay: of the moving average of the counts: the window is about 1 / (1 - usage_decay) updates.
    """

    ema_counts: Tensor
    pending_counts: Tensor

    depth = 1
    """Codes a cell."""

    def __init__(self, codebook_size: int, encoded_channels: int, usage_decay: float = 0.99) -> None:
        super().__init__()
        self.codebook_size, self.encoded_channels, self.usage_decay = codebook_size, encoded_channels, usage_decay
        self.register_buffer("ema_counts", torch.ones(codebook_size))
        self.register_buffer("pending_counts", torch.zeros(codebook_size), persistent=False)

    @torch.no_grad()
    def count(self, indices: Tensor, times: Tensor | None = None) -> None:
        """Notes that the codes ``indices`` (N,) were chosen, once each, or ``times`` (a scalar)."""
        times = torch.ones((), device=indices.device) if times is None else times.float()
        self.pending_counts.index_add_(0, indices, times.expand(len(indices)))

    @torch.no_grad()
    def update_codebook(self, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Takes in the counts since the last call; ``reduce_sum`` sums a tensor over the processes."""
        self.ema_counts.lerp_(reduce_sum(self.pending_counts), 1 - self.usage_decay)
        self.pending_counts.zero_()

    @torch.no_grad()
    def usage_metrics(self) -> dict[str, Tensor]:
        """`perplexity`: exp of the entropy of the recent choices. `codebook_usage`: the share of codes that were chosen
        more than a hundredth as often as the average."""
        total = self.ema_counts.sum()
        shares = self.ema_counts / total
        used = (self.ema_counts > 0.01 * total / self.codebook_size).float().mean()
        return {"perplexity": torch.special.entr(shares).sum().exp(), "codebook_usage": used}


def pass_gradient(encoded: Tensor, quantized: Tensor, rule: GradientRule) -> Tensor:
    """``quantized`` (N, D) in value, with a gradient to ``encoded`` (N, D).

    `straight_through`: the gradient as it is (van den Oord et al. 2017, section 3.2). `rotation`: turned and scaled as
    ``encoded`` would have to be to become ``quantized``, the turn being held constant (Fifty et al. 2024,
    arXiv 2410.06424, equation 4 and section 4.3).
    """
    if rule == "straight_through":
        return _StraightThrough.apply(encoded, quantized)  # type: ignore[return-value]
    with torch.no_grad():
        lengths = encoded.norm(dim=1, keepdim=True).clamp(min=1e-6), quantized.norm(dim=1, keepdim=True)
        e_hat, q_hat = encoded / lengths[0], F.normalize(quantized, dim=1)
        r = F.normalize(e_hat + q_hat, dim=1)  # the Householder vector of the half-way turn
        scale = lengths[1] / lengths[0]
    reflected = encoded - 2 * (encoded * r).sum(1, keepdim=True) * r
    return scale * (reflected + 2 * (encoded * e_hat).sum(1, keepdim=True) * q_hat)


class _StraightThrough(torch.autograd.Function):
    """Without the arithmetic of the usual `encoded + (quantized - encoded).detach()`, and without its rounding."""

    @staticmethod
    def forward(ctx: object, encoded: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradients[0], None
