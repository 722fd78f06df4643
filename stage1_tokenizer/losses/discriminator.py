"""PatchGAN and the adversarial losses of VQ-GAN.

Isola et al. 2017 (arXiv 1611.07004), Esser et al. 2021 (arXiv 2012.09841). Axes: B images, C channels, H and W pixels,
p and q patches.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from stage1_tokenizer.backbones.backbone import group_norm
from twostage.core.config.sections import Count, Flag, Number, Section, Share, Width
from twostage.core.errors import InputError
from twostage.core.machine.placement import ConvolutionalNetwork
from twostage.core.training.train_config import Beta

__all__ = [
    "AdversarialConfig",
    "Discriminator",
    "adversarial_weight",
    "discriminator_loss",
    "generator_loss",
    "r1_penalty",
]

AdversarialLoss = Literal["hinge", "non_saturating", "vanilla"]


class AdversarialConfig(Section):
    """A patch discriminator, and how it enters the autoencoder's loss."""

    loss: AdversarialLoss = "hinge"
    """`hinge`: margins; `non_saturating`: logistic losses for both networks; `vanilla`: a logistic discriminator loss
    and a linear generator loss, as in taming-transformers."""
    weight: Number = Field(default=0.1, ge=0)
    """Weight of the generator's adversarial term, times the adaptive ratio if `adaptive` (alias: disc_weight)."""
    adaptive: Flag = False
    """Scales the weight by a ratio of gradient norms at the decoder's last layer: that of the reconstruction loss over
    that of the adversarial term."""
    max_weight: Number = Field(default=1e4, gt=0)
    """Upper limit of the adaptive ratio."""
    start: Share = 0.2
    """The share of the run after which the discriminator starts to train (alias: disc_start, in steps)."""
    ramp: Share = 0.1
    """The share of the run during which the generator's term then rises from 0 to its weight."""
    channels: Width = 64
    """Width of the first layer; each further layer doubles it, up to 8 times."""
    num_layers: Annotated[Count, Field(le=16)] = 3
    """Halvings: with 3, a logit sees 70x70 pixels (Isola et al., section 3.2.2)."""
    norm: Literal["group", "sync_batch", "none"] = "group"
    """`sync_batch` shares its statistics among all processes; with several processes it needs GPUs."""
    lr: Number | None = Field(default=None, gt=0)
    """Learning rate of the discriminator; null: `train.lr`."""
    betas: tuple[Beta, Beta] = (0.5, 0.9)
    """The discriminator's Adam betas."""
    lecam_weight: Number = Field(default=0.0, ge=0)
    """Weight of the LeCam term, which keeps the logits near the average logits of the other kind of images (Tseng et
    al. 2021, arXiv 2104.03310)."""
    r1_weight: Number = Field(default=0.0, ge=0)
    """Weight of half the squared gradient at real images (R1, Mescheder et al. 2018, arXiv 1801.04406)."""

    @model_validator(mode="after")
    def _differentiable_twice(self) -> "AdversarialConfig":
        if self.norm == "sync_batch" and self.r1_weight:
            raise ValueError(
                f"r1_weight {self.r1_weight}: needs second derivatives, which norm 'sync_batch' does not have. Set "
                "loss.adversarial.norm=group."
            )
        return self


class Discriminator(ConvolutionalNetwork):
    """Images (B, C, H, W) in [-1, 1] -> one logit per patch (B, 1, p, q), above 0 for real.

    Args:
        image_size: (H, W); each side needs at least 3 * 2^num_layers pixels.

    Raises:
        InputError: the images are too small for this many halvings.
    """

    ema_logits: Tensor
    pending_logits: Tensor

    def __init__(self, config: AdversarialConfig, channels: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        smallest = 3 * 2**config.num_layers  # leaves one patch after two convolutions that lose a cell each
        if min(image_size) < smallest:
            raise InputError(
                f"loss.adversarial.num_layers {config.num_layers}: images of {image_size[0]}x{image_size[1]} are too "
                f"small, expected at least {smallest} pixels on each side. Use fewer layers."
            )
        self.config = config
        widths = [config.channels * min(2**i, 8) for i in range(config.num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, config.num_layers + 1):
            stride = 2 if i < config.num_layers else 1
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride, padding=1, bias=config.norm == "none"),
                *_norm(config.norm, widths[i]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):  # as in pix2pix and VQGAN
                nn.init.normal_(layer.weight, std=0.02)
        # For LeCam: the mean logits of real and of fake images, averaged over updates.
        self.register_buffer("ema_logits", torch.zeros(2))
        self.register_buffer("pending_logits", torch.zeros(3), persistent=False)

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        """The logits of each batch; each batch is normalised separately."""
        return tuple(self.layers(batch).float() for batch in images)

    @torch.no_grad()
    def observe(self, loss: Tensor, logits_real: Tensor, logits_fake: Tensor) -> dict[str, Tensor]:
        """Collects the mean logits of a part of a batch, and returns metrics by name. `discriminator_accuracy` is the
        share of correctly classified patches; chance is 1/2."""
        real, fake = logits_real.mean(), logits_fake.mean()
        seen = torch.stack([real, fake, real.new_ones(())])
        self.pending_logits += torch.where(seen.isfinite().all(), seen, 0.0)
        right = ((logits_real > 0).float().mean() + (logits_fake < 0).float().mean()) / 2
        names = ("discriminator", "logits_real", "logits_fake", "discriminator_accuracy")
        return dict(zip(names, (loss.detach(), real, fake, right), strict=True))

    @torch.no_grad()
    def update_statistics(self, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Applies the collected logits, summed over the processes; called once per update."""
        total = reduce_sum(self.pending_logits)
        self.ema_logits.lerp_(total[:2] / total[2].clamp(min=1), 0.01)
        self.pending_logits.zero_()


def _norm(kind: Literal["group", "sync_batch", "none"], channels: int) -> list[nn.Module]:
    match kind:
        case "group":
            return [group_norm(channels)]
        case "sync_batch":
            return [nn.SyncBatchNorm(channels)]
        case "none":
            return []


def generator_loss(logits_fake: Tensor, kind: AdversarialLoss) -> Tensor:
    """The autoencoder's loss on the logits of its reconstructions: it falls as they rise."""
    return F.softplus(-logits_fake).mean() if kind == "non_saturating" else -logits_fake.mean()


def discriminator_loss(
    logits_real: Tensor, logits_fake: Tensor, config: AdversarialConfig, ema_logits: Tensor | None = None
) -> Tensor:
    """The discriminator's loss: it falls as real logits rise and fake logits fall.

    Args:
        ema_logits: (2,) average logits of real and of fake images, for the LeCam term (equation 5 of that paper,
            one-sided as in its code).
    """
    if config.loss == "hinge":
        loss = 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())
    else:
        loss = 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())
    if config.lecam_weight and ema_logits is not None:
        lecam = (
            F.relu(logits_real - ema_logits[1]).square().mean() + F.relu(ema_logits[0] - logits_fake).square().mean()
        )
        loss = loss + config.lecam_weight * lecam
    return loss


def r1_penalty(logits_real: Tensor, images: Tensor) -> Tensor:
    """1/2 E |d logits / d image|^2 at real images, which must require gradients; differentiable."""
    (gradient,) = torch.autograd.grad(logits_real.sum(), images, create_graph=True)
    return 0.5 * gradient.square().flatten(1).sum(1).mean()


def adversarial_weight(config: AdversarialConfig, progress: float) -> float:
    """The generator's weight at ``progress`` in [0, 1] of the run: 0 before ``start``, then a ramp."""
    if progress < config.start:
        return 0.0
    return config.weight * min(1.0, (progress - config.start) / config.ramp if config.ramp else 1.0)
