"""A folder of generated images: the same whoever makes it, and never made twice."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stage2_prior.sampling import SamplingConfig


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


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


def modified(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "images").iterdir()}


def test_the_files_are_the_images_of_the_pipeline(folder, pipeline):
    expected = pipeline(num_images=20, seed=3, output_type="np").images
    assert list(pictures(folder)) == [f"{i:06d}.png" for i in range(20)]
    for i, image in enumerate(expected):
        assert np.array_equal(np.asarray(Image.open(folder / "images" / f"{i:06d}.png")), image)


def test_settings_say_how(folder, pipeline):
    settings = json.loads((folder / "settings.json").read_text())
    names = pipeline.class_names
    assert len(settings.pop("weights_sha256")) == 64
    assert settings == {
        "tokenizer": pipeline.tokenizer.content_hash(),
        "seed": 3,
        "class_names": None,
        **SamplingConfig().model_dump(mode="json"),
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
    assert pictures(generate("--num-images", 20, "--seed", 3, "--batch-size", batch_size)) == pictures(folder)


def test_more_images_keep_the_first(folder, generate):
    out = generate("--num-images", 5, "--seed", 3)
    first, before = pictures(out), modified(out)
    assert first == dict(list(pictures(folder).items())[:5])
    assert pictures(generate("--num-images", 20, "--seed", 3)) == pictures(folder)
    assert {name: time for name, time in modified(out).items() if name in before} == before


def test_only_missing_images_are_made(generate):
    out = generate("--num-images", 12, "--batch-size", 8)
    complete, before = pictures(out), modified(out)
    for name in ("000002.png", "000003.png", "000009.png"):
        (out / "images" / name).unlink()
        del before[name]
    assert pictures(generate("--num-images", 12, "--batch-size", 8)) == complete
    assert {name: time for name, time in modified(out).items() if name in before} == before


def test_a_class_can_be_asked_for(generate, pipeline):
    out = generate("--num-images", 3, "--class-name", "star", "--class-name", "ring")
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["class_names"], settings["classes"]) == (["star", "ring"], ["star", "ring", "star"])
    expected = pipeline(num_images=3, class_names=["star", "ring"], output_type="np").images
    assert np.array_equal(np.asarray(Image.open(out / "images" / "000001.png")), expected[1])


def test_a_pipeline_folder_does_as_well(folder, pipeline, twostage, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    out = tmp_path / "out"
    ended = twostage("generate", tmp_path / "pipeline", "--num-images", 20, "--seed", 3, "--out", out)
    assert ended.code == 0, ended.err
    assert pictures(out) == pictures(folder)
    assert (out / "settings.json").read_bytes() == (folder / "settings.json").read_bytes()
