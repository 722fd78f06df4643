"""How much slower is sampling from a caption than from a class?

python -m benchmarks.caption_sampling [--batch-sizes 1 8] [--repeats 5] [--json FILE]

Each prior is built twice with the same sizes: conditioned on 10 classes, and on captions of 32 tokens, which its
encoder reads anew for every call. Both sample 16x16 codes out of 512 without guidance, with random weights. The ratio
is the speed by caption, as a share of the speed by class.
"""

from functools import partial

import torch

from benchmarks.reporting import alternate, compared, parser, report
from stage2_prior.codes import TokenizerReference
from stage2_prior.networks.causal_transformer import CausalTransformerConfig
from stage2_prior.networks.masked_transformer import MaskedTransformerConfig
from stage2_prior.networks.network import NetworkConfig
from stage2_prior.networks.pixelcnn import PixelCNNConfig
from stage2_prior.prior import Prior, PriorConfig, PriorLossConfig
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.conditions.class_condition import ClassConditionConfig
from twostage.core.conditions.condition import ConditionConfig
from twostage.core.conditions.text_condition import TextConditionConfig
from twostage.core.conditions.vocabulary import Vocabulary
from twostage.core.machine.processes import share_cores

GRID, CODES, LENGTH = (16, 16), 512, 32
WORDS = tuple(f"word{i}" for i in range(100))
NETWORKS: dict[str, NetworkConfig] = {
    "causal transformer": CausalTransformerConfig(hidden_size=256, depth=6, num_heads=4, positions="relative"),
    "masked transformer": MaskedTransformerConfig(hidden_size=256, depth=6, num_heads=4, positions="relative"),
    "PixelCNN": PixelCNNConfig(),
}


def build(network: NetworkConfig, condition: ConditionConfig, class_names: list[str] | None) -> Prior:
    """A prior with random weights."""
    config = PriorConfig(
        model=network,
        conditions=[condition],
        loss=PriorLossConfig(),
        codebook_size=CODES,
        grid=GRID,
        class_names=class_names,
        image_size=(64, 64),
        channels=3,
        tokenizer=TokenizerReference(hash="0" * 64, path="none"),
        unigram_nats_per_code=6.0,
    )
    return Prior(config).eval()


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    arguments.add_argument("--repeats", type=int, default=5)
    options = arguments.parse_args()
    share_cores()
    torch.manual_seed(0)
    text = TextConditionConfig(units="words", max_length=LENGTH, vocabulary=Vocabulary(units="words", entries=WORDS))
    names = [f"class {i}" for i in range(10)]
    rows = []
    for name, network in NETWORKS.items():
        by_class = build(network, ClassConditionConfig(num_classes=len(names)), names)
        by_caption = build(network, text, None)
        for batch in options.batch_sizes:
            seeds, labels = list(range(batch)), {"class": torch.arange(batch) % 10}
            captions = {"text": by_caption.parse("text", [" ".join(WORDS[i : i + LENGTH]) for i in range(batch)])}
            runs = {
                "class": partial(by_class.sample, labels, SamplingConfig(), seeds),
                "caption": partial(by_caption.sample, captions, SamplingConfig(), seeds),
            }
            seconds = alternate(runs, options.repeats)
            rows.append(compared(f"{name}, batch {batch}", seconds["caption"], seconds["class"]))
    report({"cells": GRID[0] * GRID[1], "tokens": LENGTH, "repeats": options.repeats}, rows, options.json)


if __name__ == "__main__":
    main()
