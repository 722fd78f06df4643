"""The `gumbel_softmax` bottleneck: the encoder scores every code, and the decoder sees a noisy, soft choice of them.

dVAE, Ramesh et al. 2021 (DALL-E, arXiv 2102.12092), appendix A.2. Axes: B images, h and w cells, K codes, D dimensions.
"""

import math
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.bottleneck import BottleneckConfig, BottleneckOutput, Quantizer
from stage1_tokenizer.bottlenecks.vector_quantizer import LearnedCodebookConfig
from twostage.core.config.sections import Number, Section, Share, Width
from twostage.core.training.random import BatchRandom

NO_GRADIENT = 1e-3
"""A code with less than this share of the average probability gets next to no gradient."""

__all__ = ["Annealing", "GumbelSoftmax", "GumbelSoftmaxConfig", "annealed"]


class Annealing(Section):
    """A number that moves from `start` to `end` along half a cosine, and stays there."""

    start: Annotated[Number, Field(ge=0)]
    """The number at a run's first step."""
    end: Annotated[Number, Field(ge=0)]
    """The number from the end of the schedule on."""
    over: Share
    """The share of the run that the schedule takes; 0: none, it is `end` at once."""


class Temperature(Annealing):
    """The temperature of the soft choice; lower is harder."""

    start: Annotated[Number, Field(gt=0)] = 1.0
    end: Annotated[Number, Field(gt=0)] = 1 / 16
    over: Share = 0.5


class KLWeight(Annealing):
    """The weight of the divergence from a uniform choice."""

    start: Annotated[Number, Field(ge=0)] = 0.0
    end: Annotated[Number, Field(ge=0)] = 0.01
    over: Share = 0.1


@BottleneckConfig.register
class GumbelSoftmaxConfig(LearnedCodebookConfig):
    """A codebook of ``codebook_size`` vectors; the encoder's last layer has one channel for each."""

    type: Literal["gumbel_softmax"] = "gumbel_softmax"
    codebook_size: Annotated[Width, Field(ge=2)] = 512
    """The number of codes."""
    revive_below: Share = 0.05
    """A code chosen less than this share of the average, and without a gradient because the softmax is sure of others,
    gets the mean score of the code with the highest one; 0: never."""
    temperature: Temperature = Temperature()
    """Temperature of the soft choice in training. DALL-E's goes from 1 to 1/16."""
    kl_weight: KLWeight = KLWeight()
    """Weight of the mean over cells of KL(choice | uniform), in nats. DALL-E's 6.6 multiplies a sum that is divided by
    the 192 values of a cell, so it is 0.034 here."""
    collapse_remedy: ClassVar[str] = (
        "model.bottleneck.revive_below=0.2, a higher model.bottleneck.kl_weight.end, a higher "
        "model.bottleneck.temperature.end, or a smaller model.bottleneck.codebook_size"
    )
    scheduled: ClassVar[str] = "model.bottleneck.temperature.over and kl_weight.over"

    def build(self, shape: tuple[int, int, int], num_classes: int) -> "GumbelSoftmax":
        return GumbelSoftmax(self, shape[0])


class GumbelSoftmax(Quantizer):
    """z = softmax((l + g) / T) E for the encoder's scores l (K,), Gumbel noise g, and a codebook E (K, D).

    In evaluation and in ``encode`` a cell's code is the one with the highest score, without noise. All codes get a
    gradient. The encoder's output is the (B, K, h, w) matrix of scores, so training keeps a few tensors of that size:
    B h w K x 4 bytes each, 3 MiB for 128 images of 7x7 cells and 128 codes, 256 MiB for 8 of 32x32 and 8,192.

    ``offset`` is added to the encoder's scores. It is 0 until a code is dead.
    """

    offset: Tensor
    pending_sums: Tensor

    def __init__(self, config: GumbelSoftmaxConfig, latent_channels: int) -> None:
        super().__init__(config.codebook_size, config.codebook_size, config.ema_decay)
        self.config = config
        codes = torch.empty(config.codebook_size, latent_channels)
        self.codebook = nn.Parameter(nn.init.normal_(codes))
        self.register_buffer("offset", torch.zeros(config.codebook_size))
        # Sums over the cells of an update: of the scores, and of the choices softmax(l).
        self.register_buffer("pending_sums", torch.zeros(2, config.codebook_size), persistent=False)

    def forward(self, encoded: Tensor, labels: Tensor | None, random: BatchRandom) -> BottleneckOutput:
        """The soft choice of scores (B, K, h, w). The loss `choice_kl` (weighted) is the mean over cells of
        KL(softmax(l) | uniform) = sum_k q_k log(K q_k) in nats."""
        with torch.autocast(encoded.device.type, enabled=False):
            scores = self._scores(encoded)
            logs = torch.log_softmax(scores, 1)
            divergence = (logs.exp() * (logs + math.log(self.codebook_size))).sum(1).mean()
            indices = scores.argmax(1)
            if self.training:
                self._gather_statistics(scores.detach(), logs.detach().exp(), indices)
                z = self._relaxed(scores, random)
            else:
                z = self.lookup(indices)
        progress = self.progress if self.training else 1.0
        losses = {"choice_kl": annealed(self.config.kl_weight, progress) * divergence}
        return BottleneckOutput(z, indices, losses=losses, metrics=self.usage_metrics())

    def _relaxed(self, scores: Tensor, random: BatchRandom) -> Tensor:
        uniform = random.uniform("gumbel", tuple(scores.shape[1:]), scores.device)
        gumbel = -torch.log(-torch.log(uniform.clamp(min=torch.finfo(uniform.dtype).tiny)))
        choice = torch.softmax((scores + gumbel) / annealed(self.config.temperature, self.progress), 1)
        return torch.einsum("bkhw,kd->bdhw", choice, self.codebook)

    def encode(self, encoded: Tensor) -> BottleneckOutput:
        """The codes with the highest of the scores (B, K, h, w), and their vectors."""
        indices = self._scores(encoded).argmax(1)
        return BottleneckOutput(self.lookup(indices), indices)

    @torch.no_grad()
    def update_codebook(self, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Raises the scores of dead codes without a gradient: their mean over the batch becomes the highest mean.

        Raising codes that are only rare cost 1.8 dB on MNIST.
        """
        super().update_codebook(reduce_sum)
        scores, choices = reduce_sum(self.pending_sums)
        cells = choices.sum()
        stuck = (choices < NO_GRADIENT * choices.mean()) & (cells > 0)  # a skipped batch has no cells
        means = scores / cells.clamp(min=1)
        dead = self.restart(self.config.revive_below, stuck)
        self.offset += torch.where(dead, means.max() - means, 0.0)
        self.pending_sums.zero_()

    @torch.no_grad()
    def _gather_statistics(self, scores: Tensor, choices: Tensor, indices: Tensor) -> None:
        finite = scores.sum().isfinite()  # a batch whose update is skipped must leave no trace
        self.count(indices.flatten(), finite)
        sums = torch.stack([scores.sum((0, 2, 3)), choices.sum((0, 2, 3))])
        self.pending_sums += torch.where(finite, sums, 0.0)

    def _scores(self, encoded: Tensor) -> Tensor:
        return encoded.float() + self.offset[:, None, None]

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes (B, h, w) -> their vectors (B, D, h, w)."""
        return rearrange(F.embedding(indices, self.codebook), "b h w d -> b d h w")


def annealed(schedule: Annealing, progress: float) -> float:
    """The value of ``schedule`` when the share ``progress`` of a run is done."""
    done = min(1.0, progress / schedule.over) if schedule.over else 1.0
    return schedule.end + (schedule.start - schedule.end) * (1 + math.cos(math.pi * done)) / 2
