"""Do the priors learn a distribution whose entropy is known?

python -m benchmarks.known_entropy [--models pixelcnn causal_transformer ...] [--dir DIR] [--json FILE]

Grids of 6 x 5 codes out of 8, in 4 classes, are sampled code by code. In two classes each code depends on its left
neighbour, in the other two on the one above, by a fixed random table per class. No prior can beat the held-out cost
under these tables, except by chance. The masked transformer only has an upper bound, and more to learn: what any codes
say about any others. The target is an excess of at most 2%.

The scale transformer gets codes of three scales, 1x1, 2x2 and 4x4, of which each depends on the coarser code at its
place, by a table per class and scale.
"""

import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.reporting import parser, report
from pipelines.evaluation.evaluate_prior import evaluate_prior
from stage2_prior.codes import Manifest, SplitFiles, TokenizerReference, code_statistics
from stage2_prior.networks.causal_transformer import CausalTransformerConfig
from stage2_prior.networks.masked_transformer import MaskedTransformerConfig
from stage2_prior.networks.network import NetworkConfig
from stage2_prior.networks.pixelcnn import PixelCNNConfig
from stage2_prior.networks.scale_transformer import ScaleTransformerConfig
from stage2_prior.prior import PriorLossConfig
from stage2_prior.prior_training import PriorTrainConfig, PriorTrainingConfig, train
from twostage.core.config.sections import RunConfig
from twostage.core.files import write_json
from twostage.core.scales import join_scales, num_codes

GRID, CODES, CLASSES = (6, 5), 8, 4
ROWS = {"train": 40_000, "test": 4_000}
SCALES = (1, 1), (2, 2), (4, 4)
SHARPNESS = 1.5  # standard deviation of the tables' logits

MODELS: dict[str, tuple[NetworkConfig, int]] = {  # and the steps
    "pixelcnn": (PixelCNNConfig(channels=32, depth=4, first_kernel=3, head_channels=64), 1000),
    "causal_transformer": (CausalTransformerConfig(hidden_size=64, depth=3, num_heads=4, dropout=0.0), 1000),
    "masked_transformer": (MaskedTransformerConfig(hidden_size=64, depth=4, num_heads=4, dropout=0.0), 4000),
    "scale_transformer": (ScaleTransformerConfig(hidden_size=64, depth=3, num_heads=4, dropout=0.0), 1000),
}
SCALED = ("scale_transformer",)


def process(seed: int = 0) -> Tensor:
    """log p(code | class, code to the left, code above), (classes, K + 1, K + 1, K); K stands for the border."""
    generator = torch.Generator().manual_seed(seed)
    shape = (CLASSES, CODES + 1, CODES)
    logs = (SHARPNESS * torch.randn(shape, generator=generator, dtype=torch.float64)).log_softmax(-1)
    table = torch.empty(CLASSES, CODES + 1, CODES + 1, CODES, dtype=torch.float64)
    table[::2], table[1::2] = logs[::2, :, None], logs[1::2, None]  # by the left neighbour, by the upper one
    return table


def draw(table: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Grids (n, h, w) of the classes ``labels`` (n,), and the nats of each under the process, (n,)."""
    generator = torch.Generator().manual_seed(seed)
    height, width = GRID
    codes = torch.full((len(labels), height + 1, width + 1), CODES)  # with a border above and to the left
    nats = torch.zeros(len(labels), dtype=torch.float64)
    for y in range(1, height + 1):
        for x in range(1, width + 1):
            logs = table[labels, codes[:, y, x - 1], codes[:, y - 1, x]]  # (n, K)
            codes[:, y, x] = torch.multinomial(logs.exp(), 1, generator=generator)[:, 0]
            nats -= logs.gather(1, codes[:, y, x, None])[:, 0]
    return codes[:, 1:, 1:], nats


def scaled_process(seed: int = 0) -> Tensor:
    """log p(code | scale, class, the coarser code at its place), (scales, classes, K, K)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(SCALES), CLASSES, CODES, CODES)
    return (SHARPNESS * torch.randn(shape, generator=generator, dtype=torch.float64)).log_softmax(-1)


def draw_scales(table: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Rows (n, 1, N) of the codes of all scales, and the nats of each row under the process, (n,). The first scale
    depends on the class alone."""
    generator = torch.Generator().manual_seed(seed)
    coarser, grids = torch.zeros(len(labels), 1, 1, dtype=torch.long), []
    nats = torch.zeros(len(labels), dtype=torch.float64)
    for of_scale, (height, width) in zip(table, SCALES, strict=True):
        factor = height // coarser.shape[1]
        parents = coarser.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        logs = of_scale[labels[:, None, None], parents].flatten(0, 2)  # (n h w, K)
        codes = torch.multinomial(logs.exp(), 1, generator=generator)
        nats -= logs.gather(1, codes).view(len(labels), -1).sum(1)
        coarser = codes.view(len(labels), height, width)
        grids.append(coarser)
    return join_scales(grids)[:, None], nats


def write_codes(folder: Path, scaled: bool = False) -> float:
    """A code cache of a process; returns what its held-out grids cost under the process, in nats per code."""
    folder.mkdir(parents=True, exist_ok=True)
    grid, scales = ((1, num_codes(SCALES)), SCALES) if scaled else (GRID, ())
    table, cost, grids = scaled_process() if scaled else process(), 0.0, {}
    for seed, (split, rows) in enumerate(ROWS.items(), start=1):
        labels = torch.arange(rows) % CLASSES
        codes, nats = draw_scales(table, labels, seed) if scaled else draw(table, labels, seed)
        grids[split], cost = codes.numpy(), nats.mean().item() / math.prod(grid)
        np.save(folder / f"{split}.codes.npy", grids[split].astype(np.uint16))
        np.save(folder / f"{split}.labels.npy", labels.numpy().astype(np.int32))
    manifest = Manifest(
        tokenizer=TokenizerReference(hash="none: drawn codes", path=str(folder)),
        source="known_entropy",
        image_size=GRID,
        channels=1,
        grid=grid,
        scales=scales,
        codebook_size=CODES,
        class_names=[f"table {label}" for label in range(CLASSES)],
        validation_split="test",
        splits={
            split: SplitFiles(rows=rows, codes=f"{split}.codes.npy", labels=f"{split}.labels.npy")
            for split, rows in ROWS.items()
        },
        **code_statistics(grids, CODES),
    )
    write_json(folder / "manifest.json", manifest.model_dump(mode="json"))
    return cost


def training(model: NetworkConfig, steps: int, run: Path, codes: Path) -> PriorTrainingConfig:
    return PriorTrainingConfig(
        run=RunConfig(dir=str(run), trackers=[]),
        codes=str(codes),
        model=model,
        loss=PriorLossConfig(class_dropout_prob=0.0),
        train=PriorTrainConfig(
            batch_size=64,
            max_steps=steps,
            lr=3e-3,
            lr_schedule="cosine",
            warmup_steps=100,
            max_grad_norm=1.0,
            ema_decay=0.99,
            validate_every=steps,
            checkpoint_every=steps,
        ),
    )


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    arguments.add_argument("--dir", type=Path, help="keep runs here and resume them; by default they are deleted")
    options = arguments.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as thrown_away:
        folder = options.dir or Path(thrown_away)
        for name in options.models:
            model, steps = MODELS[name]
            codes = folder / ("codes_of_scales" if name in SCALED else "codes")
            truth = write_codes(codes, name in SCALED)
            begun, start = (folder / name).exists(), time.process_time()
            train(training(model, steps, folder / name, codes))
            seconds = time.process_time() - start
            figures = evaluate_prior(folder / name, batch_size=500).figures
            bound = "nats_per_code" not in figures
            nats = figures["nats_per_code_bound" if bound else "nats_per_code"]
            rows.append(
                {
                    "name": name,
                    "nats_per_code": nats,
                    "what": "upper bound" if bound else "exact",
                    "true_nats_per_code": truth,
                    "excess": nats / truth - 1,
                    "within_2_percent": nats <= 1.02 * truth,
                    "unigram": figures["unigram_nats_per_code"],
                    "uniform": figures["uniform_nats_per_code"],
                    "steps": steps,
                    "processor_s": None if begun else seconds,  # only after a full training run
                }
            )
    report({"grid": "6x5", "codes": CODES, "classes": CLASSES, "held_out": ROWS["test"]}, rows, options.json)


if __name__ == "__main__":
    main()
