"""Does a VQ-GAN train as well in bf16 as in float32?

python -m benchmarks.vqgan_precision [--steps 1000] [--dir runs/precision] [--features RUN] [--json FILE]

Trains `vqgan_cifar10.yaml` in both precisions from the same weights, with batches of 64 and the discriminator from a
tenth of the run on. A non-finite value would stop a run. Needs a feature network (`twostage train-features cifar10`).
"""

import subprocess
import sys
from pathlib import Path

from benchmarks.reporting import parser, report
from twostage.core.runs.run_folder import read_metrics

CONFIG = Path(__file__).parents[1] / "configs" / "tokenizer" / "vqgan_cifar10.yaml"
SHOWN = ("psnr", "codebook_usage", "perplexity", "reconstruction")


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--steps", type=int, default=1000)
    arguments.add_argument("--dir", type=Path, default=Path("runs/precision"))
    arguments.add_argument("--features", type=Path, default=Path("runs/features_cifar10"))
    options = arguments.parse_args()
    rows = []
    for precision in ("no", "bf16"):
        run = options.dir / precision
        overrides = [f"run.dir={run}", "run.trackers=[]", "data.source=cifar10", "train.batch_size=64"]
        overrides += [f"train.mixed_precision={precision}", f"train.max_steps={options.steps}", "train.log_every=10"]
        overrides += [f"loss.perceptual.path={options.features}", "loss.adversarial.start=0.1"]
        overrides += [f"train.{what}_every={options.steps}" for what in ("validate", "checkpoint")]
        command = [sys.executable, "-m", "stage1_tokenizer.train_tokenizer", str(CONFIG), *overrides]
        ended = subprocess.run(command, check=False)  # one process each: Accelerate has one precision per process
        lines = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
        measured = next((line for line in reversed(lines) if line["split"] == "val"), {})
        row = {"name": precision, "finished": ended.returncode == 0, "steps": lines[-1]["step"] if lines else 0}
        rows.append(row | {name: measured.get(name) for name in SHOWN})
    report({"data": "CIFAR-10, re-encoded as JPEG", "batch_size": 64}, rows, options.json)


if __name__ == "__main__":
    main()
