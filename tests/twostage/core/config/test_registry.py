"""Unions that other packages add types to."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Literal

import pytest
from messages import refuses

from twostage.core.config import registry
from twostage.core.config.registry import OpenUnion
from twostage.core.config.sections import Section, load_config, parse_config


class Paint(OpenUnion, Section):
    """A union."""

    def dries_in(self) -> float:
        """Hours."""
        raise NotImplementedError


@Paint.register
class Oil(Paint):
    """A member."""

    type: Literal["oil"] = "oil"
    layers: int = 1
    name: str = ""

    def dries_in(self) -> float:
        return 24.0 * self.layers


@Paint.register
class Ink(Paint):
    """Another one."""

    type: Literal["ink"] = "ink"
    bottles: int = 1


class Painting(Section):
    """What holds one of them."""

    paint: Paint = Oil()
    varnish: Paint | None = None


PLUGIN = """
from typing import Literal
from test_registry import Paint

@Paint.register
class Chalk(Paint):
    type: Literal["chalk"] = "chalk"
    sticks: int = 3
    name: str = ""
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> Path:
    """An installed plugin that no process has imported yet, by its file."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "chalk_plugin", raising=False)
    monkeypatch.setattr(Paint, "registered", dict(Paint.registered))
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint("chalks", "chalk_plugin", group)])
    registry._waiting.cache_clear()
    yield tmp_path / "chalk_plugin.py"
    registry._waiting.cache_clear()


def test_the_type_picks_the_member():
    parsed = parse_config(Painting, {"paint": {"type": "oil", "layers": 2}, "varnish": {"type": "ink"}}, "config")
    assert parsed == Painting(paint=Oil(layers=2), varnish=Ink())
    assert parsed.paint.dries_in() == 48
    assert parse_config(Painting, parsed.model_dump(mode="json"), "config") == parsed


def test_every_mistake_is_named_at_once():
    with refuses(
        "config has 3 mistakes",
        "paint.layers: expected a valid integer",
        "'many'",
        "paint.laiers: unknown key; did you mean 'layers'?",
        "varnish.type: got 'inc', expected one of 'oil', 'ink'; did you mean 'ink'?",
    ):
        document = {"paint": {"type": "oil", "layers": "many", "laiers": 1}, "varnish": {"type": "inc"}}
        parse_config(Painting, document, "config")


def test_a_type_that_no_package_registers_asks_for_its_plugin():
    with refuses("paint.type", "'water'", "'oil', 'ink'", "install"):
        parse_config(Painting, {"paint": {"type": "water"}}, "config")


def test_a_plugin_is_found_when_a_document_is_read(plugin, tmp_path):
    plugin.write_text(PLUGIN)
    (tmp_path / "image.yaml").write_text("paint:\n  type: chalk\n  name: 7\n")
    found = load_config(Painting, tmp_path / "image.yaml", ["paint.sticks=5"]).paint
    assert found.model_dump() == {"type": "chalk", "sticks": 5, "name": "7"}


def test_an_override_may_change_to_a_plugins_type(plugin, tmp_path):
    plugin.write_text(PLUGIN)
    (tmp_path / "image.yaml").write_text("paint: {type: oil, layers: 2, name: sunset}\n")
    said: list[str] = []
    found = load_config(Painting, tmp_path / "image.yaml", ["paint.type=chalk"], said.append).paint
    assert found.model_dump() == {"type": "chalk", "sticks": 3, "name": "sunset"}
    assert "dropped layers; kept name" in said[0]


def test_a_plugin_that_cannot_be_imported_is_named_every_time(plugin):
    plugin.write_text("import a_package_that_nobody_has")
    for _ in range(2):
        with refuses("plugin 'chalks'", "a_package_that_nobody_has", "pip uninstall"):
            parse_config(Painting, {"paint": {"type": "chalk"}}, "config")


def test_a_type_belongs_to_one_class(monkeypatch):
    monkeypatch.setattr(Paint, "registered", dict(Paint.registered))

    class Crayon(Paint):
        type: Literal["ink"] = "ink"

    class Nameless(Paint):
        pass

    with pytest.raises(ValueError, match=r"'ink' belongs to test_registry\.Ink"):
        Paint.register(Crayon)
    for other in (Nameless, Painting):
        with pytest.raises(ValueError, match="subclass of Paint"):
            Paint.register(other)
    again = type("Ink", (Ink,), {"__module__": Ink.__module__, "__qualname__": Ink.__qualname__})
    assert Paint.register(again) is again, "a cell of a notebook that is run again"
    assert Paint.registered["ink"] is again
