"""A folder of generated images does not depend on who makes it, and no image is made twice."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from messages import assert_names
from PIL import Image

from stage2_prior.sampling_config import SamplingConfig
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images


@pytest.fixture(scope="module")
def folder(runs, twostage, tmp_path_factory) -> Path:
    """Twenty images."""
    out = tmp_path_factory.mktemp("generated") / "images20"
    ended = twostage("generate", runs.prior, "--num-images", 20, "--seed", 3, "--out", out)
    assert ended.code == 0, ended.err
    assert f"20 images: {out / 'images'}" in ended.out
    return out


@pytest.fixture
def generate(runs, twostage, tmp_path):
    """``generate("--seed", 3)``: the folder that the command writes."""

    def generate(*options: object) -> Path:
        ended = twostage("generate", runs.prior, "--out", tmp_path / "out", *options)
        assert ended.code == 0, ended.err
        return tmp_path / "out"

    return generate


def stored_images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


def modified(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "images").iterdir()}


def test_the_files_are_the_images_of_the_pipeline(folder, pipeline):
    expected = pipeline(num_images=20, seed=3, output_type="np").images
    assert list(stored_images(folder)) == [f"{i:06d}.png" for i in range(20)]
    for i, image in enumerate(expected):
        assert np.array_equal(np.asarray(Image.open(folder / "images" / f"{i:06d}.png")), image)


def test_settings_describe_the_images(folder, pipeline):
    settings = json.loads((folder / "settings.json").read_text())
    names = pipeline.class_names
    assert len(settings.pop("weights_sha256")) == 64
    assert settings == {
        "format_version": 1,
        "tokenizer": pipeline.tokenizer.content_hash(),
        "seed": 3,
        "class_names": None,
        **SamplingConfig().model_dump(mode="json"),
        "file_format": "png",
        "num_images": 20,
        "classes": [names[i % len(names)] for i in range(20)],
    }


def test_the_grid_shows_each_image_enlarged(folder):
    with Image.open(folder / "grid.png") as grid:
        rows, cell, caption = 3, 6 * 16 + 4, 18
        assert grid.size == (8 * cell + 4, rows * (cell + caption) + 4)
        x, y = 4 + 3 * cell, 4 + 1 * (cell + caption)  # image 11
        tile = np.asarray(grid.crop((x, y, x + 96, y + 96)))
    image = np.asarray(Image.open(folder / "images" / "000011.png"))
    assert np.array_equal(tile, image.repeat(6, 0).repeat(6, 1))


@pytest.mark.parametrize("batch_size", [3, 8, 32])
def test_the_batch_size_changes_no_file(folder, generate, batch_size):
    assert stored_images(generate("--num-images", 20, "--seed", 3, "--batch-size", batch_size)) == stored_images(folder)


def test_existing_images_are_kept_when_more_are_made(folder, generate):
    out = generate("--num-images", 5, "--seed", 3)
    first, before = stored_images(out), modified(out)
    assert first == dict(list(stored_images(folder).items())[:5])
    assert stored_images(generate("--num-images", 20, "--seed", 3)) == stored_images(folder)
    assert {name: time for name, time in modified(out).items() if name in before} == before


def test_only_missing_images_are_made(generate):
    out = generate("--num-images", 12, "--batch-size", 8)
    complete, before = stored_images(out), modified(out)
    for name in ("000002.png", "000003.png", "000009.png"):
        (out / "images" / name).unlink()
        del before[name]
    assert stored_images(generate("--num-images", 12, "--batch-size", 8)) == complete
    assert {name: time for name, time in modified(out).items() if name in before} == before


def test_a_class_can_be_asked_for(generate, pipeline):
    out = generate("--num-images", 3, "--class-name", "star", "--class-name", "ring")
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["class_names"], settings["classes"]) == (["star", "ring"], ["star", "ring", "star"])
    expected = pipeline(num_images=3, class_names=["star", "ring"], output_type="np").images
    assert np.array_equal(np.asarray(Image.open(out / "images" / "000001.png")), expected[1])


def test_a_pipeline_folder_gives_the_same_images(folder, pipeline, twostage, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    out = tmp_path / "out"
    ended = twostage("generate", tmp_path / "pipeline", "--num-images", 20, "--seed", 3, "--out", out)
    assert ended.code == 0, ended.err
    assert stored_images(out) == stored_images(folder)
    assert (out / "settings.json").read_bytes() == (folder / "settings.json").read_bytes()


def test_damaged_images_are_made_again(generate):
    out = generate("--num-images", 6)
    complete, before = stored_images(out), modified(out)
    damaged = {"000001.png": complete["000001.png"][:40], "000004.png": b"no image"}
    for name, content in damaged.items():
        (out / "images" / name).write_bytes(content)
        del before[name]
    Image.new("RGB", (8, 8)).save(out / "images" / "000005.png")  # of another size
    del before["000005.png"]
    assert stored_images(generate("--num-images", 6)) == complete
    assert {name: time for name, time in modified(out).items() if name in before} == before


def test_it_reports_how_many_were_kept(runs, twostage, tmp_path):
    words = ("generate", runs.prior, "--out", tmp_path / "out", "--num-images")
    assert re.search(r"4 images: .*images \([\d.]+ per second\)", twostage(*words, 4).out)
    assert re.search(r"6 images: .*images \(4 were already there, [\d.]+ per second\)", twostage(*words, 6).out)
    assert "6 images: " in (again := twostage(*words, 6)).out
    assert "(6 were already there)" in again.out


def test_parquet_holds_the_same_images_as_a_data_source(folder, generate, pipeline, monkeypatch):
    monkeypatch.setattr("pipelines.files.image_files.SHARD_IMAGES", 8)
    out = generate("--num-images", 20, "--seed", 3, "--format", "parquet")
    assert sorted(stored_images(out)) == [f"shard_0000{i}.parquet" for i in range(3)]
    assert (out / "grid.png").read_bytes() == (folder / "grid.png").read_bytes()
    config = DataConfig(source=str(out / "images"), image_size=16, validation_share=0.1)
    data = load_images(config)
    assert data.class_names == pipeline.class_names
    read = {bytes(image.numpy().tobytes()): label for s in data.splits.values() for image, label in rows(s)}
    expected = pipeline(num_images=20, seed=3, output_type="pt")
    made = zip(expected.images, expected.labels, strict=True)
    assert read == {bytes(image.numpy().tobytes()): label for image, label in made}


def test_intact_parquet_shards_are_kept(generate, monkeypatch):
    monkeypatch.setattr("pipelines.files.image_files.SHARD_IMAGES", 4)
    out = generate("--num-images", 10, "--format", "parquet")
    complete, before = stored_images(out), modified(out)
    shards = sorted(before)
    (out / "images" / shards[0]).write_bytes(complete[shards[0]][:-30])
    (out / "images" / shards[1]).unlink()
    assert stored_images(generate("--num-images", 10, "--format", "parquet")) == complete
    assert modified(out)[shards[2]] == before[shards[2]]
    generate("--num-images", 12, "--format", "parquet")  # the last one was short
    assert [pq.read_metadata(out / "images" / shard).num_rows for shard in shards] == [4, 4, 4]


def test_a_variational_autoencoder_generates_too(variational, twostage, tmp_path):
    ended = twostage("generate", variational("class_gaussian"), "--num-images", 9, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert len(stored_images(tmp_path / "out")) == 9
    refused = twostage("generate", variational("gaussian"), "--top-k", 3, "--out", tmp_path / "other")
    assert refused.code == 2
    assert_names(refused.err, "top_k 3", "variational autoencoder", "Omit top_k")


def rows(split):
    """(image, label) of each row."""
    every = torch.arange(len(split))
    return zip(split.read(every), split.read_labels(every).tolist(), strict=True)
