"""Writes `api.md`: signatures and docstrings of the public names, and every key of a configuration.

python docs/make_api.py
"""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import twostage
from stage1_tokenizer.train_tokenizer import TokenizerConfig
from stage2_prior.train_prior import PriorTrainingConfig
from twostage.core.config.registry import is_open
from twostage.core.config.sections import Section

__all__ = ["api"]

ROOT = Path(__file__).parents[1]
HEAD = "# API\n\n`python docs/make_api.py` writes this page from the docstrings. Do not edit it by hand.\n"
MORE: dict[str, dict[str, list[str]]] = {
    "Codes and sampling": {
        "stage2_prior.codes": ["CodeCache", "CodeSplit", "Manifest"],
        "stage2_prior.sampling": ["Branches", "image_seeds", "filter_logits", "choose"],
    },
    "Training from Python": {
        "stage1_tokenizer.train_tokenizer": ["train"],
        "stage2_prior.train_prior": ["train"],
    },
}
"""Names that the face `twostage` does not export: by heading and module."""
MAX_SIGNATURE = 100  # characters on one line
Function = ast.FunctionDef | ast.AsyncFunctionDef


def api() -> str:
    """The text of `api.md`."""
    face: dict[str, list[str]] = {}
    for name, module in twostage.MODULES.items():
        face.setdefault(module, []).append(name)
    configs: dict[str, list[str]] = {}
    for model in [*_models(TokenizerConfig), *_models(PriorTrainingConfig)]:
        if model.__name__ not in (*face.get(model.__module__, []), *configs.get(model.__module__, [])):
            configs.setdefault(model.__module__, []).append(model.__name__)
    parts = {"from twostage import ...": face, **MORE, "Configuration: the keys of the YAML files": configs}
    lines = [HEAD]
    for heading, modules in parts.items():
        lines.append(f"## {heading}\n")
        for module, names in modules.items():
            file = f"{module.replace('.', '/')}.py"
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            found = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | Function)}
            lines.append(f"### [{module}](../{file})\n")
            for name in names:
                lines += _describe(found[name])
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _models(annotation: object) -> Iterator[type[Section]]:
    """Every configuration class below a type annotation, the outermost first."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield from (base for base in annotation.__mro__ if issubclass(base, Section) and base is not Section)
        for field in annotation.model_fields.values():
            yield from _models(field.annotation)
    if is_open(annotation):
        for member in annotation.registered.values():
            yield from _models(member)
    for part in get_args(annotation):
        yield from _models(part)


def _describe(node: ast.ClassDef | Function, owner: str = "") -> Iterator[str]:
    """A class with its fields and public methods, or a function."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        yield f"#### class `{node.name}({bases})`\n" if bases else f"#### class `{node.name}`\n"
    else:
        yield "" if owner else f"#### `{node.name}`\n"
        yield f"```python\n{_signature(node, owner)}\n```\n"
    yield _markdown(ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef):
        yield from (field for _, field in _fields(node.body))
        for member in node.body:
            if (
                isinstance(member, Function)
                and (member.name == "__call__" or member.name[0] != "_")
                and ast.get_docstring(member)
            ):
                yield from _describe(member, f"{node.name}.")


def _signature(node: Function, owner: str) -> str:
    """How it is called, without `self`: on one line, or one line per argument. Of a property: its type."""
    returns = ast.unparse(node.returns).strip("'") if node.returns else "None"
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    if "property" in decorators:
        return f"{owner}{node.name}: {returns}"
    arguments = node.args
    if owner and "staticmethod" not in decorators:
        del arguments.args[0]
    line = f"{owner}{node.name}({ast.unparse(arguments)}) -> {returns}"
    if len(line) <= MAX_SIGNATURE:
        return line
    return re.sub(
        r", (?=\*{0,2}\w+: )", ",\n    ", f"{owner}{node.name}(\n    {ast.unparse(arguments)},\n) -> {returns}"
    )


def _fields(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    """The names that a class assigns, each with its docstring as Markdown."""
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and "ClassVar" in ast.unparse(node.annotation):  # not a configuration key
            continue
        if isinstance(node, ast.AnnAssign | ast.Assign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            yield ast.unparse(target), f"- `{ast.unparse(node)}`\n" + _markdown(_docstring(after), "  ")


def _docstring(node: ast.stmt | None) -> str:
    """The string below an assignment."""
    text = node.value.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) else ""
    return inspect.cleandoc(text) if isinstance(text, str) else ""


def _markdown(docstring: str, indent: str = "") -> str:
    """A docstring: roles become code, sections become lists."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", docstring).replace("``", "`")
    lines, in_section = [], False
    for line in text.splitlines():
        if line in ("Args:", "Returns:", "Raises:"):
            in_section = True
            lines += [f"{line}\n"]
        elif in_section and line.startswith("    "):
            item = re.sub(r"^    ([\w, ]+): ", r"- `\1`: ", line)
            lines.append(f"  {item.strip()}" if item == line else item)
        else:
            in_section = in_section and not line
            lines.append(line)
    return "".join(f"{indent}{line}".rstrip() + "\n" for line in lines)


if __name__ == "__main__":
    (ROOT / "docs" / "api.md").write_text(api(), encoding="utf-8")
