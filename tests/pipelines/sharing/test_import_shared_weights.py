"""Weights in every form that people share: variants, shards, pipelines, safetensors, half precision."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from foreign_models import Reference, agree, images, imported, refused
from messages import assert_names
from safetensors.torch import load_file, save_file
from test_import_diffusers import tiny_vq, vq_results

from pipelines.import_tokenizer import command
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.autoencoder_config import AutoencoderConfig
from twostage.core.config.sections import parse_config

SHARDED = {"max_shard_size": "20KB"}
STEM = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def theirs() -> diffusers.VQModel:
    """Its weights are the same in float16, bfloat16 and float32."""
    model = tiny_vq()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().half().float())
    return model


@pytest.fixture(scope="module")
def results(theirs):
    return vq_results(theirs)


def printed_weights(source: Path, out: Path, capsys) -> str:
    """What the command prints about the weights."""
    command(str(source), out)
    return capsys.readouterr().out.partition("weights")[2].partition("\n")[0].strip()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "saved",
    [
        {},
        {"variant": "fp16"},
        SHARDED,
        {"variant": "fp16"} | SHARDED,
        {"safe_serialization": False},
        {"safe_serialization": False, "variant": "fp16"},
        {"safe_serialization": False} | SHARDED,
        {"safe_serialization": False, "variant": "fp16"} | SHARDED,
        {"variant": "non_ema"},
    ],
    ids=str,
)
def test_every_form_that_diffusers_writes(theirs, results, saved, dtype, tmp_path, capsys):
    model = diffusers.VQModel.from_config(theirs.config)
    model.load_state_dict(theirs.state_dict())
    model.to(dtype).save_pretrained(tmp_path / "theirs", **saved)
    assert (len(list((tmp_path / "theirs").iterdir())) > 3) == ("max_shard_size" in saved)
    printed = printed_weights(tmp_path / "theirs", tmp_path / "ours", capsys)
    agree(Autoencoder.from_pretrained(tmp_path / "ours"), tmp_path / "ours", *results)
    assert {tensor.dtype for tensor in load_file(tmp_path / "ours" / "model" / "model.safetensors").values()} == {
        torch.float32
    }
    precision = str(dtype).removeprefix("torch.")
    assert ("converted to float32" in printed) == (dtype != torch.float32)
    assert f"({precision}, converted" in printed or dtype == torch.float32
    assert printed.startswith(STEM)
    assert saved.get("variant", "") in printed


@pytest.mark.parametrize(
    ("forms", "taken"),
    [
        ([{}, {"variant": "fp16"}], f"{STEM}.safetensors; ignored: {STEM}.fp16.safetensors"),
        ([{"variant": "bf16"}, {"variant": "fp16"}], f"{STEM}.fp16.safetensors"),
        ([{"variant": "fp16"}, {"variant": "fp32"}], f"{STEM}.fp32.safetensors"),
        ([{"variant": "fp16"}, {"safe_serialization": False}], f"{STEM}.bin; ignored: {STEM}.fp16.safetensors"),
        ([{}, {"safe_serialization": False}], f"{STEM}.safetensors; ignored: {STEM}.bin"),
        ([SHARDED, {"variant": "fp16"}], f"{STEM}.safetensors.index.json; ignored: {STEM}.fp16.safetensors"),
        ([{"variant": "fp16"} | SHARDED, {}], f"{STEM}.safetensors; ignored: {STEM}.safetensors.index.fp16.json"),
        ([{}, SHARDED], f"{STEM}.safetensors; ignored: {STEM}.safetensors.index.json"),
    ],
    ids=str,
)
def test_full_precision_is_preferred_and_printed(theirs, results, forms, taken, tmp_path, capsys):
    folder = tmp_path / "theirs"
    for number, form in enumerate(forms):
        theirs.save_pretrained(tmp_path / str(number), **form)
        shutil.copytree(tmp_path / str(number), folder, dirs_exist_ok=True)
    assert printed_weights(folder, tmp_path / "ours", capsys).startswith(taken)
    agree(Autoencoder.from_pretrained(tmp_path / "ours"), tmp_path / "ours", *results)


def test_ignored_weights_have_no_influence(theirs, results, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    state = load_file(tmp_path / "theirs" / f"{STEM}.safetensors")
    save_file({name: tensor * 2 for name, tensor in state.items()}, tmp_path / "theirs" / f"{STEM}.fp16.safetensors")
    agree(imported(tmp_path / "theirs", tmp_path / "ours"), tmp_path / "ours", *results)


# --- a pipeline -----------------------------------------------------------------------------------------------------


def pipeline_folder(folder: Path, parts: dict[str, object], index: bool = True) -> Path:
    """A pipeline as diffusers lays it out, with those of ``parts`` that are models."""
    folder.mkdir(parents=True, exist_ok=True)
    entries: dict[str, object] = {
        "_class_name": "LDMPipeline",
        "_diffusers_version": "0.30.0",
        "scheduler": [None, None],
    }
    for name, part in parts.items():
        entries[name] = ["diffusers", part if isinstance(part, str) else type(part).__name__]
        if not isinstance(part, str):
            part.save_pretrained(folder / name)
    if index:
        (folder / "model_index.json").write_text(json.dumps(entries))
    return folder


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("name", ["vqvae", "vae", "movq"])
def test_the_vq_model_of_a_pipeline(theirs, results, name, index, tmp_path):
    source = pipeline_folder(tmp_path / "pipeline", {"unet": "UNet2DModel", name: theirs}, index)
    agree(imported(source, tmp_path / "ours"), tmp_path / "ours", *results)
    agree(imported(source / name, tmp_path / "part"), tmp_path / "part", *results)


def test_a_pipeline_in_half_precision_and_shards(theirs, results, tmp_path):
    source = pipeline_folder(tmp_path / "pipeline", {"vqvae": theirs})
    shutil.rmtree(source / "vqvae")
    theirs.save_pretrained(source / "vqvae", variant="fp16", **SHARDED)
    agree(imported(source, tmp_path / "ours"), tmp_path / "ours", *results)


def test_a_pipeline_without_a_vq_model_is_refused(theirs, tmp_path):
    kl = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    for number, index in enumerate((True, False)):
        source = pipeline_folder(tmp_path / str(number), {"vae": kl, "unet": "UNet2DConditionModel"}, index)
        assert_names(refused(source, tmp_path / "ours"), source, "vae/ (AutoencoderKL)", "no VQModel")
    assert_names(refused(tmp_path / "0" / "vae", tmp_path / "ours"), "_class_name", "'AutoencoderKL'", "'VQModel'")
    source = pipeline_folder(tmp_path / "ddpm", {"unet": "UNet2DModel"})
    assert_names(refused(source, tmp_path), source, "unet/ (UNet2DModel)", "no VQModel")
    source = pipeline_folder(tmp_path / "two", {"prior": theirs, "vqvae": theirs})
    assert_names(refused(source, tmp_path / "ours"), source, "several VQModels", "prior, vqvae")
    source = pipeline_folder(tmp_path / "half", {"vqvae": "VQModel"})
    assert_names(refused(source, tmp_path / "ours"), "VQModel vqvae", source / "vqvae/config.json")
    source = pipeline_folder(tmp_path / "elsewhere", {"../half": "VQModel"})
    assert_names(refused(source, tmp_path / "ours"), "VQModel ../half", "config.json")
    (source / "model_index.json").write_text("{")
    assert_names(refused(source, tmp_path / "ours"), source / "model_index.json", "JSON", "download it again")
    (tmp_path / "empty").mkdir()
    assert_names(refused(tmp_path / "empty", tmp_path / "ours"), tmp_path / "empty", "VQModel")


# --- missing and damaged shards and files ----------------------------------------------------------------------------


@pytest.fixture
def sharded(theirs, tmp_path) -> Path:
    theirs.save_pretrained(tmp_path / "theirs", **SHARDED)
    return tmp_path / "theirs"


def test_a_shard_that_is_missing_or_damaged_is_named(sharded, tmp_path):
    out, index = tmp_path / "ours", sharded / f"{STEM}.safetensors.index.json"
    shards = sorted(sharded.glob("*-of-*.safetensors"))
    first, second = shards[:2]
    whole = first.read_bytes()
    first.write_bytes(whole[:-100])
    assert_names(refused(sharded, out), f"{first}: damaged", "Download it again")
    first.write_bytes(b"")
    assert_names(refused(sharded, out), f"{first}: damaged", "Download it again")
    shutil.copy(second, first)
    assert_names(refused(sharded, out), f"{first}: lacks weights", index.name, "Download both again")
    first.unlink()
    assert_names(refused(sharded, out), f"1 of {len(shards)} shards", first.name, index.name, "Download them")
    first.mkdir()
    assert_names(refused(sharded, out), f"1 of {len(shards)} shards", first.name)
    first.rmdir()
    first.write_bytes(whole)
    stored = index.read_text()
    for text, expected in {
        "{": "JSON",
        "[]": "JSON object",
        "{}": "weight_map",
        '{"weight_map": {}}': "weight_map",
        '{"weight_map": {"a": 3}}': "weight_map",
        '{"weight_map": {"a": "../secret.safetensors"}}': "the shard '../secret.safetensors'",
        '{"weight_map": {"a": "/etc/passwd"}}': "the shard '/etc/passwd'",
    }.items():
        index.write_text(text)
        assert_names(refused(sharded, out), index, expected)
    index.unlink()
    assert_names(refused(sharded, out), sharded, first.name, f"{STEM}.safetensors.index.json")
    index.write_text(stored)
    imported(sharded, out)


def test_a_damaged_pickled_shard_is_named(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=False, **SHARDED)
    shard = sorted((tmp_path / "theirs").glob("*-of-*.bin"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert_names(refused(tmp_path / "theirs", tmp_path / "ours"), shard, "tensors alone")


def test_a_damaged_file_is_not_replaced_by_one_of_less_precision(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs", variant="fp16")
    theirs.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / f"{STEM}.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    assert_names(refused(tmp_path / "theirs", tmp_path / "ours"), f"{file}: damaged")


def test_a_folder_without_weights_is_refused_by_what_it_contains(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / f"{STEM}.safetensors"
    file.rename(file.with_name("model.safetensors"))
    message = refused(tmp_path / "theirs", tmp_path / "ours")
    assert_names(message, tmp_path / "theirs", f"{STEM}.safetensors, {STEM}.bin", "config.json, model.safetensors")


def test_quantized_weights_are_refused(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / f"{STEM}.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(file).items()}, file)
    assert_names(refused(tmp_path / "theirs", tmp_path / "ours"), "torch.int8", "not quantized")


# --- single files ---------------------------------------------------------------------------------------------------


def model_of(layout: str) -> tuple[Reference, dict]:
    """A tokenizer of taming or LlamaGen and its weights, the same in every precision."""
    model = Reference(layout=layout, cosine=layout == "llamagen", attended=(2,))
    model.state = {name: tensor.half().bfloat16().float() for name, tensor in model.state.items()}
    return model, model.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "model.pt", "model.bin"])
@pytest.mark.parametrize("layout", ["taming", "llamagen"])
def test_single_files_in_safetensors(layout, name, dtype, tmp_path):
    """The content decides, not the file name extension."""
    model, state = model_of(layout)
    state = {key: tensor.to(dtype).contiguous() for key, tensor in state.items()}
    save_file(state | {"loss.logvar": torch.zeros(1)} if layout == "taming" else state, tmp_path / name)
    config, size = None, 16
    if layout == "taming":
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(model.config()))
        config, size = tmp_path / "config.yaml", None
    ours = imported(tmp_path / name, tmp_path / "ours", config, image_size=size)
    x = images(3)
    codes = model.codes(x)
    agree(ours, tmp_path / "ours", x, codes, model.decode_codes(codes))


def test_safetensors_that_are_damaged_or_not_a_tokenizer(theirs, tmp_path):
    file, out = tmp_path / "model.safetensors", tmp_path / "ours"
    _, state = model_of("llamagen")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:1000], whole[:9], whole[:4], b"", b"\0" * 100, whole + b"more"):
        file.write_bytes(damaged)
        assert_names(refused(file, out), f"{file}: damaged")
    save_file({}, file)
    assert_names(refused(file, out), file, "no weights")
    save_file({"a": torch.zeros(1)}, file)
    assert_names(refused(file, out), file, "encoder.down...", "encoder.conv_blocks...")
    theirs.save_pretrained(tmp_path / "theirs")
    assert_names(
        refused(tmp_path / "theirs" / f"{STEM}.safetensors", out), "diffusers", "config.json", "Give the folder"
    )
    torch.save(state, file)  # a pickle named .safetensors
    assert_names(refused(file, out), f"{file}: damaged")


def test_training_with_lpips_is_recorded(tmp_path):
    model, state = model_of("taming")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "a.safetensors")
    for number, (target, expected) in enumerate(
        {"taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": ["lpips"], "my.Loss": []}.items()
    ):
        config = model.config()
        config["model"]["params"]["lossconfig"]["target"] = target
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        ours = imported(tmp_path / "a.safetensors", tmp_path / str(number), tmp_path / "config.yaml")
        assert [network.type for network in ours.config.trained_against] == expected
        document = ours.config.model_dump(mode="json")
        assert parse_config(AutoencoderConfig, document, "again") == ours.config
