"""`benchmarks.gpu` runs in its small size, on a CPU too."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_every_part_of_the_benchmark_runs(tmp_path):
    file, environment = tmp_path / "gpu.json", os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--tiny", "--json", file], cwd=Path(__file__).parents[1],
                   env=environment, check=True, timeout=300)  # fmt: skip
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    found = {row["name"]: row for row in rows}
    assert found["resumed run"]["note"] == "same bits"
    for part in (
        "train VQ-GAN",
        "train GPT",
        "sample GPT",
        "sample masked",
        "sample parallel",
        "sample scale",
        "sample PixelCNN",
        "encode",
        "decode",
        "quantizer",
    ):
        assert all(row["rate"] > 0 for name, row in found.items() if name.startswith(part))
        assert any(name.startswith(part) for name in found)
    notes = [row["note"] for row in rows if row["name"] == "sample GPT tiny"]
    assert {note.endswith("no CUDA graph") for note in notes} == {True, False}
