"""`export --weights bfloat16` halves a pipeline and changes no code; a tokenizer can be rounded before its prior."""

import shutil
from pathlib import Path

import pytest
import torch
from messages import assert_names
from safetensors.torch import load_file

from pipelines.drawing.rebuilt_images import rebuild_images
from pipelines.drawing.two_stage import TwoStagePipeline
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.prior import Prior
from twostage.core.data.shapes import draw_shapes

IMAGES = torch.from_numpy(draw_shapes(0, 16, (16, 16), 3))


@pytest.fixture(scope="module")
def rounded(runs, works, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("rounded") / "shapes"
    words = ["--weights", "bfloat16", "--license", "mit", "--data-license", "CC0: drawn by twostage"]
    works("export", runs.prior, "--out", out, *words)
    return out


def test_prior_and_decoder_are_halved_and_no_code_changes(runs, rounded, pipeline):
    stored = {part: load_file(rounded / part / "model.safetensors") for part in ("tokenizer", "prior")}
    assert {tensor.dtype for tensor in stored["prior"].values() if tensor.is_floating_point()} == {torch.bfloat16}
    kept = {name.partition(".")[0] for name, tensor in stored["tokenizer"].items() if tensor.dtype == torch.float32}
    assert kept == {"encoder", "bottleneck"}
    tokenizer, original = (
        Autoencoder.from_pretrained(rounded / "tokenizer"),
        Autoencoder.from_pretrained(runs.tokenizer),
    )
    assert tokenizer.content_hash() == original.content_hash()
    assert {tensor.dtype for tensor in tokenizer.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    for name, tensor in Prior.from_pretrained(rounded / "prior").state_dict().items():
        assert torch.equal(tensor, pipeline.prior.state_dict()[name].bfloat16().float())
    change = rebuild_images(tokenizer, IMAGES).int() - rebuild_images(original, IMAGES).int()
    assert 0 < change.abs().max() < 10, "only the decoder was rounded"


def test_the_card_says_so_and_the_same_command_replaces_it(runs, rounded, works):
    card = (rounded / "README.md").read_text()
    assert_names(card, "| weights | bfloat16", "CC0: drawn by twostage")
    works("export", runs.prior, "--out", rounded, "--weights", "bfloat16", "--license", "mit")
    assert "| weights | bfloat16" in (rounded / "README.md").read_text()


def test_a_rounded_tokenizer_and_its_prior_lose_nothing_in_bfloat16(runs, configs, works, tmp_path):
    tokenizer, codes, run = tmp_path / "tokenizer", tmp_path / "codes", tmp_path / "run"
    shown = works("export", runs.tokenizer, "--out", tokenizer / "model", "--weights", "bfloat16")
    assert_names(shown, "rounded weights", f"twostage encode {tokenizer / 'model'} --data SOURCE")
    shutil.copy(runs.tokenizer / "config.yaml", tokenizer)  # 320 images
    model = Autoencoder.from_pretrained(tokenizer)
    assert model.content_hash() != Autoencoder.from_pretrained(runs.tokenizer).content_hash()
    works("encode", tokenizer, "--out", codes)
    works("train-prior", configs / "prior.yaml", f"codes={codes}", f"run.dir={run}", "train.max_steps=1")
    works("export", run, "--out", tmp_path / "shared", "--weights", "bfloat16")
    stored = load_file(tmp_path / "shared" / "tokenizer" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.bfloat16}
    loaded = TwoStagePipeline.from_pretrained(tmp_path / "shared").tokenizer
    assert loaded.content_hash() == model.content_hash()


def test_generate_needs_no_folder(rounded, works, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    works("generate", rounded, "--num-images", 2)
    assert (tmp_path / "generated" / "shapes" / "images" / "000001.png").is_file()
