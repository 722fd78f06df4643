"""A prior: a network, what it was trained on, and how both are stored. All priors have one interface: ``forward`` (the
training loss), ``nats_per_image``, ``log_likelihood`` and ``sample``.

Axes: B images, h and w cells of the code grid.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stage2_prior.codes import CodeCache, TokenizerReference
from stage2_prior.networks.causal_transformer import CausalTransformerConfig
from stage2_prior.networks.fast_linear import check_weights
from stage2_prior.networks.masked_transformer import MaskedTransformerConfig
from stage2_prior.networks.network import NetworkConfig, OnProgress, PriorNetwork
from stage2_prior.networks.parallel_transformer import ParallelTransformerConfig
from stage2_prior.networks.pixelcnn import PixelCNNConfig
from stage2_prior.networks.scale_by_scale import ScaleByScaleConfig
from stage2_prior.networks.scale_transformer import ScaleTransformerConfig
from stage2_prior.sampling import Branches
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.conditions.class_condition import ClassConditionConfig
from twostage.core.conditions.condition import ConditionConfig
from twostage.core.conditions.conditions import NAMES, Conditions, Given, context_form, examples_of
from twostage.core.conditions.context import join_contexts
from twostage.core.config.registry import plugins_of
from twostage.core.config.schema import tag
from twostage.core.config.sections import Count, Number, Section, Share, Sides, parse_config
from twostage.core.errors import InputError
from twostage.core.runs.model_folder import check_rebuilds, filled, load_model_folder, save_model_folder
from twostage.core.scales import describe_grids
from twostage.core.training.random import BatchRandom

__all__ = ["Prior", "PriorConfig", "PriorLossConfig", "ReplaceSchedule", "prior_config"]

for network in (
    PixelCNNConfig,
    CausalTransformerConfig,
    MaskedTransformerConfig,
    ParallelTransformerConfig,
    ScaleTransformerConfig,
    ScaleByScaleConfig,
):
    NetworkConfig.register(network)


class ReplaceSchedule(Section):
    """A share that changes from `start` at a run's first step to `end` at its last."""

    start: Share
    end: Share
    shape: Literal["linear", "cosine"] = "linear"


class PriorLossConfig(Section):
    """Random changes to the codes and classes of a training step."""

    replace_prob: Share | ReplaceSchedule = 0.0
    """Share of the input codes that are replaced by uniformly random ones (a Bernoulli mask), while the true codes are
    predicted. It makes sampling robust to its own mistakes (also called `1 - pkeep`). Or a schedule over the run:
    `{start: 0.3, end: 0.0, shape: linear}`."""
    class_dropout_prob: Share = 0.1
    """Share of the images that are trained on without their class, or without another condition that has no `dropout`
    of its own. Guidance needs it."""


class PriorConfig(Section):
    """A prior's `config.json`: everything needed to build the prior and to refuse another tokenizer's codes."""

    model: NetworkConfig = CausalTransformerConfig()
    conditions: list[ConditionConfig] = Field(default=[])
    """What it is conditioned on; by default the class if there are ``class_names``."""
    loss: PriorLossConfig = PriorLossConfig()
    codebook_size: Count
    grid: tuple[Count, Count]
    """Cells (h, w); (1, N) for codes of several scales."""
    class_names: list[str] | None = None
    """Those that the prior draws; None: it is not conditioned on the class."""
    untrained_classes: tuple[str, ...] = ()
    """The classes that had no training image."""
    image_size: Sides
    """(height, width) of the images that the codes stand for."""
    channels: Count
    tokenizer: TokenizerReference = TokenizerReference(hash="", path="")
    """The tokenizer of its codes; by default none that twostage knows."""
    unigram_nats_per_code: Number | None = Field(default=None, ge=0)
    """The held-out baseline, see `Manifest`; None: not known."""

    @model_validator(mode="before")
    @classmethod
    def _class_by_default(cls, document: Any) -> Any:
        if not isinstance(document, dict):
            return document
        return {"conditions": _class_alone(document.get("class_names"))} | document


def prior_config(
    model: NetworkConfig, conditions: list[ConditionConfig] | None, loss: PriorLossConfig, cache: CodeCache
) -> PriorConfig:
    """The stored configuration of a prior that is trained on the codes in ``cache``.

    Args:
        conditions: None: the class, if the codes have classes.

    Raises:
        InputError: the codes lack a condition, or the model cannot predict such codes.
    """
    manifest = cache.manifest
    if conditions is None:
        conditions = [ClassConditionConfig()] if manifest.class_names else []
    has_class = any(condition.type == "class" for condition in conditions)
    model = model.for_codes(manifest.codebook_size, manifest.digits, manifest.scales)
    if manifest.scales and model.context_space(manifest.grid).grid == manifest.grid:
        for condition in conditions:
            if condition.form.cells:
                raise InputError(
                    f"condition.type {condition.type!r}: says something about each place of an image, but a "
                    f"{model.type} sees the codes of {describe_grids((), manifest.scales)} as one row. Set "
                    "model.type=scale_transformer"
                )
    return PriorConfig(
        model=model,
        conditions=[condition.learned_from(cache.condition_source()) for condition in conditions],
        loss=loss,
        codebook_size=manifest.codebook_size,
        grid=manifest.grid,
        class_names=manifest.class_names if has_class else None,
        untrained_classes=tuple(cache.untrained_classes) if has_class else (),
        image_size=manifest.image_size,
        channels=manifest.channels,
        tokenizer=manifest.tokenizer,
        unigram_nats_per_code=manifest.unigram_nats_per_code[manifest.validation_split],
    )


class Prior(nn.Module):
    """A distribution over code grids (B, h, w), given conditions such as a class."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        self.form = form = context_form(config.conditions)
        self.num_classes = form.num_classes
        self.conditions = Conditions(config.conditions, config.model.context_space(config.grid))
        self.network: PriorNetwork = config.model.build(config.codebook_size, config.grid, form)

    @property
    def exact_likelihood(self) -> bool:
        """Whether :meth:`nats_per_image` is exact; otherwise it is an upper bound."""
        return self.network.exact_likelihood

    def forward(
        self,
        indices: Tensor,
        given: Given | Tensor | None = None,
        random: BatchRandom | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """The training loss, nats per code as a scalar, of codes (B, h, w).

        Args:
            given: the conditions, such as labels (B,), see `Conditions.complete`.
            random: the source of all random numbers; None: `BatchRandom.from_torch`.
            progress: how much of the run is done, in [0, 1], for a schedule of `loss.replace_prob`.
        """
        random = random or BatchRandom.from_torch(len(indices))
        codes, options = indices.flatten(1), self.config.loss
        inputs = replace_codes(
            codes, replace_prob_at(progress, options.replace_prob), self.config.codebook_size, random
        )
        values = self.conditions.hide(self._complete(given, codes), options.class_dropout_prob, random)
        return self.network.loss(codes, self.conditions(values, len(codes)), inputs, random)

    if TYPE_CHECKING:  # torch says that a call returns anything

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...

    @torch.no_grad()
    def nats_per_image(
        self, indices: Tensor, given: Given | Tensor | None = None, random: BatchRandom | None = None
    ) -> Tensor:
        """-log p(codes | conditions) of codes (B, h, w), or an upper bound on it (see :attr:`exact_likelihood`) that
        uses ``random``: (B,). No code is replaced and no condition hidden.

        Args:
            given: the conditions, see `Conditions.complete`.
            random: None: `BatchRandom.from_torch`.

        Raises:
            InputError: a condition is not one of this prior, or out of range.
        """
        random = random or BatchRandom.from_torch(len(indices))
        codes = indices.flatten(1)
        return self.network.nats_per_image(codes, self.conditions(self._complete(given, codes), len(codes)), random)

    def log_likelihood(self, indices: Tensor, given: Given | Tensor | None = None) -> Tensor:
        """log p(codes | conditions) in nats per image, (B,).

        Raises:
            InputError: the prior has no exact likelihood, such as a masked transformer.
        """
        if not self.exact_likelihood:
            raise InputError(
                f"model.type {self.config.model.type!r}: its likelihood cannot be computed exactly. Use "
                "nats_per_image, an upper bound on the negative log-likelihood"
            )
        return -self.nats_per_image(indices, given, BatchRandom(0, slice(0, len(indices)), len(indices)))

    def check_sampling(self, sampling: SamplingConfig) -> None:
        """Refuses settings that this prior cannot be sampled with.

        Raises:
            InputError: settings that only apply to other priors, top-k above the codebook size, more steps than codes,
                or guidance for a prior that was trained without classes or without class dropout.
        """
        model, codes, cells = self.config.model, self.config.codebook_size, math.prod(self.config.grid)
        for name, value in sampling.model_dump(exclude_defaults=True).items():
            if name not in model.sampling_settings:
                others = [
                    tag(one)
                    for one in NetworkConfig.members()
                    if issubclass(one, NetworkConfig) and name in one.sampling_settings
                ]
                raise InputError(
                    f"{name} {value!r}: only applies to {' and '.join(filter(None, others))}, but this prior is a "
                    f"{model.type}. Remove {name}"
                )
        if sampling.top_k is not None and not model.ranks_codes:
            raise InputError(
                f"top_k {sampling.top_k}: needs the probability of every code, but this prior predicts a code digit by "
                "digit (model.codes). Use top_p, which then applies to each digit, or a lower temperature"
            )
        if sampling.top_k is not None and sampling.top_k > codes:
            raise InputError(f"top_k {sampling.top_k}: expected at most {codes}, the size of the codebook")
        if sampling.num_steps is not None and sampling.num_steps > cells:
            raise InputError(f"num_steps {sampling.num_steps}: expected at most {cells}, the number of codes in a grid")
        self._check_guidance(sampling)
        check_weights(sampling.weights, next(self.parameters()).device)

    def needs(self, condition: str) -> bool:
        """Whether it cannot draw without this condition, because it was never hidden in training."""
        return any(each.type == condition and not self.dropout_of(each) for each in self.config.conditions)

    def _check_guidance(self, sampling: SamplingConfig) -> None:
        scale = sampling.guidance_scale
        if isinstance(scale, dict) and (unknown := [name for name in scale if name not in self.conditions]):
            has = " and ".join(self.conditions) or "no conditions"
            raise InputError(f"guidance_scale {unknown[0]!r}: this prior was trained with {has}. Remove {unknown[0]!r}")
        if not sampling.is_guided:
            return
        if not self.config.conditions:
            raise InputError(f"guidance_scale {scale}: this prior has no classes or prompts. Use guidance_scale 1")
        hidden = {name for _, names in sampling.scales_of(list(self.conditions)) for name in names}
        for condition in self.config.conditions:
            if condition.type in hidden and not self.dropout_of(condition):
                raise InputError(
                    f"guidance_scale {scale}: this prior was trained with {self.dropout_setting(condition)}, so it "
                    f"cannot sample without a {condition.type}. Use guidance_scale 1"
                )

    def dropout_setting(self, condition: ConditionConfig) -> str:
        """What sets :meth:`dropout_of`, as in a config."""
        own = f"condition.dropout={condition.dropout:g} for {condition.type}" if condition.dropout is not None else ""
        return own or f"loss.class_dropout_prob={self.config.loss.class_dropout_prob:g}"

    def dropout_of(self, condition: ConditionConfig) -> float:
        """The share of the training images from which a condition was hidden."""
        return self.config.loss.class_dropout_prob if condition.dropout is None else condition.dropout

    def parse(self, condition: str, values: Sequence[Any]) -> Tensor:
        """The values (n, ...) of a condition as people give them, such as prompts of `text`.

        Raises:
            InputError: the prior was trained without this condition, or it cannot have such a value.
        """
        return self.conditions.parse(condition, values)

    def example_prompts(self) -> tuple[str, ...]:
        """Some held-out captions, if the prior is conditioned on captions."""
        return examples_of(self.config.conditions)

    def can_keep(self, known: Tensor) -> bool:
        """Whether sampling can keep the codes of the cells that are True in ``known`` (B, h, w). Masked and
        parallel transformers keep any codes; a prior that writes one code after another keeps only codes that come
        first in its order."""
        return self.network.can_keep(known.flatten(1))

    @torch.no_grad()
    def sample(
        self,
        given: Given | Tensor | None = None,
        sampling: SamplingConfig | None = None,
        seeds: Sequence[int] = (0,),
        known: Tensor | None = None,
        on_progress: OnProgress | None = None,
        negative: Given | None = None,
    ) -> Tensor:
        """Codes (len(seeds), h, w) int64. Image i depends on its conditions, ``sampling``, ``known[i]`` and
        ``seeds[i]`` only.

        Args:
            given: the conditions, see `Conditions.complete`; those that are missing are nothing for all images.
            sampling: None: temperature 1 and no guidance.
            seeds: one for each image.
            negative: what guidance leads away from, instead of nothing: the same for some of the conditions.
            known: (B, h, w) int64: codes to keep, -1 where a code is to be sampled, see :meth:`can_keep`.

        Raises:
            InputError: a condition is out of range, :meth:`check_sampling` refuses the settings, or the known codes
                have another grid or codebook or cannot be kept.
        """
        sampling = sampling or SamplingConfig()
        self.check_sampling(sampling)
        device = next(self.parameters()).device
        branches = self._branches(given, negative, sampling, len(seeds))
        if known is not None:
            self._check_known(known, len(seeds))
            known = known.flatten(1).long().to(device)
        codes = self.network.sample(branches, sampling, list(seeds), known, on_progress)
        return codes.view(len(seeds), *self.config.grid)

    def _complete(self, given: Given | Tensor | None, codes: Tensor) -> dict[str, Tensor]:
        values = self.conditions.complete(given, len(codes))
        return {name: value.to(codes.device, non_blocking=True) for name, value in values.items()}

    def _branches(
        self, given: Given | Tensor | None, negative: Given | None, sampling: SamplingConfig, count: int
    ) -> Branches:
        device = next(self.parameters()).device
        values, without = (
            {name: value.to(device) for name, value in self.conditions.complete(each, count).items()}
            for each in (given, negative)
        )
        steps = sampling.scales_of(list(self.conditions))
        hidden = {name for _, names in steps for name in names}
        if useless := [name for name in negative or {} if name not in hidden]:
            raise InputError(
                f"negative {NAMES.get(useless[0], useless[0])}: has no effect with the guidance_scale "
                f"{sampling.guidance_scale}. Set a guidance_scale above 1, or remove it"
            )
        contexts = [self.conditions.encode_each(values, count)]
        for _, names in steps:
            values = values | {name: without[name] for name in names}
            contexts.append(self.conditions.encode_each(values, count))
        return Branches(join_contexts(contexts), tuple(scale for scale, _ in steps))

    def _check_known(self, known: Tensor, count: int) -> None:
        if known.shape != (count, *self.config.grid):
            raise InputError(
                f"known codes: expected the shape {(count, *self.config.grid)} (the number of images and this prior's "
                f"grid), got {tuple(known.shape)}"
            )
        if known.is_floating_point() or known.min() < -1 or known.max() >= self.config.codebook_size:
            raise InputError(
                f"known codes: expected integers from 0 to {self.config.codebook_size - 1}, or -1 where a code is to "
                f"be sampled, got {known.dtype} from {known.min().item()} to {known.max().item()}"
            )
        given = known >= 0
        if not self.can_keep(given):
            image = next(i for i, cells in enumerate(given) if not self.can_keep(cells[None]))
            raise InputError(
                f"known codes: image {image} has codes that this prior cannot keep. It is a {self.config.model.type}, "
                f"which keeps {self.network.keeps}. Give such codes, or use a masked or parallel "
                "transformer, which keeps any codes"
            )

    def save_pretrained(
        self, folder: str | Path, state: dict[str, Tensor] | None = None, tokenizer: str | None = None
    ) -> None:
        """Writes config.json and model.safetensors.

        Args:
            state: the weights to write, if this process holds only a share of them, or others in another precision.
            tokenizer: where the tokenizer will be, if not where the codes were made.

        Raises:
            InputError: its network is not the one that its config describes, so it could not be loaded.
        """
        check_rebuilds(self, lambda: Prior(self.config), folder)
        state = self.state_dict() if state is None else state
        config = self.config.model_dump(mode="json")
        config["tokenizer"]["path"] = tokenizer or config["tokenizer"]["path"]
        # Keys that earlier versions do not know are only written if they say something new.
        if not config["untrained_classes"]:
            del config["untrained_classes"]
        if config["model"].get("codes") == "table":
            del config["model"]["codes"]
        if config["conditions"] == _class_alone(config["class_names"]):
            del config["conditions"]
            config["model"].pop("context_channels", None)
        save_model_folder(Path(folder), "prior", config, state, plugins_of(self.config))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Prior":
        """Reads a model folder, or the `model/` of a run folder. The prior is on the CPU, in evaluation mode."""
        document, state = load_model_folder(path, "prior")
        config = parse_config(PriorConfig, document, f"{path}: config.json")
        return filled(lambda: cls(config), state, path)


def _class_alone(class_names: list[str] | None) -> list[dict[str, Any]]:
    """The `conditions` of a prior that is conditioned on the class if there are classes, and are not stored then."""
    return [ClassConditionConfig(num_classes=len(class_names)).model_dump(mode="json")] if class_names else []


def replace_prob_at(progress: float, replace_prob: float | ReplaceSchedule) -> float:
    """The share of codes that are replaced at ``progress`` in [0, 1] of a run."""
    if not isinstance(replace_prob, ReplaceSchedule):
        return replace_prob
    done = progress if replace_prob.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return replace_prob.start + (replace_prob.end - replace_prob.start) * done


def replace_codes(codes: Tensor, replace_prob: float, codebook_size: int, random: BatchRandom) -> Tensor:
    """Replaces each of the codes (B, N), with probability ``replace_prob``, by a uniformly random one."""
    if not replace_prob:
        return codes
    shape = tuple(codes.shape[1:])
    replaced = random.uniform("replace", shape, codes.device) < replace_prob
    others = (random.uniform("replacement", shape, codes.device) * codebook_size).long()
    return torch.where(replaced, others, codes)
