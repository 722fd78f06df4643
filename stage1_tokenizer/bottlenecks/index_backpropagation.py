"""The `index_backpropagation` bottleneck: the one-hot choice of a code gets the gradient of a softmax over all codes.

IBQ, Shi et al. 2024 (arXiv 2412.02692). Axes: N = B h w vectors, n of them in a part, D dimensions, K codes.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stage1_tokenizer.bottlenecks.bottleneck import BottleneckConfig
from stage1_tokenizer.bottlenecks.lookup_free import entropy, mean_over_processes
from stage1_tokenizer.bottlenecks.vector_quantizer import LearnedCodebookConfig, VectorQuantizer
from twostage.core.config.sections import Number
from twostage.core.training.random import BatchRandom

__all__ = ["IndexBackpropagation", "IndexBackpropagationConfig", "straight_through_choice"]

CPU_TILE = 1 << 20  # logits computed at a time on a CPU: 4 MiB, which stays in its cache
GPU_TILE = 1 << 26  # a GPU is faster with few large products than with many small ones


@BottleneckConfig.register
class IndexBackpropagationConfig(LearnedCodebookConfig):
    """A codebook of which every code gets a gradient in every step."""

    type: Literal["index_backpropagation"] = "index_backpropagation"
    commitment_weight: Number = Field(default=0.25, ge=0)
    """Weight of the loss that pulls the encoder towards the codes (alias: beta)."""
    entropy_weight: Number = Field(default=0.05, ge=0)
    """Weight of the entropy terms: each vector should choose one code clearly, and all vectors together should use
    every code equally often."""
    temperature: Number = Field(default=0.01, gt=0)
    """Temperature of the soft choice that the entropies measure: lower is harder."""
    collapse_remedy: ClassVar[str] = (
        "a higher model.bottleneck.entropy_weight, a higher model.bottleneck.temperature, or "
        "model.bottleneck.revive_below=0.2"
    )

    def build(self, shape: tuple[int, int, int], num_classes: int) -> "IndexBackpropagation":
        return IndexBackpropagation(self, shape[0])


class IndexBackpropagation(VectorQuantizer):
    """The nearest code: z_q = onehot E with onehot = hard + soft - sg[soft] (equation 4).

    The logits are z.e - |e|^2 / 2 = (|z|^2 - |z - e|^2) / 2 (our choice; the paper has z.e). With z.e alone, a code far
    from all vectors can be the best choice of most of them, because it is long. Then no restart helps.

    The gradient needs the softmax over all K codes of each of the N vectors. It is computed in parts and once more in
    the backward pass, so no (N, K) matrix is kept: the peak is one part of 4 MiB on a CPU, 256 MiB on a GPU, times the
    few such matrices that a softmax and its gradient need.
    """

    def __init__(self, config: IndexBackpropagationConfig, latent_channels: int) -> None:
        super().__init__(config, latent_channels)
        self.commitment_weight, self.entropy_weight = config.commitment_weight, config.entropy_weight
        self.temperature = config.temperature

    def quantize(self, vectors: Tensor, random: BatchRandom) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Vectors (N, D) -> codes (N,), z_q (N, D) with its gradient, losses by name; collects statistics during
        training.

        The losses are those of the paper's equation 6: `codebook` |sg[z] - e|^2 + |z - z_q|^2 and `commitment`
        (weighted) |z - sg[e]|^2, each a mean over all elements, and the entropies of :class:`LookupFree`.
        """
        indices = self.choose(vectors)
        if self.training:
            self._gather_statistics(vectors.detach(), indices, random)
        size, measured = self._part(vectors), self.entropy_weight > 0
        parts = [
            checkpoint(_part, x, self.codebook, codes, self.temperature, measured, use_reentrant=False,
                       preserve_rng_state=False)
            for x, codes in zip(vectors.split(size), indices.split(size), strict=True)
        ]  # fmt: skip
        z, choices, entropies = zip(*parts, strict=True)
        passed = torch.cat(z)
        chosen = F.embedding(indices, self.codebook)
        losses = {
            "codebook": F.mse_loss(chosen, vectors.detach()) + F.mse_loss(passed, vectors),
            "commitment": self.commitment_weight * F.mse_loss(vectors, chosen.detach()),
        }
        if measured:
            choice = torch.stack(choices).sum(0) / len(vectors)
            if self.training:  # processes have unequal numbers of held-out batches: a collective would hang
                choice = mean_over_processes(choice)
            losses["code_entropy"] = self.entropy_weight * torch.stack(entropies).sum() / len(vectors)
            losses["codebook_entropy"] = -self.entropy_weight * entropy(choice)
        return indices, passed, losses

    def passed_on(self, vectors: Tensor, chosen: Tensor, random: BatchRandom) -> Tensor:
        """``chosen`` (N, D): it has its gradient from :meth:`quantize`."""
        return chosen

    def _part(self, vectors: Tensor) -> int:
        return max(16, (CPU_TILE if vectors.device.type == "cpu" else GPU_TILE) // self.codebook_size)


def straight_through_choice(logits: Tensor, indices: Tensor, codebook: Tensor) -> Tensor:
    """onehot E (n, D) for the ``indices`` (n,) of the chosen codes in a codebook (K, D); the gradient of the one-hot
    goes to the softmax of ``logits`` (n, K)."""
    soft = torch.softmax(logits, 1)
    # (hard + soft - sg[soft]) E, without a one-hot: the hard part is a lookup.
    return F.embedding(indices, codebook) + (soft - soft.detach()) @ codebook.detach()


def _part(
    vectors: Tensor, codebook: Tensor, indices: Tensor, temperature: float, measured: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """z_q (n, D), and over the vectors of the part the sums of their soft choices (K,) and of its entropies."""
    logits = torch.addmm(codebook.square().sum(1), vectors, codebook.t(), beta=-0.5)
    z = straight_through_choice(logits, indices, codebook)
    if not measured:
        return z, codebook.new_zeros(len(codebook)), codebook.new_zeros(())
    logs = torch.log_softmax(logits / temperature, 1)
    choice = logs.exp()
    return z, choice.sum(0), -(choice * logs).sum()
