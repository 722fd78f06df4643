"""The losses that only training needs: the perceptual and adversarial terms beside the autoencoder's objective.

Each term is differentiated with respect to the pixels of a detached reconstruction. The autoencoder then needs one
backward pass for all of them, and neither the frozen network nor the discriminator ever gets a gradient from it.
"""

from functools import reduce
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import Field, field_validator
from torch import Tensor, nn

from stage1_tokenizer.autoencoder import Autoencoder, AutoencoderOutput
from stage1_tokenizer.autoencoder_config import PerceptualNetwork
from stage1_tokenizer.bottlenecks.code_perturbation import PerturbationConfig
from stage1_tokenizer.features.feature_network import FeatureNetwork
from stage1_tokenizer.features.imagenet_network import LOSS_WEIGHTS
from stage1_tokenizer.losses import causal_term, semantic_term  # noqa: F401  # register the types of `loss.latents`
from stage1_tokenizer.losses.discriminator import AdversarialConfig, Discriminator, adversarial_weight, generator_loss
from stage1_tokenizer.losses.equivariance import EquivarianceConfig
from stage1_tokenizer.losses.latent_term import LatentTermConfig
from stage1_tokenizer.losses.loss_term import LossTermConfig
from stage1_tokenizer.losses.objective import ObjectiveConfig
from stage1_tokenizer.losses.perceptual import ImageNetPerceptualConfig, LPIPSConfig, PerceptualConfig, build_perceptual
from twostage.core.training.random import BatchRandom

__all__ = ["ImageLosses", "LossConfig"]


class LossConfig(ObjectiveConfig):
    """The loss that training minimises."""

    perceptual: PerceptualConfig | None = None
    """A distance in the features of a frozen network, added to the reconstruction loss; null: none."""
    adversarial: AdversarialConfig | None = None
    """A discriminator trained beside the autoencoder, which makes it a VQ-GAN; null: none."""
    perturbation: PerturbationConfig | None = None
    """Replaces codes by similar ones before the decoder, which then forgives more mistakes of a prior. Meant for
    VQ-GANs, because the other losses alone then blur images. null: none."""
    equivariance: EquivarianceConfig | None = None
    """Scales and turns latents, which must decode to scaled and turned images; a prior learns such latents more easily.
    null: none."""
    latents: list[LatentTermConfig] = Field(default=[])
    """Terms on the encoder's output that make it easier for a prior: `[{type: causal}, {type: semantic}]`."""
    terms: list[LossTermConfig] = Field(default=[])
    """Loss terms of your own, such as `[{type: edges, weight: 0.1}]` (docs/extending.md)."""

    @field_validator("terms", "latents")
    @classmethod
    def _each_once(cls, value: list[Any]) -> list[Any]:
        types = [term.type for term in value]
        if len(set(types)) < len(types):
            raise ValueError(f"got the types {', '.join(types)}, expected each at most once. Remove one")
        return value

    def objective(self) -> ObjectiveConfig:
        """The part that the trained model keeps."""
        return ObjectiveConfig(**{name: getattr(self, name) for name in ObjectiveConfig.model_fields})


class ImageLosses:
    """The perceptual term, the terms of plugins, and the adversarial term of ``config``, all optional.

    Not a module: checkpoints do not contain LPIPS and feature networks, and the discriminator is trained separately.

    Args:
        autoencoder: unwrapped; the adaptive weight is measured at its last layer.
        discriminator: unwrapped, or None.
        weights_dir: the folder of LPIPS's trunk; None: torch's cache.
    """

    def __init__(
        self,
        config: LossConfig,
        autoencoder: Autoencoder,
        discriminator: Discriminator | None,
        weights_dir: Path | None,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.autoencoder, self.discriminator = config, autoencoder, discriminator
        self.accelerator, form = accelerator, autoencoder.config
        terms = [(term, term.build((form.channels, *form.image_size))) for term in config.terms]
        self.terms = [
            (term, built.to(accelerator.device).requires_grad_(False) if isinstance(built, nn.Module) else built)
            for term, built in terms
        ]
        self.perceptual = None
        if config.perceptual:
            built = build_perceptual(config.perceptual, form.channels, form.image_size, weights_dir)
            self.perceptual = built.to(accelerator.device)

    def networks(self) -> list[PerceptualNetwork]:
        """The networks that the autoencoder is trained against, for its record."""
        config, imagenet = self.config.perceptual, PerceptualNetwork(type="imagenet", hash=LOSS_WEIGHTS.sha256)
        semantic = [imagenet] if any(term.type == "semantic" and term.weight for term in self.config.latents) else []
        if config is None or self.perceptual is None or not config.weight:
            return semantic
        if isinstance(config, LPIPSConfig):
            return [PerceptualNetwork(type="lpips"), *semantic]
        if isinstance(config, ImageNetPerceptualConfig):
            return [imagenet]
        assert isinstance(self.perceptual.network, FeatureNetwork)
        return [
            PerceptualNetwork(type="features", path=config.path, hash=self.perceptual.network.features_hash()),
            *semantic,
        ]

    def notices(self) -> list[str]:
        """What the losses do not see."""
        if self.autoencoder.config.channels == 4 and isinstance(self.config.perceptual, LPIPSConfig):
            notice = (
                "loss.perceptual lpips: sees three of the four channels, so only loss.reconstruction trains the "
                "transparency. loss.perceptual={type: imagenet} compares images on random backgrounds instead."
            )
            return [notice]
        return []

    def pixel_gradient(
        self, output: AutoencoderOutput, images: Tensor, progress: float, random: BatchRandom
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """d(weighted terms) / d(decoded), (B, C, H, W), or None without terms; and metrics by name, among them the
        whole `loss` that the autoencoder minimises.

        Args:
            images: the target images (B, C, H, W) in [-1, 1].
            progress: how much of the run is done, in [0, 1].
            random: draws the colours on which transparent images are compared.
        """
        decoded = output.decoded.detach().requires_grad_()
        pixels = self.autoencoder.to_pixels(decoded)
        terms = {term.type: term.weight * built(pixels, images) for term, built in self.terms}
        if self.perceptual is not None and self.config.perceptual:
            is_transparent = images.shape[1] == 4
            background = 2 * random.uniform("background", (3, 1, 1), images.device) - 1 if is_transparent else 1.0
            terms["perceptual"] = self.config.perceptual.weight * self.perceptual(pixels, images, background)
        gradient, metrics = None, {name: term.detach() for name, term in terms.items()}
        if terms:
            total = reduce(torch.add, terms.values())
            (gradient,) = torch.autograd.grad(total, decoded, retain_graph=True)
            metrics["loss"] = output.loss.detach() + total.detach()
        adversarial = self.config.adversarial
        if self.discriminator is not None and adversarial and progress >= adversarial.start:
            (logits,) = self.discriminator(pixels)
            term = generator_loss(logits, adversarial.loss)
            (pull,) = torch.autograd.grad(term, decoded)
            weight = torch.full((), adversarial_weight(adversarial, progress), device=pull.device)
            if adversarial.adaptive:
                weight = weight * self._adaptive_ratio(output, gradient, pull, adversarial)
            gradient = weight * pull if gradient is None else gradient + weight * pull
            loss = metrics.get("loss", output.loss.detach()) + weight * term.detach()
            metrics |= {"adversarial": term.detach(), "adversarial_weight": weight, "loss": loss}
        return gradient, metrics

    def _adaptive_ratio(
        self, output: AutoencoderOutput, perceptual: Tensor | None, pull: Tensor, config: AdversarialConfig
    ) -> Tensor:
        """|d(reconstruction + perceptual)| / |d(adversarial)| at the last layer's weights (equation 7 of the VQGAN
        paper). The gradients are averaged over the processes first, so this is the ratio of the global batch."""
        (push,) = torch.autograd.grad(output.reconstruction, output.decoded, retain_graph=True)
        push = push if perceptual is None else push + perceptual
        at_last = [
            torch.autograd.grad(output.decoded, self.autoencoder.last_layer, gradient, retain_graph=True)[0].float()
            for gradient in (push, pull)
        ]
        averaged = self.accelerator.reduce(torch.stack(at_last), "mean")
        assert isinstance(averaged, Tensor)
        norms = averaged.flatten(1).norm(dim=1)
        return (norms[0] / (norms[1] + 1e-4)).clamp(0, config.max_weight)
