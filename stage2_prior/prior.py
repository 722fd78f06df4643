"""A trained prior: the network, what it was trained on, and how it is stored. One interface for all networks:
``forward`` (the training loss), ``log_likelihood``, ``sample``.

Axes: B images, h and w cells of the code grid.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from core.config import Count, Number, Section, Share, parse_config
from core.errors import InputError
from core.model_folder import fill, load_model_folder, save_model_folder
from core.random import BatchRandom
from stage2_prior.causal_transformer import CausalTransformer, CausalTransformerConfig
from stage2_prior.codes import Manifest, TokenizerReference
from stage2_prior.sampling import SamplingConfig

__all__ = ["Prior", "PriorConfig", "PriorLossConfig", "PriorOutput", "prior_config"]


class PriorLossConfig(Section):
    """What a training step does to its codes and classes."""

    replace_prob: Share = 0.0
    """Share of the input codes that are replaced by uniformly random ones (a Bernoulli mask); the true codes are what
    is to be predicted. It makes sampling robust to its own mistakes (alias: `1 - pkeep`)."""
    class_dropout_prob: Share = 0.1
    """Share of the images that are trained on without their class, which guidance needs."""


class PriorConfig(Section):
    """All that a trained prior needs to be built again, and to refuse another tokenizer's codes: its `config.json`."""

    model: CausalTransformerConfig
    loss: PriorLossConfig
    codebook_size: Count
    grid: tuple[Count, Count]
    class_names: list[str] | None
    image_size: tuple[Count, Count]
    channels: Count
    tokenizer: TokenizerReference
    unigram_nats_per_code: Number = Field(ge=0)
    """The held-out baseline."""


@dataclass
class PriorOutput:
    """What a training step needs."""

    loss: Tensor
    """Scalar: nats per code."""
    metrics: dict[str, Tensor]
    """Scalars by name, `loss` among them, detached."""


def prior_config(model: CausalTransformerConfig, loss: PriorLossConfig, manifest: Manifest) -> PriorConfig:
    """The stored configuration of a prior that is trained on the codes of ``manifest``."""
    return PriorConfig(
        model=model,
        loss=loss,
        codebook_size=manifest.codebook_size,
        grid=manifest.grid,
        class_names=manifest.class_names,
        image_size=manifest.image_size,
        channels=manifest.channels,
        tokenizer=manifest.tokenizer,
        unigram_nats_per_code=manifest.unigram_nats_per_code[manifest.validation_split],
    )


class Prior(nn.Module):
    """A distribution over code grids (B, h, w), given a class."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        self.num_classes = len(config.class_names or [])
        self.network = CausalTransformer(config.model, config.codebook_size, config.grid, self.num_classes)

    def forward(self, indices: Tensor, labels: Tensor | None, random: BatchRandom) -> PriorOutput:
        """The training loss of codes (B, h, w) and labels (B,) or None."""
        codes, classes = indices.flatten(1), self._classes(labels, indices)
        inputs = codes
        if self.training:
            options = self.config.loss
            inputs = replace_codes(codes, options.replace_prob, self.config.codebook_size, random)
            hidden = random.uniform("class dropout", (), codes.device) < options.class_dropout_prob
            classes = torch.where(hidden, self.num_classes, classes)
        loss = self.network.loss(codes, classes, inputs).mean()
        return PriorOutput(loss, {"loss": loss.detach()})

    @torch.no_grad()
    def log_likelihood(self, indices: Tensor, labels: Tensor | None) -> Tensor:
        """log p(codes | class) in nats per image, (B,)."""
        codes = indices.flatten(1)
        return -self.network.loss(codes, self._classes(labels, indices), codes).sum(1)

    def check_sampling(self, sampling: SamplingConfig) -> None:
        """Refuses settings that this prior cannot be sampled with.

        Raises:
            InputError: top-k above the codebook, or guidance on a prior without classes or class dropout.
        """
        if sampling.top_k is not None and sampling.top_k > self.config.codebook_size:
            raise InputError(
                f"top_k {sampling.top_k}: expected at most the {self.config.codebook_size} codes of the codebook"
            )
        if sampling.guidance_scale != 1.0:
            if not self.num_classes:
                raise InputError(f"guidance_scale {sampling.guidance_scale}: this prior has no classes; use 1")
            if not self.config.loss.class_dropout_prob:
                raise InputError(
                    f"guidance_scale {sampling.guidance_scale}: this prior was trained with loss.class_dropout_prob=0 "
                    "and has no unconditional branch; use 1"
                )

    @torch.no_grad()
    def sample(self, labels: Tensor | None, sampling: SamplingConfig, seeds: list[int]) -> Tensor:
        """Codes (len(seeds), h, w) int64; image i depends on its label, the settings and ``seeds[i]`` alone.

        Raises:
            InputError: settings that :meth:`check_sampling` refuses.
        """
        self.check_sampling(sampling)
        device = next(self.parameters()).device
        if labels is None:
            labels = torch.full((len(seeds),), self.num_classes, device=device)
        return self.network.sample(labels.to(device), sampling, seeds).view(len(seeds), *self.config.grid)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors."""
        save_model_folder(Path(folder), "prior", self.config.model_dump(mode="json"), self.state_dict())

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Prior":
        """Reads a model folder, or a run folder's `model/`; in evaluation mode, on the CPU."""
        document, state = load_model_folder(path, "prior")
        prior = cls(parse_config(PriorConfig, document, f"{path}: config.json"))
        fill(prior, state, path)
        return prior.eval()

    def _classes(self, labels: Tensor | None, indices: Tensor) -> Tensor:
        if labels is None or not self.num_classes:
            return torch.full((len(indices),), self.num_classes, device=indices.device)
        return labels


def replace_codes(codes: Tensor, replace_prob: float, codebook_size: int, random: BatchRandom) -> Tensor:
    """Codes (B, N) of which each was replaced, with probability ``replace_prob``, by a uniformly random one."""
    if not replace_prob:
        return codes
    shape = tuple(codes.shape[1:])
    replaced = random.uniform("replace", shape, codes.device) < replace_prob
    others = (random.uniform("replacement", shape, codes.device) * codebook_size).long()
    return torch.where(replaced, others, codes)
