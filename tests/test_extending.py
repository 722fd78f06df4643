"""The plugin that docs/extending.md writes: named by a config, trained, encoded, used by a prior; and installed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from messages import assert_names

from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.backbones.backbone import BackboneConfig
from stage1_tokenizer.bottlenecks.bottleneck import BottleneckConfig
from stage1_tokenizer.losses.loss_term import LossTermConfig
from stage2_prior.networks.network import NetworkConfig
from stage2_prior.prior import Prior
from twostage.core.config import registry

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
UNIONS = (BackboneConfig, BottleneckConfig, LossTermConfig, NetworkConfig)
MAX_LINES = 40
TINY = "train.batch_size=8 train.warmup_steps=0 train.max_steps=20 train.validate_every=20 train.checkpoint_every=20"
SMALL = ["data.image_size=16", "data.num_images=32", *TINY.split()]


def blocks(language: str) -> list[str]:
    """The page's blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def commands() -> list[list[str]]:
    """The page's commands, word by word, with shorter trainings."""
    lines = blocks("bash")[0].replace("\\\n", " ").strip().splitlines()
    return [line.split() + (TINY.split() if "train" in line else []) for line in lines]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder with the page's module, in which its training has run, started by accelerate."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "configs").symlink_to(REPOSITORY / "configs")
    (folder / "my_parts.py").write_text("\n".join(blocks("python")), encoding="utf-8")
    (words,) = [words for words in commands() if words[0] == "accelerate"]
    launched = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", *words[2:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        ended = subprocess.run(
            [*launched, "data.num_images=64"], cwd=folder, capture_output=True, text=True, check=False
        )
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture
def fresh(monkeypatch, trained):
    """This process in that folder, as if it had just been started: no plugin is loaded."""
    monkeypatch.chdir(trained)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for union in UNIONS:
        monkeypatch.setattr(union, "registered", dict(union.registered))
    monkeypatch.delenv("TWOSTAGE_PLUGINS", raising=False)
    registry._waiting.cache_clear()
    yield
    registry._waiting.cache_clear()
    sys.modules.pop("my_parts", None)


def test_the_example_is_short():
    assert len([line for line in (blocks("python")[0] + blocks("bash")[0]).splitlines() if line]) <= MAX_LINES


def test_the_commands_of_the_page_work(fresh, works, monkeypatch):
    words = [words for words in commands() if words[0] == "export"]
    monkeypatch.setenv(*words[0][1].split("="))
    verbs = [words for words in commands() if words[0] == "twostage"]
    assert [words[1] for words in verbs] == ["encode", "train-prior", "generate"]
    for words in verbs:
        works(*words[1:])
    assert Path("generated/ternary/grid.png").is_file()
    manifest = json.loads(Path("codes/ternary/manifest.json").read_text())
    model = Autoencoder.from_pretrained("runs/ternary")
    assert manifest["codebook_size"] == model.codebook_size == 3**5
    assert manifest["tokenizer"]["hash"] == model.content_hash()
    assert type(model.bottleneck).__name__ == "Ternary"


def test_all_parts_are_used_from_the_command_line(fresh, works):
    config, backbone = "configs/tokenizer/vqvae_shapes.yaml", "model.backbone={type: patches}"
    loss = "loss.terms=[{type: edges, weight: 0.5}]"
    works("train-tokenizer", config, "plugins=my_parts", backbone, loss, "run.dir=runs/own", *SMALL)
    first, last = (json.loads(line) for line in Path("runs/own/metrics.jsonl").read_text().splitlines())
    assert first["loss"] == pytest.approx(first["reconstruction"] + first["commitment"] + first["edges"], rel=1e-3)
    assert "edges" not in last, "the held-out loss is the model's own"
    stored = json.loads(Path("runs/own/model/config.json").read_text())
    assert stored["plugins"] == ["my_parts"]
    assert "terms" not in stored["loss"], "a model does not need the losses of its training"
    assert "nothing left" in works(
        "train-tokenizer", config, "plugins=[my_parts]", backbone, loss, "run.dir=runs/own", *SMALL
    )

    works("encode", "runs/own", "--out", "codes/own")
    prior = ["plugins=my_parts", "codes=codes/own", "model={type: unigram}", "run.dir=runs/unigram", *TINY.split()]
    works("train-prior", "configs/prior/gpt_shapes.yaml", *prior)
    works("generate", "runs/unigram", "--num-images", 2, "--top-k", 5, "--out", "generated/unigram")
    assert type(Prior.from_pretrained("runs/unigram").network).__name__ == "Unigram"


def test_its_keys_are_checked_like_any_others(fresh, twostage):
    words = ["train-tokenizer", "configs/tokenizer/vqvae_shapes.yaml", "run.dir=runs/other", "plugins=[my_parts]"]
    ended = twostage(*words, "model.bottleneck={type: ternry}", "train.lr=fast", "loss.terms=[{type: edgs}]")
    assert_names(ended.err, "'ternry'", "did you mean 'ternary'", "train.lr", "loss.terms.0.type", "'edges'")
    ended = twostage(*words, "model.bottleneck={type: ternary, gian: 3}", "loss.terms=[{type: edges, wieght: 3}]")
    assert_names(ended.err, "model.bottleneck.gian", "did you mean 'gain'", "loss.terms.0.wieght", "'weight'")
    ended = twostage(*words, "loss.terms=[{type: edges}, {type: edges}]")
    assert_names(ended.err, "loss.terms", "edges, edges", "Remove one")
    assert ended.code == 2


def test_a_model_without_its_plugin_names_it(fresh, twostage):
    ended = twostage("reconstruct", "runs/ternary", "--out", "image.png")
    assert ended.code == 2
    assert_names(ended.err, "runs/ternary", "'my_parts'", "TWOSTAGE_PLUGINS=my_parts")
    assert "my_parts" not in sys.modules, "a model never imports code by itself"
    words = ["train-tokenizer", "configs/tokenizer/vqvae_shapes.yaml", "run.dir=runs/other"]
    ended = twostage(*words, "model.bottleneck={type: ternary}", "loss.terms=[{type: edges}]")
    assert_names(ended.err, "model.bottleneck.type", "'ternary'", "'vector'", "`plugins`", "loss.terms.0.type", "none")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import missing_library", ["broken.py, line 1", "missing_library"]),
        ("def f(:", ["SyntaxError", "broken.py, line 1"]),
        ("\nraise SystemExit", ["broken.py, line 2", "SystemExit"]),
        (None, ["no such module", "broken.py", "configs/tokenizer"]),
    ],
)
def test_a_plugin_that_does_not_import(fresh, twostage, code, expected, monkeypatch):
    if code:
        Path("broken.py").write_text(code)
    else:
        Path("broken.py").unlink(missing_ok=True)
    ended = twostage("train-tokenizer", "configs/tokenizer/vqvae_shapes.yaml", "plugins=[broken]", "run.dir=runs/other")
    assert ended.code == 2
    assert ended.err.count("\n") == 1, "one sentence"
    assert_names(ended.err, "plugins 'broken'", *expected, "Fix")
    monkeypatch.setenv("TWOSTAGE_PLUGINS", "broken")
    registry._waiting.cache_clear()
    assert_names(twostage("reconstruct", "runs/ternary", "--out", "image.png").err, "plugins 'broken'")


def test_a_plugin_that_is_installed_needs_no_key(fresh, tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text((Path("my_parts.py")).read_text())
    (tmp_path / "pyproject.toml").write_text(blocks("toml")[0])
    words = ["--no-index", "--no-deps", "--no-build-isolation", "--target", tmp_path / "site", tmp_path]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *words], check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert "ternary" in [member.model_fields["type"].default for member in BottleneckConfig.members()]
