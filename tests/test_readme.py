"""Run every command of the README, the tutorial and the pages about data and reliability, on little data."""

import io
import os
import re
import shlex
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from twostage.core.data.shapes import draw_shapes

REPOSITORY = Path(__file__).parents[1]
FEW = "data.num_images=320"
TINY = "train.max_steps=4 train.batch_size=8 train.warmup_steps=0 train.validate_every=2 train.checkpoint_every=2"
MADE = {
    "docs/data.md": [
        "inspect.png",
        "runs/tiles/reconstructions.png",
        "reconstructed/tiles/000000.tif",
        "generated/tiles_prior/images/000014.tif",
        "runs/tiles/evaluation/evaluation.html",
        "reconstructed/spots/000000.png",
    ],
    "docs/reliability.md": ["runs/limited/losses.png"],
    "README.md": [
        "generated/emoji/grid.png",
        "runs/demo/reconstructions.png",
        "runs/demo/generated/grid.png",
        "generated/ring/grid.png",
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
    ],
    "docs/tutorial.md": [
        "generated/first/grid.png",
        "generated/stars/images/000023.png",
        "runs/vqvae_shapes/reconstructions.png",
        "runs/vqvae_shapes/interpolations.png",
        "between.png",
        "inpainted/bottom/grid.png",
        "inpainted/mask/000003.png",
        "outpainted/below/grid.png",
        "outpainted/sides/grid.png",
        "runs/gpt_shapes/evaluation/evaluation.html",
        "compared/compare.html",
        "my_pipeline/onnx/encoder.onnx",
        "star.png",
        "my_images.png",
        "runs/mine/reconstructions.png",
        "generated/mine/grid.png",
    ],
}
"""For each document, some of the files that its commands write."""


def blocks(document: str) -> list[tuple[str, str]]:
    """The code blocks of a document: language (`bash` or `python`) and text."""
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    return re.findall(r"```(bash|python)\n(.*?)```", text, re.DOTALL)


def tiny_mnist(folder: Path) -> None:
    """Grey 28x28 images with labels 0 to 9, in the form of MNIST's parquet files."""
    folder.mkdir(parents=True)
    for split, count in {"train": 80, "test": 20}.items():
        images = []
        for image in draw_shapes(0, count, (28, 28), 1):
            file = io.BytesIO()
            Image.fromarray(image[0]).save(file, format="PNG")
            images.append({"bytes": file.getvalue(), "path": None})
        table = pa.table({"image": images, "label": np.arange(count) % 10})
        pa.parquet.write_table(table, folder / f"{split}.parquet")


def tiny(command: str) -> str:
    """The command with a shorter training; this checkout replaces the clone, and the page stops once it answers."""
    if command.startswith("git clone"):
        return ":"
    if command in ("make demo", "make demo-text"):
        settings = f"DEMO=$PWD/runs/demo DEMO_TEXT=$PWD/runs/demo_text DEMO_DATA={FEW}"
        return f'{command.replace("make ", f"make -C {REPOSITORY} ")} {settings} DEMO_OPTIONS="{TINY}"'
    if command.startswith("pip install"):  # do not change the shared environment
        return f"(cd {REPOSITORY} && {command} --dry-run --quiet)"
    if command.startswith("make "):  # the target may be followed by && and another command
        return command.replace("make ", f"make -C {REPOSITORY} ", 1)
    if command.startswith("twostage app"):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        ask = f"python -c 'from urllib.request import urlopen; urlopen(\"http://127.0.0.1:{port}\")' 2>/dev/null"
        return f"{command} --port {port} & until {ask}; do kill -0 $!; sleep 1; done; kill $!; wait $!"
    if command.startswith("twostage doctor"):
        return f"{command} --time-limit 600"  # other tests may run at the same time
    if re.match(r"twostage evaluate runs/(maskgit|gpt)", command):
        return f"{command} --num-samples 40"
    if re.search(r"train[-_]tokenizer|twostage sweep", command):
        return f"{command} {TINY} {FEW}"
    return f"{command} {TINY}" if re.search(r"train[-_]prior", command) else command


def commands(document: str) -> Iterator[str]:
    """All commands of a document, each for bash."""
    for language, block in blocks(document):
        if language == "python":
            yield f"python - <<'END'\n{block}END"
        else:
            yield from map(tiny, block.replace("\\\n", " ").strip().splitlines())


@pytest.mark.readme
@pytest.mark.parametrize("document", MADE)
def test_every_command_runs(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: Callable[..., str]):
    """Plain `twostage` commands run in this process, which saves their imports; all others run in bash."""
    tiny_mnist(tmp_path / "data" / "mnist")
    for name in ("configs", "models", ".venv"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TWOSTAGE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PATH", f"{REPOSITORY / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}")  # as if activated
    for command in commands(document):
        if command.startswith("twostage ") and not re.search(r"[&|;<>$]", command):
            works(*shlex.split(command, comments=True)[1:])
            continue
        done = subprocess.run(
            ["bash", "-c", f"set -euo pipefail\n{command}"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    for made in MADE[document]:
        assert Path(made).is_file(), made


def test_the_chinese_readme_has_the_same_commands_and_links():
    """Then running one document tests both; only comments are translated."""
    english, chinese = "README.md", "README.zh.md"

    def code(document: str) -> list[tuple[str, str]]:
        return [(language, re.sub(r" *#.*", "", block)) for language, block in blocks(document)]

    def links(document: str) -> list[str]:
        return sorted(re.findall(r"\]\(([^)\s]+)\)", (REPOSITORY / document).read_text(encoding="utf-8")))

    assert code(chinese) == code(english)
    assert set(links(chinese)) - {english} == set(links(english)) - {chinese}


def test_the_readme_lists_every_package():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    folders = [path.name for path in REPOSITORY.iterdir() if path.is_dir() and (path / "__init__.py").exists()]
    assert all(f"{folder}/" in text for folder in folders)
