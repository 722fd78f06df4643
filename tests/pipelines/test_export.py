"""Exported folders are complete, programs compute what PyTorch computes, and nothing else is overwritten."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from messages import assert_names, refuses

from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.sharing import exported_programs
from pipelines.sharing.exported_programs import Encoder, export_programs
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.autoencoder_config import AutoencoderConfig
from twostage.core.config.sections import parse_config
from twostage.core.machine.installation import pip_install

BACKBONES = {
    "mlp": {"type": "mlp", "hidden_sizes": [16]},
    "conv": {"type": "conv", "channels": 8, "channel_mult": [1, 1], "num_res_blocks": [0, 0], "attention_factors": [2]},
    "vqgan": {
        "type": "vqgan",
        "channels": 4,
        "channel_mult": [1, 1],
        "num_res_blocks": 1,
        "inner_channels": 4,
        "norm_groups": 2,
    },
}
BOTTLENECKS = {
    "identity": (4, {}),
    "gaussian": (4, {}),
    "vector": (4, {"codebook_size": 128, "codebook": "simvq", "l2_normalize": True}),
    "finite_scalar": (3, {"levels": [8, 5, 3]}),
    "lookup_free": (6, {}),
    "residual": (4, {"codebook_size": 16, "depth": 3}),
    "gumbel_softmax": (4, {"codebook_size": 16}),
    "binary_spherical": (6, {}),
    "index_backpropagation": (4, {"codebook_size": 16}),
    "diveq": (4, {"codebook_size": 16}),
    "projected": (4, {"codebook_size": 16}),
    "product": (4, {"groups": 2, "each": {"type": "residual", "codebook_size": 16, "depth": 2}}),
    "two_level": (4, {"codebook_size": 16}),
    "multi_scale": (4, {"scales": [1, [3, 4], [5, 7]], "codes": {"type": "vector", "codebook_size": 16}}),
}


def untrained(backbone: str, bottleneck: str, reconstruction: str = "l2") -> Autoencoder:
    """For images whose size needs padding."""
    torch.manual_seed(0)
    channels, settings = BOTTLENECKS[bottleneck]
    document = {
        "image_size": [9, 14],
        "channels": 3,
        "model": {
            "latent_channels": channels,
            "backbone": BACKBONES[backbone],
            "bottleneck": {"type": bottleneck, **settings},
        },
        "loss": {"reconstruction": reconstruction},
    }
    return Autoencoder(parse_config(AutoencoderConfig, document, "test")).eval()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("backbone", "bottleneck"),
    [
        ("mlp", "vector"),
        ("mlp", "gaussian"),
        ("mlp", "lookup_free"),
        ("mlp", "gumbel_softmax"),
        ("mlp", "binary_spherical"),
        ("mlp", "index_backpropagation"),
        ("mlp", "diveq"),
        ("mlp", "projected"),
        ("mlp", "product"),
        ("conv", "residual"),
        ("conv", "multi_scale"),
        ("conv", "two_level"),
        ("conv", "identity"),
        ("vqgan", "finite_scalar"),
    ],
)
def test_programs_of_every_family(backbone, bottleneck, tmp_path):
    model = untrained(backbone, bottleneck, "bce" if bottleneck == "gaussian" else "l2")
    sentences = export_programs(model, tmp_path, ["torch_export"])
    assert len(sentences) == 2
    images = torch.rand(3, 3, 9, 14) * 2 - 1
    made = torch.export.load(tmp_path / "torch_export" / "encoder.pt2").module()(images)
    encoded = model.encode(images)
    if encoded.indices is None:
        torch.testing.assert_close(made, encoded.z)
    else:
        assert torch.equal(made, encoded.indices)
    back = torch.export.load(tmp_path / "torch_export" / "decoder.pt2").module()(made)
    torch.testing.assert_close(back, model.reconstruct(images), atol=1e-4, rtol=0)


def test_the_command_and_its_onnx(runs, twostage, tmp_path):
    out = tmp_path / "shared"
    ended = twostage("export", runs.prior, "--out", out, "--onnx", "--license", "mit")
    assert ended.code == 0, ended.err
    assert_names(ended.out, "onnx/encoder.onnx: images to codes", "70 images")
    assert "Warning" not in ended.err
    pipeline = TwoStagePipeline.from_pretrained(out)
    output = pipeline(5, seed=1, output_type="pt")
    decoder = onnxruntime.InferenceSession(str(out / "onnx" / "decoder.onnx"))
    encoder = onnxruntime.InferenceSession(str(out / "onnx" / "encoder.onnx"))
    batch, *shape = encoder.get_inputs()[0].shape
    assert isinstance(batch, str), "the batch size is fixed"
    assert (shape, encoder.get_outputs()[0].type) == ([3, 16, 16], "tensor(int64)")
    for part in (output.codes[:1], output.codes):
        images = decoder.run(["images"], {"codes": part.numpy()})[0]
        assert np.abs(images - pipeline.tokenizer.decode_indices(part).numpy()).max() <= 1e-4
        codes = encoder.run(["codes"], {"images": images})[0]
        assert np.array_equal(codes, pipeline.tokenizer.encode(torch.from_numpy(images)).indices)
    assert {path.name for path in out.iterdir()} == {
        "README.md", "onnx", "pipeline.json", "prior", "samples.png", "tokenizer", "training"
    }  # fmt: skip


def test_an_export_names_no_folder_of_this_machine(runs, works, tmp_path):
    works("export", runs.prior, "--out", tmp_path / "out")
    for file in [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".yaml", ".md")]:
        assert str(runs.prior.parents[1]) not in file.read_text(), file
    assert yaml.safe_load((tmp_path / "out" / "training" / "prior.yaml").read_text())["codes"] == runs.codes.name
    assert json.loads((tmp_path / "out" / "prior" / "config.json").read_text())["tokenizer"]["path"] == "tokenizer"


def test_a_second_export_writes_the_same_and_keeps_additions(runs, twostage, tmp_path):
    out = tmp_path / "shared"
    assert twostage("export", runs.prior, "--out", out).code == 0
    before = files_of(out)
    (out / "notes.txt").write_text("mine")
    (out / "prior" / "model.safetensors").write_bytes(b"damaged")
    assert twostage("export", runs.prior, "--out", out).code == 0
    assert files_of(out) == {**before, "notes.txt": b"mine"}
    card = before["README.md"].decode().replace("not stated; whoever shares this model should state it here", "CC0")
    (out / "README.md").write_text(card)
    ended = twostage("export", runs.prior, "--out", out)
    assert_names(ended.out, "README.md was changed by hand and is kept", "README.new.md")
    assert (out / "README.md").read_text() == card
    assert (out / "README.new.md").read_bytes() == before["README.md"]
    again = tmp_path / "again"  # from the exported folder
    shutil.rmtree(out)
    assert twostage("export", runs.prior, "--out", out).code == 0
    assert twostage("export", out, "--out", again).code == 0
    changed = {name for name, content in files_of(again).items() if content != before[name]}
    assert changed == {"README.md"}  # its example names the folder
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_export_of_an_earlier_version_is_replaced(runs, works, tmp_path):
    """It may write the same config in another way: what counts is the weights."""
    out = tmp_path / "shared"
    works("export", runs.prior, "--out", out)
    document = json.loads((out / "pipeline.json").read_text())
    document["sha256"]["prior/config.json"] = "0" * 64
    (out / "pipeline.json").write_text(json.dumps(document))
    works("export", runs.prior, "--out", out)
    assert json.loads((out / "pipeline.json").read_text())["sha256"] != document["sha256"]


def test_other_files_are_not_overwritten(runs, twostage, changed_tokenizer, variational, tmp_path):
    out = tmp_path / "shared"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    ended = twostage("export", runs.prior, "--out", out)
    assert ended.code == 2
    assert_names(ended.err, f"--out {out}", "not a pipeline", "Nothing was changed")
    assert files_of(out) == {"thesis.txt": b"years of work"}
    ended = twostage("export", runs.tokenizer, "--out", out, "--torch-export")
    assert_names(ended.err, f"--out {out}", "other files")
    other = tmp_path / "other"
    assert twostage("export", variational("gaussian"), "--out", other).code == 0
    before = files_of(other)
    ended = twostage("export", runs.prior, "--out", other)
    assert ended.code == 2
    assert_names(ended.err, f"--out {other}", "another pipeline", "Nothing was changed")
    assert files_of(other) == before


def test_a_tokenizer_alone(runs, twostage, tmp_path):
    out = tmp_path / "programs"
    ended = twostage("export", runs.tokenizer, "--out", out)
    assert ended.code == 2
    assert_names(ended.err, "'vector'", "--onnx", "--torch-export")
    assert not out.exists()
    ended = twostage("export", runs.tokenizer, "--out", out, "--torch-export")
    assert ended.code == 0, ended.err
    assert_names(ended.out, out, "cannot generate images by itself")
    assert set(files_of(out)) == {"torch_export/encoder.pt2", "torch_export/decoder.pt2"}
    assert twostage("export", runs.tokenizer, "--out", out, "--torch-export").code == 0


def test_a_wrong_program_is_removed(monkeypatch, tmp_path):
    """The exporter changes the weights."""
    model = untrained("mlp", "vector")
    trace = exported_programs._trace

    def wrong(module, example, name):
        other = copy.deepcopy(module)
        for weights in other.parameters():
            weights.mul_(-1.5)
        return trace(other, example, name)

    monkeypatch.setattr(exported_programs, "_trace", wrong)
    with refuses("torch_export/encoder.pt2", "The file was removed"):
        export_programs(model, tmp_path, ["torch_export"])
    assert files_of(tmp_path) == {}


def test_codes_that_are_equally_near_are_counted():
    """If rounding chooses between two equal codes, that is counted; any other difference is an error."""
    model = untrained("mlp", "lookup_free")
    images = torch.rand(70, 3, 9, 14) * 2 - 1
    with torch.no_grad():
        last = [layer for layer in model.encoder.modules() if isinstance(layer, torch.nn.Linear)][-1]
        last.weight[0], last.bias[0] = 0, 1e-12
    encoder = Encoder(model)
    sentence = exported_programs._compare(encoder, lambda values: encoder(values) ^ 1, images)
    assert_names(sentence, "0 of 70 codes", "equally near")
    with refuses("1 of 1 codes"):
        exported_programs._compare(encoder, lambda values: encoder(values) ^ 2, images)


def test_missing_libraries_are_named(runs, twostage, monkeypatch, tmp_path):
    find = exported_programs.importlib.util.find_spec
    monkeypatch.setattr(
        exported_programs.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    ended = twostage("export", runs.prior, "--out", tmp_path / "out", "--onnx")
    assert ended.code == 2
    assert_names(ended.err, "--onnx", "onnxscript", pip_install("export"))
    assert "onnxruntime" not in ended.err


def test_wrong_options(runs, twostage, tmp_path):
    for words, names in (
        (("--private",), ("--private", "--push owner/name")),
        (("--license", "do what you want"), ("license 'do what you want'", "mit")),
        (("--push", "nobody"), ("'nobody'", "owner/name")),
    ):
        ended = twostage("export", runs.prior, "--out", tmp_path / "out", *words)
        assert ended.code == 2
        assert_names(ended.err, *names)
