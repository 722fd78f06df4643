"""What does a quantizer cost, compared with those on PyPI?

python -m benchmarks.quantizers [--repeats 5] [--json FILE]

8,192 vectors of dimension 64, forward and backward (a learned codebook, commitment and codebook loss), with 1,024,
8,192 and 65,536 codes: ours, `vector-quantize-pytorch`, and `diffusers`. Peak memory is what a separate process needs
on top of the quantizer, its gradient and its input. `exact` is how often each finds the code that float64 finds, with
its initial codebook.
"""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.reporting import alternate, compared, parser, report
from stage1_tokenizer.bottlenecks.vector_quantizer import VectorConfig, VectorQuantizer
from twostage.core.training.random import BatchRandom

BATCH, SIDE, DIM = 32, 16, 64
SIZES = (1024, 8192, 65536)


def vectors() -> Tensor:
    """An encoder's output, (32, 64, 16, 16): 8,192 vectors."""
    return torch.randn(BATCH, DIM, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def build(name: str, size: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A step (forward and backward; returns the codes), and the codebook that it searches."""
    torch.manual_seed(0)
    encoded = vectors().requires_grad_()
    if name == "ours":
        ours = VectorQuantizer(VectorConfig(codebook_size=size, codebook="learned"), DIM)
        random = BatchRandom(0, slice(0, BATCH), BATCH)

        def step() -> Tensor:
            output = ours(encoded, None, random)
            (output.z.square().mean() + sum(output.losses.values())).backward()
            assert output.indices is not None
            return output.indices.flatten()

        return step, lambda: ours.codebook.detach()
    if name == "vector-quantize-pytorch":
        from vector_quantize_pytorch import VectorQuantize

        theirs = VectorQuantize(DIM, size, learnable_codebook=True, ema_update=False, accept_image_fmap=True)

        def step() -> Tensor:
            z, indices, loss = theirs(encoded)
            (z.square().mean() + loss.sum()).backward()
            return indices.flatten()

        return step, lambda: theirs.codebook.detach()
    from diffusers.models.autoencoders.vq_model import VectorQuantizer as DiffusersQuantizer

    diffusers = DiffusersQuantizer(size, DIM, beta=0.25, legacy=False)

    def step() -> Tensor:
        z, loss, (_, _, indices) = diffusers(encoded)
        (z.square().mean() + loss).backward()
        return indices.flatten()

    return step, lambda: diffusers.embedding.weight.detach()


def exact_share(name: str, size: int) -> float:
    """The fraction of vectors that get the code nearest in float64."""
    step, codebook = build(name, size)
    codes = codebook().double()
    points = vectors().permute(0, 2, 3, 1).reshape(-1, DIM).double()
    bias = codes.square().sum(1) / 2
    expected = torch.cat([(part @ codes.T - bias).argmax(1) for part in points.split(256)])
    return (step() == expected).double().mean().item()


def peak_memory(name: str, size: int) -> float:
    """MiB that two steps need on top of the quantizer, its gradient and its input, in a new process (Linux)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, size))


def _peak(name: str, size: int) -> float:
    small, _ = build(name, 16)  # load libraries and start threads, at a negligible size
    small()
    step, codebook = build(name, size)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # measure the peak from here
    step()
    step()
    return (_status("VmHWM") - before) / 1024 - codebook().numel() * 4 / 2**20


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--repeats", type=int, default=5)
    options = arguments.parse_args()
    rows = []
    for size in SIZES:
        names = ("ours", "vector-quantize-pytorch", "diffusers")
        seconds = alternate({name: build(name, size)[0] for name in names}, options.repeats)
        memory = {name: peak_memory(name, size) for name in names}
        exact = {name: exact_share(name, size) for name in names}
        for peer in names[1:]:
            row = compared(f"{size} codes against {peer}", seconds["ours"], seconds[peer])
            row |= {"ours_mib": memory["ours"], "peer_mib": memory[peer]}
            row |= {"ours_exact": exact["ours"], "peer_exact": exact[peer]}
            rows.append(row)
    report({"vectors": BATCH * SIDE * SIDE, "dimension": DIM, "repeats": options.repeats}, rows, options.json)


if __name__ == "__main__":
    main()
