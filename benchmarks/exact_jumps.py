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
from stage2_prior.networks.autoregressive import Autoregressive
from stage2_prior.networks.jumps import Windows
from stage2_prior.prior import Prior
from stage2_prior.sampling import image_seeds
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.machine.processes import share_cores

BATCH = 8


class Draw:
    """Draws the codes (n, h, w) of images 0 to n - 1 of seed 0, each alone."""

    def __init__(self, prior: Prior, sampling: SamplingConfig, images: int) -> None:
        assert isinstance(prior.network, Autoregressive)
        self.prior, self.sampling, self.images, self.passes = prior, sampling, images, 0
        self.window_decoder = prior.network.window_decoder

    def by_jumps(self) -> Tensor:
        def counting(*given) -> Windows:
            windows = self.window_decoder(*given)
            assert windows is not None
            predict = windows.predict

            def counted(first: int, before: Tensor) -> Tensor:
                self.passes += 1
                return predict(first, before)

            windows.predict = counted
            return windows

        return self._draw(counting)

    def by_steps(self, copies: int = 1) -> Tensor:
        return self._draw(lambda *given: None, copies)

    def _draw(self, window_decoder, copies: int = 1) -> Tensor:
        self.prior.network.window_decoder = window_decoder
        classes, drawn = len(self.prior.config.class_names or []), []
        for i in range(self.images):
            given = {"class": torch.full((copies,), i % classes)} if classes else {}
            drawn.append(self.prior.sample(given, self.sampling, image_seeds(0, i, 1) * copies)[:1])
        return torch.cat(drawn)


def measure(run: str, sampling: SamplingConfig, images: int, repeats: int) -> Row:
    draw = Draw(Prior.from_pretrained(run).eval(), sampling, images)
    found: dict[str, Tensor] = {}
    seconds = alternate(
        {
            "jumps": lambda: found.update(jumps=draw.by_jumps()),
            "steps": lambda: found.update(steps=draw.by_steps()),
            "batch": lambda: found.update(batch=draw.by_steps(BATCH)),
        },
        repeats,
    )
    row = compared(f"{run.split('/')[-1]}, {sampling.weights}", seconds["jumps"], seconds["steps"])
    cells, passes = draw.prior.config.grid[0] * draw.prior.config.grid[1], draw.passes / images / (repeats + 1)
    return row | {
        "batch_ratio": statistics.median(seconds["batch"]) / statistics.median(seconds["jumps"]),
        "passes": passes,
        "fewer_passes": cells / passes,
        "equal_images": (found["jumps"] == found["batch"]).flatten(1).all(1).float().mean().item(),
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
