"""The notebooks: their cells run (with two training steps), and the stored outputs are complete, small and clean."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from test_readme import tiny_mnist

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 6_000_000


def cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def shortened(source: str) -> str:
    """A cell with two steps of training and few images."""
    source = re.sub(r"^(\w*steps) = \d+", r"\1 = 2", source, flags=re.MULTILINE)
    return re.sub(r"num_images=\d[\d_]{3,}", "num_images=320", source)


@pytest.fixture
def tiny_data(tmp_path, monkeypatch, new_process):
    tiny_mnist(tmp_path / "mnist")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TWOSTAGE_DATA", str(tmp_path))
    monkeypatch.setattr(plt, "show", plt.close)
    with torch.random.fork_rng():
        yield


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_all_cells_run(notebook: Path, tiny_data):
    names = {"__name__": "__main__", "display": lambda image: image.load()}
    for number, cell in enumerate(cells(notebook)):
        if cell["cell_type"] == "code":
            exec(compile(shortened("".join(cell["source"])), f"{notebook.name}[{number}]", "exec"), names)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_the_outputs_are_those_of_one_clean_run(notebook: Path):
    code = [cell for cell in cells(notebook) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert [cell["metadata"] for cell in cells(notebook) if cell["metadata"]] == []
    written = json.dumps(outputs)
    assert re.findall(r"/(?:home|root|tmp|work|Users)/\w+|Warning", written) == []


def test_the_first_eight_are_in_english_and_chinese():
    for notebook in NOTEBOOKS[:8]:
        for cell in cells(notebook):
            if cell["cell_type"] == "markdown" and len("".join(cell["source"])) > 100:
                assert "**中文**" in "".join(cell["source"]), (notebook.name, cell["source"])


def test_all_are_listed_and_small():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= MAX_BYTES
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    site = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    for file in NOTEBOOKS:
        assert f"({file.name})" in index
        assert f"notebooks/{file.stem}.md" in site
