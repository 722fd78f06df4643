"""`twostage embed` writes features with the names of their images, by which `data.vector_column` finds them."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from messages import assert_names, refuses
from PIL import Image

from pipelines.evaluation.embeddings import embed, features_of
from pipelines.evaluation.judges import OwnFeatures
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.features.feature_network import FeatureNetwork, FeatureNetworkConfig
from stage2_prior.codes import CodeCache
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.images.conversion import to_float


@pytest.fixture
def images(tmp_path) -> Path:
    noise = np.random.default_rng(0)
    for i in range(24):
        file = tmp_path / "images" / ("light", "dark")[i % 2] / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    return tmp_path / "images"


@pytest.fixture
def network(tmp_path) -> Path:
    torch.manual_seed(0)
    config = FeatureNetworkConfig(image_size=(16, 16), channels=3, class_names=["dark", "light"], widths=[4, 6])
    FeatureNetwork(config).save_pretrained(tmp_path / "network")
    return tmp_path / "network"


def test_vectors_reach_the_codes_by_name(runs, images, network, twostage, tmp_path):
    file = tmp_path / "vectors.npz"
    ended = twostage("embed", images, "--features", network, "--out", file)
    assert ended.code == 0, ended.err
    assert f"{file}: 24 vectors of 6 numbers" in ended.out
    with np.load(file) as stored:
        assert (stored["labels"] == [name.startswith("light") for name in stored["names"]]).all()
        by_name = dict(zip(stored["names"].tolist(), stored["vectors"], strict=True))
        assert set(stored["splits"]) == {"train", "val"}
    # The vectors follow the images, however they are split and whatever their size is.
    for path in images.rglob("*.png"):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        expected = OwnFeatures(network)(pixels[None])[0].float().numpy()
        np.testing.assert_allclose(by_name[str(path.relative_to(images))], expected, rtol=1e-4, atol=1e-6)
    settings = {"source": str(images), "image_size": 16, "vector_column": str(file), "validation_share": 0.25}
    data = load_images(DataConfig.model_validate(settings))
    for split in data.splits.values():
        for name, vector in zip(split.names(torch.arange(len(split))), split.vectors, strict=True):
            assert (by_name[str(Path(name).relative_to(images))] == vector).all()
    ended = twostage(
        "encode", runs.tokenizer, "--data", images, "--out", tmp_path / "codes", f"data.vector_column={file}"
    )
    assert ended.code == 0, ended.err
    assert CodeCache(tmp_path / "codes").manifest.vector_length == 6


def test_other_files_are_refused(images, network, tmp_path):
    def load(file: Path) -> None:
        load_images(DataConfig(source=str(images), image_size=16, vector_column=str(file)))

    with refuses("data.vector_column", "none.npz", "no such file", "twostage embed"):
        load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with refuses("text.npz", "expected arrays `vectors` and `names`", "twostage embed"):
        load(tmp_path / "text.npz")
    np.savez(tmp_path / "short.npz", names=["light/00.png"], vectors=np.zeros((1, 2), dtype=np.float32))
    with refuses("short.npz", "has no vectors of 23 of the images", "dark/01.png", "twostage embed"):
        load(tmp_path / "short.npz")
    np.savez(tmp_path / "wrong.npz", names=["light/00.png"], vectors=np.full((1, 2), np.nan, dtype=np.float32))
    with refuses("wrong.npz", "finite numbers", "float32 of the shape (1, 2)", "twostage embed"):
        load(tmp_path / "wrong.npz")


def test_what_cannot_be_embedded_is_refused(images, network, tmp_path):
    with refuses("source shapes", "images in files", "folder or table"):
        embed("shapes", features_of(OwnFeatures(network)), tmp_path / "out.npz")
    with refuses("--out", "out.csv", "ends in .npz", "out.npz"):
        embed(str(images), features_of(OwnFeatures(network)), tmp_path / "out.csv")


def test_latents_and_codes_of_a_tokenizer(runs, images, works, tmp_path):
    model = Autoencoder.from_pretrained(runs.tokenizer)
    works("embed", images, "--codes", runs.tokenizer, "--out", tmp_path / "codes.npz")
    works("embed", images, "--latents", runs.tokenizer, "--out", tmp_path / "latents.parquet")
    table = pq.read_table(tmp_path / "latents.parquet")
    assert table.schema.metadata[b"shape"] == b"4,4,4"
    latents = dict(zip(table["names"].to_pylist(), table["latents"].to_pylist(), strict=True))
    assert [name.partition("/")[0] for name in latents] == table["class"].to_pylist()
    with np.load(tmp_path / "codes.npz") as stored:
        assert stored["class_names"].tolist() == ["dark", "light"]
        codes = dict(zip(stored["names"].tolist(), stored["codes"], strict=True))
    for path in images.rglob("*.png"):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        encoded, name = model.encode(to_float(pixels[None])), str(path.relative_to(images))
        assert encoded.indices is not None
        assert torch.equal(torch.from_numpy(codes[name]), encoded.indices[0])
        np.testing.assert_allclose(latents[name], encoded.z.flatten().numpy(), rtol=1e-4, atol=1e-5)


def test_exactly_one_kind_is_written(twostage, images, runs, variational):
    ended = twostage("embed", images)
    assert ended.code == 2
    assert_names(ended.err, "--features, --latents, --codes", "exactly one", "got none")
    ended = twostage("embed", images, "--codes", variational("gaussian"))
    assert ended.code == 2
    assert_names(ended.err, "--codes", "'gaussian' has no codes", "--latents")
