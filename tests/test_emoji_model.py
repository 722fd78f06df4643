"""The trained pair in the repository: it is small, says whose images it learned from, and draws."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[1] / "models" / "emoji"
MAX_BYTES = 10e6


def test_it_is_small():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= MAX_BYTES


def test_its_card_names_the_licences_of_the_images():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(words in card for words in ("Noto Emoji", "Apache 2.0", "Twemoji", "CC-BY 4.0")), card


@pytest.fixture(scope="module")
def drawn(twostage, tmp_path_factory) -> list[np.ndarray]:
    """One image of each class, as RGBA pixels."""
    out = tmp_path_factory.mktemp("emoji")
    ended = twostage("generate", FOLDER, "--num-images", 9, "--out", out / "drawn")
    assert ended.code == 0, ended.err
    return [np.asarray(Image.open(file)) for file in sorted((out / "drawn" / "images").iterdir())]


def test_it_draws_something_on_nothing(drawn):
    """Most of a border is transparent, most of a centre is not: an emoji."""
    assert len(drawn) == 9
    assert all(image.shape == (64, 64, 4) for image in drawn)
    opacity = np.stack(drawn)[..., 3] / 255
    corners = opacity[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.mean() < 0.3
    assert opacity[:, 24:40, 24:40].mean() > 0.6


def test_the_classes_differ(drawn):
    assert len({image.tobytes() for image in drawn}) == 9
