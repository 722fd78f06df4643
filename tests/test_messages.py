"""Messages name a field or a file, the value and the remedy; and everything that people read is plain English."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("twostage", "stage1_tokenizer", "stage2_prior", "pipelines")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.yaml")])
REMEDIES = (
    "add", "change", "check", "choose", "compare", "convert", "copy", "create", "delete", "download", "encode", "fix",
    "free", "give", "install", "launch", "lower", "make", "mask", "merge", "move", "name", "omit", "open", "paint",
    "pass", "pick", "pip install", "put", "quote", "reduce", "remove", "rename", "replace", "restore", "run", "save",
    "see", "set", "start", "stop", "switch", "train", "try", "unset", "update", "upload", "use", "wait", "write",
)  # fmt: skip
"""Verbs with which a message may say what to do."""
REMEDY = re.compile(
    rf"\b(?:expected|did you mean)\b|(?:^|[.;:,(}}] ?|\b(?:or|and|to) )(?:{'|'.join(REMEDIES)})\b", re.IGNORECASE
)
HOLDS_A_REMEDY = {"remedy", "hint", "error", "refusal", "lines", "wanted"}
"""Variables with a remedy, or with other messages that have one."""
DIALECT = {
    r"\banew\b": "again, or re-",
    r"\b(?:is|are|was) said\b": "twostage warns, prints, reports",
    r"\b(?:is|are|be) told\b(?! (?:apart|to))": "the message names, reports",
    r"\bsaid in words\b": "prints a warning",
    r"\b(?:cannot|could not) be had\b": "is not available",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\b(?:go|goes|going|gone|went) on (?:from|with|where|after|when)\b": "resume, continue, extend",
    r"\bthe same command goes on\b": "Run the same command again to resume",
    r"\btakes? turns\b": "cycle through",
    r"\bsees? fit\b": "choose",
    r"\bin the place of\b": "instead of",
    r"(?<!there )\bis no (?:run|picture|image|folder|file|split|class|number|model|checkpoint)\b": "is not a ...",
    r"\bis of --": "only works with --",
    r"\bmake room\b": "free some space",
    r"\bpictures?\b": "image",
    r"\bthe (?:newest )?whole ones?\b": "intact",
    r"\b(?:one|a) (?:file|line|folder|row|class|process|thread|card|step|split) an? (?:verb|image|class|split|epoch)\b":
        "one ... per ...",
    r"\bothers' weights\b": "pretrained weights",
    r"\b(?:is|are|were) there already\b": "already exist",
    r"\b(?:is|was) not looked at\b": "skipped",
    r"\bof (?:its|their) own making\b": "its own",
}  # fmt: skip
"""Phrases that are always wrong here, and what to write."""
STORED = {'"pictures"', '"picture"'}
"""A key of sources.json, and a usual column name."""


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def literal_parts(node: ast.AST, constants: dict[str, str]) -> Iterator[str]:
    """The literal text of an expression, with `{variable}` for each value; ``constants`` are those of the module."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.FormattedValue):
        name = ast.unparse(node.value)
        yield constants.get(name, f"{{{name}}}")
    elif isinstance(node, ast.Name):
        yield f"{{{node.id}}}"
    else:
        for child in ast.iter_child_nodes(node):
            yield from literal_parts(child, constants)


def module_constants(path: Path) -> dict[str, str]:
    found = {}
    for node in parse(path).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = "".join(literal_parts(node.value, {}))
    return found


def errors(path: Path) -> list[str]:
    """The line and message of each `InputError(...)`; without those whose message is made elsewhere."""
    found, constants = [], module_constants(path)
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "InputError" and node.args:
            text = "".join(literal_parts(node.args[0], constants))
            if " " in text:
                found.append(f"line {node.lineno}: {' '.join(text.split())}")
    return found


@pytest.mark.parametrize("path", [path for path in FILES if errors(path)], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_error_names_something_and_has_a_remedy(path):
    nameless = [error for error in errors(path) if not re.search(r"\{|[`'\"]|--|\w\.\w|: [\w, ]+: ", error)]
    assert not nameless, "\n".join(nameless)
    helpless = [
        error
        for error in errors(path)
        if not REMEDY.search(error.partition(": ")[2]) and not HOLDS_A_REMEDY & set(re.findall(r"(\w+)\}", error))
    ]
    assert not helpless, "\n".join(helpless)


def readable_texts(path: Path) -> Iterator[tuple[int, str]]:
    """The line and the text of each string and each comment of a Python file; of other files each line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", -1)):
            yield token.start[0], token.string


@pytest.mark.parametrize("path", [*FILES, *DOCUMENTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_plain_english(path):
    found = []
    for line, text in readable_texts(path):
        one_line = " ".join(text.split())
        if one_line in STORED:
            continue
        for phrase, better in DIALECT.items():
            for match in re.finditer(phrase, one_line, re.IGNORECASE):
                around = one_line[max(0, match.start() - 40) : match.end() + 40]
                found.append(f"line {line}: {match[0]!r} (better: {better}) in ...{around}...")
    assert not found, "\n".join(found)
