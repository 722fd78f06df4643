"""What does a full VQ-GAN step cost, compared with taming-transformers' way of computing it?

python -m benchmarks.vqgan_step [--repeats 7] [--model taming] [--image-size 64] [--batch-size 8] [--channels-last]
                              [--json FILE]

Tokenizer + LPIPS (VGG-16) + PatchGAN with an adaptive weight, both networks updated, float32. Both sides use the same
modules with the same weights (VGG's are random, which costs the same). The peer follows taming-transformers'
`training_step`: one full pass of the autoencoder for each of the two optimizers, with the losses in one graph. It
computes the adaptive weight by `autograd.grad` of both losses down to the decoder's last layer. Then it runs the
backward pass of their sum, which goes through LPIPS and the discriminator again. The benchmark also prints how much
the gradients of both sides differ.
"""

import tempfile
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.reporting import alternate, compared, parser, report
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.autoencoder_config import AutoencoderConfig, ModelConfig
from stage1_tokenizer.discriminator import AdversarialConfig, Discriminator, discriminator_loss, generator_loss
from stage1_tokenizer.perceptual import TRUNK, LPIPSConfig
from stage1_tokenizer.training_losses import ImageLosses, LossConfig
from stage1_tokenizer.vector_quantizer import VectorConfig
from stage1_tokenizer.vqgan_backbone import VQGANConfig
from twostage.core.training.random import BatchRandom

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


class Step:
    """The networks of a step, their optimizers, and a batch."""

    def __init__(self, model: ModelConfig, size: int, batch_size: int, weights_dir: Path) -> None:
        torch.manual_seed(0)
        assert LOSS.adversarial is not None
        config = AutoencoderConfig(image_size=(size, size), channels=3, model=model, loss=LOSS.objective())
        self.autoencoder = Autoencoder(config)
        self.discriminator = Discriminator(LOSS.adversarial, 3, (size, size))
        self.losses = ImageLosses(LOSS, self.autoencoder, self.discriminator, weights_dir, Accelerator(cpu=True))
        self.optimizer = torch.optim.Adam(self.autoencoder.parameters(), lr=1e-9, betas=(0.5, 0.9))
        self.opponent_optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=1e-9, betas=(0.5, 0.9))
        self.images = torch.rand(batch_size, 3, size, size) * 2 - 1
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
        self._update_discriminator(self.autoencoder(self.images, None, self.random).decoded.detach())

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
    with tempfile.TemporaryDirectory() as folder:
        random_trunk(Path(folder))
        ours = Step(MODELS[options.model], options.image_size, options.batch_size, Path(folder))
        peer = Step(MODELS[options.model], options.image_size, options.batch_size, Path(folder))
    if options.channels_last:
        for network in filter(None, (ours.autoencoder, ours.discriminator, ours.losses.perceptual)):
            network.to(memory_format=torch.channels_last)
    ours.ours()
    peer.peer()
    difference = (ours.gradient() - peer.gradient()).norm() / peer.gradient().norm()
    seconds = alternate({"ours": ours.ours, "peer": peer.peer}, options.repeats)
    row = compared("VQ-GAN step against taming-transformers' scheme", seconds["ours"], seconds["peer"])
    row |= {"share_of_peer": row["ours_s"] / row["peer_s"], "gradient_difference": difference.item()}
    settings = {
        "model": options.model,
        "image_size": options.image_size,
        "batch_size": options.batch_size,
        "channels_last": options.channels_last,
        "repeats": options.repeats,
    }
    report(settings, [row], options.json)


if __name__ == "__main__":
    main()
