"""The quantizer that docs/extending.md writes: installed as it says, trained, encoded, and used by a prior."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from messages import assert_names

from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.bottleneck import BottleneckConfig
from twostage.core.config import registry

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
MAX_LINES = 40
TINY = "train.batch_size=8 train.warmup_steps=0 train.max_steps=20 train.validate_every=20 train.checkpoint_every=20"


def block(language: str) -> str:
    """The page's only block of a language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def commands() -> list[list[str]]:
    """The page's commands, word by word, with shorter trainings."""
    lines = block("bash").replace("\\\n", " ").strip().splitlines()
    return [line.split() + (TINY.split() if "train" in line else []) for line in lines]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the plugin as pip installs it."""
    root = tmp_path_factory.mktemp("plugin")
    (root / "project").mkdir()
    (root / "project" / "my_quantizer.py").write_text(block("python"), encoding="utf-8")
    (root / "project" / "pyproject.toml").write_text(block("toml"), encoding="utf-8")
    words = ["--no-index", "--no-deps", "--no-build-isolation", "--target", root / "site", root / "project"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *words], check=True, capture_output=True)
    return root / "site"


@pytest.fixture
def plugin(site, monkeypatch):
    """This process, as if it had been started with the plugin installed."""
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(BottleneckConfig, "registered", dict(BottleneckConfig.registered))
    importlib.invalidate_caches()
    registry._waiting.cache_clear()
    yield
    registry._waiting.cache_clear()
    sys.modules.pop("my_quantizer", None)


@pytest.fixture(scope="module")
def trained(site, tmp_path_factory) -> Path:
    """The folder in which the page's training has run, started by accelerate."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "configs").symlink_to(REPOSITORY / "configs")
    (words,) = [words for words in commands() if words[0] == "accelerate"]
    launched = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", *words[2:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{site}:{REPOSITORY}")
        ended = subprocess.run(
            [*launched, "data.num_images=64"], cwd=folder, capture_output=True, text=True, check=False
        )
    assert ended.returncode == 0, ended.stderr
    return folder


def test_the_example_is_short():
    lines = "".join(map(block, ("python", "toml", "bash"))).splitlines()
    assert len([line for line in lines if line]) <= MAX_LINES


def test_the_commands_of_the_page_work(trained, plugin, works, monkeypatch):
    monkeypatch.chdir(trained)
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


def test_its_keys_are_checked_like_any_others(trained, plugin, twostage, monkeypatch):
    monkeypatch.chdir(trained)
    words = ["train-tokenizer", "configs/tokenizer/vqvae_shapes.yaml", "run.dir=runs/other"]
    ended = twostage(*words, "model.bottleneck={type: ternry}", "train.lr=fast")
    assert_names(ended.err, "'ternry'", "did you mean 'ternary'", "train.lr")
    ended = twostage(*words, "model.bottleneck={type: ternary, gian: 3}")
    assert_names(ended.err, "model.bottleneck.gian", "did you mean 'gain'")
    assert ended.code == 2


def test_a_model_without_its_plugin_asks_for_it(trained, twostage, monkeypatch):
    monkeypatch.chdir(trained)
    ended = twostage("reconstruct", "runs/ternary", "--out", "image.png")
    assert ended.code == 2
    assert_names(ended.err, "runs/ternary", "model.bottleneck.type", "'ternary'", "'vector'", "plugin")
