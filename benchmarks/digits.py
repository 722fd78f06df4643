"""What do codes cost as digits (`model.codes: digits`), compared with a table and a softmax over all codes?

python -m benchmarks.digits [--codes codes/fsq_512] [--steps 600] [--seeds 0] [--repeats 5] [--json FILE]

First, memory and time: a GPT on 7x7 codes out of 2^16, as 16 bits and as two digits of 256, beside its tables. A step
is forward, backward and AdamW; `_mb` are the weights of embedding and head. Then, with --codes, what is learned: the
same small GPT, trained for the same steps on the same batches, with each kind of code; held-out nats per code.
"""

import math
import time
from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from benchmarks.reporting import Row, alternate, compared, parser, report
from stage2_prior.codes import CodeCache, CodeSplit
from stage2_prior.networks.causal_transformer import CausalTransformer, CausalTransformerConfig
from stage2_prior.prior import Prior, PriorLossConfig, prior_config
from twostage.core.conditions.context import Context, ContextForm
from twostage.core.machine.processes import share_cores
from twostage.core.training.random import BatchRandom

CODES, GRID, BATCH = 2**16, (7, 7), 16
KINDS = {"table": "table", "16 bits": [2] * 16, "2 digits of 256": [256, 256]}
SMALL = {"hidden_size": 96, "depth": 3, "num_heads": 4, "dropout": 0.0}
SMALL_BATCH, LR, HELD_OUT = 32, 2e-3, 2000


def gpt(codes: object, codebook_size: int = CODES) -> CausalTransformer:
    """A GPT of the default size."""
    torch.manual_seed(0)
    config = CausalTransformerConfig.model_validate({"codes": codes, "dropout": 0.0})
    return CausalTransformer(config, codebook_size, GRID, ContextForm()).train()


def code_megabytes(model: CausalTransformer) -> float:
    """The weights of the embedding and the head."""
    modules = [model.code_embedding, cast(nn.Module, model.head)]
    return sum(weight.numel() for module in modules for weight in module.parameters()) * 4 / 2**20


def step(model: CausalTransformer, codebook_size: int = CODES) -> Callable[[], None]:
    """One training step with its own optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    codes = torch.randint(codebook_size, (BATCH, math.prod(GRID)), generator=torch.Generator().manual_seed(0))
    random = BatchRandom(0, slice(0, BATCH), BATCH)

    def run() -> None:
        model.loss(codes, Context(BATCH), codes, random).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def costs(repeats: int) -> list[Row]:
    """Memory and time beside the table of 2^16 codes, and beside a table of 512 codes."""
    models = {kind: gpt(codes) for kind, codes in KINDS.items()}
    candidates = {kind: step(model) for kind, model in models.items()}
    small = gpt("table", 512)
    seconds = alternate(candidates | {"512": step(small, 512)}, repeats)
    rows = []
    for kind in list(KINDS)[1:]:
        for peer, model in (("table", models["table"]), ("512", small)):
            memory = code_megabytes(models[kind]), code_megabytes(model)
            name = f"{kind} beside a table of {'2^16' if peer == 'table' else peer}"
            sizes = {"ours_mb": memory[0], "peer_mb": memory[1], "memory_ratio": memory[1] / memory[0]}
            rows.append(compared(name, seconds[kind], seconds[peer]) | sizes)
    return rows


def trained(codes: object, cache: CodeCache, steps: int, seed: int) -> Row:
    """The held-out nats per code of a small GPT after so many steps, and its processor time."""
    torch.manual_seed(seed)
    config = CausalTransformerConfig.model_validate(SMALL | {"codes": codes})
    prior = Prior(prior_config(config, None, PriorLossConfig(class_dropout_prob=0.0), cache)).train()
    optimizer = torch.optim.AdamW(prior.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    split, start = cache.splits["train"], time.process_time()
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    for number in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (number + 1) / 50) * (1 + math.cos(math.pi * number / steps)) / 2
        rows = order[torch.arange(number * SMALL_BATCH, (number + 1) * SMALL_BATCH) % len(order)].sort().values
        random = BatchRandom(number, slice(0, SMALL_BATCH), SMALL_BATCH)
        prior(split.read(rows), prior.conditions.read(split, rows), random).backward()
        nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.process_time() - start
    return {"name": f"codes {codes}, seed {seed}", "nats_per_code": held_out(prior, cache.validation), "cpu_s": seconds}


@torch.no_grad()
def held_out(prior: Prior, split: CodeSplit) -> float:
    """Nats per code of the first held-out images."""
    prior.eval()
    total = 0.0
    for rows in torch.arange(min(HELD_OUT, len(split))).split(200):
        total += prior.nats_per_image(split.read(rows), prior.conditions.read(split, rows)).sum().item()
    return total / (min(HELD_OUT, len(split)) * math.prod(prior.config.grid))


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--codes", help="a code cache whose codes have digits")
    arguments.add_argument("--steps", type=int, default=600)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--only-learning", action="store_true", help="skip memory and time")
    options = arguments.parse_args()
    share_cores()
    rows: list[Row] = [] if options.only_learning else costs(options.repeats)
    if options.codes:
        cache = CodeCache(options.codes)
        bits = cache.manifest.codebook_size.bit_length() - 1
        kinds: list[object] = ["table", "digits"]
        if 2**bits == cache.manifest.codebook_size and cache.manifest.digits != [2] * bits:
            kinds.append([2] * bits)
        for seed in options.seeds:
            found = [trained(kind, cache, options.steps, seed) for kind in kinds]
            rows += [row | {"beside_table": row["nats_per_code"] / found[0]["nats_per_code"]} for row in found]
    settings = {"batch_size": BATCH, "codes": options.codes, "steps": options.steps, "small_gpt": SMALL}
    report(settings | {"repeats": options.repeats}, rows, options.json)


if __name__ == "__main__":
    main()
