"""How fast is one GPU: training, sampling, encoding, the quantizer? And do its runs resume bit for bit?

python -m benchmarks.gpu [--tiny] [--json FILE] [--write docs/scaling.md]

Takes at most ten minutes: what would begin later is left out. A row takes about four seconds, or two calls if these are
slower. `--tiny` runs everything in a small size, on a CPU too. Batches are random. `share` is that of the GPU's peak:
of its bfloat16 operations in training, and of its memory's bandwidth in sampling, where the bound is that each step
reads all weights once.
"""

import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from benchmarks.quantizers import DIM
from benchmarks.reporting import Row, markdown_table, parser, report, write_section
from pipelines.drawing.batch_size import fitting_batch_size
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.autoencoder_config import AutoencoderConfig, ModelConfig
from stage1_tokenizer.bottlenecks.vector_quantizer import VectorConfig, VectorQuantizer
from stage1_tokenizer.losses.discriminator import AdversarialConfig, Discriminator
from stage1_tokenizer.tokenizer_training import TokenizerConfig, adversary_loss
from stage1_tokenizer.tokenizer_training import train as train_tokenizer
from stage1_tokenizer.training_losses import ImageLosses, LossConfig
from stage2_prior.codes import TokenizerReference
from stage2_prior.networks import captured_step
from stage2_prior.networks.causal_transformer import CausalTransformerConfig
from stage2_prior.networks.masked_transformer import MaskedTransformerConfig
from stage2_prior.networks.network import NetworkConfig
from stage2_prior.networks.parallel_transformer import ParallelTransformerConfig
from stage2_prior.networks.pixelcnn import PixelCNNConfig
from stage2_prior.networks.scale_transformer import ScaleTransformerConfig
from stage2_prior.prior import Prior, PriorConfig, PriorLossConfig
from stage2_prior.sampling import image_seeds
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.conditions.class_condition import ClassConditionConfig
from twostage.core.config.sections import parse_config
from twostage.core.machine.precision import reason_for_precision, state_float32
from twostage.core.scales import num_codes
from twostage.core.training.flops import count_flops
from twostage.core.training.optimizer import TrainedNetwork
from twostage.core.training.random import BatchRandom
from twostage.core.training.train_config import TrainConfig

LIMIT = 550.0
"""Seconds after which no row begins."""
ROW_SECONDS, MAX_ROW_SECONDS = 4.0, 25.0
"""How long the calls of a row take together, after two to warm up, and with them."""
PEAKS = {"H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.04e12), "RTX 4090": (165e12, 1.01e12)}
"""Dense bfloat16 operations and bytes of memory per second, from the data sheets."""
GPTS = {"GPT 100M": (12, 768, 12), "GPT 340M": (24, 1024, 16), "GPT 750M": (36, 1280, 20)}
COLUMNS = {"name": "what", "batch": "batch", "rate": "per second", "unit": "of", "share": "share", "memory_gb": "GB",
           "note": "note"}  # fmt: skip


class Machine:
    """The device, and how to measure on it."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.name = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        self.peak, self.bandwidth = next((found for key, found in PEAKS.items() if key in self.name), (None, None))
        self.precision = reason_for_precision(self.device)[0]

    def measure(self, name: str, run: Callable[[], object], batch: int, unit: str, each: int = 1) -> Row:
        """Calls ``run`` for some seconds, after two calls to warm up. ``each``: units of one item of the batch."""
        is_gpu = self.device.type == "cuda"
        if is_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds: list[float] = []
        wanted = 0.0 if self.tiny else ROW_SECONDS
        while (len(seconds) < 3 or sum(seconds[2:]) < wanted) and sum(seconds) < MAX_ROW_SECONDS:
            start = time.perf_counter()
            try:
                run()
            except torch.OutOfMemoryError:
                return {"name": name, "batch": batch, "unit": unit, "note": "out of memory"}
            if is_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        seconds = seconds[2:] or seconds[-1:]
        memory = torch.cuda.max_memory_allocated() / 1e9 if is_gpu else None
        rate = batch * each / statistics.median(seconds)
        return {"name": name, "batch": batch, "rate": rate, "unit": unit, "share": None, "memory_gb": memory,
                "spread": (max(seconds) - min(seconds)) / statistics.median(seconds)}  # fmt: skip

    def trained(self, name: str, run: Callable[[], object], batch: int, unit: str, each: int = 1) -> Row:
        """:meth:`measure` for a training step, with the share of the peak."""
        with count_flops() as counter:
            run()
        row = self.measure(name, run, batch, unit, each)
        if self.peak and "rate" in row:
            row["share"] = counter.get_total_flops() * row["rate"] / (batch * each) / self.peak
        return row


def tokenizer(size: int, model: ModelConfig, device: torch.device) -> Autoencoder:
    config = AutoencoderConfig(image_size=(size, size), channels=3, model=model, loss=LossConfig().objective())
    return Autoencoder(config).to(device)


def tokenizers(tiny: bool) -> dict[str, tuple[int, int, ModelConfig]]:
    """Image size, batch size and model."""
    cifar = {"type": "conv", "patch_size": 2, "channel_mult": [1, 2], "num_res_blocks": [0, 2], "group_channels": 16}
    small = ModelConfig.model_validate({"backbone": cifar})
    if tiny:
        return {"VQ-GAN CIFAR-10": (32, 2, small)}
    f16 = {
        "backbone": {"type": "vqgan"},
        "bottleneck": {"type": "vector", "codebook_size": 16384},
        "latent_channels": 8,
    }
    return {"VQ-GAN f16 256 px": (256, 16, ModelConfig.model_validate(f16)), "VQ-GAN CIFAR-10": (32, 512, small)}


def tokenizer_training(machine: Machine) -> Iterator[Row]:
    for name, (size, batch, model) in tokenizers(machine.tiny).items():
        train = TrainConfig(batch_size=batch, max_steps=1000, lr=1e-4)
        accelerator = Accelerator(mixed_precision=machine.precision)
        adversarial = AdversarialConfig(start=0.0, ramp=0.0)
        loss = LossConfig(reconstruction="l1", adversarial=adversarial)
        network = TrainedNetwork(tokenizer(size, model, machine.device), train, accelerator, ema_decay=0.999)
        adversary = TrainedNetwork(
            Discriminator(adversarial, 3, (size, size)).to(machine.device), train, accelerator, name="discriminator"
        )
        losses = ImageLosses(loss, network.module, adversary.module, None, accelerator)
        images = torch.rand(batch, 3, size, size, device=machine.device) * 2 - 1
        random = BatchRandom(0, slice(0, batch), batch)

        def update(trained: TrainedNetwork, value: Tensor, accelerator: Accelerator = accelerator) -> None:
            accelerator.backward(value)
            trained.wrapped_optimizer.step()
            trained.wrapped_optimizer.zero_grad()

        def step() -> None:
            output = network.wrapped(images, None, random)  # noqa: B023
            gradient, _ = losses.pixel_gradient(output, images, 1.0, random)  # noqa: B023
            assert gradient is not None
            update(network, output.loss + (output.decoded * gradient).sum())  # noqa: B023
            update(adversary, adversary_loss(adversary, images, output.decoded.detach().float())[0])  # noqa: B023
            network.module.bottleneck.update_codebook(lambda tensor: tensor)  # noqa: B023
            network.update_average()  # noqa: B023

        yield machine.trained(f"train {name}, no LPIPS", step, batch, "images")


def prior(network: NetworkConfig, machine: Machine) -> Prior:
    codes, side, classes = (16, 4, 2) if machine.tiny else (16384, 16, 1000)
    scales = network.scales if isinstance(network, ScaleTransformerConfig) else ()
    config = PriorConfig(
        model=network,
        conditions=[ClassConditionConfig(num_classes=classes)],
        loss=PriorLossConfig(),
        codebook_size=codes,
        grid=(1, num_codes(scales)) if scales else (side, side),
        class_names=[str(i) for i in range(classes)],
        image_size=(256, 256),
        channels=3,
        unigram_nats_per_code=1.0,
        tokenizer=TokenizerReference(hash="0" * 64, path="none"),
    )
    return Prior(config).to(machine.device)


def gpts(machine: Machine) -> dict[str, CausalTransformerConfig]:
    shapes = {"GPT tiny": (2, 16, 2)} if machine.tiny else GPTS
    return {
        name: CausalTransformerConfig(depth=depth, hidden_size=size, num_heads=heads, dropout=0.0)
        for name, (depth, size, heads) in shapes.items()
    }


def prior_training(machine: Machine) -> Iterator[Row]:
    for name, config in gpts(machine).items():
        batch = 2 if machine.tiny else 64
        accelerator = Accelerator(mixed_precision=machine.precision)
        network = TrainedNetwork(
            prior(config, machine), TrainConfig(batch_size=batch, max_steps=1, lr=1e-4), accelerator
        )
        form, random = network.module.config, BatchRandom(0, slice(0, batch), batch)
        codes = torch.randint(form.codebook_size, (batch, *form.grid), device=machine.device)

        def step() -> None:
            accelerator.backward(network.wrapped(codes, None, random, 0.0))  # noqa: B023
            network.wrapped_optimizer.step()  # noqa: B023
            network.wrapped_optimizer.zero_grad()  # noqa: B023

        yield machine.trained(f"train {name}", step, batch, "codes", codes[0].numel())


def sampling(machine: Machine) -> Iterator[Row]:
    """Guided images of each prior at batch 1, 64 and the largest."""
    sizes = {"hidden_size": 16, "depth": 2, "num_heads": 2} if machine.tiny else {
        "hidden_size": 768, "depth": 12, "num_heads": 12}  # fmt: skip
    others: dict[str, NetworkConfig] = {
        "masked transformer 100M": MaskedTransformerConfig.model_validate(sizes),
        "parallel transformer 100M": ParallelTransformerConfig.model_validate(sizes),
        "scale transformer 100M": ScaleTransformerConfig.model_validate(
            sizes
            | {"scales": [(1, 1), (2, 2), (4, 4)] if machine.tiny else [(s, s) for s in (1, 2, 3, 4, 6, 9, 13, 16)]}
        ),
        "PixelCNN": PixelCNNConfig(depth=2 if machine.tiny else 15),
    }
    for name, config in {**gpts(machine), **others}.items():
        model = prior(config, machine).eval()
        is_rounded = machine.precision == "bf16" and "weights" in config.sampling_settings
        settings = SamplingConfig(guidance_scale=2.0, weights="bfloat16" if is_rounded else "float32")
        bytes_read = sum(weight.numel() for weight in model.network.parameters()) * (2 if is_rounded else 4)  # type: ignore[attr-defined]
        largest = min(1024, fitting_batch_size(model, settings, machine.device))
        for batch in (1, 2) if machine.tiny else sorted({1, 64, largest}):
            call = partial(model.sample, None, settings, image_seeds(0, 0, batch))
            ways = {"": nullcontext, ", no CUDA graph": without_graphs}
            for note, way in ways.items() if name.startswith("GPT") and batch <= 64 else [("", nullcontext)]:
                with way():
                    row = machine.measure(f"sample {name}", call, batch, "images")
                if machine.bandwidth and "rate" in row:
                    bytes_of_steps = bytes_read * config.default_steps(model.config.grid)
                    row["share"] = bytes_of_steps / machine.bandwidth * row["rate"] / batch
                yield {"note": settings.weights + note} | row


@contextmanager
def without_graphs() -> Iterator[None]:
    """No step of a GPT is captured."""
    with mock.patch.object(captured_step, "EAGER_CALLS", sys.maxsize):
        yield


def coding(machine: Machine) -> Iterator[Row]:
    for name, (size, batch, model) in tokenizers(machine.tiny).items():
        net = tokenizer(size, model, machine.device).eval()
        images = torch.zeros(batch, 3, size, size, device=machine.device)
        codes = torch.zeros(batch, *net.code_grid, dtype=torch.long, device=machine.device)
        yield machine.measure(f"encode {name}", lambda: net.encode(images), batch, "images")  # noqa: B023
        yield machine.measure(f"decode {name}", lambda: net.decode_indices(codes), batch, "images")  # noqa: B023


def quantizers(machine: Machine) -> Iterator[Row]:
    """Forward and backward of a learned codebook; peers that are not installed are left out."""
    batch, side, size = (2, 4, 16) if machine.tiny else (128, 16, 16384)
    encoded = torch.randn(batch, DIM, side, side, device=machine.device, requires_grad=True)
    ours = VectorQuantizer(VectorConfig(codebook_size=size, codebook="learned"), DIM).to(machine.device)
    random = BatchRandom(0, slice(0, batch), batch)

    def own() -> None:
        output = ours(encoded, None, random)
        (output.z.square().mean() + sum(output.losses.values())).backward()

    steps: dict[str, Callable[[], None]] = {"ours": own}
    if not machine.tiny:
        steps |= peer_quantizers(encoded, size, machine.device)
    for name, step in steps.items():
        yield machine.measure(f"quantizer of {size} codes: {name}", step, batch, "vectors", side * side)


def peer_quantizers(encoded: Tensor, size: int, device: torch.device) -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    with suppress(ImportError):
        from vector_quantize_pytorch import VectorQuantize

        peer = VectorQuantize(DIM, size, learnable_codebook=True, ema_update=False, accept_image_fmap=True).to(device)

        def of_vector_quantize() -> None:
            z, _, loss = peer(encoded)
            (z.square().mean() + loss.sum()).backward()

        found["vector-quantize-pytorch"] = of_vector_quantize
    with suppress(ImportError):
        from diffusers.models.autoencoders.vq_model import VectorQuantizer as DiffusersQuantizer

        other = DiffusersQuantizer(size, DIM, beta=0.25, legacy=False).to(device)

        def of_diffusers() -> None:
            z, loss, _ = other(encoded)
            (z.square().mean() + loss).backward()

        found["diffusers"] = of_diffusers
    return found


def resuming(machine: Machine) -> Iterator[Row]:
    """Four steps at once, the last two again from the checkpoint, and with two accumulation steps instead of one."""

    def train(folder: Path, parts: int) -> Tensor:
        AcceleratorState._reset_state(reset_partial_state=True)
        document = {
            "run": {"dir": str(folder), "trackers": []},
            "data": {"source": "shapes", "image_size": 16, "num_images": 32},
            "model": {"backbone": {"type": "conv", "channels": 8, "channel_mult": [1, 1], "num_res_blocks": [0, 1]}},
            "train": {"batch_size": 16, "max_steps": 4, "lr": 1e-3, "checkpoint_every": 2, "validate_every": 4,
                      "gradient_accumulation_steps": parts, "mixed_precision": "no"},
        }  # fmt: skip
        train_tokenizer(parse_config(TokenizerConfig, document, "benchmark"))
        state = Autoencoder.from_pretrained(folder).state_dict()
        return torch.cat([tensor.flatten().double() for tensor in state.values()])

    with tempfile.TemporaryDirectory() as folder:
        at_once = train(Path(folder) / "run", 1)
        shutil.rmtree(Path(folder) / "run" / "checkpoints" / "step_00000004")
        resumed, in_parts = train(Path(folder) / "run", 1), train(Path(folder) / "parts", 2)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield {"name": "resumed run", "note": "same bits" if torch.equal(at_once, resumed) else "OTHER BITS"}
    difference = ((at_once - in_parts).norm() / at_once.norm()).item()
    yield {"name": "two accumulation steps", "note": f"relative difference of the weights {difference:.1e}"}


PARTS = (resuming, tokenizer_training, prior_training, coding, quantizers, sampling)


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--tiny", action="store_true", help="a small size of everything, for a test on a CPU")
    arguments.add_argument("--write", type=Path, help="write the table into this file")
    options = arguments.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    start, machine, rows = time.perf_counter(), Machine(options.tiny), list[Row]()
    state_float32()
    for part in PARTS:
        measured = part(machine)
        while time.perf_counter() - start < LIMIT:
            try:
                rows.append(next(measured))
            except StopIteration:
                break
            except torch.OutOfMemoryError:
                rows.append({"name": part.__name__, "note": "out of memory"})
                break
        else:
            rows.append({"name": part.__name__, "note": "left out: the ten minutes are over"})
        measured.close()
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()
    report({"device": machine.name, "precision": machine.precision, "tiny": options.tiny}, rows, options.json)
    if options.write:
        text = f"Measured by `python -m benchmarks.gpu` on {machine.name}, torch {torch.__version__}.\n\n"
        write_section(options.write, "gpu", text + markdown_table(COLUMNS, rows))


if __name__ == "__main__":
    main()
