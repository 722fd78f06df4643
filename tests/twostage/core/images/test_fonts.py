"""Class names of every script are drawn by a font that has them, or as the class's number: never as boxes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from twostage.core.images import fonts
from twostage.core.images.fonts import class_labels, figure_families, fit_width, font_for, legible, load_matplotlib
from twostage.core.images.sheets import contact_sheet, draw_curves

raqm = pytest.mark.skipif(not fonts.features.check("raqm"), reason="this Pillow does not join letters")


def build_font(file: Path, name: str, characters: str) -> None:
    """A font in which each of the characters is a filled square."""
    glyphs = [".notdef", *(f"u{ord(c):X}" for c in characters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap({ord(c): f"u{ord(c):X}" for c in characters})
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for point in ((100, 700), (900, 700), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    square = pen.glyph()
    builder.setupGlyf(dict.fromkeys(glyphs, square))
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": name, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWeightClass=400)
    builder.setupPost()
    builder.save(file)


def forget() -> None:
    for cached in (fonts.font_for, fonts._file_for, fonts._font_files, fonts._characters):
        cached.cache_clear()


@pytest.fixture
def system_font(tmp_path, monkeypatch):
    """``system_font(name, characters)``: makes that font one of the system's."""
    load_matplotlib()
    from matplotlib.font_manager import fontManager

    monkeypatch.setattr(fontManager, "ttflist", [e for e in fontManager.ttflist if "DejaVu" in e.name])
    forget()

    def install(name: str, characters: str) -> Path:
        file = tmp_path / f"{name}.ttf"
        build_font(file, name, characters)
        fontManager.addfont(file)
        forget()
        return file

    yield install
    forget()


@pytest.mark.parametrize(
    "name", ["cat", "größe", "кошка", "γάτα", "ñandú", "Đà Lạt", "e\u0301", "☕ 5", "½ → ∞", "$x$"]
)
def test_what_dejavu_has_is_drawn(system_font, name):
    assert class_labels([name]) == [fonts.unicodedata.normalize("NFC", name)]


@raqm
@pytest.mark.parametrize("name", ["قطة", "חתול", "x\u0323\u0302"])
def test_joined_letters_are_drawn_by_pillow_alone(system_font, name):
    assert class_labels(["a", name]) == ["a", name]
    assert class_labels(["a", name], complex_scripts=False) == ["a", "class 1"]


@pytest.mark.parametrize(
    "name",
    [
        "猫",
        "고양이",
        "ねこ",
        "🐈",
        "👨‍👩‍👧",
        "बिल्ली",
        "cat 猫",
        "\x07",
        "a\x00b",
        "\ud800",
        "\ue000",
        "\u202eabc",
        "",
        "  ",
        "\u200b",
    ],
)
def test_what_no_font_has_is_the_class_number(system_font, name):
    assert class_labels(["a", name]) == ["a", "class 1"]
    assert class_labels([name], [7]) == ["class 7"]


def test_white_space_is_one_space(system_font):
    assert class_labels(["tab\tnew\nline ", "x\u2028y\u3000z"]) == ["tab new line", "x y z"]


def test_a_font_of_the_system_is_found(system_font):
    system_font("Other", "abc")
    file = system_font("Cats", "猫犬 cat")
    assert class_labels(["猫", "cat 犬", "鳥"]) == ["猫", "cat 犬", "class 2"]
    assert font_for("猫").path == str(file)  # type: ignore[union-attr]
    assert figure_families(["cat", "猫"]) == ["DejaVu Sans", "Cats"]


def test_a_system_font_is_drawn_with(system_font):
    pixels = torch.full((1, 3, 88, 88), 255, dtype=torch.uint8)

    def ink(caption: str) -> int:
        return int((np.asarray(contact_sheet(pixels, 1, [caption]))[92:] < 128).all(-1).sum())

    system_font("Cats", "猫")
    assert ink("猫猫") == pytest.approx(2 * ink("猫"), rel=0.2)
    assert ink("猫") > 50, "the square"


def test_a_font_that_cannot_be_read_is_left_out(system_font, tmp_path):
    system_font("Broken", "猫").write_bytes(b"no font")
    forget()
    assert class_labels(["猫"]) == ["class 0"]


def test_a_caption_stays_within_its_image(system_font):
    pixels = torch.zeros(3, 3, 88, 88, dtype=torch.uint8)
    empty = np.asarray(contact_sheet(pixels, 3, ["", "", ""]))
    long = np.asarray(contact_sheet(pixels, 3, ["", "кошка " * 30 + "1", ""]))
    columns = np.nonzero((empty != long).any(-1).any(0))[0]
    assert columns.min() >= 92
    assert columns.max() < 92 + 92


@pytest.mark.parametrize("text", ["a very long name that ends with 1", "a very long name that ends with 2"])
def test_both_ends_of_a_long_name_are_kept(text):
    font = font_for(text)
    assert font is not None
    short = fit_width(text, font, 90)
    assert font.getlength(short) <= 90
    assert (short[:3], short[-1]) == ("a v", text[-1])
    assert fit_width(text, font, 1) == ""


def test_titles_keep_what_can_be_read(system_font):
    assert legible("runs/größe 猫\x07") == "runs/größe \\u732b\\x07"
    assert legible("runs/größe") == "runs/größe"


def test_curves_have_any_title(system_font, tmp_path):
    lines = [{"step": step, "split": "train", "loss": 1.0} for step in (1, 2)]
    for title in ("猫", "$x^{", "قطة", "$a$ and $b$", "\ud800"):  # a warning of matplotlib's would be an error
        draw_curves(lines, tmp_path / "losses.png", title)
