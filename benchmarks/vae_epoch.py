"""What does an epoch of the classic MNIST VAE cost, compared with the usual loop?

python -m benchmarks.vae_epoch [--repeats 3] [--json FILE]

The usual loop is that of torch's examples: a dataset of PIL images, `ToTensor`, `DataLoader(num_workers=1)`, a
handwritten model, Adam. Ours is the training command's own loop (with Accelerate, metrics, learning rate and seeds)
for `configs/tokenizer/vae_mnist.yaml`: one epoch without its validation and checkpoint. The images must be in
$TWOSTAGE_DATA/mnist (otherwise they are downloaded as ylecun/mnist).
"""

import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.reporting import compared, parser, report
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.tokenizer_training import TokenizerConfig, autoencoder_config
from twostage.core.config.sections import load_config
from twostage.core.data.dataset import load_images
from twostage.core.data.image_data import ImageData, ImageSplit
from twostage.core.images.conversion import to_float
from twostage.core.training.batches import Batches
from twostage.core.training.optimizer import TrainedNetwork
from twostage.core.training.training_run import TrainingRun

CONFIG = Path(__file__).parents[1] / "configs" / "tokenizer" / "vae_mnist.yaml"


class PILDataset(Dataset):
    """Like torchvision's MNIST: an array of pixels, converted to a PIL image and back to a tensor for each sample."""

    def __init__(self, split: ImageSplit) -> None:
        assert split.pixels is not None
        assert split.labels is not None
        self.pixels, self.labels, self.transform = split.pixels[:, 0], split.labels, transforms.ToTensor()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index].numpy(), mode="L")), int(self.labels[index])


class UsualVAE(nn.Module):
    """784-400-20 as in torch's example."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(784, 400), nn.Linear(400, 20), nn.Linear(400, 20)
        self.fc3, self.fc4 = nn.Linear(20, 400), nn.Linear(400, 784)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.relu(self.fc1(x.view(-1, 784)))
        mean, log_variance = self.fc21(h), self.fc22(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), mean, log_variance


def usual_epoch(loader: DataLoader, model: UsualVAE, optimizer: torch.optim.Optimizer) -> float:
    """Seconds of one epoch."""
    start = time.perf_counter()
    total = 0.0
    for images, _ in loader:
        optimizer.zero_grad()
        decoded, mean, log_variance = model(images)
        likelihood = F.binary_cross_entropy(decoded, images.view(-1, 784), reduction="sum")
        loss = likelihood - 0.5 * torch.sum(1 + log_variance - mean.pow(2) - log_variance.exp())
        loss.backward()
        total += loss.item()
        optimizer.step()
    return time.perf_counter() - start


def our_epochs(config: TokenizerConfig, data: ImageData):
    """Yield the seconds of each epoch of the training command's loop."""
    run, split = TrainingRun(config), data.splits["train"]
    accelerator = run.accelerator
    batches = Batches(len(split), config.train, run.seed, accelerator, "images")
    autoencoder = Autoencoder(autoencoder_config(config, data))
    network = TrainedNetwork(autoencoder, config.train, accelerator, ema_decay=config.train.ema_decay)
    run.attach(batches, [network], {})
    start = time.perf_counter()
    for batch in run.steps(split.read, read_ahead=False):
        for pixels, random in batch:
            with accelerator.accumulate(network.wrapped):
                output = network.wrapped(to_float(pixels), None, random)
                run.update(network, output.loss)
            run.record(output.metrics)
        network.update_average()
        run.advance()
        if run.step % batches.steps_per_epoch == 0:
            yield time.perf_counter() - start
            start = time.perf_counter()


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--repeats", type=int, default=3)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"run.dir={folder}/run", "run.trackers=[]", f"train.epochs={options.repeats + 1}"]
        config = load_config(TokenizerConfig, CONFIG, overrides)
        data = load_images(config.data)
        ours = our_epochs(config, data)
        usual, peer = UsualVAE(), []
        optimizer = torch.optim.Adam(usual.parameters(), lr=1e-3)
        loader = DataLoader(PILDataset(data.splits["train"]), batch_size=128, shuffle=True, num_workers=1)
        measured = []
        for _ in range(options.repeats + 1):  # alternating; the first is a warm-up
            measured.append(next(ours))
            peer.append(usual_epoch(loader, usual, optimizer))
    row = compared("epoch of 60,000 images", measured[1:], peer[1:])
    row["share_of_usual"] = row["ours_s"] / row["peer_s"]
    report({"batch_size": 128, "repeats": options.repeats}, [row], options.json)


if __name__ == "__main__":
    main()
