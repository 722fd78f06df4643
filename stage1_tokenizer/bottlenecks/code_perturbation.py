"""Codes replaced by similar ones, so that the decoder learns to forgive a prior's mistakes.

RobusTok, Qiu et al. 2025 (arXiv 2503.08354): a prior samples codes that are wrong but not far off, which a decoder
trained on the encoder's own codes has never seen. Axes: B images, h and w cells, N codes, K codes in the codebook,
D dimensions, C = D latent channels.
"""

import torch
from torch import Tensor

from stage1_tokenizer.bottlenecks.bottleneck import Bottleneck, pass_gradient
from stage1_tokenizer.bottlenecks.nearest_codes import neighbour
from twostage.core.config.sections import Count, Section, Share
from twostage.core.errors import InputError
from twostage.core.training.random import BatchRandom

__all__ = ["PerturbationConfig", "code_vectors", "perturb_codes", "perturb_latent"]


class PerturbationConfig(Section):
    """How many codes the decoder sees replaced during training, and by which."""

    image_share: Share = 0.5
    """The share of images with replaced codes."""
    code_share: Share = 0.5
    """The largest share of an image's codes to replace; each of these images draws a share up to it."""
    neighbours: Count = 16
    """A replaced code becomes one of this many nearest other codes, each equally likely."""

    def check(self, bottleneck: Bottleneck, kind: str) -> None:
        """Checks that ``bottleneck``, of type ``kind``, has codes with that many neighbours.

        Raises:
            InputError: it does not.
        """
        if bottleneck.codebook_size == 0 or bottleneck.depth > 1 or bottleneck.scales:
            raise InputError(
                f"loss.perturbation: needs a bottleneck with one code per cell (vector, finite_scalar or lookup_free), "
                f"got model.bottleneck.type {kind!r}. Remove loss.perturbation, or change the bottleneck"
            )
        if self.neighbours >= bottleneck.codebook_size:
            raise InputError(
                f"loss.perturbation.neighbours {self.neighbours}: the codebook only has {bottleneck.codebook_size} "
                f"codes. Set it to at most {bottleneck.codebook_size - 1}"
            )


def perturb_latent(
    z: Tensor, indices: Tensor, bottleneck: Bottleneck, config: PerturbationConfig, random: BatchRandom
) -> Tensor:
    """The latent (B, C, h, w) of codes (B, h, w) with some of the codes replaced. The gradient reaches ``z`` unchanged,
    as if nothing were replaced."""
    with torch.autocast(z.device.type, enabled=False):
        draws = random.uniform("perturbed images", (2,), z.device)
        share = torch.where(draws[:, 0] < config.image_share, draws[:, 1] * config.code_share, 0.0)
        vectors = code_vectors(bottleneck, indices.device)
        replaced = perturb_codes(indices, vectors, share, config.neighbours, random)
        return pass_gradient(z, bottleneck.lookup(replaced).to(z.dtype))


def perturb_codes(indices: Tensor, vectors: Tensor, share: Tensor, num_neighbours: int, random: BatchRandom) -> Tensor:
    """Codes (B, h, w) of which each becomes, with the probability ``share`` (B,) of its image, one of its nearest other
    codes, each equally likely.

    Args:
        vectors: the codebook (K, D).
    """
    draws = random.uniform("perturbed codes", (2, *indices.shape[1:]), indices.device)  # (B, 2, h, w)
    chosen = draws[:, 0] < share[:, None, None]
    ranks = (draws[:, 1] * num_neighbours).long().clamp(max=num_neighbours - 1)
    if indices.device.type == "cpu":
        return indices.masked_scatter(chosen, neighbour(vectors, indices[chosen], ranks[chosen], num_neighbours))
    # Other devices compute all cells, because the CPU would have to wait for the number of chosen ones.
    other = neighbour(vectors, indices.flatten(), ranks.flatten(), num_neighbours)
    return torch.where(chosen, other.view_as(indices), indices)


@torch.no_grad()
def code_vectors(bottleneck: Bottleneck, device: torch.device) -> Tensor:
    """The vectors (K, D) of all codes of a bottleneck on ``device`` with one code per cell."""
    return bottleneck.lookup(torch.arange(bottleneck.codebook_size, device=device).view(-1, 1, 1))[:, :, 0, 0]
