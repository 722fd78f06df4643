"""The trained pair in the repository: it is small, says whose images it learned from, and draws."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[1] / "models" / "emoji"
MAX_BYTES = 10e6


def test_it_is_small():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= MAX_BYTES


def test_it_names_no_place_on_a_machine():
    texts = [file.read_text(encoding="utf-8") for file in FOLDER.rglob("*") if file.suffix in (".json", ".yaml", ".md")]
    assert not [text for text in texts if re.search("/(root|home|tmp)/", text)]


def test_its_card_names_the_licences_of_the_images():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(words in card for words in ("Noto Emoji", "Apache 2.0", "Twemoji", "CC-BY 4.0")), card


@pytest.fixture(scope="module")
def opacity(twostage, tmp_path_factory) -> np.ndarray:
    """Flags and people in turns: (16, 64, 64), from 0 to 1."""
    out = tmp_path_factory.mktemp("emoji") / "drawn"
    classes = ["--class-name", "Flags", "--class-name", "People & Body"]
    ended = twostage("generate", FOLDER, "--num-images", 16, "--temperature", 0.9, *classes, "--out", out)
    assert ended.code == 0, ended.err
    images = np.stack([np.asarray(Image.open(file)) for file in sorted((out / "images").iterdir())])
    assert images.shape == (16, 64, 64, 4)
    return images[..., 3] / 255


def test_it_draws_something_on_nothing(opacity):
    """Most corners are transparent, and most centres are not."""
    assert opacity[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean() < 0.3
    assert opacity[:, 24:40, 24:40].mean() > 0.6


def test_flags_are_flags(opacity):
    """They reach the left and the right border, but not the upper and the lower one; people do so less."""
    wide = opacity[:, 28:36, :4].mean((1, 2)) - opacity[:, :4, 28:36].mean((1, 2))
    flags, people = wide[::2], wide[1::2]
    assert (flags > 0.25).mean() >= 0.75, flags  # those of one style are a little narrower
    assert flags.mean() > people.mean() + 0.3, people
