"""The wheel is complete: beside a user's own `core/`, `data/`, `utils/` and `models/`, every command shows its help and
a few lines of Python make images."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipelines.cli import VERBS
from twostage import TwoStagePipeline

REPOSITORY = Path(__file__).parents[1]
SOURCES = (
    "twostage",
    "stage1_tokenizer",
    "stage2_prior",
    "pipelines",
    "configs",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
LAUNCHED = ("stage1_tokenizer.train_tokenizer", "stage2_prior.train_prior", "pipelines.encode_dataset")
"""Some of the modules that a launcher starts, as `python -m` does."""
MAX_IMPORT_SECONDS, MAX_HELP_SECONDS = 0.1, 0.5
IMPORT = "import twostage, sys; print(twostage.__file__, 'torch' in sys.modules, twostage.__version__)"
HELP = """
import sys
from pipelines.cli import main
sys.argv = ["twostage", "--help"]
try:
    main()
finally:
    print("torch" in sys.modules)
"""
HELP_OF_ALL = """
import runpy, sys
from pipelines.cli import VERBS, main
for words in [*([verb] for verb in VERBS), *(["-m", module] for module in LAUNCHED)]:
    sys.argv = ["twostage", *words, "--help"]
    try:
        if words[0] == "-m":
            sys.modules.pop(words[1], None)
            sys.argv = [words[1], "--help"]
            runpy.run_module(words[1], run_name="__main__")
        else:
            main()
    except SystemExit as ended:
        print("ENDED", *words, ended.code)
"""
FOUR_LINES = """
from twostage import TwoStagePipeline
pipeline = TwoStagePipeline.from_pretrained("shared")
output = pipeline(num_images=2, class_names=["star"], seed=0)
output.images[0].save("star.png")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs; it is built from a copy, without leftovers of earlier builds."""
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


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder, whose own packages have names that a program might use."""
    for name in ("core", "data", "utils", "models", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('this package belongs to the user')\n")
    return tmp_path


def run(site: Path, folder: Path, code: str) -> str:
    """Runs ``code`` in ``folder``; the packages come from ``site``."""
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def cpu_seconds(site: Path, folder: Path, code: str) -> float:
    """The median processor time of three processes, which other work on the machine hardly changes."""
    run(site, folder, code)  # compiles
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(site, folder, code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return sorted(seconds)[1]


def test_every_file_is_in_the_wheel(installed):
    def files(root: Path, package: str) -> set[str]:
        found = [*(root / package).rglob("*.py"), *(root / package).rglob("py.typed")]
        return {str(path.relative_to(root)) for path in found}

    for package in ("twostage", "stage1_tokenizer", "stage2_prior", "pipelines"):
        assert files(installed, package) == files(REPOSITORY, package)
    configs = {file.relative_to(REPOSITORY) for file in (REPOSITORY / "configs").rglob("*.yaml")}
    assert {file.relative_to(installed / "twostage") for file in installed.rglob("*.yaml")} == configs


def test_import_and_help_are_instant_and_load_no_torch(installed, project):
    where, torch_loaded, version = run(installed, project, IMPORT).split()
    assert Path(where).is_relative_to(installed)
    assert (torch_loaded, version) == ("False", "0.1.0")
    shown = run(installed, project, HELP)
    assert "Usage: twostage" in shown
    assert shown.split()[-1] == "False"
    nothing = cpu_seconds(installed, project, "pass")  # the interpreter itself
    assert cpu_seconds(installed, project, "import twostage") - nothing < MAX_IMPORT_SECONDS
    assert cpu_seconds(installed, project, HELP) - nothing < MAX_HELP_SECONDS


def test_every_command_shows_its_help_beside_a_users_own_packages(installed, project):
    shown = run(installed, project, f"LAUNCHED = {LAUNCHED}\n{HELP_OF_ALL}")
    ended = [line for line in shown.splitlines() if line.startswith("ENDED ")]
    assert ended == [f"ENDED {verb} 0" for verb in VERBS] + [f"ENDED -m {module} 0" for module in LAUNCHED]
    assert shown.count("Usage: ") == len(ended)


def test_four_lines_make_images(installed, pipeline_folder, project):
    shutil.copytree(pipeline_folder, project / "shared")
    shown = run(installed, project, f"{FOUR_LINES}\nimport twostage\nprint(twostage.__file__)")
    assert Path(shown.strip()).is_relative_to(installed)
    expected = TwoStagePipeline.from_pretrained(pipeline_folder)(2, ["star"], seed=0).images[0]
    with Image.open(project / "star.png") as image:
        assert image.tobytes() == expected.tobytes()


@pytest.fixture
def pipeline_folder(runs, twostage, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "pipeline"
    ended = twostage("export", runs.prior, "--out", out)
    assert ended.code == 0, ended.err
    return out


def test_a_config_is_written_for_images(installed, project):
    code = "import sys; from pipelines.cli import main; sys.argv = ['twostage', *'train-tokenizer shapes'.split(), *"
    words = ["--dry-run", "train.batch_size=8"]
    assert "After configs/tokenizer/vqvae_shapes.yaml" in run(installed, project, f"{code}{words}]; main()")
