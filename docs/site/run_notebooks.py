"""Runs notebooks in place and stores their outputs.

python docs/site/run_notebooks.py [docs/notebooks/01_vae.ipynb ...]

Times, versions and random names are removed, so running a notebook again changes only what its results change.
"""

import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

__all__ = ["run_notebook"]

FOLDER = Path(__file__).parents[1] / "notebooks"
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def run_notebook(file: Path) -> None:
    """Runs all cells in an empty folder. If a cell fails, raises `CellExecutionError` and keeps the file as it was."""
    notebook = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": folder}}
        ).execute()
    notebook.metadata = METADATA
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type == "code":
            cell.outputs = _joined([output for output in cell.outputs if output.get("name") != "stderr"])
            for output in cell.outputs:
                if "data" in output and "image/png" in output.data:
                    output.data, output.metadata = {"image/png": output.data["image/png"]}, {}
    nbformat.write(notebook, file)


def _joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Printed text in one piece: where a kernel cuts it is a matter of time."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    for output in joined:
        if output.output_type == "stream":  # without the note on images that are decoded for the first time
            output.text = re.sub(r"^decoding .*\n", "", output.text, flags=re.MULTILINE)
            output.text = re.sub(r", [\d.,]+ img/s, [\d:]+ left", "", output.text)
    return joined


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for file in map(Path, sys.argv[1:] or sorted(FOLDER.glob("*.ipynb"))):
        start = time.perf_counter()
        run_notebook(file)
        print(f"{file.name}: {time.perf_counter() - start:.0f} s, {file.stat().st_size / 1024:.0f} KiB")
