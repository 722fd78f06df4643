"""How fast is sampling from the causal transformer, beside `transformers`' GPT-2 with its cache?

python -m benchmarks.sampling [--batch-sizes 1 8 32] [--repeats 3] [--json FILE]

Both have 8 layers of 512, 512 codes, 256 positions, float32, random weights of the same sizes; both draw from the full
distribution.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.reporting import alternate, compared, parser, report
from core.training import share_cores
from stage2_prior.causal_transformer import CausalTransformer, CausalTransformerConfig
from stage2_prior.sampling import SamplingConfig

CODES, GRID, SIZE, DEPTH, HEADS = 512, (16, 16), 512, 8, 8


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    arguments.add_argument("--repeats", type=int, default=3)
    options = arguments.parse_args()
    share_cores()
    torch.manual_seed(0)
    ours = CausalTransformer(
        CausalTransformerConfig(hidden_size=SIZE, depth=DEPTH, num_heads=HEADS), CODES, GRID, num_classes=0
    ).eval()
    torch.nn.init.normal_(ours.head.weight, std=0.02)
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
        none = torch.zeros(batch, dtype=torch.long)

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

        def sample(labels: torch.Tensor = none) -> None:
            ours.sample(labels, SamplingConfig(), list(range(len(labels))))

        seconds = alternate({"ours": sample, "peer": generate}, options.repeats)
        rows.append(compared(f"batch {batch}", seconds["ours"], seconds["peer"]))
        rows[-1]["codes_per_s"] = batch * cells / rows[-1]["ours_s"]
    report({"layers": DEPTH, "hidden_size": SIZE, "codes": cells, "repeats": options.repeats}, rows, options.json)


if __name__ == "__main__":
    main()
