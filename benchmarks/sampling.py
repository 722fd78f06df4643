"""How fast is sampling from the causal transformer, compared with `transformers`' GPT-2 with its cache?

python -m benchmarks.sampling [--batch-sizes 1 8 32] [--weights float32 bfloat16 int8] [--repeats 3] [--json FILE]
                              [--prior runs/NAME --codes DIR [--rows 64]]

Both have 8 layers of 512, 512 codes, 256 positions and random weights of the same sizes, and sample from the full
distribution. The peer's weights are always float32. A single image is sampled one code after another, without exact
jumps, because the codes of random weights are too easy to guess; `benchmarks.exact_jumps` measures trained ones. With
--prior and --codes, it also measures what rounded weights cost a trained prior: its held-out nats per code with the
decoder that samples.
"""

import functools
from typing import get_args

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.reporting import Row, alternate, compared, parser, report
from stage2_prior.codes import CodeCache
from stage2_prior.networks.causal_transformer import CausalTransformer, CausalTransformerConfig
from stage2_prior.prior import Prior
from stage2_prior.sampling import Branches
from stage2_prior.sampling_config import SamplingConfig, Weights
from twostage.core.conditions.context import Context, ContextForm
from twostage.core.machine.processes import share_cores

CODES, GRID, SIZE, DEPTH, HEADS = 512, (16, 16), 512, 8, 8


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    arguments.add_argument("--weights", nargs="+", choices=get_args(Weights), default=list(get_args(Weights)))
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--prior", help="a trained causal transformer")
    arguments.add_argument("--codes", help="the folder of the codes that it was trained on")
    arguments.add_argument("--rows", type=int, default=64, help="held-out images for its nats per code")
    options = arguments.parse_args()
    if (options.prior is None) != (options.codes is None):
        arguments.error("--prior and --codes need each other")
    share_cores()
    torch.manual_seed(0)
    ours = CausalTransformer(
        CausalTransformerConfig(hidden_size=SIZE, depth=DEPTH, num_heads=HEADS), CODES, GRID, ContextForm()
    ).eval()
    torch.nn.init.normal_(ours.head.weight, std=0.02)
    ours.window_decoder = lambda *_: None
    cells = GRID[0] * GRID[1]
    peer = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=CODES + 1,
            n_positions=cells + 1,
            n_embd=SIZE,
            n_layer=DEPTH,
            n_head=HEADS,
            bos_token_id=CODES,
            eos_token_id=None,
            pad_token_id=CODES,
        )
    ).eval()

    rows = []
    for batch in options.batch_sizes:
        start = torch.full((batch, 1), CODES)
        none = Branches(Context(batch))

        def generate(start: torch.Tensor = start) -> None:
            with torch.no_grad():
                out = peer.generate(
                    start,
                    attention_mask=torch.ones_like(start),
                    do_sample=True,
                    top_k=0,
                    max_new_tokens=cells,
                    min_new_tokens=cells,
                    use_cache=True,
                )
            assert out.shape == (len(start), cells + 1)

        def sample(weights: Weights, branches: Branches = none) -> None:
            ours.sample(branches, SamplingConfig(weights=weights), list(range(branches.images)))

        candidates = {weights: functools.partial(sample, weights) for weights in options.weights}
        seconds = alternate(candidates | {"peer": generate}, options.repeats)
        for weights in options.weights:
            rows.append(compared(f"batch {batch}, {weights}", seconds[weights], seconds["peer"]))
            rows[-1]["codes_per_s"] = batch * cells / rows[-1]["ours_s"]
    if options.prior is not None:
        rows += held_out(options.prior, options.codes, options.rows)
    report({"layers": DEPTH, "hidden_size": SIZE, "codes": cells, "repeats": options.repeats}, rows, options.json)


@torch.no_grad()
def held_out(path: str, codes: str, count: int) -> list[Row]:
    """Nats per code of the first ``count`` held-out images, for each type of weights."""
    prior, split = Prior.from_pretrained(path), CodeCache(codes).validation
    assert isinstance(prior.network, CausalTransformer), f"{path}: expected a causal transformer"
    places = torch.arange(min(count, len(split)))
    indices = split.read(places)
    context = prior.conditions(prior.conditions.read(split, places), len(places))
    rows: list[Row] = []
    for weights in get_args(Weights):
        nats = prior.network.decoded_nats(indices.flatten(1), context, weights).mean().item() / indices[0].numel()
        rows.append({"name": f"held out, {weights}", "nats_per_code": nats})
        rows[-1]["above_float32"] = nats - rows[0]["nats_per_code"]
    return rows


if __name__ == "__main__":
    main()
