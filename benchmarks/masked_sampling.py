"""How fast is sampling from the masked transformer in 8 steps, compared with the plain scheme and a causal transformer?

python -m benchmarks.masked_sampling [--batch-sizes 1 8 32] [--repeats 3] [--json FILE]

`plain` is the scheme of valeoai's Halton-MaskGIT `ConfidenceSampler` with the same weights. At every step it runs a
float32 forward pass with torch's `F.linear` over all cells of all images, and samples every cell. `causal` writes one
code after another with a cache. All have 8 layers of 512, 512 codes, 16x16 cells and random weights, and sample from
the full distribution. Ours is also measured with bfloat16 and int8 weights.
"""

import math
from functools import partial
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.reporting import alternate, compared, parser, report
from stage2_prior.causal_transformer import CausalTransformer, CausalTransformerConfig
from stage2_prior.masked_transformer import MaskedTransformer, MaskedTransformerConfig
from stage2_prior.sampling import Branches
from stage2_prior.sampling_config import SamplingConfig, Weights
from stage2_prior.transformer import Block, rotate
from twostage.core.conditions.context import Context, ContextForm
from twostage.core.machine.processes import share_cores

CODES, GRID, SIZE, DEPTH, HEADS, STEPS = 512, (16, 16), 512, 8, 8, 8
CELLS = GRID[0] * GRID[1]


def plain_logits(model: MaskedTransformer, codes: Tensor, labels: Tensor) -> Tensor:
    """The result of the model's ``forward``, computed with torch's own matrix products: (B, N, K)."""
    x = model.code_embedding(codes) + model.class_embedding(labels)[:, None] + model.positions
    for block in cast(list[Block], list(model.blocks)):
        qkv = F.linear(block.norm1(x), block.qkv.weight, block.qkv.bias)
        qkv = qkv.view(len(x), CELLS, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
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
    codes = torch.full((len(labels), CELLS), model.mask_token_id)
    for step in range(STEPS):
        done = (step + 1) / STEPS
        masked = codes == model.mask_token_id
        shares = plain_logits(model, codes, labels).softmax(-1)  # (B, N, K)
        drawn = shares.flatten(0, 1).multinomial(1).view_as(codes)
        confidence = shares.gather(-1, drawn[..., None])[..., 0].log()
        confidence += choice_temperature * (1 - done) * -(-torch.rand_like(confidence).log()).log()
        confidence[~masked] = torch.inf
        left = int(math.cos(math.pi / 2 * done) * CELLS)
        codes = torch.where(masked, drawn, codes)
        codes.scatter_(1, confidence.topk(left, largest=False).indices, model.mask_token_id)
    return codes


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    arguments.add_argument("--repeats", type=int, default=3)
    options = arguments.parse_args()
    share_cores()
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": SIZE, "depth": DEPTH, "num_heads": HEADS}
    masked = MaskedTransformer(MaskedTransformerConfig(**shape), CODES, GRID, ContextForm(num_classes=10)).eval()
    causal = CausalTransformer(CausalTransformerConfig(**shape), CODES, GRID, ContextForm(num_classes=10)).eval()
    for model in (masked, causal):
        assert model.head is not None
        torch.nn.init.normal_(model.head.weight, std=0.02)
    with torch.no_grad():
        codes, label = torch.randint(CODES, (1, CELLS)), torch.tensor([3])
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

        def one_by_one(branches: Branches = branches, seeds: list[int] = seeds) -> None:
            causal.sample(branches, SamplingConfig(), seeds)

        candidates = {weights: partial(ours, weights) for weights in get_args(Weights)}
        seconds = alternate({**candidates, "plain": plain, "causal": one_by_one}, options.repeats)
        for weights in candidates:
            for peer in ("plain", "causal"):
                rows.append(compared(f"batch {batch}, {weights}, {peer}", seconds[weights], seconds[peer]))
            rows[-2]["codes_per_s"] = batch * CELLS / rows[-2]["ours_s"]
    settings = {"layers": DEPTH, "hidden_size": SIZE, "cells": CELLS, "steps": STEPS, "repeats": options.repeats}
    report(settings, rows, options.json)


if __name__ == "__main__":
    main()
