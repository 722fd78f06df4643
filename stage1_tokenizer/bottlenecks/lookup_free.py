"""The `lookup_free` bottleneck: the sign of each channel is one bit of the code.

LFQ, Yu et al. 2023 (MAGVIT-v2, arXiv 2310.05737). Axes: N = B h w vectors, D channels, 2^D codes.
"""

from typing import ClassVar, Literal

import torch
import torch.distributed
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor

from stage1_tokenizer.bottlenecks.bottleneck import BottleneckConfig, BottleneckOutput, Quantizer
from twostage.core.config.sections import Number
from twostage.core.training.random import BatchRandom

__all__ = [
    "MAX_BITS",
    "LookupFree",
    "LookupFreeConfig",
    "bits_of",
    "code_of_signs",
    "entropies",
    "entropy",
    "mean_over_processes",
]


MAX_BITS = 20  # counting the usage of 2^20 codes takes 4 MiB
MIN_SHARE = 1e-12


@BottleneckConfig.register
class LookupFreeConfig(BottleneckConfig):
    """A codebook of 2^`model.latent_channels` codes."""

    type: Literal["lookup_free"] = "lookup_free"
    entropy_weight: Number = Field(default=0.1, ge=0)
    """Weight of the entropy terms: each vector should choose one code clearly, and all vectors together should use
    every code equally often."""
    diversity_weight: Number = Field(default=1.0, ge=0)
    """Weight of the second entropy term relative to the first (alias: gamma)."""
    temperature: Number = Field(default=1.0, gt=0)
    """Temperature of the soft choice that the entropies measure: lower is harder."""
    commitment_weight: Number = Field(default=0.25, ge=0)
    """Weight of the loss that pulls the encoder's output towards -1 and 1 (alias: beta)."""
    collapse_remedy: ClassVar[str] = (
        "a higher model.bottleneck.entropy_weight, a higher model.bottleneck.diversity_weight, or a smaller "
        "model.latent_channels"
    )

    def build(self, shape: tuple[int, int, int], num_classes: int) -> "LookupFree":
        return LookupFree(self, shape[0])

    def check_channels(self, latent_channels: int) -> None:
        if latent_channels > MAX_BITS:
            raise ValueError(
                f"latent_channels {latent_channels}: lookup_free has 2^latent_channels codes; expected at most "
                f"{MAX_BITS}"
            )


class LookupFree(Quantizer):
    """sign(z) with straight-through gradients, and the entropy terms of equation 5 of the paper.

    With codes c in {-1, 1}^D the soft choice p(c) ~ exp(-|z - c|^2 / T) is a product over bits, so both entropies are
    exact and cheap: the entropy of one vector is a sum over its bits, and the mean choice of N vectors is the product
    of two (N, 2^(D/2)) matrices; no (N, 2^D) matrix is needed.
    """

    def __init__(self, config: LookupFreeConfig, latent_channels: int) -> None:
        super().__init__(2**latent_channels, latent_channels)
        self.config, self.digits = config, (2,) * latent_channels

    def forward(self, encoded: Tensor, labels: Tensor | None, random: BatchRandom) -> BottleneckOutput:
        """Quantizes (B, D, h, w). The weighted losses are `commitment`, `code_entropy` (nats, of a vector's choice) and
        `codebook_entropy` (the negative entropy in nats of the mean choice over all processes)."""
        with torch.autocast(encoded.device.type, enabled=False):
            x = encoded.float()
            output = self.encode(x)
            losses = {"commitment": self.config.commitment_weight * F.mse_loss(x, output.z)}
            if self.config.entropy_weight:
                logits = rearrange(x, "b d h w -> (b h w) d") * (4 / self.config.temperature)
                single, joint = entropies(logits, self.encoded_channels, share=self.training)
                losses["code_entropy"] = self.config.entropy_weight * single
                losses["codebook_entropy"] = -self.config.entropy_weight * self.config.diversity_weight * joint
            if self.training:
                assert output.indices is not None
                self.count(output.indices.flatten())
        z = x + (output.z - x).detach()
        return BottleneckOutput(z, output.indices, losses=losses, metrics=self.usage_metrics())

    def encode(self, encoded: Tensor) -> BottleneckOutput:
        """The codes of (B, D, h, w) and their vectors of -1 and 1, without losses."""
        indices = code_of_signs(encoded)
        return BottleneckOutput(self.lookup(indices), indices)

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes (B, h, w) -> their vectors (B, D, h, w)."""
        return bits_of(indices, self.encoded_channels)


def code_of_signs(encoded: Tensor) -> Tensor:
    """The codes (B, h, w) whose bits are the signs of (B, D, h, w)."""
    return ((encoded > 0) * _powers(encoded.shape[1], encoded.device)[:, None, None]).sum(1)


def bits_of(indices: Tensor, num_bits: int) -> Tensor:
    """Codes (B, h, w) -> -1 or 1 for each bit, (B, num_bits, h, w)."""
    ones = indices[..., None] & _powers(num_bits, indices.device) != 0
    return rearrange(ones.float() * 2 - 1, "b h w d -> b d h w")


def _powers(count: int, device: torch.device) -> Tensor:
    """1, 2, 4 ... (D,): what each bit adds to a code. No bit shifts: ONNX has none for signed numbers."""
    return 2 ** torch.arange(count, device=device)


def entropies(logits: Tensor, group_bits: int, share: bool) -> tuple[Tensor, Tensor]:
    """Two entropies in nats of N choices of D independent bits with ``logits`` (N, D).

    Args:
        group_bits: bits that the second entropy measures together.
        share: whether its mean is over all processes.

    Returns:
        The mean entropy of a choice; and the entropy of the mean choice, a sum over groups of bits: exact for one
        group, an upper bound for several.
    """
    single = (F.softplus(logits) - logits * torch.sigmoid(logits)).sum(1).mean()
    joint = logits.new_zeros(())
    for group in logits.split(group_bits, dim=1):
        choice = mean_choice(group)
        if share:  # processes have unequal numbers of held-out batches: a collective would hang
            choice = mean_over_processes(choice)
        joint = joint + entropy(choice)
    return single, joint


def entropy(choice: Tensor) -> Tensor:
    """The entropy in nats of a distribution (K,). Its derivative at 0 would be infinite, so it ends at `MIN_SHARE`."""
    return torch.special.entr(choice.clamp(min=MIN_SHARE)).sum()


def mean_choice(logits: Tensor) -> Tensor:
    """The mean (2^D,) of N distributions, each a product over D bits with ``logits`` (N, D)."""
    low, high = logits.tensor_split([logits.shape[1] // 2], dim=1)
    return (_half(high).T @ _half(low)).flatten() / len(logits)


def _half(logits: Tensor) -> Tensor:
    """The probabilities (N, 2^D) of all combinations of D independent bits."""
    numbers = torch.arange(2 ** logits.shape[1], device=logits.device)
    ones = (numbers[:, None] >> torch.arange(logits.shape[1], device=logits.device) & 1).float()
    return torch.exp(F.logsigmoid(logits) @ ones.T + F.logsigmoid(-logits) @ (1 - ones).T)


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean over all processes by value, with this process's own gradient: DistributedDataParallel averages it."""
    if not torch.distributed.is_initialized():
        return value
    total = value.detach().clone()
    torch.distributed.all_reduce(total)
    return value + (total / torch.distributed.get_world_size() - value).detach()
