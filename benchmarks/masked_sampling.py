"""How fast is sampling in a few steps, from the masked and the parallel transformer?

python -m benchmarks.masked_sampling [--batch-sizes 1 8 32] [--grid 16] [--layers 8] [--hidden-size 512] [--repeats 3]
                                     [--json FILE]

`plain` is the scheme of valeoai's Halton-MaskGIT `ConfidenceSampler` with the same weights. At every step it runs a
float32 forward pass with torch's `F.linear` over all cells of all images, and samples every cell. `causal` writes one
code after another with a cache (a single image by exact jumps). The masked transformer takes 8 steps; it is also
measured with bfloat16 and int8 weights. `parallel` takes its default number of steps; `parallel, raster` compares it
with the same weights, one cell after another in raster order. All have 512 codes and random weights, and sample from
the full distribution.
"""

import math
from functools import partial
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.reporting import alternate, compared, parser, report
from stage2_prior.networks.causal_transformer import CausalTransformer, CausalTransformerConfig
from stage2_prior.networks.masked_transformer import MaskedTransformer, MaskedTransformerConfig
from stage2_prior.networks.parallel_transformer import ParallelTransformer, ParallelTransformerConfig
from stage2_prior.networks.transformer import Block, rotate
from stage2_prior.sampling import Branches
from stage2_prior.sampling_config import SamplingConfig, Weights
from twostage.core.conditions.context import Context, ContextForm
from twostage.core.machine.processes import share_cores

CODES, HEADS, STEPS = 512, 8, 8


def plain_logits(model: MaskedTransformer, codes: Tensor, labels: Tensor) -> Tensor:
    """The result of the model's ``forward``, computed with torch's own matrix products: (B, N, K)."""
    x = model.code_embedding(codes) + model.class_embedding(labels)[:, None] + model.positions
    for block in cast(list[Block], list(model.blocks)):
        qkv = F.linear(block.norm1(x), block.qkv.weight, block.qkv.bias)
        qkv = qkv.view(len(x), model.cells, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        assert model.rotation is not None
        q, k = rotate(qkv[:2], model.rotation)  # each (B, H, N, E)
        attended = F.scaled_dot_product_attention(q, k, qkv[2]).transpose(1, 2).reshape(x.shape)
        x = x + F.linear(attended, block.attention_out.weight, block.attention_out.bias)
        hidden = F.gelu(F.linear(block.norm2(x), block.mlp_in.weight, block.mlp_in.bias), approximate="tanh")
        x = x + F.linear(hidden, block.mlp_out.weight, block.mlp_out.bias)
    return F.linear(model.norm(x), model.head_weight)


@torch.no_grad()
def plain_sample(model: MaskedTransformer, labels: Tensor, choice_temperature: float = 4.5) -> Tensor:
    """Confidence sampling without any shortcut: (B, N)."""
    codes = torch.full((len(labels), model.cells), model.mask_token_id)
    for step in range(STEPS):
        done = (step + 1) / STEPS
        masked = codes == model.mask_token_id
        shares = plain_logits(model, codes, labels).softmax(-1)  # (B, N, K)
        drawn = shares.flatten(0, 1).multinomial(1).view_as(codes)
        confidence = shares.gather(-1, drawn[..., None])[..., 0].log()
        confidence += choice_temperature * (1 - done) * -(-torch.rand_like(confidence).log()).log()
        confidence[~masked] = torch.inf
        left = int(math.cos(math.pi / 2 * done) * model.cells)
        codes = torch.where(masked, drawn, codes)
        codes.scatter_(1, confidence.topk(left, largest=False).indices, model.mask_token_id)
    return codes


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    arguments.add_argument("--grid", type=int, default=16, help="rows and columns of the code grid")
    arguments.add_argument("--layers", type=int, default=8)
    arguments.add_argument("--hidden-size", type=int, default=512)
    arguments.add_argument("--repeats", type=int, default=3)
    options = arguments.parse_args()
    share_cores()
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": options.hidden_size, "depth": options.layers, "num_heads": HEADS}
    given: tuple[Any, ...] = CODES, (options.grid, options.grid), ContextForm(num_classes=10)
    masked = MaskedTransformer(MaskedTransformerConfig(**shape), *given).eval()
    causal = CausalTransformer(CausalTransformerConfig(**shape), *given).eval()
    parallel = ParallelTransformer(ParallelTransformerConfig(**shape), *given).eval()
    cells = parallel.cells
    raster = ParallelTransformer(ParallelTransformerConfig(**shape, order="raster", num_steps=cells), *given).eval()
    for model in (masked, causal, parallel):
        assert model.head is not None
        torch.nn.init.normal_(model.head.weight, std=0.02)
    raster.load_state_dict(parallel.state_dict())
    with torch.no_grad():
        codes, label = torch.randint(CODES, (1, cells)), torch.tensor([3])
        logits = masked(codes, Context(1, label))
        torch.testing.assert_close(plain_logits(masked, codes, label), logits, rtol=1e-4, atol=1e-4)

    rows = []
    for batch in options.batch_sizes:
        labels, seeds = torch.arange(batch) % 10, list(range(batch))
        branches = Branches(Context(batch, labels))

        def ours(weights: Weights, branches: Branches = branches, seeds: list[int] = seeds) -> None:
            codes = masked.sample(branches, SamplingConfig(num_steps=STEPS, weights=weights), seeds)
            assert codes.max() < CODES

        def plain(labels: Tensor = labels) -> None:
            assert plain_sample(masked, labels).max() < CODES

        def other(
            model: CausalTransformer | ParallelTransformer, branches: Branches = branches, seeds: list[int] = seeds
        ) -> None:
            assert model.sample(branches, SamplingConfig(), seeds).max() < CODES

        candidates = {weights: partial(ours, weights) for weights in get_args(Weights)}
        others = {"causal": causal, "parallel": parallel, "parallel, raster": raster}
        peers = {name: partial(other, model) for name, model in others.items()}
        seconds = alternate({**candidates, "plain": plain, **peers}, options.repeats)
        for weights in candidates:
            for peer in ("plain", "causal"):
                rows.append(compared(f"batch {batch}, {weights}, {peer}", seconds[weights], seconds[peer]))
            rows[-2]["codes_per_s"] = batch * cells / rows[-2]["ours_s"]
        for peer in ("parallel, raster", "causal", "float32"):
            name = f"batch {batch}, parallel, {peer}".replace("float32", "masked")
            rows.append(compared(name, seconds["parallel"], seconds[peer]))
        rows[-3]["codes_per_s"] = batch * cells / rows[-3]["ours_s"]
    steps = {"steps": STEPS, "parallel_steps": parallel.config.default_steps(parallel.grid)}
    settings = {"layers": options.layers, "hidden_size": options.hidden_size, "cells": cells, **steps}
    report({**settings, "repeats": options.repeats}, rows, options.json)


if __name__ == "__main__":
    main()
