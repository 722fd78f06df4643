"""A trained prior: the network, what it was trained on, and how it is stored. One interface for all networks:
``forward`` (the training loss), ``nats_per_image`` and ``log_likelihood``, ``sample``.

Axes: B images, h and w cells of the code grid.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from stage2_prior.causal_transformer import CausalTransformer, CausalTransformerConfig
from stage2_prior.codes import CodeCache, TokenizerReference
from stage2_prior.fast_linear import check_weights
from stage2_prior.masked_transformer import MaskedTransformer, MaskedTransformerConfig
from stage2_prior.pixelcnn import PixelCNN, PixelCNNConfig
from stage2_prior.sampling import Progress, SamplingConfig
from stage2_prior.shares import ReplaceSchedule, replace_prob_at
from twostage.core.config.sections import Count, Number, Section, Share, parse_config
from twostage.core.errors import InputError
from twostage.core.runs.model_folder import filled, load_model_folder, save_model_folder
from twostage.core.training.random import BatchRandom

__all__ = ["Prior", "PriorConfig", "PriorLossConfig", "PriorModelConfig", "PriorOutput", "prior_config"]


PriorModelConfig = Annotated[
    PixelCNNConfig | CausalTransformerConfig | MaskedTransformerConfig, Field(discriminator="type")
]


class PriorLossConfig(Section):
    """What a training step does to its codes and classes."""

    replace_prob: Share | ReplaceSchedule = 0.0
    """Share of the input codes that are replaced by uniformly random ones (a Bernoulli mask); the true codes are what
    is to be predicted. It makes sampling robust to its own mistakes (alias: `1 - pkeep`). Or a schedule over the run:
    `{start: 0.3, end: 0.0, shape: linear}`."""
    class_dropout_prob: Share = 0.1
    """Share of the images that are trained on without their class, which guidance needs."""


class PriorConfig(Section):
    """All that a trained prior needs to be built again, and to refuse another tokenizer's codes: its `config.json`."""

    model: PriorModelConfig
    loss: PriorLossConfig
    codebook_size: Count
    grid: tuple[Count, Count]
    class_names: list[str] | None
    untrained_classes: tuple[str, ...] = ()
    """Those of them that had no training image."""
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


def prior_config(model: PriorModelConfig, loss: PriorLossConfig, cache: CodeCache) -> PriorConfig:
    """The stored configuration of a prior that is trained on the codes of ``cache``."""
    manifest = cache.manifest
    return PriorConfig(
        model=model,
        loss=loss,
        codebook_size=manifest.codebook_size,
        grid=manifest.grid,
        class_names=manifest.class_names,
        untrained_classes=tuple(cache.untrained_classes),
        image_size=manifest.image_size,
        channels=manifest.channels,
        tokenizer=manifest.tokenizer,
        unigram_nats_per_code=manifest.unigram_nats_per_code[manifest.validation_split],
    )


class PriorNetwork(Protocol):
    """What a prior's network has to offer. Codes are (B, N), row by row; labels (B,), ``num_classes`` for none."""

    exact_likelihood: bool
    """Whether :meth:`nats_per_image` is the likelihood itself and not a bound."""

    def loss(self, codes: Tensor, labels: Tensor, inputs: Tensor, random: BatchRandom) -> Tensor:
        """The training loss, a scalar; ``inputs`` are the codes of which some were replaced."""
        ...

    def nats_per_image(self, codes: Tensor, labels: Tensor, random: BatchRandom) -> Tensor:
        """-log p(codes | label), or an upper bound on it: (B,)."""
        ...

    @property
    def keeps(self) -> str:
        """Which known codes sampling can keep, in words such as "any codes"."""
        ...

    def can_keep(self, known: Tensor) -> bool:
        """Whether sampling can keep the codes of the cells that are True in ``known`` (B, N)."""
        ...

    def sample(
        self,
        labels: Tensor,
        sampling: SamplingConfig,
        seeds: list[int],
        known: Tensor | None,
        progress: Progress | None,
    ) -> Tensor:
        """New codes (B, N)."""
        ...


def build_network(
    config: PriorModelConfig, codebook_size: int, grid: tuple[int, int], num_classes: int
) -> PriorNetwork:
    """The network that ``config`` describes."""
    match config:
        case PixelCNNConfig():
            return PixelCNN(config, codebook_size, grid, num_classes)
        case CausalTransformerConfig():
            return CausalTransformer(config, codebook_size, grid, num_classes)
        case MaskedTransformerConfig():
            return MaskedTransformer(config, codebook_size, grid, num_classes)


class Prior(nn.Module):
    """A distribution over code grids (B, h, w), given a class."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        self.num_classes = len(config.class_names or [])
        self.network: PriorNetwork = build_network(config.model, config.codebook_size, config.grid, self.num_classes)

    @property
    def exact_likelihood(self) -> bool:
        """Whether :meth:`nats_per_image` is the likelihood itself and not an upper bound on its negative logarithm."""
        return self.network.exact_likelihood

    def forward(self, indices: Tensor, labels: Tensor | None, random: BatchRandom, progress: float) -> PriorOutput:
        """The training loss of codes (B, h, w) and labels (B,) or None where ``progress``, in [0, 1], of the run is
        done."""
        codes, classes = indices.flatten(1), self._classes(labels, indices)
        options = self.config.loss
        inputs = replace_codes(
            codes, replace_prob_at(progress, options.replace_prob), self.config.codebook_size, random
        )
        hidden = random.uniform("class dropout", (), codes.device) < options.class_dropout_prob
        loss = self.network.loss(codes, torch.where(hidden, self.num_classes, classes), inputs, random)
        return PriorOutput(loss, {"loss": loss.detach()})

    @torch.no_grad()
    def nats_per_image(self, indices: Tensor, labels: Tensor | None, random: BatchRandom) -> Tensor:
        """-log p(codes | class) of codes (B, h, w), (B,), or an upper bound on it (:attr:`exact_likelihood`), for
        which ``random`` is drawn from; no code is replaced, no class hidden.

        Raises:
            InputError: a label out of range.
        """
        if self.num_classes:
            self._labels(labels, len(indices))
        return self.network.nats_per_image(indices.flatten(1), self._classes(labels, indices), random)

    def log_likelihood(self, indices: Tensor, labels: Tensor | None) -> Tensor:
        """log p(codes | class) in nats per image, (B,).

        Raises:
            InputError: a masked transformer, which has a bound only.
        """
        if not self.exact_likelihood:
            raise InputError(
                f"model.type {self.config.model.type!r}: has no likelihood that can be computed; nats_per_image gives "
                "an upper bound on its negative logarithm"
            )
        return -self.nats_per_image(indices, labels, BatchRandom(0, slice(0, len(indices)), len(indices)))

    def check_sampling(self, sampling: SamplingConfig) -> None:
        """Refuses settings that this prior cannot be sampled with.

        Raises:
            InputError: top-k above the codebook, guidance on a prior without classes or class dropout, settings of
                another kind of prior, fewer codes than steps.
        """
        codes, cells = self.config.codebook_size, self.config.grid[0] * self.config.grid[1]
        if sampling.top_k is not None and sampling.top_k > codes:
            raise InputError(f"top_k {sampling.top_k}: expected at most the {codes} codes of the codebook")
        if sampling.guidance_scale != 1.0:
            if not self.num_classes:
                raise InputError(f"guidance_scale {sampling.guidance_scale}: this prior has no classes; use 1")
            if not self.config.loss.class_dropout_prob:
                raise InputError(
                    f"guidance_scale {sampling.guidance_scale}: this prior was trained with loss.class_dropout_prob=0 "
                    "and has no unconditional branch; use 1"
                )
        kind = self.config.model.type
        if kind != "masked_transformer":
            for name in ("num_steps", "mask_schedule", "choice_temperature"):
                if getattr(sampling, name) is not None:
                    raise InputError(
                        f"{name} {getattr(sampling, name)}: is of masked transformers, this prior is a {kind}, which "
                        "writes one code after another; leave it out"
                    )
        elif sampling.num_steps is not None and sampling.num_steps > cells:
            raise InputError(f"num_steps {sampling.num_steps}: expected at most the {cells} codes of a grid")
        if sampling.weights != "float32":
            device = next(self.parameters()).device.type
            if kind == "pixelcnn" or device != "cpu":
                raise InputError(
                    f"weights {sampling.weights!r}: is of transformers on a CPU, this prior is a {kind} on {device}; "
                    "use float32"
                )
            check_weights(sampling.weights)

    def can_keep(self, known: Tensor) -> bool:
        """Whether sampling can keep the codes of the cells that are True in ``known`` (B, h, w), and draw the others.
        A masked transformer can keep any codes; a prior that writes one code after another only those that come
        first in its order."""
        return self.network.can_keep(known.flatten(1))

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor | None,
        sampling: SamplingConfig,
        seeds: list[int],
        known: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Codes (len(seeds), h, w) int64; image i depends on its label, the settings, ``known[i]`` and ``seeds[i]``.

        Args:
            labels: (B,) in [0, num_classes], ``num_classes`` for no class; None: no class for all.
            known: (B, h, w) int64: codes that are given and kept, and -1 where one is to be drawn. A masked
                transformer takes any, the others those that come before all that they have to draw.

        Raises:
            InputError: a label out of range, settings that :meth:`check_sampling` refuses, known codes of another
                grid or codebook, or some that cannot be kept.
        """
        self.check_sampling(sampling)
        device = next(self.parameters()).device
        labels = self._labels(labels, len(seeds)).to(device)
        if known is not None:
            self._check_known(known, len(seeds))
            known = known.flatten(1).long().to(device)
        codes = self.network.sample(labels, sampling, seeds, known, progress)
        return codes.view(len(seeds), *self.config.grid)

    def _labels(self, labels: Tensor | None, count: int) -> Tensor:
        if labels is None:
            return torch.full((count,), self.num_classes)
        if labels.shape != (count,):
            raise InputError(f"labels: expected one for each of {count} seeds, got the shape {tuple(labels.shape)}")
        wrong = labels[(labels < 0) | (labels > self.num_classes)]
        if len(wrong):
            raise InputError(
                f"labels: got {wrong[0].item()}, expected 0 to {self.num_classes - 1}, or {self.num_classes} for no "
                "class"
                if self.num_classes
                else f"labels: got {wrong[0].item()}, but this prior has no classes; leave them out"
            )
        return labels

    def _check_known(self, known: Tensor, count: int) -> None:
        if known.shape != (count, *self.config.grid):
            raise InputError(
                f"known codes: expected the shape {(count, *self.config.grid)} (images and this prior's grid), got "
                f"{tuple(known.shape)}"
            )
        if known.is_floating_point() or known.min() < -1 or known.max() >= self.config.codebook_size:
            raise InputError(
                f"known codes: expected whole numbers from 0 to {self.config.codebook_size - 1}, or -1 where a code is "
                f"to be drawn, got {known.dtype} from {known.min().item()} to {known.max().item()}"
            )
        given = known >= 0
        if not self.can_keep(given):
            image = next(i for i, cells in enumerate(given) if not self.can_keep(cells[None]))
            raise InputError(
                f"known codes: image {image} has codes that this prior cannot keep. It is a {self.config.model.type}, "
                f"which keeps {self.network.keeps}. Give such codes, or use a masked transformer, which keeps any codes"
            )

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Writes config.json and model.safetensors; ``state``: the whole weights, where this process has a share."""
        state = self.state_dict() if state is None else state
        config = self.config.model_dump(mode="json")
        if not config["untrained_classes"]:  # earlier versions do not know the key
            del config["untrained_classes"]
        save_model_folder(Path(folder), "prior", config, state)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Prior":
        """Reads a model folder, or a run folder's `model/`; in evaluation mode, on the CPU."""
        document, state = load_model_folder(path, "prior")
        config = parse_config(PriorConfig, document, f"{path}: config.json")
        return filled(lambda: cls(config), state, path)

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
