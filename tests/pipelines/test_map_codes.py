"""Maps through a tokenizer of their own: encode, train-prior, generate, and pipeline folders."""

import json

import numpy as np
import pytest
import torch
import yaml
from messages import assert_names, refuses
from PIL import Image

from pipelines.drawing.asked import Asked
from pipelines.drawing.two_stage import TwoStagePipeline
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.codes import CodeCache
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.images.conversion import to_float
from twostage.core.images.map_colours import coloured_classes

SHORT = {"batch_size": 16, "max_steps": 2, "lr": 1e-2, "validate_every": 2, "checkpoint_every": 2}
DATA = {"source": "captioned_shapes", "image_size": 16, "num_images": 96}


def write(folder, name, data, mult=(1, 1)):
    document = {
        "run": {"dir": str(folder / name), "trackers": []},
        "data": data,
        "model": {
            "latent_channels": 4,
            "backbone": {"type": "conv", "channels": 8, "channel_mult": list(mult), "num_res_blocks": [0] * len(mult)},
            "bottleneck": {"type": "vector", "codebook_size": 16},
        },
        "train": SHORT,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return folder / f"{name}.yaml"


@pytest.fixture(scope="module")
def made(works, tmp_path_factory):
    """Tokenizers of images (8x8 codes) and of maps (4x4 codes), codes of both, and a prior."""
    folder = tmp_path_factory.mktemp("maps")
    works("train-tokenizer", write(folder, "images", DATA))
    works("train-tokenizer", write(folder, "maps", DATA | {"train_on": "maps"}, (1, 1, 1)))
    out = works("encode", folder / "images", "--map-tokenizer", folder / "maps", "--out", folder / "codes",
                "--horizontal-flip")  # fmt: skip
    assert "4x4 codes" in out
    prior = {
        "run": {"dir": str(folder / "prior"), "trackers": []},
        "codes": str(folder / "codes"),
        "condition": {"type": "map", "depth": 1},
        "model": {"type": "masked_transformer", "hidden_size": 16, "depth": 1, "num_heads": 2},
        "train": SHORT | {"max_steps": 12},
    }
    (folder / "prior.yaml").write_text(yaml.safe_dump(prior), encoding="utf-8")
    works("train-prior", folder / "prior.yaml")
    return folder


def test_a_tokenizer_of_maps_sees_maps(made):
    data = load_images(DataConfig(**DATA | {"train_on": "maps"}))
    split, rows = data.validation, torch.arange(3)
    assert torch.equal(split.read(rows), coloured_classes(split.read_maps(rows)))
    with refuses("data.channels 4", "maps of classes", "data.channels=3"):
        load_images(DataConfig(**DATA | {"train_on": "maps", "channels": 4}))
    with refuses("data.train_on 'maps'", "no maps", "data.maps"):
        load_images(DataConfig(**DATA | {"source": "shapes", "train_on": "maps"}))


def test_codes_of_maps_lie_beside_the_codes(made, works, twostage):
    cache, model = CodeCache(made / "codes"), Autoencoder.from_pretrained(made / "maps")
    form = cache.manifest.maps
    assert (form.kind, form.codes.grid, form.codes.hash) == ("labels", (4, 4), model.content_hash())
    condition = TwoStagePipeline.from_pretrained(made / "prior").map_config
    assert condition.names[:2] == form.names[:2] == ("ground", "circle")
    maps = load_images(DataConfig(**DATA)).splits["train"].read_maps(torch.arange(96))
    train = cache.splits["train"]
    assert len(train) == 192
    for first, shown in ((0, maps), (96, maps.flip(-1))):
        expected = model.encode_indices(to_float(coloured_classes(shown)))
        assert (train.read_maps(torch.arange(first, first + 96)).long() == expected).float().mean() > 0.99
    assert cache.contents().facts["map_tokenizer"] == form.codes.hash
    again = ["encode", made / "images", "--out", made / "codes", "--horizontal-flip"]
    assert "nothing to do" in works(*again, "--map-tokenizer", made / "maps")
    ended = twostage(*again)
    assert ended.code == 2
    assert_names(ended.err, "map tokenizer", form.codes.hash[:12], "none", "--out")


def test_images_are_drawn_from_maps(made, works, tmp_path):
    found = np.zeros((16, 16), dtype=np.uint8)
    found[4:12, 4:12] = 3
    Image.fromarray(found).save(tmp_path / "map.png")
    works("generate", made / "prior", "--map", tmp_path / "map.png", "--num-images", 2, "--out", tmp_path / "drawn")
    pipeline = TwoStagePipeline.from_pretrained(made / "prior")
    drawn = pipeline(2, maps=[found], output_type="pt")
    image = np.asarray(Image.open(tmp_path / "drawn" / "images" / "000001.png")).transpose(2, 0, 1)
    assert np.array_equal(image, drawn.images[1].numpy())
    codes = pipeline.map_tokenizer.encode_indices(to_float(coloured_classes(torch.from_numpy(found)[None])))
    given = pipeline.cycle(Asked(maps=[found])).given(range(2))["map"]
    assert torch.equal(given, codes.int().expand(2, -1, -1))
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert (tmp_path / "pipeline" / "map_tokenizer" / "model.safetensors").is_file()
    loaded = TwoStagePipeline.from_pretrained(tmp_path / "pipeline")
    assert torch.equal(loaded(2, maps=[found], output_type="pt").codes, drawn.codes)
    works("evaluate", made / "prior", "--num-images", 16, "--num-samples", 8)
    figures = json.loads((made / "prior" / "evaluation" / "evaluation.json").read_text())["figures"]
    assert "map_saves" in figures
    assert "map_overlap" not in figures


def test_mistakes_are_named(made, twostage, tmp_path):
    pipeline = TwoStagePipeline.from_pretrained(made / "prior")
    with refuses("map", "16x16", "(8, 8)", "Resize"):
        pipeline(1, maps=[np.zeros((8, 8), dtype=np.uint8)])
    with refuses("map", "label 99", "255"):
        pipeline(1, maps=[np.full((16, 16), 99, dtype=np.uint8)])
    images = Autoencoder.from_pretrained(made / "images")
    with refuses("map_tokenizer", images.content_hash()[:12], "Give the one"):
        TwoStagePipeline(pipeline.tokenizer, pipeline.prior, images)
    alone = TwoStagePipeline(pipeline.tokenizer, pipeline.prior)
    with refuses("map", "codes of the tokenizer", "Move it back", "map_tokenizer"):
        alone(1, maps=[np.zeros((16, 16), dtype=np.uint8)])
    works_without = alone(1, output_type="pt")
    assert works_without.images.shape == (1, 3, 16, 16)
    small = write(tmp_path, "small", DATA | {"image_size": 8, "train_on": "maps"})
    assert twostage("train-tokenizer", small).code == 0
    ended = twostage("encode", made / "images", "--map-tokenizer", tmp_path / "small", "--out", tmp_path / "codes")
    assert ended.code == 2
    assert_names(ended.err, "--map-tokenizer", "8x8", "16x16", "data.image_size=[16, 16]")
    ended = twostage("encode", made / "images", "--map-tokenizer", made / "maps", "--data", "shapes", "--out",
                     tmp_path / "codes")  # fmt: skip
    assert ended.code == 2
    assert_names(ended.err, "--map-tokenizer", "no maps", "omit it")
