"""VAEs whose encoder and decoder see the caption, the vector or the map of each image, through the commands."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from messages import assert_names, refuses
from PIL import Image
from safetensors.torch import load_file

from pipelines.drawing.two_stage import TwoStagePipeline
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.tokenizer_training import TokenizerConfig
from twostage.core.config.sections import parse_config
from twostage.core.data.shapes import draw_shapes
from twostage.core.images.conversion import to_float, to_uint8

WORDS = {"type": "text", "units": "words", "depth": 1}


def config_of(folder, condition, **data):
    document = {
        "run": {"dir": str(folder / "run"), "trackers": []},
        "data": {"source": "captioned_shapes", "image_size": 16, "num_images": 96} | data,
        "model": {
            "latent_channels": 4,
            "backbone": {"type": "conv", "channels": 8, "channel_mult": [1, 1], "num_res_blocks": [0, 0]},
            "bottleneck": {"type": "gaussian"},
            "condition": condition,
        },
        "train": {"batch_size": 16, "max_steps": 4, "lr": 1e-2, "validate_every": 2, "checkpoint_every": 2},
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def captioned(works, tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    works("train-tokenizer", config_of(folder, WORDS))
    return folder / "run"


@pytest.fixture(scope="module")
def vectors(works, tmp_path_factory):
    """A VAE of shapes that sees a vector of three numbers, and its table."""
    folder = tmp_path_factory.mktemp("vectors")
    for split, count in {"train": 64, "test": 16}.items():
        pixels = draw_shapes(0, count, (16, 16), 3)
        files = []
        for image in pixels:
            Image.fromarray(image.transpose(1, 2, 0)).save(opened := io.BytesIO(), format="PNG")
            files.append({"bytes": opened.getvalue()})
        features = [[float(number), number / 7, 1.0] for number in range(count)]
        (folder / "data").mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": files, "features": features}), folder / "data" / f"{split}.parquet")
    data = {"source": str(folder / "data"), "vector_column": "features"}
    works("train-tokenizer", config_of(folder, "vector", **data))
    return folder / "run"


def test_training_draws_prompts_and_keeps_the_vocabulary(captioned):
    assert {path.name for path in (captioned / "samples").iterdir()} == {
        f"step_0000000{step}{name}.png" for step in (2, 4) for name in ("", "_prompts")
    }
    condition = json.loads((captioned / "model" / "config.json").read_text())["model"]["condition"]
    assert "turquoise" in condition["vocabulary"]["entries"]
    assert len(condition["examples"]) > 8
    assert Autoencoder.from_pretrained(captioned).config.model.condition.vocabulary is not None


def test_a_stopped_run_ends_as_if_uninterrupted(captioned, twostage, works, tmp_path):
    config = config_of(tmp_path, WORDS)
    assert twostage("train-tokenizer", config, "--time-limit", "0").code == 75
    works("train-tokenizer", config)
    for name in ("model.safetensors", "optimizer.safetensors"):
        first, second = (
            load_file(run / "checkpoints" / "step_00000004" / name) for run in (captioned, tmp_path / "run")
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_prompts_are_drawn(captioned, works, tmp_path):
    prompts = ["a small red star in the centre, on black", "a large blue circle at the top left, on white"]
    words = ["generate", captioned, "--num-images", 10, "--seed", 3, "--prompt", prompts[0], "--prompt", prompts[1]]
    works(*words, "--out", tmp_path / "all")
    works(*words, "--batch-size", 3, "--out", tmp_path / "parts")
    for name in ("000000.png", "000009.png"):
        first, second = ((tmp_path / folder / "images" / name).read_bytes() for folder in ("all", "parts"))
        assert first == second, "an image depends on its prompt, the seed and its number alone"
    assert json.loads((tmp_path / "all" / "settings.json").read_text())["prompts"] == prompts
    pipeline = TwoStagePipeline.from_pretrained(captioned)
    drawn = pipeline(2, prompt=prompts, seed=3, output_type="pt")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "all" / "images" / "000001.png")).transpose(2, 0, 1),
                          drawn.images[1].numpy())  # fmt: skip
    swapped = pipeline(2, prompt=prompts[::-1], seed=3, output_type="pt").images
    assert not torch.equal(swapped, drawn.images)
    assert pipeline(3).prompts == list(pipeline.tokenizer.example_prompts()[:3]), "without a prompt: its examples"
    pipeline.save_pretrained(tmp_path / "pipeline")
    again = TwoStagePipeline.from_pretrained(tmp_path / "pipeline")(2, prompt=prompts, seed=3, output_type="pt")
    assert torch.equal(again.images, drawn.images)


def test_reconstructions_get_what_encoder_and_decoder_see(captioned, works, tmp_path):
    pipeline, images = TwoStagePipeline.from_pretrained(captioned), torch.from_numpy(draw_shapes(0, 3, (16, 16), 3))
    prompts = ["a red star", "a blue ring", "a red star"]
    found = pipeline.reconstruct(images, prompts=prompts)
    model = pipeline.tokenizer
    expected = to_uint8(model.reconstruct(to_float(images), model.parse("text", prompts)))
    assert (found.int() - expected.int()).abs().max() <= 1
    assert torch.equal(pipeline.interpolate(images[0], images[2], 2, prompt="a red star"), found[[0, 2]])
    works("reconstruct", captioned, "--out", tmp_path / "sheet.png")
    works("evaluate", captioned, "--num-images", 12)
    with refuses("model.condition 'text'", "no captions", "one for every image", "Use images with captions"):
        pipeline.reconstruct(images)
    with refuses("prompt", "got 1", "each of 3 images"):
        pipeline.reconstruct(images, prompts=prompts[:1])
    with refuses("vector", "without vector", "Omit"):
        pipeline.reconstruct(images, vectors=[[1.0]] * 3)


def test_vectors(vectors, works, tmp_path):
    np.save(tmp_path / "two.npy", np.array([[0, 0, 1], [60, 8, 1]], dtype=np.float32))
    words = ["generate", vectors, "--num-images", 4, "--vector", tmp_path / "two.npy", "--out", tmp_path / "drawn"]
    works(*words)
    works("reconstruct", vectors, "--out", tmp_path / "sheet.png")
    pipeline = TwoStagePipeline.from_pretrained(vectors)
    model, noise = pipeline.tokenizer, torch.zeros(2, *pipeline.tokenizer.latent_shape)
    near, far = model.sample_from(noise, model.parse("vector", [[0, 0, 1], [60, 8, 1]]))
    assert (near - far).abs().max() > 1e-3
    with refuses("vector", "decoder of this model sees one for every image", "--vector"):
        pipeline(2)
    with refuses("vector", "3 finite numbers", "(2,)"):
        pipeline(2, vectors=[[1, 2]])
    with refuses("prompt", "without text", "Omit"):
        pipeline(2, prompt="a star")


def test_maps(works, tmp_path):
    works("train-tokenizer", config_of(tmp_path, {"type": "map", "depth": 1}))
    pipeline = TwoStagePipeline.from_pretrained(tmp_path / "run")
    maps = np.zeros((2, 16, 16), dtype=np.uint8)
    maps[1, 8:, 8:] = 5
    Image.fromarray(maps[1]).save(tmp_path / "map.png")
    works("generate", tmp_path / "run", "--map", tmp_path / "map.png", "--num-images", 2, "--out", tmp_path / "drawn")
    model = pipeline.tokenizer
    first, second = model.sample_from(torch.zeros(2, *model.latent_shape), model.parse("map", list(maps)))
    changed = (first - second).abs().amax(0)
    assert changed[12:, 12:].max() > changed[:3, :3].max(), "a map acts where it says something"
    with refuses("map", "16x16", "(8, 8)"):
        pipeline(1, maps=[maps[0, :8, :8]])


def test_mistakes_are_named(captioned, variational, twostage, tmp_path):
    for model, words, named in (
        (captioned, ["--prompt", "a purple star"], ("'purple'", "star")),
        (captioned, ["--negative-prompt", "a star"], ("negative prompt", "variational autoencoder", "Omit")),
        (captioned, ["--class-name", "star"], ("class name 'star'", "without classes")),
        (variational("gaussian"), ["--prompt", "a star"], ("prompt", "without text", "Omit")),
        (variational("conditional"), ["--prompt", "a star"], ("prompt", "without text", "Omit")),
    ):
        ended = twostage("generate", model, *words, "--out", tmp_path / "refused")
        assert ended.code == 2
        assert_names(ended.err, *named)
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    ended = twostage("reconstruct", captioned, "--image", tmp_path / "image.png")
    assert ended.code == 2
    assert_names(ended.err, "--image", "sees the captions", "--data")
    ended = twostage("interpolate", captioned, "--out", tmp_path / "strip.png")
    assert ended.code == 2
    assert_names(ended.err, "sees the captions", "twostage reconstruct")


def test_data_that_lacks_a_condition_is_refused(twostage, tmp_path):
    for condition, data, named in (
        ("text", {"source": "shapes"}, ("condition.type 'text'", "data.source shapes", "column caption")),
        ("vector", {}, ("condition.type 'vector'", "data.source captioned_shapes", "data.vector_column=NAME")),
        ("map", {"horizontal_flip": True}, ("data.horizontal_flip True", "maps", "Remove")),
    ):
        ended = twostage("train-tokenizer", config_of(tmp_path, condition, **data))
        assert ended.code == 2
        assert_names(ended.err, *named)
    document = yaml.safe_load(config_of(tmp_path, WORDS | {"dropout": 0.1}).read_text())
    with refuses("model.condition", "dropout 0.1", "only applies to priors", "Remove"):
        parse_config(TokenizerConfig, document, "config")


def test_other_captions_are_another_run(works, twostage, tmp_path):
    (data := tmp_path / "data").mkdir()
    for number in range(20):
        Image.fromarray(draw_shapes(number, 1, (16, 16), 3)[0].transpose(1, 2, 0)).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(f"number {number % 3}", encoding="utf-8")
    config = config_of(tmp_path / "work", WORDS, source=str(data))
    assert twostage("train-tokenizer", config, "--time-limit", "0").code == 75
    (data / "0.txt").write_text("number 1", encoding="utf-8")
    ended = twostage("train-tokenizer", config)
    assert ended.code == 2
    assert_names(ended.err, "data.source", "captions: was")
