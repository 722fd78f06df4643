"""Tokenizers of taming-transformers and LlamaGen give their own codes and pixels here."""

import os
import pickle
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
import yaml
from foreign_models import Reference, agree, images, imported, refused
from messages import assert_names
from torch import Tensor


def save_taming(reference: Reference, folder: Path, document: dict | None = None, **extra) -> tuple[Path, Path]:
    checkpoint, config = folder / "last.ckpt", folder / "model.yaml"
    unused = {"loss.discriminator.main.0.weight": torch.zeros(3), "loss.logvar": torch.zeros(())}
    torch.save({"state_dict": reference.state | unused, "epoch": 3, "global_step": 10, **extra}, checkpoint)
    config.write_text(yaml.safe_dump(document or reference.config()), encoding="utf-8")
    return checkpoint, config


def save_llamagen(reference: Reference, folder: Path, key: str = "model") -> Path:
    file = folder / "vq.pt"
    torch.save({key: reference.state | {"quantize.codebook_used": torch.zeros(65536)}}, file)
    return file


# --- taming-transformers --------------------------------------------------------------------------------------------

TAMING = {
    "as published": {},
    "attention at two levels": {"attended": (0, 2), "blocks": 2},
    "attention only in the middle": {"attended": (), "ch_mult": (2, 1)},
    "other sizes": {"dim": 12, "channels": 1, "ch_mult": (1, 2, 4), "attended": (1,)},
}


@torch.no_grad()
def reference_results(reference: Reference) -> tuple[Tensor, Tensor, Tensor]:
    x = images(3, reference.channels)
    codes = reference.codes(x)
    return x, codes, reference.decode_codes(codes)


@pytest.mark.parametrize("changes", TAMING.values(), ids=TAMING)
def test_taming(changes, tmp_path):
    theirs = Reference(**changes)
    checkpoint, config = save_taming(theirs, tmp_path)
    ours = imported(checkpoint, tmp_path / "ours", config)
    assert ours.config.image_size == (16, 16)
    agree(ours, tmp_path / "ours", *reference_results(theirs))


def test_taming_attention_where_halving_rounds(tmp_path):
    """Of 18 pixels taming's encoder sees 18, 9, 4, its decoder 4, 8, 16: `attn_resolutions: [8]` is the decoder's."""
    theirs = Reference(attended=())
    document = theirs.config(resolution=18, attn_resolutions=[8])
    extra = Reference(attended=(1,)).state
    theirs.state |= {name: tensor for name, tensor in extra.items() if name.startswith("decoder.up.1.attn")}
    checkpoint, config = save_taming(theirs, tmp_path, document)
    ours = imported(checkpoint, tmp_path / "ours", config, image_size=16)
    backbone = ours.config.model.backbone.model_dump()
    assert (backbone["attention_factors"], backbone["decoder_attention_factors"]) == ([], [2])


class OfTheirTraining:
    """Stands for the objects that Lightning stores in a checkpoint, of classes that are not installed here."""

    def __init__(self) -> None:
        self.best = 0.5


def test_a_lightning_checkpoint_with_objects_of_other_programs(tmp_path, monkeypatch):
    theirs = Reference()
    monkeypatch.setattr(OfTheirTraining, "__module__", "pytorch_lightning.callbacks.checkpoint")
    module = ModuleType("pytorch_lightning.callbacks.checkpoint")
    module.OfTheirTraining = OfTheirTraining
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.checkpoint"):
            patch.setitem(sys.modules, name, module)
        checkpoint, config = save_taming(
            theirs, tmp_path, callbacks={OfTheirTraining: {"score": 1.0}}, hyper_parameters=OfTheirTraining()
        )
    with pytest.raises(pickle.UnpicklingError, match="OfTheirTraining"):
        torch.load(checkpoint, weights_only=True)
    ours = imported(checkpoint, tmp_path / "ours", config)
    agree(ours, tmp_path / "ours", *reference_results(theirs))


class Payload:
    """Touches a file if it is unpickled carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


class Command(Payload):
    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("payload", [Payload, Command])
def test_nothing_in_a_checkpoint_is_executed(payload, tmp_path):
    touched = tmp_path / "touched"
    checkpoint, config = save_taming(Reference(), tmp_path, callbacks=payload(touched))
    assert_names(refused(checkpoint, tmp_path / "ours", config), checkpoint, "tensors alone", "state dict")
    assert not touched.exists()


# --- LlamaGen -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["model", "ema", "state_dict"])
def test_llamagen(key, tmp_path):
    theirs = Reference("llamagen", dim=8, cosine=True)
    file = save_llamagen(theirs, tmp_path, key)
    ours = imported(file, tmp_path / "ours", image_size=16)
    agree(ours, tmp_path / "ours", *reference_results(theirs))


@pytest.mark.parametrize(("ch_mult", "blocks"), [((1, 2, 2, 4), 2), ((1, 1, 2, 2, 4), 1)])
def test_llamagen_presets_are_found_by_their_shapes(ch_mult, blocks, tmp_path):
    last = len(ch_mult) - 1
    theirs = Reference("llamagen", ch_mult=ch_mult, blocks=blocks, attended=(last,), dim=8, cosine=True)
    ours = imported(save_llamagen(theirs, tmp_path), tmp_path / "ours")
    backbone = ours.config.model.backbone.model_dump()
    assert (backbone["channels"], backbone["channel_mult"], backbone["num_res_blocks"]) == (32, list(ch_mult), blocks)
    assert (ours.config.image_size, ours.grid) == ((256, 256), (256 >> last, 256 >> last))
    x = F.interpolate(images(3), scale_factor=2)
    with torch.no_grad():
        assert torch.equal(ours.bottleneck.encode(ours.encoder(x)).indices, theirs.codes(x))


def test_averaged_weights_are_preferred_to_the_last_step(tmp_path):
    theirs = Reference("llamagen", dim=8, cosine=True)
    other = {name: tensor + 1 for name, tensor in theirs.state.items()}
    torch.save({"model": other, "ema": theirs.state}, tmp_path / "vq.pt")
    ours = imported(tmp_path / "vq.pt", tmp_path / "ours", image_size=16)
    agree(ours, tmp_path / "ours", *reference_results(theirs))


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_wrong_paths_and_options(tmp_path):
    out = tmp_path / "ours"
    checkpoint, config = save_taming(Reference(), tmp_path)
    assert_names(refused(tmp_path / "absent.ckpt", out), tmp_path / "absent.ckpt", ".ckpt", ".pt", ".safetensors")
    assert_names(refused(checkpoint, out, kind="vae"), "--kind", "vae", "taming, diffusers, llamagen")
    assert_names(
        refused(checkpoint, out, kind="diffusers"), checkpoint, "--kind diffusers", "a folder with config.json"
    )
    assert_names(refused(tmp_path, out, kind="taming"), tmp_path, "--kind taming", "a checkpoint file")
    assert_names(refused(checkpoint, out), checkpoint, "--config FILE", "YAML", "model.params.ddconfig")
    assert_names(refused(checkpoint, out, tmp_path / "absent.yaml"), "absent.yaml: no such file")
    llamagen = save_llamagen(Reference("llamagen"), tmp_path)
    assert_names(refused(llamagen, out, config), "--config", config, "taming-transformers")
    assert_names(refused(checkpoint, out, kind="llamagen"), "encoder.conv_blocks.0.res.0.conv1.weight", "missing")
    assert not out.exists()


def test_files_that_are_not_checkpoints(tmp_path):
    out, file = tmp_path / "ours", tmp_path / "file.ckpt"
    file.write_text("hello")
    assert_names(refused(file, out), file, "tensors alone")
    file.write_bytes(b"")
    assert_names(refused(file, out), file, "tensors alone")
    torch.save([torch.zeros(2)], file)
    assert_names(refused(file, out), file, "a list", "a dict with a state dict")
    torch.save({"epoch": 3, "state_dict": {}}, file)
    assert_names(refused(file, out), file, "state_dict, ema or model", "epoch, state_dict")
    torch.save({"state_dict": {f"layer.{i}": torch.zeros(2) for i in range(7)}}, file)
    message = refused(file, out)
    assert_names(message, file, "encoder.down...", "encoder.conv_blocks...")
    assert message.endswith("layer.0, layer.1, layer.2, layer.3, layer.4 and 2 more")
    checkpoint, _ = save_taming(Reference(), tmp_path)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    assert_names(refused(checkpoint, out), checkpoint, "tensors alone")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"double_z": True}, ("model.params.ddconfig.double_z", "True", "False")),
        ({"resamp_with_conv": False}, ("model.params.ddconfig.resamp_with_conv", "False", "True")),
        ({"attn_type": "linear"}, ("model.params.ddconfig.attn_type", "'linear'", "'vanilla'")),
        ({"out_ch": 5}, ("model.params.ddconfig", "3 input channels", "5 output")),
        ({"ch": 40}, ("norm_groups 32", "multiple", "40")),
        ({"z_channels": "many"}, ("model.params.ddconfig.z_channels", "'many'")),
        ({"ch_mult": [1, 1, 2, 2]}, ("lacks", "encoder.down.2.downsample")),
        ({"ch_mult": [1, 1]}, ("do not belong", "encoder.down.1.downsample")),
        ({"z_channels": 16}, ("encoder.conv_out.weight", "(12, 64, 3, 3)", "(16, ")),
    ],
)
def test_a_configuration_that_is_invalid_or_does_not_fit(changes, expected, tmp_path):
    theirs = Reference()
    checkpoint, config = save_taming(theirs, tmp_path, theirs.config(**changes))
    assert_names(refused(checkpoint, tmp_path / "ours", config), *expected)


def test_other_quantizers_of_taming(tmp_path):
    theirs = Reference()
    document = theirs.config()
    document["model"]["target"] = "taming.models.vqgan.GumbelVQ"
    checkpoint, config = save_taming(theirs, tmp_path, document)
    message = refused(checkpoint, tmp_path / "ours", config)
    assert_names(message, "model.target", "'taming.models.vqgan.GumbelVQ'", "VQModel")
    document = theirs.config()
    document["model"]["params"]["remap"] = "used.npy"
    checkpoint, config = save_taming(theirs, tmp_path, document)
    assert_names(refused(checkpoint, tmp_path / "ours", config), "model.params.remap", "'used.npy'", "None")
    config.write_text("model: {params: {embed_dim: 4}}")
    assert_names(refused(checkpoint, tmp_path / "ours", config), "model.params.ddconfig", "required")
