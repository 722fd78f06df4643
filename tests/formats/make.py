"""python tests/formats/make.py CHECKOUT OUT: a small folder of everything that the twostage in CHECKOUT writes to disk.

Run when a format changes; the folders of earlier versions stay, and tests/test_formats.py reads them all.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

TOKENIZER = """
run: {dir: tokenizer, trackers: []}
data: {source: shapes, image_size: 8, num_images: 32}
model:
  latent_channels: 2
  backbone: {type: conv, channels: 2, channel_mult: [1, 1], num_res_blocks: [0, 0]}
  bottleneck: {type: vector, codebook_size: 8}
loss: {adversarial: {channels: 2, num_layers: 1, start: 0}}
train: {batch_size: 8, max_steps: 4, lr: 1.0e-2, checkpoint_every: 2, validate_every: 4, keep_checkpoints: 1,
        ema_decay: 0.9}
"""
PRIOR = """
run: {dir: prior, trackers: []}
codes: codes
model: {type: causal_transformer, hidden_size: 8, depth: 1, num_heads: 1, dropout: 0}
train: {batch_size: 8, max_steps: 4, lr: 1.0e-2, checkpoint_every: 4, validate_every: 4, keep_checkpoints: 1}
"""
COMMANDS = [
    ["train-tokenizer", "tokenizer.yaml"],
    ["encode", "tokenizer", "--out", "codes"],
    ["train-prior", "prior.yaml"],
    ["train-features", "shapes", "--image-size", "8", "--width", "2", "--epochs", "1", "--out", "features"],
    ["generate", "prior", "--num-images", "3", "--out", "generated"],
    ["generate", "prior", "--num-images", "3", "--format", "parquet", "--out", "generated_parquet"],
    ["evaluate", "tokenizer"],
    ["export", "prior", "--out", "pipeline"],
]
# Stops training right after the checkpoint of step 2, as a power failure would.
INTERRUPTED = """
import sys
from twostage.core.training.training_run import TrainingRun
from pipelines.cli import main
save = TrainingRun.save
def save_and_end(run, *args, **options):
    save(run, *args, **options)
    raise SystemExit(0)
TrainingRun.save = save_and_end
sys.argv = ["twostage", "train-tokenizer", "tokenizer.yaml", "run.dir=interrupted"]
main()
"""
# Stops encoding when its folder exists but holds no codes yet.
ENCODING = """
import sys
from pipelines.cli import main
from pipelines.encoding.partial_codes import PartialCodes
begin = PartialCodes.begin
def begin_and_stop(codes, *args):
    begin(codes, *args)
    raise SystemExit(0)
PartialCodes.begin = begin_and_stop
sys.argv = ["twostage", "encode", "tokenizer", "--out", "begun"]
main()
"""
UNREAD = ["losses.png", "worst.png", "typical.png", "evaluation.html", "grid.png", "samples", "README.md",
            "samples.png", "reconstructions.png", "tensorboard"]  # fmt: skip


def main() -> None:
    checkout, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    out.mkdir(parents=True)
    (out / "tokenizer.yaml").write_text(TOKENIZER, encoding="utf-8")
    (out / "prior.yaml").write_text(PRIOR, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(checkout), "LOCAL_WORLD_SIZE": "1000"}
    for words in [*(["-m", "pipelines.cli", *command] for command in COMMANDS), ["-c", INTERRUPTED], ["-c", ENCODING]]:
        subprocess.run([sys.executable, *words], cwd=out, env=environment, check=True)
    for name in UNREAD:  # images and reports, which no command reads
        for path in list(out.rglob(name)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main()
