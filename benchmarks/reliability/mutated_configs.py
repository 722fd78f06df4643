"""Configurations with mistakes of every kind: each either trains one step with its settings, or is refused with one
sentence that names the key."""

import contextlib
import copy
import io
import math
import os
import re
import resource
import shutil
import signal
import sys
import types
import warnings
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import hypothesis
import yaml
from accelerate.state import AcceleratorState
from hypothesis import strategies as st
from pydantic import BaseModel

from pipelines.cli import main
from stage1_tokenizer.features.feature_network import FeatureNetwork, FeatureNetworkConfig
from stage1_tokenizer.tokenizer_training import TokenizerConfig
from stage2_prior.prior_training import PriorTrainingConfig
from twostage.core.data.shapes import CLASS_NAMES

__all__ = ["fuzz_configs"]

CONFIGS = Path(__file__).parents[2] / "configs"
SECONDS = 60  # time limit of a command
MEMORY = 10 * 2**30  # bytes of address space
TINY = {
    "data": {"source": "shapes", "image_size": 16, "num_images": 32},
    "conv": {"type": "conv", "channels": 4, "channel_mult": [1, 1, 1], "num_res_blocks": [0, 0, 0]},
    "mlp": {"type": "mlp", "hidden_sizes": [8]},
    "train": {"batch_size": 8, "max_steps": 1, "log_every": 1},
}
WRONG = [
    *(None, True, False, -1, 10**9, 2**31, 2**63, 2**70, -(2**70), -0.5, 1e-300, math.inf, -math.inf, math.nan),
    *("1e-400", "1e400", "", "a", "no", "x" * 3000, "ünïcødé ☃", "null\0byte", "../up", date(2020, 1, 2), b"bytes"),
    *([], {}, [0], [[1]], ["a"], [None], {"type": "nothing"}, {"a": {"b": 1}}, {1: 2}),
]
PLAUSIBLE = [
    *(0, 1, 2, 3, 4, 7, 8, 16, 64, 0.1, 0.5, 0.9, 1.0, 2.5, "1e-4", [1], [2, 2], [4, 4, 4], [8, 8, 8, 8], [0.5, 0.9]),
    *("l1", "l2", "bce", "cosine", "linear", "constant", "learned", "simvq", "ema", "rotation", "straight_through"),
    *("rotary", "both", "raster", "spiral", "arccos", "auto", "bf16", "skip", "error", "hinge", "vanilla", "group"),
    *("none", "sync_batch", "non_saturating", "shapes", {"type": "gaussian"}, {"type": "identity"}, {"type": "lpips"}),
    *({"type": "class_gaussian"}, {"type": "vector", "codebook_size": 8}, {"type": "lookup_free"}, {"type": "mlp"}),
    *({"type": "finite_scalar", "levels": [4, 3]}, {"type": "residual", "depth": 2}, {"masked_share": 0.3}),
    *({"channels": 4, "num_layers": 1}, {"start": 0.5, "end": 0.1}, {"type": "pixelcnn", "channels": 8, "depth": 2}),
]
VALUES = st.sampled_from(WRONG) | st.sampled_from(PLAUSIBLE)
EXECUTED = "!!python/object/apply:os.system ['true']"
TEXTS = ["- 1\n- 2\n", "\t", "{", "a: b: c", "\xff\xfe", "run: &a {dir: run, seed: *a}", "7", EXECUTED, "a: 1\na: 2"]
"""Files that are not configurations."""
TYPES = [
    "vector",
    "gaussian",
    "pixelcnn",
    "conv",
    "mlp",
    "vqgan",
    "lpips",
    "finite_scalar",
    "masked_transformer",
    "x",
    3,
]
MISSING = object()


def fuzz_configs(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run ``count`` mutated configurations of the files in configs/.

    Returns:
        The figures: how many trained and how many were refused.

    Raises:
        AssertionError: anything else happened, with the smallest such configuration found.
    """
    figures = {"trained": 0, "refused": 0}
    bases = _tiny_configs(folder)

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=count, database=None, deadline=None, derandomize=False, print_blob=False,
                         suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
    @hypothesis.given(st.data())
    def check(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(bases)), label="file")
        figures["trained" if _check_one(data, bases[name], name, folder) else "refused"] += 1

    with _guarded(folder):
        check()
    return {"configs": sum(figures.values()), **figures}


def _check_one(data: st.DataObject, base: dict[str, Any], name: str, folder: Path) -> bool:
    """Whether it trained."""
    kind = name.split("/")[0]
    if data.draw(st.integers(0, 19)) == 0:
        text = data.draw(st.sampled_from(TEXTS), label="text")
        status, said = _command(kind, text.encode("latin-1"), [], folder)
        assert status == 2, (text, said)
        _check_sentence(said, ["config config.yaml"])
        return False
    document = copy.deepcopy(base)
    overrides: list[str] = []
    changes: dict[tuple[str, ...], Any] = {}
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 2, 3]), label="mutations")):
        _mutate(data, document, kind, changes, overrides)
    hypothesis.event(f"{len(changes)} changes")
    status, said = _command(kind, yaml.safe_dump(document, allow_unicode=True).encode(), overrides, folder)
    shown = yaml.safe_dump(document) + "\n".join(overrides) + "\n" + said
    assert status in (0, 2), shown
    if status == 2:
        _check_sentence(said, [key for path in changes for key in _names(document, path, changes[path])])
        return False
    run_dir = folder / "work" / _text(changes.get(("run", "dir"), "run"))
    resolved = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    shutil.rmtree(run_dir)
    for path, value in changes.items():
        found = _at(resolved, path)
        if _is_replaced(path, overrides):
            continue
        if not any(path != other and path == other[: len(path)] for other in changes):  # a later change lies inside it
            assert _same(value, found), f"{'.'.join(path)}: {value!r} became {found!r}\n{shown}"
    return True


def _mutate(
    data: st.DataObject, document: dict[str, Any], kind: str, changes: dict[tuple[str, ...], Any], overrides: list[str]
) -> None:
    """Change one thing in the document, or add an override; record what should be where."""
    paths = [path for path in _paths(document) if not any(other == path[: len(other)] for other in changes)]
    groups = [(), *(path for path in paths if isinstance(_at(document, path), dict))]
    what = data.draw(st.sampled_from(["replace", "replace", "schema", "schema", "delete", "misspell", "add", "type",
                                      "override", "no text"]), label="what")  # fmt: skip
    if what in ("replace", "delete", "misspell", "override") and paths:
        path = data.draw(st.sampled_from(paths), label="path")
        group = _at(document, path[:-1])
        for within in [other for other in changes if path == other[: len(path)]]:
            del changes[within]
        if what == "delete":
            del group[path[-1]]
            changes[path] = MISSING
        elif what == "misspell":
            wrong = f"{path[-1][:-1]}{'x' if path[-1][-1] != 'x' else 'y'}"
            group[wrong] = group.pop(path[-1])
            changes[(*path[:-1], wrong)] = group[wrong]
        else:
            value = data.draw(_values(kind, document, path), label="value")
            if what == "replace":
                group[path[-1]] = value
            else:
                overrides.append(f"{'.'.join(path)}={value if isinstance(value, str) else _plain(value)}")
            changes[path] = value
    elif what == "schema":
        group_path = data.draw(st.sampled_from(groups), label="group")
        known = sorted(_fields(kind, document, group_path) - _at(document, group_path).keys())
        if known:
            path = (*group_path, data.draw(st.sampled_from(known), label="key"))
            value = data.draw(_values(kind, document, path), label="value")
            _at(document, group_path)[path[-1]] = changes[path] = value
    else:
        group_path = data.draw(st.sampled_from(groups), label="group")
        key, value = {
            "add": ("unheard_of", data.draw(VALUES, label="value")),
            "type": ("type", data.draw(st.sampled_from(TYPES), label="type")),
            "no text": (data.draw(st.sampled_from([1, None, True, 2.5]), label="key"), 1),
        }.get(what, ("unheard_of", 1))  # fmt: skip
        _at(document, group_path)[key] = value
        changes[(*group_path, key)] = value


def _check_sentence(said: str, names: list[str]) -> None:
    """Assert that there is one short error that names one of the keys."""
    assert said.count("error: ") == 1, said
    assert "Traceback" not in said, said
    assert any(name in said for name in names), f"none of {names} in: {said}"


def _names(document: dict[str, Any], path: tuple[str, ...], value: Any) -> list[str]:
    """The names that a message may use for a change: its key; in a replaced group, one of the group's own keys; if the
    group got another type, a key that does not fit that type."""
    group = value if isinstance(value, dict) else _at(document, path[:-1]) if path[-1] == "type" else {}
    return [str(path[-1]), *(map(str, group) if isinstance(group, dict) else [])]


def _plain(value: Any) -> str:
    """The value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("\n...")


def _text(value: Any) -> str:
    """The value that a text key reads; YAML's binary text counts as text, too."""
    return value.decode() if isinstance(value, bytes) else value if isinstance(value, str) else _plain(value)


def _is_replaced(path: tuple[str, ...], overrides: list[str]) -> bool:
    """Whether an override may drop what the file has there: in a group of another type, or one of two lengths."""
    given = {override.partition("=")[0] for override in overrides}
    others = {"max_steps": "train.epochs", "epochs": "train.max_steps"}
    types = {".".join((*path[:depth], "type")) for depth in range(1, len(path))}
    return ".".join(path) not in given and bool(given & (types | {others.get(path[-1], "")}))


def _same(given: Any, found: Any) -> bool:
    """Whether the resolved configuration has the given value, or the default if the key was removed."""
    if given is MISSING:
        return True
    if isinstance(found, str) and not isinstance(given, str | bytes):  # of a text key
        return found == _plain(given)
    if isinstance(given, dict):
        return isinstance(found, dict) and all(_same(value, found.get(key, MISSING)) for key, value in given.items())
    if isinstance(found, list) and isinstance(given, str):  # one word for a list of one
        given = [given]
    if isinstance(given, list | tuple):
        return isinstance(found, list) and len(given) == len(found) and all(map(_same, given, found))
    if isinstance(found, bool) or isinstance(given, bool):
        return given is found
    if isinstance(found, int | float) and isinstance(given, int | float | str):
        return float(given) == float(found)
    return given == found or (isinstance(given, bytes) and given.decode() == found)


def _paths(document: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in document.items():
        if isinstance(key, str):
            yield (*prefix, key)
            if isinstance(value, dict):
                yield from _paths(value, (*prefix, key))


def _at(document: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        document = document[key] if isinstance(document, dict) and key in document else MISSING
        if document is MISSING:
            return MISSING
    return document


def _values(kind: str, document: dict[str, Any], path: tuple[str, ...]) -> st.SearchStrategy[Any]:
    """A random value for a key: anything, or, half of the time, a value of its own type."""
    models = _known(kind, document, path[:-1])
    fitting = [value for model in models if path[-1] in model.model_fields
               for value in _fitting(model.model_fields[path[-1]].annotation)]  # fmt: skip
    return st.sampled_from(fitting) | VALUES if fitting else VALUES


def _fitting(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    plain = {int: [1, 2, 3, 4, 8], float: [0.0, 0.1, 0.5, 0.9, 1.0, 2.0], bool: [True, False]}
    return plain.get(annotation, [value for part in get_args(annotation) for value in _fitting(part)])


def _fields(kind: str, document: dict[str, Any], path: tuple[str, ...]) -> set[str]:
    """The keys of the group at ``path``."""
    return {name for model in _known(kind, document, path) for name in model.model_fields}


def _known(kind: str, document: dict[str, Any], path: tuple[str, ...]) -> list[type[BaseModel]]:
    """The classes that the group at ``path`` can have, by type if there are several."""
    models: list[type[BaseModel]] = [TokenizerConfig if kind == "tokenizer" else PriorTrainingConfig]
    for depth, key in enumerate(path):
        annotations = [model.model_fields[key].annotation for model in models if key in model.model_fields]
        models = [model for annotation in annotations for model in _models(annotation)]
        tag = _at(document, (*path[: depth + 1], "type"))
        tagged = [m for m in models if "type" in m.model_fields and m.model_fields["type"].default == tag]
        models = tagged or models
    return models


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    parts = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else get_args(annotation)[:1]
    return [model for part in parts for model in _models(part)]


# --- the real commands ----------------------------------------------------------------------------------------------


def _tiny_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Small versions of the files in configs/, with codes and a feature network for them."""
    (folder / "work").mkdir(parents=True)
    network = FeatureNetworkConfig(image_size=(16, 16), channels=3, class_names=list(CLASS_NAMES), widths=[4])
    for channels in (1, 3, 4):
        FeatureNetwork(network.model_copy(update={"channels": channels})).save_pretrained(
            folder / f"features_{channels}"
        )
    found = {}
    for file in sorted(CONFIGS.glob("tokenizer/*.yaml")):
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
        document["run"] = {"dir": "run", "trackers": []}
        document["data"] = TINY["data"] | {"channels": document["data"].get("channels", 3)}
        model = document["model"]
        if model.get("condition") is not None:  # shapes without captions have classes
            model["condition"] = "class"
        model["backbone"] = dict(TINY[model.get("backbone", {}).get("type", "conv")])
        model["latent_channels"] = min(model.get("latent_channels", 4), 4) if "levels" not in model["bottleneck"] else (
            len(model["bottleneck"]["levels"]))  # fmt: skip
        if "codebook_size" in model["bottleneck"]:
            model["bottleneck"]["codebook_size"] = 8
        if "scales" in model["bottleneck"]:
            model["bottleneck"] |= {"scales": [1, 2, 4], "codes": {"type": "vector", "codebook_size": 8}}
        loss = document.get("loss", {})
        if "perceptual" in loss:
            path = str(folder / f"features_{document['data']['channels']}")
            loss["perceptual"] = {"type": "features", "path": path, "weight": 0.1}
        if "adversarial" in loss:
            loss["adversarial"] |= {"channels": 4, "num_layers": 2, "start": 0.0}
        document["train"] = {k: v for k, v in document["train"].items() if k not in SLOW} | TINY["train"]
        found[f"tokenizer/{file.stem}"] = document
    one_grid, two_grids = (
        _codes_of(found[f"tokenizer/{name}"], folder, name) for name in ("vqvae_shapes", "two_level_mnist")
    )
    for file in sorted(CONFIGS.glob("prior/*.yaml")):
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
        model = document["model"]
        codes = two_grids if model["type"].startswith("scale_") else one_grid
        document |= {"run": {"dir": "run", "trackers": []}, "codes": str(codes)}
        if document.get("condition") == {"type": "vector"}:
            del document["condition"]  # these codes have captions, maps and classes
        small = {"hidden_size": 16, "depth": 1, "num_heads": 2, "channels": 8, "head_channels": 8}
        for network in model.get("networks", [model]):
            network |= {key: value for key, value in small.items() if key in network}
        if "codes" in model:
            model["codes"] = [2, 4]
        document["train"] = {k: v for k, v in document["train"].items() if k not in SLOW} | TINY["train"]
        found[f"prior/{file.stem}"] = document
    return found


def _codes_of(document: dict[str, Any], folder: Path, name: str) -> Path:
    """A folder with the codes of a tokenizer that is trained for it."""
    document = document | {"data": document["data"] | {"channels": 3}}
    status, said = _command("tokenizer", yaml.safe_dump(document).encode(), [], folder)
    assert status == 0, said
    trained, codes = folder / f"trained_{name}", folder / f"codes_{name}"
    shutil.move(folder / "work/run", trained)
    assert _run(["encode", str(trained), "--data", "captioned_shapes", "--out", str(codes)], folder)[0] == 0
    return codes


SLOW = ("epochs", "validate_every", "checkpoint_every", "warmup_steps", "mixed_precision")


def _command(kind: str, content: bytes, overrides: list[str], folder: Path) -> tuple[int, str]:
    """Train with the file in a new folder; returns how it ends and its error output."""
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    (work / "config.yaml").write_bytes(content)
    # Stop after the first step, whatever the configuration asks for.
    status, said = _run([f"train-{kind}", "config.yaml", "--time-limit", "0", *overrides], work)
    return (0, "") if status == 75 else (status, said)


def _run(words: list[str], folder: Path) -> tuple[int, str]:
    out, err, before = io.StringIO(), io.StringIO(), Path.cwd()
    AcceleratorState._reset_state(reset_partial_state=True)
    os.chdir(folder)
    argv, sys.argv = sys.argv, ["twostage", *words]
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("error")
            main()
    except SystemExit as ended:
        errors = re.sub(r"^.*(img/s|img\]|it/s).*$", "", err.getvalue().replace("\r", "\n"), flags=re.MULTILINE)
        return int(ended.code or 0), "\n".join(line[:1000] for line in errors.splitlines())
    finally:
        signal.alarm(0)
        sys.argv = argv
        os.chdir(before)
        AcceleratorState._reset_state(reset_partial_state=True)
    raise AssertionError("the command did not end")


@contextlib.contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    """Run a command with limits of time and memory, and without the machine's data."""

    def late(*_: object) -> None:
        raise TimeoutError(f"still running after {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, late)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, limits[1]))
    settings = {"LOCAL_WORLD_SIZE": "1000", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    saved = {name: os.environ.get(name) for name in (*settings, "TWOSTAGE_DATA")}
    os.environ |= settings
    os.environ.pop("TWOSTAGE_DATA", None)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, handler)
        for name, value in saved.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
