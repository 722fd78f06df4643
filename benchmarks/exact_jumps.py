"""How many passes and how much time do exact jumps save in drawing single images with a trained prior?

python -m benchmarks.exact_jumps runs/PRIOR [runs/PRIOR ...] [--images 16] [--guidance-scale 1] [--json FILE]

Each image is drawn alone: by jumps, and one code after another. `batch_ratio` compares with a batch of 8 images, of
which 7 are thrown away: how a single image was drawn before there were jumps, so that it is the same as beside others.
All have the same noise; `equal_images` is the share of images whose codes all agree with those of a batch.
"""

import statistics

import torch
from torch import Tensor

from benchmarks.reporting import Row, alternate, compared, parser, report
from stage2_prior.autoregressive import Autoregressive, sample_in_order
from stage2_prior.conditions.context import join_contexts
from stage2_prior.jumps import sample_in_jumps
from stage2_prior.prior import Prior
from stage2_prior.sampling import Branches, CodeNoise, image_seeds
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.machine.processes import share_cores

BATCH = 8


class Draw:
    """Draws the codes (n, N), in the order in which they are written, of images 0 to n - 1 of seed 0."""

    def __init__(self, prior: Prior, sampling: SamplingConfig, images: int) -> None:
        assert isinstance(prior.network, Autoregressive)
        self.network, self.sampling, self.images, self.passes = prior.network, sampling, images, 0
        classes = max(1, len(prior.config.class_names or []))
        self.scales = () if sampling.guidance_scale == 1 else (sampling.guidance_scale,)
        self.contexts = []
        for i in range(images):
            given = {"class": torch.tensor([i % classes])} if prior.config.class_names else {}
            both = [given] if not self.scales else [given, {}]
            self.contexts.append([prior.conditions(each, 1) for each in both])

    def one(self, i: int, jumps: bool, copies: int = 1) -> Tensor:
        rows = torch.zeros(copies, dtype=torch.long)
        context = join_contexts([each.rows(rows) for each in self.contexts[i]]).in_order(self.network.order)
        seeds = image_seeds(0, i, 1) * copies
        branches, noise = Branches(context, self.scales), CodeNoise(seeds, self.network.codebook_size)
        known = torch.full((copies, len(self.network.order)), -1)
        if not jumps:
            step = self.network.decoder(context, self.sampling.weights)
            return sample_in_order(step, branches, noise, self.sampling, known, None)[:1]
        window = self.network.window_decoder(context, self.sampling.weights)
        assert window is not None

        def counted(first: int, before: Tensor) -> Tensor:
            self.passes += 1
            return window(first, before)

        return sample_in_jumps(counted, branches, noise, self.sampling, known, None)

    def all(self, jumps: bool, copies: int = 1) -> Tensor:
        return torch.cat([self.one(i, jumps, copies) for i in range(self.images)])


def measure(run: str, sampling: SamplingConfig, images: int, repeats: int) -> Row:
    draw = Draw(Prior.from_pretrained(run).eval(), sampling, images)
    found: dict[str, Tensor] = {}
    seconds = alternate(
        {
            "jumps": lambda: found.update(jumps=draw.all(True)),
            "steps": lambda: found.update(steps=draw.all(False)),
            "batch": lambda: found.update(batch=draw.all(False, BATCH)),
        },
        repeats,
    )
    row = compared(f"{run.split('/')[-1]}, {sampling.weights}", seconds["jumps"], seconds["steps"])
    cells, passes = len(draw.network.order), draw.passes / images / (repeats + 1)
    return row | {
        "batch_ratio": statistics.median(seconds["batch"]) / statistics.median(seconds["jumps"]),
        "passes": passes,
        "fewer_passes": cells / passes,
        "equal_images": (found["jumps"] == found["batch"]).all(1).float().mean().item(),
    }


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("runs", nargs="+")
    arguments.add_argument("--images", type=int, default=16)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--guidance-scale", type=float, default=1.0)
    arguments.add_argument("--weights", nargs="+", default=["float32"])
    options = arguments.parse_args()
    share_cores()
    rows = [
        measure(
            run, SamplingConfig(weights=weights, guidance_scale=options.guidance_scale), options.images, options.repeats
        )
        for run in options.runs
        for weights in options.weights
    ]
    report({"images": options.images, "guidance_scale": options.guidance_scale}, rows, options.json)


if __name__ == "__main__":
    with torch.no_grad():
        main()
