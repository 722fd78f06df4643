"""The losses that look at the reconstruction as an image: perceptual and adversarial.

Each is differentiated to the pixels once, on a reconstruction cut off from the autoencoder; the autoencoder then needs
one backward pass for all of them, and neither frozen nor opposing networks ever get a gradient from it.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from stage1_tokenizer.autoencoder import Autoencoder, AutoencoderOutput
from stage1_tokenizer.discriminator import AdversarialConfig, Discriminator, adversarial_weight, generator_loss
from stage1_tokenizer.losses import LossConfig
from stage1_tokenizer.perceptual import PerceptualNetwork, build_perceptual, describe_network

__all__ = ["ImageLosses"]


class ImageLosses:
    """The perceptual and the adversarial term of ``config``; without either, it does nothing.

    No module: LPIPS and feature networks are in no checkpoint, and the discriminator is trained on its own.

    Args:
        autoencoder: unwrapped; the adaptive weight is measured at its last layer.
        discriminator: unwrapped, or None.
        weights_dir: where LPIPS's trunk lies; None: torch's cache.
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
        self.accelerator = accelerator
        self.perceptual = None
        if config.perceptual:
            form = autoencoder.config
            built = build_perceptual(config.perceptual, form.channels, form.image_size, weights_dir)
            self.perceptual = built.to(accelerator.device)

    def networks(self) -> list[PerceptualNetwork]:
        """The networks that the autoencoder is trained against, to be remembered with it."""
        perceptual = self.config.perceptual
        if perceptual is None or self.perceptual is None or not perceptual.weight:
            return []
        return [describe_network(perceptual, self.perceptual)]

    def pixel_gradient(
        self, output: AutoencoderOutput, images: Tensor, progress: float
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """d(weighted terms) / d(decoded), (B, C, H, W) or None where there are none, and metrics by name.

        Args:
            images: what the decoder should have given, (B, C, H, W) in [-1, 1].
            progress: of the run, in [0, 1].
        """
        decoded = output.decoded.detach().requires_grad_()
        pixels = self.autoencoder.to_pixels(decoded)
        gradient, metrics = None, {}
        if self.perceptual is not None and self.config.perceptual:
            term = self.config.perceptual.weight * self.perceptual(pixels, images)
            (gradient,) = torch.autograd.grad(term, decoded, retain_graph=True)
            metrics = {"perceptual": term.detach()}
        adversarial = self.config.adversarial
        if self.discriminator is not None and adversarial and progress >= adversarial.start:
            (logits,) = self.discriminator(pixels)
            term = generator_loss(logits, adversarial.loss)
            (pull,) = torch.autograd.grad(term, decoded)
            weight = torch.full((), adversarial_weight(adversarial, progress), device=pull.device)
            if adversarial.adaptive:
                weight = weight * self._adaptive_ratio(output, gradient, pull, adversarial)
            gradient = weight * pull if gradient is None else gradient + weight * pull
            metrics |= {"adversarial": term.detach(), "adversarial_weight": weight}
        return gradient, metrics

    def _adaptive_ratio(
        self, output: AutoencoderOutput, perceptual: Tensor | None, pull: Tensor, config: AdversarialConfig
    ) -> Tensor:
        """|d(reconstruction + perceptual)| / |d(adversarial)| at the last layer's weights (equation 7 of the VQGAN
        paper), of the gradients averaged over the processes: the ratio of the global batch."""
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
