"""What would training on ImageNet need? Estimates of memory and time; it trains nothing and uses no GPU.

python -m benchmarks.scaling [--write docs/scaling.md] [--json FILE]

Runs the real classes on tensors without data and counts the parameters, the floating-point operations
(torch.utils.flop_counter) and the tensors that autograd keeps. The rules below turn these counts into the estimates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

from benchmarks.reporting import Row, markdown_table, parser, report, write_section
from stage1_tokenizer.backbones.vqgan_backbone import VQGANConfig
from stage1_tokenizer.losses.discriminator import AdversarialConfig, Discriminator
from stage2_prior.networks.causal_transformer import CausalTransformer, CausalTransformerConfig
from twostage.core.conditions.context import Context, ContextForm

IMAGES, CLASSES, SIDE, GRID, CODES = 1_281_167, 1000, 256, (16, 16), 16_384
GPUS, PEAK, SHARE = 8, 990e12, 0.4  # peak bf16 FLOP/s of an H100 (SXM, dense), and the assumed utilisation
TOKENIZER_EPOCHS, TOKENIZER_BATCH, LATENT = 40, 128, 8
PRIOR_EPOCHS, PRIOR_BATCH = 300, 256
PRIORS = {  # layers, hidden size, heads
    "GPT-B": (12, 768, 12),
    "GPT-L": (24, 1024, 16),
    "GPT-XL": (36, 1280, 20),
    "GPT-3B": (24, 3200, 32),
}
# Bytes per parameter. Float32 weights, gradients, AdamW's two moments, the averaged weights ...
STATE = 4 + 4 + 8 + 4
DDP = STATE + 4 + 2  # ... and DDP's buckets of gradients, autocast's bfloat16 copy
GATHERED = 2 + 2  # FSDP: bfloat16 weights and gradients of the gathered parts
LARGEST_GPU = 80  # GB

COLUMNS = {
    "name": "model",
    "parameters_millions": "parameters, millions",
    "gflops_an_image": "training GFLOPs per image",
    "images_a_gpu": "images per GPU",
    "ddp_gb": "memory per GPU, GB: DDP",
    "fsdp_gb": "FSDP-8",
    "checkpoint_gb": "checkpoint, GB",
    "epochs": "epochs",
    "hours": "hours on 8 GPUs",
}


@dataclass
class Counted:
    """Floating-point operations of one step, and the bytes that its forward pass keeps for the backward pass."""

    flops: int
    bytes_kept: int


def count(step: Callable[[], Tensor], nets: list[nn.Module], cells: int | None = None) -> Counted:
    """Count ``step``, which returns a loss, and its backward pass.

    Args:
        cells: a transformer's sequence length; attention's (cells, cells) matrices are ignored, as GPU kernels do not
            store them.
    """
    weights = {p.untyped_storage()._cdata for net in nets for p in net.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights and tensor.shape[-2:] != (cells, cells):
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = step()
        loss.backward()
    return Counted(counter.get_total_flops(), sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))


def parameters(*nets: nn.Module) -> int:
    return sum(p.numel() for net in nets for p in net.parameters())


def hours(flops_an_image: float, epochs: int) -> float:
    return flops_an_image * IMAGES * epochs / (GPUS * PEAK * SHARE) / 3600


def prior_row(name: str, layers: int, size: int, heads: int) -> Row:
    config = CausalTransformerConfig(hidden_size=size, depth=layers, num_heads=heads, dropout=0.0)
    images = PRIOR_BATCH // GPUS
    kept = {}
    for precision in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            model = CausalTransformer(config, CODES, GRID, ContextForm(num_classes=CLASSES)).to(precision)
            codes = torch.zeros(images, model.cells, dtype=torch.long)
            context = Context(images, torch.zeros(images, dtype=torch.long))
        counted = count(lambda: model.nats(codes, context, codes).mean(), [model], model.cells)  # noqa: B023
        kept[precision] = counted.bytes_kept
    total, block = parameters(model), parameters(model.blocks[0])
    whole = total - layers * block + 2 * block  # everything but the blocks, plus two blocks
    return {
        "name": name,
        "parameters_millions": round(total / 1e6),
        "gflops_an_image": round(counted.flops / images / 1e9),
        "images_a_gpu": images,
        "ddp_gb": (total * DDP + kept[torch.float32]) / 1e9,
        "fsdp_gb": (total * STATE / GPUS + whole * GATHERED + kept[torch.bfloat16]) / 1e9,
        "checkpoint_gb": total * (STATE - 4) / 1e9,
        "epochs": PRIOR_EPOCHS,
        "hours": hours(counted.flops / images, PRIOR_EPOCHS),
    }


def tokenizer_rows() -> list[Row]:
    """The VQ-GAN with PatchGAN and LPIPS's trunk, and encoding with it; both without the search for nearest codes."""
    images = TOKENIZER_BATCH // GPUS
    fake = FakeTensorMode()  # the decoder's autocast does not support the meta device
    with fake:
        encoder, decoder = VQGANConfig().build((3, SIDE, SIDE), LATENT, LATENT)
        opponent = Discriminator(AdversarialConfig(), 3, (SIDE, SIDE))
        trunk: nn.Module = vgg16(weights=None).features.requires_grad_(False)
        batch = torch.zeros(images, 3, SIDE, SIDE)
    frozen = [trunk, opponent]

    def autoencode() -> Tensor:
        decoded = decoder(encoder(batch))
        trunk(batch)
        return decoded.mean() + trunk(decoded).mean() + opponent.requires_grad_(False)(decoded)[0].mean()

    def judge() -> Tensor:
        real, fake = opponent.requires_grad_(True)(batch, batch)
        return (fake - real).mean()

    with fake:
        generator, discriminator = count(autoencode, [encoder, decoder, *frozen]), count(judge, [opponent])
        with FlopCounterMode(display=False) as encoding, torch.no_grad():
            encoder(batch)
    trained, judged = parameters(encoder, decoder), parameters(opponent)
    flops = (generator.flops + discriminator.flops) / images
    memory = trained * DDP + judged * (DDP - 4) + parameters(trunk) * 4 + generator.bytes_kept
    encode_flops = encoding.get_total_flops() / images
    return [
        {
            "name": "VQ-GAN f16",
            "parameters_millions": round(trained / 1e6),
            "gflops_an_image": round(flops / 1e9),
            "images_a_gpu": images,
            "ddp_gb": memory / 1e9,
            "checkpoint_gb": (trained * (STATE - 4) + judged * (STATE - 8)) / 1e9,
            "epochs": TOKENIZER_EPOCHS,
            "hours": hours(flops, TOKENIZER_EPOCHS),
        },
        {
            "name": "encoding with it",
            "gflops_an_image": round(encode_flops / 1e9),
            "epochs": 1,
            "hours": hours(encode_flops, 1),
        },
    ]


def described(rows: list[Row]) -> str:
    """The section of docs/scaling.md."""
    fits = [row["name"] for row in rows if row.get("ddp_gb", 0) > LARGEST_GPU]
    larger = f"Of these, only {' and '.join(fits)} needs more than {LARGEST_GPU} GB with DDP." if fits else ""
    return f"""Written by `python -m benchmarks.scaling --write docs/scaling.md`. **These are estimates: nothing was
measured on a GPU.** They assume ImageNet's {IMAGES:,} images of {SIDE}x{SIDE} pixels, {GRID[0]}x{GRID[1]} codes out
of {CODES:,}, {CLASSES:,} classes, {GPUS} GPUs, and global batches of {TOKENIZER_BATCH} for the VQ-GAN and {PRIOR_BATCH}
for the priors.

{markdown_table(COLUMNS, rows)}

{larger}

How they are computed:

- **Parameters, operations and activations:** counted by running the real classes on tensors without data. The
  VQ-GAN is the `vqgan` backbone at its defaults, with a PatchGAN and LPIPS's trunk, without the search for codes.
- **Memory:** {STATE} bytes per parameter (float32 weights 4, gradients 4, AdamW 8, averaged weights 4), plus what
  autograd keeps. DDP adds {DDP - STATE} bytes (gradient buckets, bfloat16 copies) and keeps activations in float32, an
  upper bound under autocast. FSDP on {GPUS} GPUs needs an {GPUS}th of the {STATE} bytes, {GATHERED} bytes per parameter
  that is gathered at a time (embeddings, head, two blocks), and activations in bfloat16. CUDA and its libraries need
  additional memory.
- **Time:** operations / ({GPUS} x {SHARE:.0%} of {PEAK / 1e12:.0f} TFLOP/s, an H100's peak in bf16). The {SHARE:.0%} is
  an assumption: convolutions and small models reach less. Validation, checkpoints and reading are not included.
- **A checkpoint:** weights, averaged weights and AdamW's states; `train.keep_checkpoints` of them are kept."""


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--write", type=Path, help="write the section into this file")
    options = arguments.parse_args()
    rows = [*tokenizer_rows(), *(prior_row(name, *shape) for name, shape in PRIORS.items())]
    report({"gpus": GPUS, "assumed_share": SHARE, "peak_flops": PEAK}, rows, options.json)
    if options.write:
        write_section(options.write, "estimates", described(rows))


if __name__ == "__main__":
    main()
