"""The `twostage` command: help at once, for every verb."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cli import VERBS
from stage2_prior.sampling import SamplingConfig

WITHOUT = """
import sys
from pipelines.cli import main
sys.argv = ["twostage", "--help"]
try:
    main()
finally:
    print("loaded:", *{"torch", "numpy", "accelerate", "datasets", "PIL"} & sys.modules.keys())
"""


def test_help_is_instant():
    shown = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "loaded:"
    for verb in VERBS:
        assert verb in shown


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
    ended = twostage("generat")
    assert ended.code == 2
    assert "No such command 'generat'" in ended.err
