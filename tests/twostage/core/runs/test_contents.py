"""Two spellings of one path are the same place; a configuration knows which of its keys are paths."""

from pathlib import Path

import pytest

from twostage.core.config.sections import PathName, RunConfig, Section, path_values
from twostage.core.runs.contents import same_place


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """`elsewhere/`, the current folder, with images, beside `project/` with others; the home is above both."""
    for folder in ("project/zh", "elsewhere/zh"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [("zh", "zh", True), ("gone", "gone", True), ("zh", "./zh/", True), ("zh", "../elsewhere/zh", True),
     ("zh", "../project/zh", False), ("gone", "./gone", False), ("owner/name", "owner//name", False)],
)  # fmt: skip
def test_two_spellings_of_one_path(here, first, second, same):
    assert same_place(first, second) is same


class Inner(Section):
    path: PathName = "x"
    words: str = "no path"


class Outer(Section):
    run: RunConfig
    start: PathName | None = None
    inner: Inner | None = None


def test_the_paths_of_a_configuration_and_homes(here):
    outer = Outer(run=RunConfig(dir="~/runs/a"), start="~nobody known/a", inner=Inner(path="a~"))
    assert path_values(outer) == {"run.dir": f"{here}/runs/a", "start": "~nobody known/a", "inner.path": "a~"}
    assert path_values(Outer(run=RunConfig(dir="a"))) == {"run.dir": "a", "start": None}
