"""A stored path is found as written, where it was, or relative to the folder that stores it; most likely first."""

from pathlib import Path

import pytest

from pipelines.saved.stored_paths import find_places, portable


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """`project/` with a run, a model, codes and images, beside `elsewhere/`, the current folder."""
    for folder in ("project/runs/gpt", "project/runs/tok", "project/codes/tok", "project/zh", "elsewhere/zh"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("stored", "recorded", "direct", "moved"),
    [
        ("runs/tok", None, ["project/runs/tok"], []),
        ("./runs/tok/", None, ["project/runs/tok"], []),
        ("zh", None, ["elsewhere/zh", "project/zh"], []),
        ("zh", "project/zh", ["elsewhere/zh", "project/zh"], []),
        ("../project/zh/", None, ["project/zh"], []),
        ("/old/project/runs/tok", None, [], ["project/runs/tok"]),
        ("/old/place/codes/tok", None, [], ["project/codes/tok", "project/runs/tok"]),
        ("tok", None, ["project/runs/tok"], []),
        ("nothing", None, [], []),
        ("owner/name", None, [], []),
        ("\0", None, [], []),
    ],
)
def test_candidates_for_a_stored_path(here, stored, recorded, direct, moved):
    places = find_places(stored, here / "project/runs/gpt", recorded=recorded and str(here / recorded))
    found = [[str(place.resolve().relative_to(here)) for place in some] for some in (places.direct, places.moved)]
    assert found == [direct, moved]


def test_the_folders_of_a_link_and_of_its_target_are_searched(here):
    (here / "links").mkdir()
    (here / "links/gpt").symlink_to(here / "project/runs/gpt")
    (here / "links/tok").mkdir()
    assert find_places("runs/tok", here / "links/gpt").direct == [here / "project/runs/tok"]
    assert find_places("tok", here / "links/gpt").direct == [here / "links/tok", here / "project/runs/tok"]


def test_a_path_is_stored_as_written_if_it_can_be_found_again(here, monkeypatch):
    assert portable("zh", here / "elsewhere/codes/zh") == "zh"
    assert portable("./zh/", Path("codes/zh")) == "./zh/"
    assert portable("zh", here / "project/codes/zh") == str(here / "elsewhere/zh")
    assert portable(here / "project/zh", Path("codes/zh")) == str(here / "project/zh")
    monkeypatch.chdir(here / "project/runs/tok")
    assert portable(".", Path("../../codes/new")) == str(here / "project/runs/tok")
