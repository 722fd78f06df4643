"""Writes `api.md`: the signatures and docstrings of what one imports, and the keys of a configuration.

python docs/make_api.py
"""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["api"]

ROOT = Path(__file__).parents[1]
HEAD = "# API\n\nWritten by `python docs/make_api.py` from the docstrings; do not edit it by hand.\n"
PARTS: dict[str, dict[str, list[str] | None]] = {
    "Trained models": {
        "pipelines.drawing.two_stage": None,
        "pipelines.files.given_images": ["read_image"],
        "stage1_tokenizer.autoencoder": ["Autoencoder"],
        "stage1_tokenizer.bottleneck_output": None,
        "stage1_tokenizer.feature_network": ["FeatureNetwork"],
        "stage2_prior.prior": ["Prior"],
        "stage2_prior.sampling": ["SamplingConfig", "image_seeds", "guide", "filter_logits", "choose"],
        "stage2_prior.codes": ["CodeCache", "CodeSplit", "Manifest"],
    },
    "Images and data": {
        "twostage.core.data.dataset": ["ImageData", "ImageSplit", "load_images"],
        "twostage.core.images.conversion": None,
        "twostage.core.images.sheets": ["contact_sheet", "save_image"],
        "twostage.core.data.shapes": None,
        "twostage.core.errors": None,
    },
    "Training from Python": {
        "twostage.core.config.sections": ["load_config", "parse_config"],
        "twostage.core.training.random": None,
        "stage1_tokenizer.train_tokenizer": ["train"],
        "stage2_prior.train_prior": ["train"],
    },
    "Configuration: what the YAML files hold": {
        "twostage.core.config.sections": ["RunConfig"],
        "twostage.core.data.dataset": ["DataConfig"],
        "twostage.core.training.train_config": ["TrainConfig"],
        "stage1_tokenizer.train_tokenizer": ["TokenizerConfig", "TokenizerTrainConfig"],
        "stage1_tokenizer.autoencoder": ["ModelConfig"],
        "stage1_tokenizer.backbones": ["MLPConfig", "ConvConfig"],
        "stage1_tokenizer.vqgan_backbone": ["VQGANConfig"],
        "stage1_tokenizer.bottlenecks": ["IdentityConfig", "GaussianConfig", "ClassGaussianConfig"],
        "stage1_tokenizer.vector_quantizer": ["CodebookConfig", "VectorConfig"],
        "stage1_tokenizer.finite_scalar": ["FiniteScalarConfig"],
        "stage1_tokenizer.lookup_free": ["LookupFreeConfig"],
        "stage1_tokenizer.residual_quantizer": ["ResidualConfig"],
        "stage1_tokenizer.losses": ["LossConfig", "CorruptionConfig"],
        "stage1_tokenizer.perceptual": ["LPIPSConfig", "FeaturePerceptualConfig"],
        "stage1_tokenizer.discriminator": ["AdversarialConfig"],
        "stage2_prior.train_prior": ["PriorTrainingConfig", "PriorTrainConfig"],
        "stage2_prior.prior": ["PriorLossConfig"],
        "stage2_prior.pixelcnn": ["PixelCNNConfig"],
        "stage2_prior.transformer": ["TransformerConfig"],
        "stage2_prior.causal_transformer": ["CausalTransformerConfig"],
        "stage2_prior.masked_transformer": ["MaskedTransformerConfig"],
        "stage2_prior.shares": ["ReplaceSchedule"],
    },
}
"""By heading: modules, and the names that are shown of each; None: all of its `__all__`."""
LONGEST = 100  # characters of a signature on one line
Function = ast.FunctionDef | ast.AsyncFunctionDef


def api() -> str:
    """What `api.md` should hold."""
    lines = [HEAD]
    for heading, modules in PARTS.items():
        lines.append(f"## {heading}\n")
        for module, names in modules.items():
            file = f"{module.replace('.', '/')}.py"
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            found = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | Function)}
            fields = dict(_fields(tree.body))
            lines.append(f"### [{module}](../{file})\n")
            for name in names or _public(tree):
                lines += _describe(found[name]) if name in found else [fields[name]]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _public(tree: ast.Module) -> list[str]:
    """The names of `__all__`."""
    (names,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return ast.literal_eval(names)


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
    """As it is called, without `self`; a long one has a line for each argument. A property's is its type."""
    returns = ast.unparse(node.returns).strip("'") if node.returns else "None"
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    if "property" in decorators:
        return f"{owner}{node.name}: {returns}"
    arguments = node.args
    if owner and "staticmethod" not in decorators:
        del arguments.args[0]
    line = f"{owner}{node.name}({ast.unparse(arguments)}) -> {returns}"
    if len(line) <= LONGEST:
        return line
    return re.sub(
        r", (?=\*{0,2}\w+: )", ",\n    ", f"{owner}{node.name}(\n    {ast.unparse(arguments)},\n) -> {returns}"
    )


def _fields(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    """Of a module or a class: what is assigned, by name, with its docstring as Markdown."""
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and "ClassVar" in ast.unparse(node.annotation):  # no key of a configuration
            continue
        if isinstance(node, ast.AnnAssign | ast.Assign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            yield ast.unparse(target), f"- `{ast.unparse(node)}`\n" + _markdown(_docstring(after), "  ")


def _docstring(node: ast.stmt | None) -> str:
    """What stands below an assignment in quotes."""
    text = node.value.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) else ""
    return inspect.cleandoc(text) if isinstance(text, str) else ""


def _markdown(docstring: str, indent: str = "") -> str:
    """A docstring with its roles as code and its sections as lists."""
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
