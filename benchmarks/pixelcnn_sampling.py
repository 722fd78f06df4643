"""How fast is sampling from the gated PixelCNN, compared with a full forward pass for every code?

python -m benchmarks.pixelcnn_sampling [--batch-sizes 1 32] [--repeats 1] [--json FILE]

The peer does what public gated PixelCNNs do (for example ritheshkumar95/pytorch-vqvae): it recomputes all logits of
the whole grid for each code. Random weights, float32, full distribution, the same noise; `equal_codes` is the fraction
of codes on which both agree. With one warm-up, the peer's batches of 32 take minutes.
"""

import torch
from torch import Tensor, nn

from benchmarks.reporting import alternate, compared, parser, report
from stage2_prior.networks.pixelcnn import PixelCNN, PixelCNNConfig
from stage2_prior.sampling import Branches, CodeNoise
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.conditions.context import Context, ContextForm
from twostage.core.machine.processes import share_cores

CODES, GRID = 512, (16, 16)
CELLS = GRID[0] * GRID[1]
CONFIG = PixelCNNConfig(channels=64, depth=15, first_kernel=7, kernel=3, head_channels=512)


def plain_sample(model: PixelCNN, noise: Tensor) -> Tensor:
    """Codes (B, N), with a full forward pass for each."""
    codes = torch.zeros(noise.shape[:2], dtype=torch.long)
    context = Context(len(codes))
    with torch.no_grad():
        for cell in range(CELLS):
            codes[:, cell] = (model(codes, context)[:, cell] + noise[:, cell]).argmax(1)
    return codes


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    arguments.add_argument("--repeats", type=int, default=1)
    options = arguments.parse_args()
    share_cores()
    torch.manual_seed(0)
    model = PixelCNN(CONFIG, CODES, GRID, ContextForm()).eval()
    nn.init.normal_(model.head_out.weight, std=0.2)  # so that predictions differ between cells

    rows = []
    for batch in options.batch_sizes:
        seeds = list(range(batch))
        drawn: dict[str, Tensor] = {}

        def sample(seeds: list[int] = seeds, drawn: dict[str, Tensor] = drawn) -> None:
            drawn["ours"] = model.sample(Branches(Context(len(seeds))), SamplingConfig(), seeds)

        def plain(seeds: list[int] = seeds, drawn: dict[str, Tensor] = drawn) -> None:
            drawn["peer"] = plain_sample(model, CodeNoise(seeds, CODES).next(CELLS))

        seconds = alternate({"ours": sample, "peer": plain}, options.repeats)
        rows.append(compared(f"batch {batch}", seconds["ours"], seconds["peer"]))
        rows[-1]["codes_per_s"] = batch * CELLS / rows[-1]["ours_s"]
        rows[-1]["equal_codes"] = (drawn["ours"] == drawn["peer"]).float().mean().item()
    settings = {"depth": CONFIG.depth, "channels": CONFIG.channels, "codes": CELLS, "codebook": CODES}
    report({**settings, "repeats": options.repeats}, rows, options.json)


if __name__ == "__main__":
    main()
