"""Imports go one way, and everything public says what it is."""

import ast
import tomllib
from pathlib import Path

import pytest

import twostage

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "twostage": {"twostage"},
    "stage1_tokenizer": {"twostage", "stage1_tokenizer"},
    "stage2_prior": {"twostage", "stage2_prior"},
    "pipelines": {"twostage", "stage1_tokenizer", "stage2_prior", "pipelines"},
}
FACE = ROOT / "twostage" / "__init__.py"
"""It exports names of all packages, lazily."""
FOLDERS = {*MAY_IMPORT, "configs", "tests", "benchmarks", "docs"}
MODULES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
for_each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_packages(tree: ast.Module) -> set[str]:
    """The top-level packages that a module imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            found.add((node.module or "").partition(".")[0])
    return found


def public_names(tree: ast.Module) -> list[str] | None:
    """What a module lists in `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return ast.literal_eval(node.value)
    return None


@for_each_module
def test_imports_go_one_way(path):
    if path == FACE:
        return
    package = path.relative_to(ROOT).parts[0]
    assert imported_packages(parse(path)) & FOLDERS <= MAY_IMPORT[package]


ROOMS = ("files", "saved", "drawing", "encoding", "evaluation", "comparison", "page", "sharing", "checks")
"""The rooms of pipelines/, lowest first: each imports only itself and those before it."""


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").rglob("*.py")), ids=lambda path: path.stem)
def test_a_room_imports_lower_rooms_and_nobody_imports_a_verb(path):
    room = path.relative_to(ROOT / "pipelines").parts[0]
    allowed = ROOMS[: ROOMS.index(room) + 1] if room in ROOMS else ROOMS
    found = {
        node.module.split(".")[1]
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipelines.")
    }
    assert found <= set(allowed)


@for_each_module
def test_everything_public_has_a_docstring(path):
    tree = parse(path)
    assert ast.get_docstring(tree), "the module has none"
    names = public_names(tree)
    if path.name == "__init__.py" and names is None:
        assert len(tree.body) == 1, "a package that defines something needs `__all__`"
        return
    assert names is not None, "no `__all__`"
    defined = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert [name for name in names if name in defined and not ast.get_docstring(defined[name])] == []


@for_each_module
def test_all_lists_what_is_there(path):
    tree = parse(path)
    there = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            there |= {target.id for target in targets if isinstance(target, ast.Name)}
    names = public_names(tree) or []
    if path == FACE:
        there |= {*twostage.MODULES, "__version__"}
    assert set(names) <= there
    assert len(set(names)) == len(names)


def test_the_face_exports_what_it_names():
    assert {name: getattr(twostage, name).__module__ for name in twostage.MODULES} == twostage.MODULES


def test_top_level_folders():
    ignored = {line.strip("/\n") for line in (ROOT / ".gitignore").read_text().splitlines()}
    present = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))}
    assert {name for name in present - ignored if not name.endswith(".egg-info")} <= FOLDERS
    assert {*MAY_IMPORT, "configs", "tests"} <= present


def test_every_package_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(MAY_IMPORT)
    found = {
        ".".join(path.parent.relative_to(ROOT).parts) for p in MAY_IMPORT for path in (ROOT / p).rglob("__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == found
