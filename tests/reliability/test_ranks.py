"""Several processes: weights that differ between them are detected, and unequal shares of work do not hang."""

import json
import time
from pathlib import Path

import pytest

from benchmarks.reliability.processes import Command, run

CHANGE = Path(__file__).with_name("change_one_codebook.py")


def test_processes_with_different_codebooks_are_detected(configs, tmp_path):
    bottleneck = "model.bottleneck={type: vector, codebook_size: 16, codebook: learned}"
    words = [CHANGE, configs / "tokenizer.yaml", "run.dir=run", "train.max_steps=20", "train.checkpoint_every=4",
             "train.validate_every=20", bottleneck]  # fmt: skip
    command = Command(words, tmp_path, processes=2)
    assert command.wait() != 0
    assert 'Traceback (most recent call last):\n  File "/' not in command.said.split("ChildFailedError")[0]
    assert command.said.count("error: ") == 1
    assert "step 8: the processes no longer have the same model bottleneck.codebook" in command.said
    assert "last good checkpoint in run/checkpoints" in command.said
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step_*")] == ["step_00000004"]


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_images_than_processes_could_share(runs, tmp_path, count):
    words = ["-m", "pipelines.generate", runs.prior, "--num-images", count, "--batch-size", 1, "--out", "out"]
    start = time.monotonic()
    run(words, tmp_path, processes=2)
    assert time.monotonic() - start < 90
    assert len(list((tmp_path / "out/images").glob("*.png"))) == count


def test_held_out_images_that_cannot_be_shared_equally(configs, runs, tmp_path):
    """65 images in batches of 16: three batches for one process, two for the other, and the last holds one image."""
    from benchmarks.reliability.drawn_images import draw_images

    draw_images(tmp_path / "images/train", 64, 16)
    draw_images(tmp_path / "images/val", 65, 16)
    few = ["train.max_steps=2", "train.validate_every=1", "train.checkpoint_every=2"]
    source = f"data.source={tmp_path / 'images'}"
    found = []
    for processes in (2, 1):
        folder = tmp_path / str(processes)
        folder.mkdir()
        words = ["-m", "stage1_tokenizer.train_tokenizer", configs / "tokenizer.yaml", "run.dir=run", *few, source]
        run([*words, "data.num_images=null"], folder, processes)
        run(["-m", "pipelines.encode_dataset", "run", "--out", "codes"], folder, processes)
        prior = ["-m", "stage2_prior.train_prior", configs / "prior.yaml", "run.dir=prior", "codes=codes", *few]
        run(prior, folder, processes)
        lines = [json.loads(line) for name in ("run", "prior")
                 for line in (folder / name / "metrics.jsonl").read_text().splitlines()]  # fmt: skip
        found.append([line["loss"] for line in lines if line["split"] == "val"])
    assert len(found[0]) == 4
    assert found[0] == pytest.approx(found[1], rel=1e-4)
