"""A mistake gives one clear message and status 2, and changes no file."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from messages import assert_names
from PIL import Image

from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.autoencoder_config import AutoencoderConfig
from stage2_prior.networks.pixelcnn import PixelCNNConfig
from stage2_prior.prior import Prior
from twostage.core.config.sections import parse_config

FEW = ["train.max_steps=2", "train.validate_every=2", "train.checkpoint_every=2"]


@pytest.fixture(autouse=True)
def _own_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TWOSTAGE_DATA", raising=False)


@pytest.fixture
def refused(twostage, runs) -> Callable[..., str]:
    """``refused(*words)``: the one error message of `twostage WORDS`, which must not change a file."""

    def refused(*words: object) -> str:
        folders = [Path.cwd(), *vars(runs).values()]
        before = [snapshot(folder) for folder in folders]
        ended = twostage(*words)
        assert ended.code == 2, ended
        assert ended.err.startswith("error: ")
        assert ended.err.count("error: ") == 1
        assert "Traceback" not in ended.err + ended.out
        assert [snapshot(folder) for folder in folders] == before
        return ended.err

    return refused


@pytest.fixture
def other_tokenizer(runs, tmp_path) -> Path:
    """The run folder of a tokenizer with another encoder."""
    run = tmp_path / "other_tokenizer"
    shutil.copytree(runs.tokenizer, run)
    model = Autoencoder.from_pretrained(run)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(run / "model")
    return run


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below ``folder``, with its content and the time of its last change."""
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def short_hash(tokenizer: Path) -> str:
    return Autoencoder.from_pretrained(tokenizer).content_hash()[:12]


def write_images(folder: Path, count: int = 20, mode: str = "RGB") -> Path:
    folder.mkdir()
    for i in range(count):
        Image.new(mode, (16, 16), (10 * i, 90, 200) if mode == "RGB" else 10 * i).save(folder / f"{i:02d}.png")
    return folder


# --- a training that cannot start -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.batchsize=4"], ["train.batchsize: unknown key; did you mean 'batch_size'?"]),
        (["modle.latent_channels=4"], ["modle: unknown key; did you mean 'model'?"]),
        (["train.lr=fast"], ["train.lr: ", "valid number", "got 'fast'"]),
        (["train.batch_size=4.5"], ["train.batch_size: ", "got 4.5"]),
        (["model.bottleneck={type: vectr}"], ["model.bottleneck.type: got 'vectr'", "did you mean 'vector'?"]),
        (["train.lr=-1", "data.channels=0"], ["2 mistakes", "train.lr: ", "data.channels: "]),
        (["train.max_steps=null"], ["give either max_steps or epochs"]),
        (["train.lr"], ["override 'train.lr': expected key=value"]),
        (["data.source=./nowhere"], ["data.source './nowhere': not found"]),
        (["data.source=no_such_set"], ["data.source 'no_such_set': not found", "TWOSTAGE_DATA"]),
        (
            ["model.bottleneck={type: finite_scalar, levels: [64, 64, 64, 64]}"],
            ["16,777,216 codes", "at most 1,048,576"],
        ),
        (["model.backbone.attention_factors=[8]"], ["attention_factors [8]", "expected some of [1, 2, 4]"]),
        (["model.bottleneck={type: finite_scalar, levels: [8, 5]}"], ["latent_channels 4", "set latent_channels to 2"]),
        (["model.bottleneck={type: lookup_free}", "model.latent_channels=21"], ["latent_channels 21", "at most 20"]),
        (["model.bottleneck.codebook_size=4294967296"], ["codebook_size", "2147483647"]),
        (["loss.adversarial={num_layers: 3}"], ["loss.adversarial.num_layers 3", "16x16", "Use fewer layers"]),
        (["loss.adversarial={norm: sync_batch, r1_weight: 1}"], ["r1_weight", "derivatives", "adversarial.norm=group"]),
        (["loss.adversarial={betas: [0.5, 1.0]}"], ["loss.adversarial.betas", "less than 1"]),
        (["train.mixed_precision=fp16"], ["fp16", "needs a GPU"]),
        (["loss.perceptual={type: features, path: runs/none}"], ["runs/none: no such folder"]),
        (["train.parts=decoder"], ["train.parts", "init_from=RUN"]),
        (["init_from=runs/none"], ["runs/none: no such folder"]),
        (["data.num_images=8"], ["train.batch_size 16: the training split only has 8 images", "at most 8"]),
        (["train.batch_size=15", "train.gradient_accumulation_steps=2"], ["15", "multiple of 2"]),
    ],
)
def test_a_wrong_config_is_an_error_and_blocks_nothing(refused, works, configs, overrides, said):
    words = ["train-tokenizer", configs / "tokenizer.yaml", "run.dir=run", *FEW]
    error = refused(*words, *overrides)
    assert [part for part in said if part not in error] == []
    assert "run: finished" not in works(*words), "the corrected command works in the same folder"


def test_a_missing_config(refused, configs):
    assert "tokenizer.yaml" in refused("train-tokenizer", configs / "tokeniser.yaml")


def test_an_empty_folder(refused, configs, tmp_path):
    (tmp_path / "empty").mkdir()
    error = refused("train-tokenizer", configs / "tokenizer.yaml", "run.dir=run", "data.source=./empty")
    assert "data.source empty: expected images in it" in error
    assert "expected images" in refused("inspect", "./empty")


def test_an_unreadable_image_is_named_or_skipped(refused, works, configs, tmp_path):
    folder = write_images(tmp_path / "images")
    (folder / "07.png").write_bytes((folder / "06.png").read_bytes()[:40])
    (folder / "broken.jpg").write_bytes(b"no image")
    words = ["train-tokenizer", configs / "tokenizer.yaml", "run.dir=run", f"data.source={folder}", *FEW]
    error = refused(*words)
    assert "2 unreadable images" in error
    assert str(folder / "07.png") in error
    assert str(folder / "broken.jpg") in error
    assert "data.on_bad_image=skip" in error
    said = works(*words, "data.on_bad_image=skip")
    assert "2 unreadable images are skipped" in said
    assert str(folder / "broken.jpg") in said


@pytest.mark.parametrize(("mode", "channels", "said"), [
    ("L", 3, "1 of 21 images are grey and are copied to all colours (data.channels=3)"),
    ("RGB", 1, "1 of 21 images have colour and are converted to grey (data.channels=1)"),
])  # fmt: skip
def test_an_image_of_another_mode_is_converted_with_a_notice(works, configs, tmp_path, mode, channels, said):
    folder = write_images(tmp_path / "images", mode="L" if mode == "RGB" else "RGB")
    Image.new(mode, (16, 16)).save(folder / "other.png")
    words = ["train-tokenizer", configs / "tokenizer.yaml", "run.dir=run", f"data.source={folder}", *FEW]
    assert said in works(*words, f"data.channels={channels}")


def test_a_run_with_another_config_is_refused(refused, runs, configs):
    words = ["train-tokenizer", configs / "tokenizer.yaml", f"run.dir={runs.tokenizer}"]
    error = refused(*words, "train.lr=0.5", "model.latent_channels=8")
    assert "train.lr: was 0.003, now 0.5" in error
    assert "model.latent_channels: was 4, now 8" in error
    assert "Nothing was changed" in error
    words = ["train-prior", configs / "prior.yaml", f"run.dir={runs.prior}", f"codes={runs.codes}"]
    assert "loss.replace_prob: was 0.0, now 0.2" in refused(*words, "loss.replace_prob=0.2")


def test_a_folder_of_other_files_is_refused_as_a_run(refused, configs, tmp_path):
    write_images(tmp_path / "run", 2)
    error = refused("train-tokenizer", configs / "tokenizer.yaml", "run.dir=run")
    assert_names(error, "run.dir run", "run.dir=")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoint(twostage, configs, tmp_path):
    words = ["train-tokenizer", configs / "tokenizer.yaml", "run.dir=run", "train.max_steps=40",
             "train.warmup_steps=20", "train.log_every=1", "train.checkpoint_every=1", "train.lr=1e12"]  # fmt: skip
    ended = twostage(*words)
    assert ended.code == 2
    error = ended.err[ended.err.index("error: ") :]
    assert re.search(r"step \d+: reconstruction, commitment is not finite for the batch of \w+ \d+, ", error)
    assert_names(error, "last good checkpoint in run/checkpoints")
    kept = list((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert kept
    assert f"step {max(int(path.name[5:]) for path in kept) + 1}: " in error


# --- a prior and its codes ------------------------------------------------------------------------------------------


def test_a_prior_is_not_trained_on_another_tokenizers_codes(refused, works, runs, configs, other_tokenizer, tmp_path):
    shutil.copytree(runs.codes, tmp_path / "codes")
    words = ["train-prior", configs / "prior.yaml", "run.dir=prior", "codes=codes", *FEW]
    works(*words)
    shutil.rmtree(tmp_path / "codes")
    works("encode", other_tokenizer, "--out", "codes")
    error = refused(*words)
    assert short_hash(other_tokenizer) in error
    assert short_hash(runs.tokenizer) in error


def test_codes_that_are_missing_or_damaged(refused, runs, configs, tmp_path):
    words = ["train-prior", configs / "prior.yaml", "run.dir=prior"]
    assert_names(refused(*words, "codes=nowhere"), "codes nowhere", "no such folder", "twostage encode")
    shutil.copytree(runs.codes, tmp_path / "codes")
    whole = (tmp_path / "codes" / "train.codes.npy").read_bytes()
    (tmp_path / "codes" / "train.codes.npy").write_bytes(whole[:-100])
    assert_names(refused(*words, "codes=codes"), "train.codes.npy", "expected 320 rows", "found 316")


def test_a_continuous_autoencoder_has_no_codes(refused, runs, tmp_path):
    document = json.loads((runs.tokenizer / "model" / "config.json").read_text())
    document = {key: value for key, value in document.items() if key in AutoencoderConfig.model_fields}
    document["model"]["bottleneck"] = {"type": "gaussian"}
    Autoencoder(parse_config(AutoencoderConfig, document, "config")).save_pretrained(tmp_path / "vae" / "model")
    shutil.copy(runs.tokenizer / "config.yaml", tmp_path / "vae")
    assert "vae: the bottleneck 'gaussian' has no codes" in refused("encode", "vae", "--out", "codes")


def test_codes_are_not_written_over_others(refused, runs, other_tokenizer, tmp_path):
    error = refused("encode", other_tokenizer, "--out", runs.codes)
    assert short_hash(other_tokenizer) in error
    assert short_hash(runs.tokenizer) in error
    assert "Nothing was changed" in error
    source = write_images(tmp_path / "images")
    error = refused("encode", runs.tokenizer, "--data", source, "--out", runs.codes)
    assert f"'shapes' instead of '{source}'" in error


def test_codes_are_not_written_next_to_other_files(refused, runs, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")  # no folder can be renamed to it
    for out in (write_images(tmp_path / "images"), tmp_path / "images" / "00.png", tmp_path / "link"):
        error = refused("encode", runs.tokenizer, "--out", out)
        assert error.startswith(f"error: --out {out}: exists but contains no codes")


# --- generating -----------------------------------------------------------------------------------------------------


def test_an_unknown_class_lists_the_known(refused, runs):
    error = refused("generate", runs.prior, "--class-name", "strar", "--out", "out")
    assert "class name 'strar': not a class of this model; did you mean 'star'?" in error
    assert "circle" in error
    assert "crescent" in error


def test_a_prior_refuses_another_tokenizer(refused, runs, other_tokenizer):
    error = refused("generate", runs.prior, "--tokenizer", other_tokenizer, "--out", "out")
    assert short_hash(other_tokenizer) in error
    assert short_hash(runs.tokenizer) in error


def test_images_of_other_settings_are_not_mixed(refused, works, runs, tmp_path):
    words = ["generate", runs.prior, "--num-images", 4, "--out", "out"]
    works(*words)
    error = refused(*words, "--seed", 1, "--top-k", 3)
    assert "seed: was 0, now 1" in error
    assert "top_k: was None, now 3" in error
    write_images(tmp_path / "holiday", 2)
    assert "holds no generated images" in refused("generate", runs.prior, "--out", "holiday")


@pytest.mark.parametrize(("option", "value", "said"), [
    ("--top-k", 17, "top_k 17: expected at most 16,"),
    ("--top-p", 1.5, "top_p"),
    ("--temperature", 0, "temperature"),
    ("--num-steps", 4, "num_steps 4: only applies to masked_transformer"),
    ("--guidance-scale", 2, "guidance_scale 2.0: this prior was trained with loss.class_dropout_prob=0"),
])  # fmt: skip
def test_wrong_sampling_settings_block_nothing(refused, works, runs, tmp_path, option, value, said):
    shutil.copytree(runs.prior / "model", tmp_path / "prior")
    document = json.loads((tmp_path / "prior" / "config.json").read_text())
    document["loss"]["class_dropout_prob"] = 0.0
    (tmp_path / "prior" / "config.json").write_text(json.dumps(document))
    words = ["generate", "./prior", "--num-images", 2, "--out", "out"]
    assert said in refused(*words, option, value)
    works(*words)  # the corrected command works in the same folder


def test_unsupported_rounded_weights_block_nothing(refused, works, runs, monkeypatch):
    words = ["generate", runs.prior, "--num-images", 2, "--out", "out"]
    with monkeypatch.context() as patch:
        patch.setattr("stage2_prior.networks.fast_linear.has_bfloat16", lambda: False)
        assert "weights 'bfloat16': this torch or this processor has no" in refused(*words, "--weights", "bfloat16")
        patch.setattr(
            "stage2_prior.networks.fast_linear.torch.backends.quantized", SimpleNamespace(supported_engines=[])
        )
        assert "weights 'int8': this torch has no" in refused(*words, "--weights", "int8")
    works(*words)  # the corrected command works in the same folder


def test_a_pixelcnn_has_no_rounded_weights(refused, runs):
    prior = Prior.from_pretrained(runs.prior)
    Prior(prior.config.model_copy(update={"model": PixelCNNConfig(channels=4, depth=1)})).save_pretrained("prior")
    assert_names(refused("generate", "./prior", "--out", "out", "--weights", "int8"), "weights 'int8'", "a pixelcnn")


def test_a_prior_is_not_measured_on_another_tokenizers_codes(refused, works, runs, other_tokenizer):
    works("encode", other_tokenizer, "--out", "codes")
    error = refused("evaluate", runs.prior, "--codes", "codes")
    assert short_hash(other_tokenizer) in error
    assert short_hash(runs.tokenizer) in error


# --- missing and damaged models -------------------------------------------------------------------------------------


def test_a_missing_model(refused, tmp_path):
    assert "runs/nothing: no such folder" in refused("reconstruct", "runs/nothing")
    assert "runs/nothing: no such folder" in refused("encode", "runs/nothing")
    assert "runs/nothing: no such folder" in refused("generate", "runs/nothing", "--out", "out")
    (tmp_path / "empty").mkdir()
    assert "empty: no trained model" in refused("reconstruct", "./empty")


def test_a_wrong_kind_of_model_is_refused(refused, runs):
    assert "is a prior, expected a tokenizer" in refused("encode", runs.prior)
    assert "makes no images by itself" in refused("generate", runs.tokenizer, "--out", "out")


def test_damaged_models(refused, runs, tmp_path):
    shutil.copytree(runs.tokenizer, tmp_path / "run")
    weights = tmp_path / "run" / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "damaged: model.safetensors cannot be read" in refused("reconstruct", "run")
    weights.unlink()
    assert "incomplete, expected model.safetensors" in refused("encode", "run", "--out", "codes")
    weights.write_bytes(whole)
    (tmp_path / "run" / "model" / "config.json").write_text('{"format_version": 1, "ki')
    assert "config.json: damaged: not valid JSON" in refused("reconstruct", "run")


def test_damaged_pipelines(refused, runs, tmp_path):
    (tmp_path / "pipeline").mkdir()
    for content, said in {"{": "pipeline.json", '{"kind": "other"}': "kind 'other'"}.items():
        (tmp_path / "pipeline" / "pipeline.json").write_text(content)
        assert said in refused("generate", "./pipeline", "--out", "out")
