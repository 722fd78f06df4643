"""Tokenizers of diffusers, made by the library itself, give their own codes and pixels here."""

import json

import diffusers
import pytest
import torch
from foreign_models import agree, images, imported, refused
from messages import assert_names, refuses
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.import_tokenizer import command

PLAIN = {
    "block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 6, "num_vq_embeddings": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "sample_size": 16,
}  # fmt: skip
ATTENTION = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
}
DIFFUSERS = {
    "plain": {},
    "attention": ATTENTION,
    "attention in the decoder alone": {"up_block_types": ATTENTION["up_block_types"]},
    "attention at the full resolution": {"down_block_types": ATTENTION["down_block_types"][::-1]},
    "no attention in the middle": {"mid_block_add_attention": False, "lookup_from_codebook": True},
    "codes of other dimensions": {"vq_embed_dim": 3, "layers_per_block": 2},
    "widths that are no multiples of the first": {"block_out_channels": (12, 8), "act_fn": "swish"},
    "one level, grey": {"block_out_channels": (8,), "down_block_types": ("AttnDownEncoderBlock2D",),
                        "up_block_types": ("UpDecoderBlock2D",), "in_channels": 1, "out_channels": 1},
}  # fmt: skip


def tiny_vq(**changes) -> diffusers.VQModel:
    torch.manual_seed(0)
    model = diffusers.VQModel(**(PLAIN | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # biases and scales that a new model does not have
        x = images(4, model.config["in_channels"])
        vectors = model.encode(x).latents.transpose(0, 1).flatten(1).t()
        model.quantize.embedding.weight.copy_(vectors[torch.randperm(len(vectors))[:32]])
    return model


@torch.no_grad()
def vq_results(model: diffusers.VQModel) -> tuple[Tensor, Tensor, Tensor]:
    x = images(3, model.config["in_channels"])
    latents = model.encode(x).latents
    codes = model.quantize(latents)[2][2].view(len(x), *latents.shape[2:])
    return x, codes, model.decode(latents).sample


@pytest.mark.parametrize("changes", DIFFUSERS.values(), ids=DIFFUSERS)
def test_diffusers(changes, tmp_path):
    theirs = tiny_vq(**changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = imported(tmp_path / "theirs", tmp_path / "ours")
    agree(ours, tmp_path / "ours", *vq_results(theirs))
    if changes.get("lookup_from_codebook"):
        _, codes, _ = vq_results(theirs)
        shape = (*codes.shape, theirs.config["latent_channels"])
        decoded = theirs.decode(codes.flatten(), force_not_quantize=True, shape=shape).sample
        assert (ours.decode_indices(codes) - decoded.clamp(-1, 1)).abs().max() < 1e-4


def test_diffusers_weights_of_its_first_releases(tmp_path):
    theirs = tiny_vq(**ATTENTION)
    theirs.save_pretrained(tmp_path / "theirs")
    safe, state = tmp_path / "theirs" / "diffusion_pytorch_model.safetensors", {}
    for name, tensor in load_file(safe).items():
        for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
            name = name.replace(f".{new}.", f".{old}.")
        state[name] = tensor
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in state
    safe.unlink()
    torch.save(state, safe.with_suffix(".bin"))
    agree(imported(tmp_path / "theirs", tmp_path / "ours"), tmp_path / "ours", *vq_results(theirs))


def test_half_precision_weights_become_float32(tmp_path):
    theirs = tiny_vq().half()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = imported(tmp_path / "theirs", tmp_path / "ours")
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {torch.float32}
    agree(ours, tmp_path / "ours", *vq_results(theirs.float()))


def test_the_command_prints_what_it_imported(tmp_path, capsys):
    tiny_vq(**ATTENTION).save_pretrained(tmp_path / "theirs")
    command(str(tmp_path / "theirs"), tmp_path / "ours", image_size=32)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path / 'ours' / 'model'}: ")
    assert_names(
        printed, "widths 8 16,", "attention at the factors 2", "32 codes of 6 dimensions", "16 x 16", "32 x 32 x 3"
    )
    assert json.loads((tmp_path / "ours" / "model" / "config.json").read_text())["hash"] in printed


def test_an_existing_model_is_kept(tmp_path):
    tiny_vq().save_pretrained(tmp_path / "theirs")
    imported(tmp_path / "theirs", tmp_path / "ours")
    with refuses(tmp_path / "ours" / "model", "--out"):
        imported(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"norm_type": "spatial"}, ("norm_type", "'spatial'", "'group'")),
        ({"_class_name": "AutoencoderKL"}, ("_class_name", "'AutoencoderKL'", "'VQModel'")),
        ({"act_fn": "gelu"}, ("act_fn", "'gelu'", "'silu'", "'swish'")),
        (
            {"down_block_types": ["DownEncoderBlock2D"] * 3},
            ("down_block_types", "2, 3 and 2"),
        ),
        (
            {"down_block_types": ["DownBlock2D"] * 2},
            ("down_block_types", "'DownBlock2D'", "'DownEncoderBlock2D'"),
        ),
        ({"out_channels": 1}, ("3 input channels", "1 output")),
        ({"vq_embed_dim": 5}, ("quantize.embedding.weight", "(32, 6)", "(32, 5)")),
        ({"latent_channels": 5, "vq_embed_dim": 6}, ("(6, 16, 3, 3)", "(5, 16")),
        ({"layers_per_block": 2}, ("lacks", "encoder.down_blocks.0.resnets")),
        ({"mid_block_add_attention": False}, ("do not belong", "decoder.mid_block.attentions.0.group_norm")),
    ],
)
def test_a_diffusers_configuration_that_is_invalid_or_does_not_fit(changes, expected, tmp_path):
    tiny_vq().save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert_names(refused(tmp_path / "theirs", tmp_path / "ours"), *expected)


def test_incomplete_diffusers_folders(tmp_path):
    folder, out = tmp_path / "theirs", tmp_path / "ours"
    folder.mkdir()
    assert_names(refused(folder, out), folder / "config.json", "VQModel")
    (folder / "config.json").write_text("[]")
    assert_names(refused(folder, out), folder / "config.json", "object", "list", "download it again")
    tiny_vq().save_pretrained(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file(state | {f"extra.{i}": torch.zeros(1) for i in range(6)}, weights)
    assert_names(refused(folder, out), "extra.0, extra.1, extra.2, extra.3, extra.4 and 1 more")
    weights.write_bytes(weights.read_bytes()[:-8])
    assert_names(refused(folder, out), weights, "damaged", "Download it again")
    weights.unlink()
    assert_names(refused(folder, out), folder, "no weights", "diffusion_pytorch_model.safetensors")
