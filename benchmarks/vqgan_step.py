"""What does a full VQ-GAN step cost, compared with taming-transformers' way of computing it?

python -m benchmarks.vqgan_step [--repeats 7] [--model taming] [--image-size 64] [--batch-size 8] [--channels-last]
                              [--json FILE]

Tokenizer + LPIPS (VGG-16) + PatchGAN with an adaptive weight, both networks updated, float32. All sides have the same
weights (VGG's are random, which costs the same). The peer follows taming-transformers' `training_step`: one full pass
of the autoencoder and of LPIPS for each of the two optimizers, with the losses in one graph. It computes the adaptive
weight by `autograd.grad` of both losses down to the decoder's last layer. Then it runs the backward pass of their sum,
which goes through LPIPS and the discriminator again. It is measured twice: with the upsampling, the activation and the
optimizer of taming-transformers, and with ours. The benchmark also prints how much the gradients differ.
"""

import tempfile
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.reporting import alternate, compared, parser, report
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.autoencoder_config import AutoencoderConfig, ModelConfig
from stage1_tokenizer.backbones.vqgan_backbone import Upsample, VQGANConfig
from stage1_tokenizer.bottlenecks.vector_quantizer import VectorConfig
from stage1_tokenizer.losses.discriminator import AdversarialConfig, Discriminator, discriminator_loss, generator_loss
from stage1_tokenizer.losses.perceptual import TRUNK, LPIPSConfig
from stage1_tokenizer.training_losses import ImageLosses, LossConfig
from twostage.core.training.optimizer import make_optimizer
from twostage.core.training.random import BatchRandom
from twostage.core.training.train_config import TrainConfig

LOSS = LossConfig(
    reconstruction="l1",
    perceptual=LPIPSConfig(),
    adversarial=AdversarialConfig(adaptive=True, weight=0.8, start=0.0, ramp=0.0),
)


# taming-transformers' ImageNet tokenizer (16 pixels per cell), and twostage's default.
MODELS = {
    "taming": ModelConfig(
        latent_channels=256,
        backbone=VQGANConfig(),
        bottleneck=VectorConfig(codebook_size=1024, codebook="learned"),
    ),
    "conv": ModelConfig(),
}


def random_trunk(folder: Path) -> None:
    """A file like torchvision's, with random weights."""
    from torchvision.models import vgg16

    torch.manual_seed(0)
    torch.save({f"features.{name}": t for name, t in vgg16(weights=None).features.state_dict().items()}, folder / TRUNK)


class Swish(nn.Module):
    """taming-transformers' activation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def as_in_taming(network: nn.Module) -> None:
    """Replaces the layers that taming-transformers computes in another way; their weights stay."""
    for name, layer in list(network.named_children()):
        if isinstance(layer, nn.SiLU):
            setattr(network, name, Swish())
        elif isinstance(layer, Upsample):
            convolution = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1)
            convolution.weight, convolution.bias = layer.weight, layer.bias
            setattr(network, name, nn.Sequential(nn.Upsample(scale_factor=2.0), convolution))
        else:
            as_in_taming(layer)


class Step:
    """The networks of a step, their optimizers, and a batch."""

    def __init__(self, model: ModelConfig, size: int, batch_size: int, weights_dir: Path, taming: bool = False) -> None:
        torch.manual_seed(0)
        assert LOSS.adversarial is not None
        config = AutoencoderConfig(image_size=(size, size), channels=3, model=model, loss=LOSS.objective())
        self.autoencoder = Autoencoder(config)
        self.discriminator = Discriminator(LOSS.adversarial, 3, (size, size))
        self.losses = ImageLosses(LOSS, self.autoencoder, self.discriminator, weights_dir, Accelerator(cpu=True))
        self.optimizer, self.opponent_optimizer = (
            torch.optim.Adam(network.parameters(), lr=1e-9, betas=(0.5, 0.9))
            if taming
            else make_optimizer(network, TrainConfig(batch_size=batch_size, max_steps=1, lr=1e-9), betas=(0.5, 0.9))
            for network in (self.autoencoder, self.discriminator)
        )
        self.images = torch.rand(batch_size, 3, size, size) * 2 - 1
        if taming:
            as_in_taming(self.autoencoder)
        self.random = BatchRandom(0, slice(0, batch_size), batch_size)

    def ours(self) -> None:
        """One step as `train_tokenizer` computes it."""
        output = self.autoencoder(self.images, None, self.random)
        gradient, _ = self.losses.pixel_gradient(output, self.images, 1.0, self.random)
        self.optimizer.zero_grad()
        (output.loss + (output.decoded * gradient).sum()).backward()
        self.optimizer.step()
        self._update_discriminator(output.decoded.detach())

    def peer(self) -> None:
        """One step as taming-transformers computes it: one optimizer after the other."""
        assert self.losses.perceptual is not None
        self.discriminator.requires_grad_(False)  # Lightning's toggle_optimizer
        output = self.autoencoder(self.images, None, self.random)
        likelihood = output.reconstruction + self.losses.perceptual(output.decoded, self.images)
        adversarial = generator_loss(self.discriminator(output.decoded)[0], "hinge")
        last = self.autoencoder.last_layer
        (push,) = torch.autograd.grad(likelihood, last, retain_graph=True)
        (pull,) = torch.autograd.grad(adversarial, last, retain_graph=True)
        weight = 0.8 * (push.norm() / (pull.norm() + 1e-4)).clamp(0, 1e4).detach()
        self.optimizer.zero_grad()
        (output.loss - output.reconstruction + likelihood + weight * adversarial).backward()
        self.optimizer.step()
        self.discriminator.requires_grad_(True)
        with torch.no_grad():  # Lightning freezes the autoencoder
            fake = self.autoencoder(self.images, None, self.random).decoded
            self.losses.perceptual(fake, self.images)  # for both optimizers, though only the first needs it
        self._update_discriminator(fake)

    def _update_discriminator(self, fake: Tensor) -> None:
        assert LOSS.adversarial is not None
        logits_real, logits_fake = self.discriminator(self.images, fake)
        self.opponent_optimizer.zero_grad()
        discriminator_loss(logits_real, logits_fake, LOSS.adversarial).backward()
        self.opponent_optimizer.step()

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.autoencoder.parameters() if p.grad is not None])


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--model", choices=MODELS, default="taming")
    arguments.add_argument("--image-size", type=int, default=64)
    arguments.add_argument("--batch-size", type=int, default=8)
    arguments.add_argument("--channels-last", action="store_true", help="our kernels as a GPU keeps them")
    options = arguments.parse_args()
    warnings.filterwarnings("ignore", module="torchvision")
    form = MODELS[options.model], options.image_size, options.batch_size
    with tempfile.TemporaryDirectory() as folder:
        random_trunk(Path(folder))
        ours, peer, scheme = (Step(*form, Path(folder), taming) for taming in (False, True, False))
    if options.channels_last:
        for network in filter(None, (ours.autoencoder, ours.discriminator, ours.losses.perceptual)):
            network.to(memory_format=torch.channels_last)
    seconds = alternate({"ours": ours.ours, "peer": peer.peer, "scheme": scheme.peer}, options.repeats)
    rows = []
    for name, other, key in (("", peer, "peer"), (" in our layers", scheme, "scheme")):
        row = compared(f"VQ-GAN step against taming-transformers' scheme{name}", seconds["ours"], seconds[key])
        difference = (ours.gradient() - other.gradient()).norm() / other.gradient().norm()
        rows.append(row | {"share_of_peer": 1 / row["ratio"], "gradient_difference": difference.item()})
    settings = {
        "model": options.model,
        "image_size": options.image_size,
        "batch_size": options.batch_size,
        "channels_last": options.channels_last,
        "repeats": options.repeats,
    }
    report(settings, rows, options.json)


if __name__ == "__main__":
    main()
