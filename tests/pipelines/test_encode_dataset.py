"""The codes on disk are those of the tokenizer, and the manifest says what they are."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from core.config import parse_config
from core.data import DataConfig, load_images
from core.images import to_float
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.codes import CodeCache


@pytest.fixture(scope="module")
def data(runs):
    return load_images(
        parse_config(DataConfig, yaml.safe_load((runs.tokenizer / "config.yaml").read_text())["data"], "")
    )


def modified(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def write_pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (20, 20), (40 * i, 250 - 40 * i, 90)).save(folder / f"{i}.png")
    return folder


def test_codes_are_those_of_the_images(runs, data):
    model, cache = Autoencoder.from_pretrained(runs.tokenizer), CodeCache(runs.codes)
    assert cache.splits.keys() == data.splits.keys()
    for name, split in data.splits.items():
        everything = torch.arange(len(split))
        codes, labels = cache.splits[name].read(everything)
        assert torch.equal(codes, model.encode(to_float(split.read(everything))).indices)
        assert torch.equal(labels, split.labels)
    assert np.load(runs.codes / "train.codes.npy").dtype == np.uint16


def test_the_manifest_describes_the_codes(runs, data):
    manifest = CodeCache(runs.codes).manifest
    assert manifest.tokenizer.hash == Autoencoder.from_pretrained(runs.tokenizer).content_hash()
    assert manifest.tokenizer.path == str(runs.tokenizer)
    assert (manifest.grid, manifest.codebook_size, manifest.image_size, manifest.channels) == ((4, 4), 16, (16, 16), 3)
    assert (manifest.source, manifest.class_names, manifest.validation_split) == ("shapes", data.class_names, "test")
    assert {name: files.rows for name, files in manifest.splits.items()} == {"train": 320, "test": 64}


def test_entropy_and_unigram_are_those_of_the_arrays(runs):
    manifest = CodeCache(runs.codes).manifest
    train, test = (np.load(runs.codes / f"{name}.codes.npy") for name in ("train", "test"))
    counts = np.array([(train == code).sum() for code in range(16)])
    used = counts[counts > 0] / train.size
    assert manifest.codes_used == len(used) > 2
    assert manifest.entropy_nats_per_code == pytest.approx(-(used * np.log(used)).sum(), rel=1e-9)
    smoothed = (counts + 1) / (train.size + 16)
    for name, codes in {"train": train, "test": test}.items():
        assert manifest.unigram_nats_per_code[name] == pytest.approx(-np.log(smoothed[codes]).mean(), rel=1e-9)


def test_a_second_call_does_nothing(runs, twostage):
    before = modified(runs.codes)
    ended = twostage("encode", runs.tokenizer, "--out", runs.codes)
    assert "already holds the codes of this tokenizer; nothing to do" in ended.out
    assert modified(runs.codes) == before


def test_another_decoder_keeps_the_codes(runs, twostage, changed_tokenizer):
    ended = twostage("encode", changed_tokenizer("decoder"), "--out", runs.codes)
    assert "nothing to do" in ended.out


def test_another_encoder_has_other_codes(runs, twostage, changed_tokenizer, tmp_path):
    ended = twostage("encode", changed_tokenizer("encoder"), "--out", tmp_path / "codes")
    assert ended.code == 0
    assert CodeCache(tmp_path / "codes").manifest.tokenizer.hash != CodeCache(runs.codes).manifest.tokenizer.hash


def test_codes_are_named_after_their_run(runs, twostage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert twostage("encode", runs.tokenizer).code == 0
    assert CodeCache("codes/tokenizer").manifest == CodeCache(runs.codes).manifest


def test_another_source_without_classes(runs, twostage, tmp_path):
    pictures = write_pictures(tmp_path / "pictures", 6)
    ended = twostage("encode", runs.tokenizer, "--data", pictures, "--out", tmp_path / "codes")
    assert ended.code == 0, ended.err
    cache = CodeCache(tmp_path / "codes")
    assert (cache.manifest.source, cache.manifest.class_names) == (str(pictures), None)
    assert {name: len(split) for name, split in cache.splits.items()} == {"train": 5, "val": 1}
    assert cache.splits["train"].labels is None


def test_what_a_killed_call_left_is_replaced(runs, twostage, tmp_path):
    leftover = tmp_path / ".codes.partial"
    leftover.mkdir()
    (leftover / "train.codes.npy").write_bytes(b"half")
    assert twostage("encode", runs.tokenizer, "--out", tmp_path / "codes").code == 0
    assert not leftover.exists()
    document = json.loads((tmp_path / "codes" / "manifest.json").read_text())
    assert document == json.loads((runs.codes / "manifest.json").read_text())
