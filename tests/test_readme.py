"""Every command of the README, as it stands there, on tiny data and for a few steps."""

import io
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from core.shapes import draw_shapes

REPOSITORY = Path(__file__).parents[1]
TINY = "train.max_steps=4 train.batch_size=8 train.warmup_steps=0 train.validate_every=2 train.checkpoint_every=2"
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def tiny_mnist(folder: Path) -> None:
    """Grey 28x28 pictures with labels 0 to 9, as MNIST's parquet files have them."""
    folder.mkdir(parents=True)
    for split, count in {"train": 80, "test": 20}.items():
        images = []
        for picture in draw_shapes(0, count, (28, 28), 1):
            file = io.BytesIO()
            Image.fromarray(picture[0]).save(file, format="PNG")
            images.append({"bytes": file.getvalue(), "path": None})
        table = pa.table({"image": images, "label": np.arange(count) % 10})
        pa.parquet.write_table(table, folder / f"{split}.parquet")


def tiny(command: str) -> str:
    """The command, shortened where it trains; the clone is this checkout."""
    if command.startswith("git clone"):
        return ":"
    if command == "make demo":
        return f'make -C {REPOSITORY} demo DEMO=$PWD/runs/demo DEMO_OPTIONS="{TINY}"'
    if command.startswith("twostage evaluate runs/maskgit"):
        return f"{command} --num-samples 40"
    return f"{command} {TINY}" if re.search(r"train[-_](tokenizer|prior)", command) else command


def script() -> str:
    lines = ["set -euo pipefail"]
    for language, block in BLOCKS:
        if language == "python":
            lines.append(f"python - <<'END'\n{block}END")
        else:
            lines += [tiny(line) for line in block.strip().splitlines()]
    return "\n".join(lines)


@pytest.mark.readme
def test_every_command_of_the_readme_runs(tmp_path: Path):
    tiny_mnist(tmp_path / "data" / "mnist")
    for name in ("configs", ".venv"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    environment = os.environ | {"TWOSTAGE_DATA": str(tmp_path / "data")}
    done = subprocess.run(
        ["bash", "-c", script()], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for made in (
        "runs/demo/reconstructions.png",
        "runs/demo/generated/grid.png",
        "runs/demo/prior/losses.png",
        "runs/vqvae_mnist/reconstructions.png",
        "runs/vqgan_mnist/evaluation/worst.png",
        "runs/maskgit_mnist/evaluation/samples.png",
        "codes/vqvae_mnist_cropped/manifest.json",
        "generated/sevens/grid.png",
        "generated/maskgit/grid.png",
        "inspect.png",
        "seven.png",
        "my_pipeline/pipeline.json",
    ):
        assert (tmp_path / made).is_file(), made


def test_the_readme_names_every_verb_and_every_folder():
    from pipelines.cli import VERBS

    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert all(f"`{verb}`" in text for verb in VERBS)
    folders = [path.name for path in REPOSITORY.iterdir() if path.is_dir() and (path / "__init__.py").exists()]
    assert all(f"{folder}/" in text for folder in folders)
