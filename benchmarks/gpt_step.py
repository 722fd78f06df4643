"""How long does a training step of the causal transformer take, compared with `transformers`' GPT-2?

python -m benchmarks.gpt_step [--batch-size 8] [--repeats 5] [--json FILE]

Both have 8 layers of 512, 512 codes, 256 positions and no dropout. A step is forward, backward and AdamW. "bf16" is
autocast, and its ratio is to the peer in float32; a separate row shows what the peer itself gains from bf16.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.reporting import alternate, compared, parser, report
from stage2_prior.networks.causal_transformer import CausalTransformer, CausalTransformerConfig
from twostage.core.conditions.context import Context, ContextForm
from twostage.core.machine.processes import share_cores
from twostage.core.training.random import BatchRandom

CODES, GRID, SIZE, DEPTH, HEADS = 512, (16, 16), 512, 8, 8
CELLS = GRID[0] * GRID[1]


def step(model: nn.Module, loss: Callable[[], Tensor], bfloat16: bool) -> Callable[[], None]:
    """One training step of ``model`` with its own optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--batch-size", type=int, default=8)
    arguments.add_argument("--repeats", type=int, default=5)
    options = arguments.parse_args()
    share_cores()
    torch.manual_seed(0)
    codes = torch.randint(CODES, (options.batch_size, CELLS))
    context, random = Context(len(codes)), BatchRandom(0, slice(0, len(codes)), len(codes))
    ours = CausalTransformer(
        CausalTransformerConfig(hidden_size=SIZE, depth=DEPTH, num_heads=HEADS, dropout=0.0), CODES, GRID, ContextForm()
    ).train()
    peer = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=CODES,
            n_positions=CELLS,
            n_embd=SIZE,
            n_layer=DEPTH,
            n_head=HEADS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
    ).train()

    def our_loss() -> Tensor:
        return ours.loss(codes, context, codes, random)

    def peer_loss() -> Tensor:
        return peer(input_ids=codes, labels=codes).loss

    seconds = alternate(
        {
            "ours": step(ours, our_loss, bfloat16=False),
            "peer": step(peer, peer_loss, bfloat16=False),
            "ours bf16": step(ours, our_loss, bfloat16=True),
            "peer bf16": step(peer, peer_loss, bfloat16=True),
        },
        options.repeats,
    )
    rows = [
        compared("float32", seconds["ours"], seconds["peer"]),
        compared("bf16 beside the peer's float32", seconds["ours bf16"], seconds["peer"]),
        compared("bf16 beside the peer's bf16", seconds["ours bf16"], seconds["peer bf16"]),
        compared("the peer's bf16 beside its float32", seconds["peer bf16"], seconds["peer"]),
    ]
    settings = {"layers": DEPTH, "hidden_size": SIZE, "cells": CELLS, "batch_size": options.batch_size}
    report(settings | {"repeats": options.repeats}, rows, options.json)


if __name__ == "__main__":
    main()
