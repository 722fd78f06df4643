"""The masked transformer (MaskGIT, Chang et al. 2022, arXiv 2202.04200): all masked codes of a grid are predicted at
once from the others, in both directions; an image is made in a few parallel steps.

Axes: B images, N = h w codes of a grid, M of a batch's codes (image by image, row by row), D hidden size, H heads,
E = D / H, K codes.
"""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.fast_linear import fast_linear
from stage2_prior.parallel_sampling import draw_in_parallel
from stage2_prior.sampling import Progress, SamplingConfig, Weights, uniform_noise
from stage2_prior.shares import MEAN_MASKED_SHARE, MaskSchedule, masked_share
from stage2_prior.transformer import (
    Block,
    FastBlock,
    Transformer,
    TransformerConfig,
    complex_rotation,
    normalized,
    turn,
)
from twostage.core.config.sections import Flag
from twostage.core.training.random import BatchRandom

__all__ = ["MaskedPredictor", "MaskedTransformer", "MaskedTransformerConfig"]

NUM_STEPS, CHOICE_TEMPERATURE = 8, 4.5  # of sampling, by default
ROWS_AT_ONCE = 2048  # on a CPU: what a block computes for them stays in the cache


class MaskedTransformerConfig(TransformerConfig):
    """A bidirectional transformer that fills `[MASK]` codes."""

    type: Literal["masked_transformer"] = "masked_transformer"
    mask_schedule: MaskSchedule = "cosine"
    """What share of an image's codes a training step masks: the schedule at a uniformly random point."""
    predict_replaced: Flag = False
    """Whether the loss is also on codes that `loss.replace_prob` replaced by random ones and that are not masked."""


class MaskedTransformer(Transformer):
    """p(masked codes | the others, class), each independent of the other masked ones.

    Args:
        num_classes: 0 for a prior without classes. One further class, the last, stands for "no class".
    """

    exact_likelihood = False
    keeps = "any codes"

    def __init__(
        self, config: MaskedTransformerConfig, codebook_size: int, grid: tuple[int, int], num_classes: int
    ) -> None:
        super().__init__(config, codebook_size, codebook_size + 1, grid, num_classes, causal=False)
        self.config = config
        self.mask_token_id = codebook_size

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Logits (B, N, K) for the codes (B, N), of which some are ``mask_token_id``; labels (B,), ``num_classes`` for
        none."""
        return self.predict(self.run(self.embed(inputs), labels))

    def loss(self, codes: Tensor, labels: Tensor, inputs: Tensor, random: BatchRandom) -> Tensor:
        """The training loss, a scalar in nats per code: MaskGIT's cross-entropy of the masked codes, as the sum over
        them / (B N x the mean masked share).

        MaskGIT divides by the number of masked codes of the batch, which is that constant in expectation. With the
        constant the loss is a mean over images, so that two processes give what one gives. The masked shares of a
        global batch are evenly spaced on the schedule from a random start, so their mean varies little.
        `predict_replaced` adds the replaced codes to the sum.
        """
        share = masked_share(evenly_spaced(random), self.config.mask_schedule)
        masked = random_cells((share * self.cells).round().long().clamp(min=1), codes, random)
        wanted = masked | (inputs != codes) if self.config.predict_replaced else masked
        hidden = self.hide(codes, random)
        hidden = None if hidden is None else hidden & ~masked
        nats = self._nats(codes, labels, inputs.masked_fill(masked, self.mask_token_id), wanted, hidden)
        return nats.sum() / (codes.numel() * MEAN_MASKED_SHARE)

    def nats_per_image(self, codes: Tensor, labels: Tensor, random: BatchRandom) -> Tensor:
        """An unbiased estimate of an upper bound on -log p(codes | label), (B,), from one draw an image.

        The model taken as one that writes single codes in a uniformly random order s (Uria et al. 2014, arXiv
        1310.1757; Hoogeboom et al. 2022, arXiv 2110.02037) has p(x) = E_s prod_t p(x_s(t) | x_s(<t)), and by Jensen

            -log p(x) <= E_s sum_t -log p(x_s(t) | x_s(<t)) = N E_k E_m 1/k sum_{i in m} -log p(x_i | x_not m)

        with k uniform in 1 ... N and m uniform among the sets of k cells. One k is drawn an image, evenly spaced over
        the batch.
        """
        counts = (evenly_spaced(random) * self.cells).long() + 1
        masked = random_cells(counts, codes, random)
        nats = self._nats(codes, labels, codes.masked_fill(masked, self.mask_token_id), masked)
        sums = nats.new_zeros(codes.shape).masked_scatter(masked, nats).sum(1)
        return sums * (self.cells / counts.to(sums))

    def _nats(
        self, codes: Tensor, labels: Tensor, inputs: Tensor, wanted: Tensor, hidden: Tensor | None = None
    ) -> Tensor:
        """-log p of the codes that are ``wanted`` (B, N), given ``inputs``: (M,); nothing is predicted elsewhere."""
        output = self.run(self.embed(inputs, hidden), labels)[wanted]
        return F.cross_entropy(self.predict(output).float(), codes[wanted], reduction="none")

    def can_keep(self, known: Tensor) -> bool:
        return True

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor,
        sampling: SamplingConfig,
        seeds: list[int],
        known: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Codes (B, N) for labels (B,), image i from ``seeds[i]`` alone; ``known`` as in `Prior.sample`, flat.

        With guidance the conditional and the unconditional branch are worked on as one batch.
        """
        guided = sampling.guidance_scale != 1.0
        branches = torch.cat([labels, torch.full_like(labels, self.num_classes)]) if guided else labels
        steps = min(sampling.num_steps or NUM_STEPS, self.cells)
        noise = uniform_noise(seeds, steps * 2 * self.cells).view(len(seeds), steps, 2, self.cells)
        return draw_in_parallel(
            MaskedPredictor(self, branches, sampling.weights),
            noise.to(labels.device),
            sampling,
            sampling.mask_schedule or self.config.mask_schedule,
            CHOICE_TEMPERATURE if sampling.choice_temperature is None else sampling.choice_temperature,
            self.mask_token_id,
            known,
            progress,
        )


def evenly_spaced(random: BatchRandom) -> Tensor:
    """Points in [0, 1), evenly spaced over the global batch from a random start: (B,) float64, on the CPU."""
    start = torch.rand((), generator=random.generator("mask start", torch.device("cpu")), dtype=torch.double)
    return (start + torch.arange(random.batch_size)[random.rows] / random.batch_size) % 1


def random_cells(counts: Tensor, codes: Tensor, random: BatchRandom) -> Tensor:
    """``counts`` (B,) random cells of each image of ``codes`` (B, N): (B, N) bool."""
    ranks = random.uniform("mask", (codes.shape[1],), codes.device).argsort(1).argsort(1)
    return ranks < counts.to(codes.device)[:, None]


class MaskedPredictor:
    """The logits of masked codes in sampling; nothing is computed twice, or where it is not needed. The weights are
    read now.

    Args:
        labels: (B,), ``num_classes`` for none.
        weights: of the linear layers, as in `fast_linear`.
    """

    def __init__(self, model: MaskedTransformer, labels: Tensor, weights: Weights = "float32") -> None:
        self.model, self.labels = model, labels
        self.images = max(1, ROWS_AT_ONCE // model.cells) if labels.device.type == "cpu" else len(labels)
        self.rotation = None if model.rotation is None else complex_rotation(model)[:, None, None]  # (N, 1, 1, E / 2)
        self.blocks = [FastBlock(block, weights) for block in cast(list[Block], list(model.blocks))]
        self.head = fast_linear(model.head_weight, None, weights)

    @torch.no_grad()
    def __call__(self, codes: Tensor) -> Tensor:
        """Codes (B, N), of which some are masked -> logits (M, K) of those.

        Filled images are left out, and equal ones worked on once: in the first step all those of a class are.
        """
        masked = codes == self.model.mask_token_id
        unfilled = masked.any(1)
        images = torch.cat([self.labels[:, None], codes], 1)[unfilled]
        distinct, which = images.unique(dim=0, return_inverse=True)
        logits = torch.cat([self._logits(part[:, 1:], part[:, 0]) for part in distinct.split(self.images)])
        predicted = distinct[:, 1:] == self.model.mask_token_id
        place = predicted.flatten().cumsum(0).view_as(predicted) - 1  # of each masked code among the logits
        return logits[place[which][masked[unfilled]]]

    def _logits(self, codes: Tensor, labels: Tensor) -> Tensor:
        model, batch = self.model, len(codes)
        masked = (codes == model.mask_token_id).flatten()
        x = model.code_embedding(codes) + model.class_embedding(labels)[:, None]
        x = (x if model.positions is None else x + model.positions).flatten(0, 1)  # (B N, D)
        for block in self.blocks:
            qkv = block.qkv(x).unflatten(0, (batch, -1))  # (B, N, 3, H, E)
            if self.rotation is not None:
                turn(qkv, self.rotation)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, E)
            attended = F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).reshape(x.shape)  # (B N, D)
            if block is self.blocks[-1]:  # what follows goes from a cell to itself alone
                x, attended = x[masked], attended[masked]  # (M, D)
            x = block.finish(x, attended)
        return self.head(normalized(x, model.norm))
