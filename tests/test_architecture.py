"""The shape of the code: imports go one way and in no circle, verbs are leaves, functions are short, and everything
public has a docstring."""

import ast
import tomllib
from functools import cache
from pathlib import Path

import pytest

import twostage
from pipelines.cli import VERBS

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "twostage": {"twostage"},
    "stage1_tokenizer": {"twostage", "stage1_tokenizer"},
    "stage2_prior": {"twostage", "stage2_prior"},
    "pipelines": {"twostage", "stage1_tokenizer", "stage2_prior", "pipelines"},
}
FACE = ROOT / "twostage" / "__init__.py"
"""It exports names of all packages, lazily."""
FOLDERS = {*MAY_IMPORT, "configs", "models", "tests", "benchmarks", "docs"}
FILES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
VERB_MODULES = {module for module, _ in VERBS.values()}
ROOMS = ("recipes", "files", "saved", "drawing", "encoding", "evaluation", "comparison", "page", "sharing", "checks")
"""The rooms of pipelines/, lowest first: each only imports itself and those before it."""
MAX_LINES, MAX_TRAINING_LINES = 60, 120
SHARED_NAMES = {"command", "train", "validate"}
"""Functions that each training or each verb has."""
for_each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def imports(path: Path) -> set[str]:
    """The modules that a file imports anywhere, inside functions too; `from a import b` counts as `a` and `a.b`."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def public_names(tree: ast.Module) -> list[str] | None:
    """What a module lists in `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return ast.literal_eval(node.value)
    return None


# --- imports --------------------------------------------------------------------------------------------------------


@for_each_file
def test_imports_go_one_way(path):
    if path == FACE:
        return
    package = path.relative_to(ROOT).parts[0]
    assert {name.partition(".")[0] for name in imports(path)} & FOLDERS <= MAY_IMPORT[package]


def file_graph() -> dict[str, set[str]]:
    """The modules that each module imports; without the face."""
    names = {module_name(path): path for path in FILES if path != FACE}
    return {name: (imports(path) & names.keys()) - {name} for name, path in names.items()}


def room_graph() -> dict[str, set[str]]:
    """The rooms (folders) that each room imports; the files directly in a package are rooms of their own."""
    graph: dict[str, set[str]] = {}
    files = file_graph()
    packages = {module_name(path) for path in FILES if path.name == "__init__.py"}
    room_of = {name: name if (folder := name.rpartition(".")[0]) in MAY_IMPORT or name in packages else folder
               for name in files}  # fmt: skip
    for name, used in files.items():
        room = graph.setdefault(room_of[name], set())
        room |= {room_of[other] for other in used} - {room_of[name]}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of nodes that reach each other."""
    reached = {node: {node} for node in graph}
    changed = True
    while changed:
        changed = False
        for node, found in reached.items():
            more = set().union(*(reached[other] for other in graph[node])) - found
            changed |= bool(more)
            found |= more
    together = [frozenset(other for other in reached[node] if node in reached[other]) for node in graph]
    return [set(group) for group in dict.fromkeys(together) if len(group) > 1]


@pytest.mark.parametrize("graph", [file_graph, room_graph])
def test_imports_have_no_circles(graph):
    assert circles(graph()) == []


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").rglob("*.py")), ids=lambda path: path.stem)
def test_a_room_imports_lower_rooms_and_nobody_imports_a_verb(path):
    room = path.relative_to(ROOT / "pipelines").parts[0]
    allowed = {*(ROOMS[: ROOMS.index(room) + 1] if room in ROOMS else ROOMS)}
    assert {name.split(".")[1] for name in imports(path) if name.startswith("pipelines.")} <= allowed


def test_no_verb_imports_another():
    graph = file_graph()
    assert {verb: used for verb in VERB_MODULES if (used := graph[verb] & VERB_MODULES)} == {}


# --- functions and names --------------------------------------------------------------------------------------------


@for_each_file
def test_functions_are_short(path):
    long = {}
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            lines = node.end_lineno - node.lineno + 1
            if lines > (MAX_TRAINING_LINES if node.name == "train" else MAX_LINES):
                long[node.name] = lines
    assert long == {}


def test_public_functions_have_different_names():
    found: dict[str, list[str]] = {}
    for path in FILES:
        names = set(public_names(parse(path)) or []) - SHARED_NAMES
        for node in parse(path).body:
            if isinstance(node, ast.FunctionDef) and node.name in names:
                found.setdefault(node.name, []).append(module_name(path))
    assert {name: modules for name, modules in found.items() if len(modules) > 1} == {}


@for_each_file
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


@for_each_file
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


# --- packages -------------------------------------------------------------------------------------------------------


def test_the_face_exports_what_it_names():
    assert {name: getattr(twostage, name).__module__ for name in twostage.MODULES} == twostage.MODULES
    assert {*twostage.MODULES, "__version__"} == set(twostage.__all__)


def test_top_level_folders():
    ignored = {line.strip("/\n") for line in (ROOT / ".gitignore").read_text().splitlines()}
    present = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))}
    assert {name for name in present - ignored if not name.endswith(".egg-info")} <= FOLDERS
    assert {*MAY_IMPORT, "configs", "tests"} <= present


def test_every_package_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(MAY_IMPORT)
    found = {module_name(path) for path in FILES if path.name == "__init__.py"}
    assert set(project["tool"]["setuptools"]["packages"]) == {*found, "twostage.configs"}
