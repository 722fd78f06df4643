"""The wheel holds all that is needed: help at once, and four lines of Python, where only it is installed."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from twostage import TwoStagePipeline

REPOSITORY = Path(__file__).parents[1]
SOURCES = ("twostage", "stage1_tokenizer", "stage2_prior", "pipelines", "pyproject.toml", "README.md", "LICENSE")
HELP_SECONDS = 1.5
HELP = """
import sys
from pipelines.cli import main
sys.argv = ["twostage", "--help"]
try:
    main()
finally:
    import twostage
    print(twostage.__file__, "torch" in sys.modules)
"""
FOUR_LINES = """
from twostage import TwoStagePipeline
pipeline = TwoStagePipeline.from_pretrained("shared")
output = pipeline(num_images=2, class_names=["star"], seed=0)
output.images[0].save("star.png")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs; built from a copy, which holds no leftovers of earlier builds."""
    root = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, copy = REPOSITORY / name, root / "sources" / name
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-index", "--no-deps"]
    built = ["wheel", *offline, "--no-build-isolation", "-w", root / "dist", root / "sources"]
    subprocess.run([*pip, *built], check=True, capture_output=True)
    (wheel,) = (root / "dist").glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", root / "site", wheel], check=True, capture_output=True)
    return root / "site"


def run(site: Path, folder: Path, code: str) -> str:
    """Runs ``code`` away from the checkout; the packages come from ``site``."""
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_every_module_is_in_the_wheel(installed):
    for package in ("twostage", "stage1_tokenizer", "stage2_prior", "pipelines"):
        modules = {path.name for path in (installed / package).glob("*.py")}
        assert modules == {path.name for path in (REPOSITORY / package).glob("*.py")}


def test_help_is_instant(installed, tmp_path):
    run(installed, tmp_path, HELP)  # compiles
    seconds = []
    for _ in range(3):
        before = cpu_seconds()
        shown = run(installed, tmp_path, HELP)
        seconds.append(cpu_seconds() - before)  # of the processor, which other work on the machine does not change
    assert "Usage: twostage" in shown
    where, torch_loaded = shown.splitlines()[-1].split()
    assert Path(where).is_relative_to(installed)
    assert torch_loaded == "False"
    assert sorted(seconds)[1] < HELP_SECONDS


def test_four_lines_make_images(installed, pipeline_folder, tmp_path):
    shutil.copytree(pipeline_folder, tmp_path / "shared")
    shown = run(installed, tmp_path, f"{FOUR_LINES}\nimport twostage\nprint(twostage.__file__)")
    assert Path(shown.strip()).is_relative_to(installed)
    expected = TwoStagePipeline.from_pretrained(pipeline_folder)(2, ["star"], seed=0).images[0]
    with Image.open(tmp_path / "star.png") as image:
        assert image.tobytes() == expected.tobytes()


@pytest.fixture
def pipeline_folder(runs, twostage, tmp_path) -> Path:
    out = tmp_path / "exported"
    ended = twostage("export", runs.prior, "--out", out)
    assert ended.code == 0, ended.err
    return out
