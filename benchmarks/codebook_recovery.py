"""Does a collapsed codebook recover?

python -m benchmarks.codebook_recovery [--steps 500] [--batch-size 128] [--only ema ...] [--dir runs/recovery]
    [--json FILE]

For every codebook quantizer, all codes are set to the same vector far from the data. For Gumbel-softmax, the encoder
scores one code 100 higher than the others, so that no other code has a gradient. Then a small CIFAR-10 tokenizer
(`vqvae_cifar10.yaml` with a small backbone and AdamW) trains from there with the default settings. The table shows the
fraction of codes that the 10,000 test images use after half of the steps and at the end, and the final PSNR.
"""

from pathlib import Path

import torch

from benchmarks.reporting import parser, report
from stage1_tokenizer import tokenizer_training
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.bottlenecks.gumbel_softmax import GumbelSoftmax
from stage1_tokenizer.bottlenecks.projected_codebook import ProjectedCodebook
from stage1_tokenizer.bottlenecks.vector_quantizer import VectorQuantizer
from stage1_tokenizer.tokenizer_training import TokenizerConfig
from twostage.core.config.sections import load_config
from twostage.core.runs.run_folder import read_metrics

CONFIG = Path(__file__).parents[1] / "configs" / "tokenizer" / "vqvae_cifar10.yaml"
SMALL = [
    "model.backbone={type: conv, channels: 16, channel_mult: [1, 2, 4], num_res_blocks: [0, 0, 1]}",
    "train.optimizer=adamw",
    "train.lr=1.0e-3",
]
QUANTIZERS = {
    "ema": ["model.bottleneck={type: vector, codebook_size: 512}"],
    "learned": ["model.bottleneck={type: vector, codebook_size: 512, codebook: learned}"],
    "simvq": ["model.bottleneck={type: vector, codebook_size: 512, codebook: simvq}"],
    "l2": ["model.bottleneck={type: vector, codebook_size: 512, l2_normalize: true}", "model.latent_channels=8"],
    "rotation": ["model.bottleneck={type: vector, codebook_size: 512, gradient: rotation}"],
    "residual": ["model.bottleneck={type: residual, depth: 2, codebook_size: 512}"],
    "multi_scale": ["model.bottleneck={type: multi_scale, codes: {type: vector, codebook_size: 512}}"],
    "diveq": ["model.bottleneck={type: diveq, codebook_size: 512}"],
    "index_backpropagation": ["model.bottleneck={type: index_backpropagation, codebook_size: 512}"],
    "projected": ["model.bottleneck={type: projected, codebook_size: 512}"],
    "gumbel_softmax": ["model.bottleneck={type: gumbel_softmax, codebook_size: 512}"],
    "product": ["model.bottleneck={type: product, groups: 2, each: {type: vector, codebook_size: 512}}"],
}


@torch.no_grad()
def collapse(autoencoder: Autoencoder, *_: object) -> None:
    """Replaces the k-means start: every code of every codebook is the same distant vector."""
    for quantizer in autoencoder.bottleneck.modules():
        if isinstance(quantizer, VectorQuantizer):
            far = torch.full_like(quantizer.codebook, 100.0)
            quantizer.codebook.copy_(torch.nn.functional.normalize(far, dim=1) if quantizer.l2_normalize else far)
            if quantizer.kind == "ema":
                quantizer.ema_sums.copy_(quantizer.codebook)
            if isinstance(quantizer, ProjectedCodebook):
                quantizer.projected.copy_(quantizer.codebook)  # its bridge adds nothing yet
        elif isinstance(quantizer, GumbelSoftmax):
            last = [each for each in autoencoder.encoder.modules() if isinstance(each, torch.nn.Conv2d)][-1]
            assert last.bias is not None
            last.bias[0] = 100.0


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--steps", type=int, default=500)
    arguments.add_argument("--batch-size", type=int, default=128)
    arguments.add_argument("--only", nargs="+", choices=QUANTIZERS, default=list(QUANTIZERS))
    arguments.add_argument("--dir", type=Path, default=Path("runs/recovery"))
    options = arguments.parse_args()
    tokenizer_training.initialize_codebook = collapse
    rows = []
    for name in options.only:
        overrides = QUANTIZERS[name]
        length = [f"train.max_steps={options.steps}", f"train.batch_size={options.batch_size}"]
        length += [f"train.validate_every={options.steps // 2}", f"train.checkpoint_every={options.steps}"]
        start = [
            "run.trackers=[]",
            "train.lr_schedule=constant",
            "data.source=cifar10",
            f"run.dir={options.dir / name}",
        ]
        config = load_config(TokenizerConfig, CONFIG, [*SMALL, *overrides, *length, *start])
        tokenizer_training.train(config)
        lines = [line for line in read_metrics(options.dir / name / "metrics.jsonl") if line["split"] == "val"]
        usage = {f"usage_{line['step']}": line["codebook_usage"] for line in lines}
        rows.append({"name": name, **usage, "perplexity": lines[-1]["perplexity"], "psnr": lines[-1]["psnr"]})
    report({"data": "CIFAR-10, re-encoded as JPEG", "batch_size": options.batch_size}, rows, options.json)


if __name__ == "__main__":
    main()
