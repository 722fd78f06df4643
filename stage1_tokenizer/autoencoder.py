"""The one autoencoder: backbone + bottleneck + objective. AE, VAE, CVAE, VQ-VAE and VQ-GAN are choices, not classes.

Axes: B images, C channels, H and W pixels, h and w cells of the latent grid.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from stage1_tokenizer.autoencoder_config import AutoencoderConfig
from stage1_tokenizer.backbones.conditional_network import ConditionalNetwork, context_space
from stage1_tokenizer.bottlenecks.bottleneck import BottleneckOutput
from stage1_tokenizer.bottlenecks.code_perturbation import PerturbationConfig, perturb_latent
from stage1_tokenizer.losses.equivariance import EquivarianceConfig, draw_transform
from stage1_tokenizer.losses.objective import corrupt, negative_log_likelihood, reconstruction_loss
from twostage.core.conditions.class_condition import ClassCondition, ClassConditionConfig
from twostage.core.conditions.condition import Condition, ConditionConfig, ConditionedSplit
from twostage.core.conditions.conditions import examples_of, parse_values
from twostage.core.conditions.context import Context
from twostage.core.config.registry import plugins_of
from twostage.core.config.sections import parse_config
from twostage.core.errors import InputError
from twostage.core.machine.placement import ConvolutionalNetwork
from twostage.core.runs.model_folder import check_rebuilds, filled, hash_tensors, load_model_folder, save_model_folder
from twostage.core.scales import num_codes
from twostage.core.training.random import BatchRandom

__all__ = ["Autoencoder", "AutoencoderOutput"]

TOLERANCE = 1e-3  # for pixels outside [-1, 1]
LATER_KEYS = {"untrained_classes", "value_range", "bits", "shown_channels", "trained_against", "adversarial"}
"""Keys that earlier versions do not know, so they are written only if they say something."""


@dataclass
class AutoencoderOutput:
    """The result of a training step."""

    loss: Tensor
    """Scalar to minimise: the reconstruction loss plus the bottleneck's losses."""
    reconstruction: Tensor
    """Scalar: the reconstruction loss alone."""
    decoded: Tensor
    """The decoder's output (B, C, H, W); :meth:`Autoencoder.to_images` turns it into images."""
    bottleneck: BottleneckOutput
    encoded: Tensor
    """The encoder's output (B, encoded_channels, h, w)."""
    target: Tensor
    """The images (B, C, H, W) that ``decoded`` should be: the given ones, or transformed ones."""
    metrics: dict[str, Tensor]
    """Detached scalars by name, `loss` among them."""


class Autoencoder(ConvolutionalNetwork):
    """Images -> latent -> images.

    Use ``encode``, ``decode``, ``encode_indices``, ``decode_indices``, ``reconstruct`` and ``sample``; training (and
    DDP) calls ``forward``, then ``update_codebook``. Images are padded at the right and at the bottom to a multiple of
    the backbone's factor, and cropped back.

    Raises:
        InputError: the bottleneck or the condition needs classes, and the config names none; or the condition does not
            suit the bottleneck.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        model = config.model
        self.grid, self.factor = model.backbone.grid(config.image_size), model.backbone.factor
        self._range_known = config.loss.reconstruction != "bce"
        self.bottleneck = model.bottleneck.build((model.latent_channels, *self.grid), len(config.class_names or []))
        self.encoder, self.decoder = model.backbone.build(
            (config.channels, *config.image_size), self.bottleneck.encoded_channels, model.latent_channels
        )
        self.condition: Condition | None = None
        if model.condition:
            condition = self._checked(model.condition)
            self.condition, networks = condition.build(context_space(self.grid)), (self.encoder, self.decoder)
            self.encoder, self.decoder = (ConditionalNetwork(each, condition.form, self.grid) for each in networks)

    def _checked(self, condition: ConditionConfig) -> ConditionConfig:
        """The condition with the number of classes, if it is the class.

        Raises:
            InputError: the bottleneck does not suit it, or there are no classes.
        """
        if not self.bottleneck.variational or self.bottleneck.num_classes:
            raise InputError(
                f"model.condition {condition.type!r}: needs the bottleneck gaussian, whose prior is the same for all "
                f"images, got {self.config.model.bottleneck.type!r}. Set model.bottleneck.type=gaussian or "
                "model.condition=null."
            )
        if not isinstance(condition, ClassConditionConfig):
            return condition
        if not self.config.class_names:
            raise InputError(
                "model.condition 'class': needs labelled data, and this data has no classes. Use one folder per class "
                "or a table with a `label` column, or set model.condition=null."
            )
        return condition.model_copy(update={"num_classes": len(self.config.class_names)})

    @property
    def codebook_size(self) -> int | None:
        """The number of codes; None for a continuous latent."""
        return self.bottleneck.codebook_size or None

    @property
    def code_grid(self) -> tuple[int, int]:
        """The grid of codes (h, w) that a prior sees; wider than :attr:`grid` if a cell has several codes, and a single
        row if the codes have several scales."""
        if self.bottleneck.scales:
            return (1, num_codes(self.bottleneck.scales))
        return (self.grid[0], self.grid[1] * self.bottleneck.depth)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(latent_channels, h, w) of an image's z."""
        return (self.config.model.latent_channels, *self.grid)

    @property
    def variational(self) -> bool:
        """Whether the loss is an evidence lower bound, and :meth:`sample` works."""
        return self.bottleneck.variational

    @property
    def class_conditional(self) -> bool:
        """Whether :meth:`sample` takes a class for each image."""
        return self.bottleneck.num_classes > 0 or isinstance(self.condition, ClassCondition)

    @property
    def conditions(self) -> dict[str, Condition]:
        """What encoder and decoder see of each image, by its type; if it is not empty, all methods need ``given``."""
        return {config.type: self.condition for config in self.config.conditions if self.condition}

    def read_given(self, split: ConditionedSplit, rows: Tensor) -> Tensor | None:
        """What :meth:`forward` needs beside some images of a split: the values of its condition, or else labels; None
        if the split has none.

        Raises:
            InputError: values that the condition cannot have.
        """
        if self.condition is None:
            return split.read_labels(rows)
        given = self.condition.read(split, rows)
        if given is not None:
            self.condition.check(given)
        return given

    def parse(self, condition: str, values: Sequence[Any]) -> Tensor:
        """The values (n, ...) of a condition as people give them, such as prompts of `text`.

        Raises:
            InputError: this model does not see that condition, or it cannot have such a value.
        """
        return parse_values(self.conditions, condition, values)

    def needs(self, condition: str) -> bool:
        """Whether it cannot draw without this condition."""
        return condition in self.conditions

    def example_prompts(self) -> tuple[str, ...]:
        """Some held-out captions, if encoder and decoder see captions."""
        return examples_of(self.config.conditions)

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return next(self.parameters()).device

    @property
    def last_layer(self) -> nn.Parameter:
        """The weights of the decoder's last layer: a linear layer, or a convolution of any kind."""
        layers = [layer for layer in self.decoder.modules() if isinstance(layer, nn.Linear | _ConvNd)]
        assert isinstance(layers[-1].weight, nn.Parameter)
        return layers[-1].weight

    def forward(
        self,
        images: Tensor,
        given: Tensor | None = None,
        random: BatchRandom | None = None,
        perturbation: PerturbationConfig | None = None,
        equivariance: EquivarianceConfig | None = None,
    ) -> AutoencoderOutput:
        """The loss on images (B, C, H, W) in [-1, 1].

        Args:
            given: what the model is conditioned on: labels (B,) for `class_gaussian`, and the values (B, ...) of
                `model.condition`, see :meth:`read_given`. Other models ignore it.
            random: the source of all random numbers; None: :meth:`BatchRandom.from_torch`.
            perturbation: how the decoder's codes are replaced; None: it gets the encoder's own codes.
            equivariance: how the latent and the images that it must decode to are scaled and turned; None: they are
                not. The latent is transformed before it is quantized, so the decoder always sees codes.
        """
        random = random or BatchRandom.from_torch(len(images))
        if not self._range_known:
            check_range(images)
            self._range_known = True  # checked once: reading values back makes the GPU wait
        corruption = self.config.loss.corruption
        inputs = corrupt(images, corruption, random) if corruption else images
        if self.condition and given is not None and self.training:
            given = self.condition.one_of_each(given, random)
        context = self._context(given)
        encoded = self.run_encoder(inputs, context)
        transform = draw_transform(self.grid, equivariance, random) if equivariance else None
        target = transform.of_images(images, self.factor) if transform else images
        latent = self.bottleneck(transform.of_latent(encoded) if transform else encoded, given, random)
        z = latent.z
        if perturbation:
            assert latent.indices is not None
            z = perturb_latent(z, latent.indices, self.bottleneck, perturbation, random)
        decoded = self.run_decoder(z, context)
        metrics: dict[str, Tensor] = {}
        if self.variational:
            distortion, level = negative_log_likelihood(decoded, target, self.config.loss, self.config.bits)
            nats = distortion + latent.losses["kl"]
            loss = distortion + self.config.loss.kl_weight * latent.losses["kl"]
            bits = nats / (target[0].numel() * math.log(2)) + level
            metrics = {"nats_per_image": nats, "bits_per_dim": bits}
        else:
            distortion = reconstruction_loss(decoded, target, self.config.loss.reconstruction)
            loss = distortion + sum(latent.losses.values())
        metrics = {"loss": loss, **metrics, "reconstruction": distortion, **latent.losses, **latent.metrics}
        metrics = {name: value.detach() for name, value in metrics.items()}
        return AutoencoderOutput(loss, distortion, decoded, latent, encoded, target, metrics)

    if TYPE_CHECKING:  # torch says that a call returns anything

        def __call__(self, *args: Any, **kwargs: Any) -> AutoencoderOutput: ...

    def _context(self, given: "Tensor | Context | None") -> Context | None:
        """What the condition says about images with these values; None for a model without.

        Raises:
            InputError: no values.
        """
        if self.condition is None:
            return None
        if isinstance(given, Context):
            return given
        if given is None:
            (seen,) = self.config.conditions
            raise InputError(
                f"model.condition {seen.type!r}: got no {seen.plural}, expected one for every image, because encoder "
                f"and decoder see it. Use images with {seen.plural}, or a model that was trained with "
                "model.condition=null."
            )
        return self.condition(given.to(self.device, non_blocking=True))

    def run_encoder(self, images: Tensor, given: "Tensor | Context | None" = None) -> Tensor:
        """The encoder's raw output (B, encoded_channels, h, w) for images (B, C, H, W), padded if needed."""
        if images.ndim != 4 or images.shape[1] != self.config.channels or not images.is_floating_point():
            raise InputError(
                f"images: expected floats in [-1, 1] of the shape (images, {self.config.channels}, height, width), got "
                f"{images.dtype} of the shape {tuple(images.shape)}. Convert uint8 or uint16 with twostage.to_float"
            )
        below, right = (-side % self.factor for side in images.shape[2:])
        padded = F.pad(images, (0, right, 0, below), mode="replicate") if below or right else images
        context = self._context(given)
        return self.encoder(padded, context) if context else self.encoder(padded)

    def run_decoder(self, z: Tensor, given: "Tensor | Context | None" = None) -> Tensor:
        """The decoder's raw output (B, C, H, W), pixels or logits, without padding, for (B, latent_channels, h, w)."""
        (height, width), context = self.config.image_size, self._context(given)
        decoded = self.decoder(z, context) if context else self.decoder(z)
        return decoded[..., :height, :width] if z.shape[2:] == self.grid else decoded

    @torch.no_grad()
    def encode(self, images: Tensor, given: Tensor | None = None) -> BottleneckOutput:
        """The latent z of images (B, C, H, W) in [-1, 1], with codes if the bottleneck is discrete."""
        return self.bottleneck.encode(self.run_encoder(images, given))

    def encode_indices(self, images: Tensor, given: Tensor | None = None) -> Tensor:
        """The codes (B, *:attr:`code_grid`) int64 of images (B, C, H, W) in [-1, 1].

        Raises:
            InputError: the bottleneck has no codes.
        """
        self._check_codes("encode(images).z")
        indices = self.encode(images, given).indices
        assert indices is not None
        return indices

    @torch.no_grad()
    def decode(self, z: Tensor, given: Tensor | None = None) -> Tensor:
        """A latent (B, latent_channels, h, w) -> images (B, C, H, W) in [-1, 1]."""
        return self.to_images(self.run_decoder(z, given))

    @torch.no_grad()
    def decode_indices(self, indices: Tensor) -> Tensor:
        """Codes (B, *:attr:`code_grid`) int64 -> images (B, C, H, W) in [-1, 1].

        Raises:
            InputError: the bottleneck has no codes.
        """
        self._check_codes("decode(z)")
        return self.decode(self.bottleneck.lookup(indices.long()))

    def _check_codes(self, instead: str) -> None:
        if self.codebook_size is None:
            raise InputError(
                f"model.bottleneck.type {self.config.model.bottleneck.type!r}: has no codes. Use {instead}"
            )

    @torch.no_grad()
    def reconstruct(self, images: Tensor, given: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], encoded and decoded."""
        return self.decode(self.encode(images, given).z, given)

    @torch.no_grad()
    def sample(self, num_images: int, given: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Samples images (num_images, C, H, W) in [-1, 1] from the bottleneck's own prior; variational families have
        one.

        Args:
            given: the values (num_images, ...) of what the model is conditioned on, such as labels; None: cycle
                through all classes.

        Raises:
            InputError: the bottleneck has no prior of its own, or captions, vectors or maps are missing.
        """
        noise = torch.randn(num_images, *self.latent_shape, generator=generator, device=self.device)
        if self.class_conditional and given is None:
            given = torch.arange(num_images) % len(self.config.class_names or [])
        return self.sample_from(noise, given)

    @torch.no_grad()
    def sample_from(self, noise: Tensor, given: Tensor | None) -> Tensor:
        """:meth:`sample` for given standard normal noise (B, *:attr:`latent_shape`).

        Args:
            given: the values (B, ...) of what the model is conditioned on, such as labels.
        """
        if not self.variational:
            raise InputError(
                f"model.bottleneck.type {self.config.model.bottleneck.type!r}: has no prior of its own to sample from. "
                "Train one on its codes: twostage encode, then twostage train-prior."
            )
        return self.decode(self.bottleneck.sample(noise, given), given)

    def update_codebook(self, reduce_sum: Callable[[Tensor], Tensor] = lambda statistics: statistics) -> None:
        """Applies the statistics that ``forward`` has collected for the codebook, if there is one. Call it once per
        update, after the optimizer.

        Args:
            reduce_sum: sums a tensor over all processes, if there are several.
        """
        self.bottleneck.update_codebook(reduce_sum)

    def content_hash(self) -> str:
        """A hash of everything that determines the codes: the images' size and channels, the encoder, the codebook. It
        excludes the decoder, so that training the decoder further keeps the priors valid."""
        model = self.config.model
        form = {"image_size": self.config.image_size, "channels": self.config.channels}
        for name, part in {"backbone": model.backbone, "bottleneck": model.bottleneck}.items():
            # Without defaults, so that a new setting does not change the hashes of earlier models.
            form[name] = {"type": part.type} | part.model_dump(mode="json", exclude_defaults=True)
        if model.condition:
            settings = model.condition.model_dump(mode="json", exclude_defaults=True, exclude={"examples"})
            is_class = isinstance(model.condition, ClassConditionConfig)
            form["condition"] = model.condition.type if is_class else {"type": model.condition.type} | settings
        parts = {"encoder": self.encoder, "bottleneck": self.bottleneck}
        parts |= {"condition": self.condition} if self.condition else {}
        weights = {
            f"{part}.{name}": each for part, module in parts.items() for name, each in module.state_dict().items()
        }
        labelled = [
            (f"{name} {tuple(tensor.shape)} {tensor.dtype}", tensor)
            for name, tensor in sorted(weights.items())
            if "ema_" not in name  # training statistics
        ]
        return hash_tensors(labelled, json.dumps(form, sort_keys=True))

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Writes config.json and model.safetensors into ``folder``.

        Args:
            state: the weights to write, if they differ from those in memory, for example in precision.

        Raises:
            InputError: a part is not the one that its config describes, so it could not be loaded.
        """
        check_rebuilds(self, lambda: Autoencoder(self.config), folder)
        state = self.state_dict() if state is None else state
        defaults = {key: AutoencoderConfig.model_fields[key].default for key in LATER_KEYS}
        silent = {key for key, default in defaults.items() if getattr(self.config, key) == default}
        config = self.config.model_dump(mode="json", exclude=silent)
        config["hash"] = self.content_hash()
        save_model_folder(Path(folder), "tokenizer", config, state, plugins_of(self.config))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Autoencoder":
        """Loads a model folder, or a run folder's `model/`, in evaluation mode on the CPU.

        Raises:
            InputError: no such model, or a damaged one.
        """
        document, state = load_model_folder(path, "tokenizer")
        document.pop("hash", None)
        config = parse_config(AutoencoderConfig, document, f"{path}: config.json")
        return filled(lambda: cls(config), state, path)

    def to_pixels(self, decoded: Tensor) -> Tensor:
        """The decoder's output as pixels, differentiable: in [-1, 1] from logits, otherwise not clamped."""
        if self.config.loss.reconstruction == "bce":
            return torch.sigmoid(decoded.float()) * 2 - 1
        return decoded.float()

    def to_images(self, decoded: Tensor) -> Tensor:
        """The decoder's output as images (B, C, H, W) in [-1, 1]."""
        return self.to_pixels(decoded).clamp(-1, 1)


def check_range(images: Tensor) -> None:
    """Checks that the Bernoulli likelihood is defined for ``images``.

    Raises:
        InputError: values outside of [-1, 1].
    """
    low, high = images.min().item(), images.max().item()
    if low < -1 - TOLERANCE or high > 1 + TOLERANCE:
        raise InputError(
            f"loss.reconstruction 'bce': needs images in [-1, 1], got values from {low:.3g} to {high:.3g}. Scale them, "
            "or set loss.reconstruction=l2."
        )
