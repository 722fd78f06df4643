"""The `twostage` command: help at once, for every verb."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from pipelines.cli import VERBS
from stage2_prior.sampling_config import SamplingConfig

MODULES = [*dict.fromkeys([module for module, _ in VERBS.values()]), "stage1_tokenizer.train_tokenizer",
           "stage2_prior.train_prior"]  # fmt: skip
"""Those that `python -m` and launchers start."""
HELP_OF_ALL = """
import runpy, sys
from pipelines.cli import VERBS, main
for words in ([], *([verb] for verb in VERBS), *(["-m", module] for module in sys.argv[1:])):
    sys.argv = ["twostage", *words, "--help"]
    try:
        if words[:1] == ["-m"]:
            sys.modules.pop(words[1], None)
            sys.argv = [words[1], "--help"]
            runpy.run_module(words[1], run_name="__main__")
        main()
    except SystemExit as ended:
        slow = {"torch", "numpy", "accelerate", "datasets", "PIL"} & sys.modules.keys()
        print("LOADED", *words, sorted(slow), ended)
"""


def test_help_of_every_verb_and_module_is_instant():
    """One process shows them all, so a slow import of any of them remains loaded."""
    words = [sys.executable, "-c", HELP_OF_ALL, *MODULES]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    loaded = [line for line in shown.splitlines() if line.startswith("LOADED")]
    expected = ["LOADED", *(f"LOADED {verb}" for verb in VERBS), *(f"LOADED -m {module}" for module in MODULES)]
    assert loaded == [f"{line} [] 0" for line in expected]
    assert [verb for verb in VERBS if f"Usage: twostage {verb} " not in shown] == []


def test_the_command_is_installed():
    command = Path(sys.executable).with_name("twostage")
    shown = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "Usage: twostage" in shown


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(twostage, verb):
    ended = twostage(verb, "--help")
    assert ended.code == 0
    assert f"Usage: twostage {verb} [OPTIONS]" in ended.out
    assert VERBS[verb][1].split(":")[0].rstrip(".") in " ".join(ended.out.split())


def test_there_is_an_option_for_each_sampling_setting(twostage):
    for verb in ("generate", "evaluate"):
        shown = twostage(verb, "--help").out
        assert [name for name in SamplingConfig.model_fields if f"--{name.replace('_', '-')} " not in shown] == []


def test_a_verb_that_is_not_there(twostage):
    for word, suggestion in {
        "generat": "Did you mean generate?",
        "trian": "train-tokenizer or train-features or train-prior",
        "gen": "Did you mean generate?",
        "zzz": "--help",
    }.items():
        ended = twostage(word)
        assert ended.code == 2
        assert f"No such command '{word}'" in ended.err
        assert suggestion in ended.err


def test_short_options(twostage):
    assert twostage("--version").out == f"twostage {version('twostage')}\n"
    assert "Usage: twostage" in twostage("-h").out
    assert "Usage: twostage encode" in twostage("encode", "-h").out


LOADED = """
import sys
from pipelines.cli import main
sys.argv = ["twostage", *sys.argv[1:]]
try:
    main()
finally:
    slow = {"torch._dynamo", "torch.distributed.tensor", "triton", "datasets"}
    print("LOADED", sorted(slow & sys.modules.keys()))
"""


def test_no_slow_imports(runs, configs, tmp_path):
    """A new training, a finished one, and sampling do without the compiler of torch."""
    for words, said in {
        ("train-tokenizer", configs / "tokenizer.yaml", f"run.dir={tmp_path / 'run'}", "train.max_steps=2"): "step 2/2",
        ("train-tokenizer", configs / "tokenizer.yaml", f"run.dir={runs.tokenizer}"): "nothing left to do",
        ("generate", runs.prior, "--num-images", "2", "--out", tmp_path / "generated"): "2 images",
    }.items():
        ended = subprocess.run([sys.executable, "-c", LOADED, *words], capture_output=True, text=True, check=False)
        assert ended.stdout.splitlines()[-1] == "LOADED []", ended.stderr
        assert said in ended.stdout
