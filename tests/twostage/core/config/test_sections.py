"""A configuration is a file plus overrides; one message lists all mistakes by their paths."""

import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from messages import refuses
from pydantic import Field

from stage1_tokenizer.tokenizer_training import TokenizerConfig
from stage2_prior.prior_training import PriorTrainingConfig
from twostage.core.config.sections import (
    Count,
    Flag,
    RunConfig,
    Section,
    Share,
    Size,
    describe_differences,
    dump_config,
    load_config,
    parse_config,
)
from twostage.core.errors import InputError

CONFIGS = Path(__file__).parents[4] / "configs"
TOKENIZER = {"run": {"dir": "runs/x"}, "train": {"max_steps": 1}}


class Round(Section):
    type: Literal["round"] = "round"
    radius: float = Field(default=1.0, gt=0)


class Angular(Section):
    type: Literal["angular"] = "angular"
    corners: Count = 4


class Drawing(Section):
    run: RunConfig = RunConfig(dir="runs/drawing")
    shape: Annotated[Round | Angular, Field(discriminator="type")] = Round()
    lr: float = 0.1
    copies: Count = 1
    border: Size = 0
    filled: Flag = False
    opacity: Share = 1.0


@pytest.fixture
def load(tmp_path: Path):
    def load(text: str, *overrides: str) -> Drawing:
        path = tmp_path / "drawing.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(Drawing, path, list(overrides))

    return load


def mistakes(schema: type[Section], document: dict) -> list[str]:
    with pytest.raises(InputError) as error:
        parse_config(schema, document, "config x")
    first, *lines = str(error.value).split("\n  ")
    assert first == f"config x has {len(lines)} mistake{'s' * (len(lines) > 1)}:"
    return lines


def test_a_list_of_trackers_may_be_one_word(load):
    assert load("", "run.trackers=wandb", "run.dir=run").run.trackers == ["wandb"]


def test_overrides_win_over_the_file_and_the_file_over_defaults(load):
    config = load(
        "{lr: 1, copies: 2, run: {dir: x}}",
        "copies=3",
        "run.seed=7",
        "shape={type: angular, corners: 5}",
        "shape.corners=6",
    )
    assert (config.lr, config.copies, config.run.seed, config.border) == (1.0, 3, 7, 0)
    assert config.shape == Angular(corners=6)


def test_an_empty_file_gives_the_defaults(load):
    assert load("# nothing yet\n") == Drawing()


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Drawing().copies = 2


def test_one_message_lists_all_mistakes_by_path():
    document = {"run": {"sed": 1}, "shape": {"type": "angular", "corners": 0}, "copies": 1.5, "opacity": 2}
    assert mistakes(Drawing, document) == [
        "run.dir: required but missing",
        "run.sed: unknown key; did you mean 'seed'?",
        "shape.corners: expected greater than 0, got 0",
        "copies: expected a valid integer, got 1.5",
        "opacity: expected less than or equal to 1, got 2",
    ]


@pytest.mark.parametrize(
    ("document", "mistake"),
    [
        ({"copys": 2}, "copys: unknown key; did you mean 'copies'?"),
        ({"zzz": 2}, "zzz: unknown key; known keys: run, shape, lr, copies, border, filled, opacity"),
        ({"shape": {"type": "angular", "corner": 3}}, "shape.corner: unknown key; did you mean 'corners'?"),
        (
            {"shape": {"type": "angular", "radius": 3}},
            "shape.radius: unknown key; known keys for type 'angular': type, corners",
        ),
        (
            {"shape": {"type": "rund"}},
            "shape.type: got 'rund', expected one of 'round', 'angular'; did you mean 'round'?",
        ),
        ({"shape": {"type": 5}}, "shape.type: got 5, expected one of 'round', 'angular'"),
        ({"shape": {"radius": 5}}, "shape.type: required but missing; expected one of 'round', 'angular'"),
        ({"shape": "round"}, "shape: expected a group of keys, got 'round'"),
        ({"run": None}, "run: expected a group of keys, got None"),
        (
            {"run": {"dir": "x", "trackers": ["paper"]}},
            "run.trackers.0: expected 'tensorboard' or 'wandb', got 'paper'",
        ),
        ({"copies": True}, "copies: expected a valid integer, got True"),
        ({"copies": "2"}, "copies: expected a valid integer, got '2'"),
        ({"filled": 1}, "filled: expected a valid boolean, got 1"),
        ({"filled": "yes"}, "filled: expected a valid boolean, got 'yes'"),
        ({"border": -1}, "border: expected greater than or equal to 0, got -1"),
    ],
)
def test_a_mistake_is_one_clear_line(document, mistake):
    assert mistakes(Drawing, document) == [mistake]


@pytest.mark.parametrize(
    ("group", "mistake"),
    [
        ({"data": {"horizontal_flp": True}}, "data.horizontal_flp: unknown key; did you mean 'horizontal_flip'?"),
        ({"model": {"backbone": {"type": "conv", "chanels": 8}}},
         "model.backbone.chanels: unknown key; did you mean 'channels'?"),
        ({"model": {"backbone": {"type": "conv", "channel_mult": [1, 0, 2]}}},
         "model.backbone.channel_mult.1: expected greater than 0, got 0"),
        ({"train": {"max_steps": 1, "epochs": 1}}, "train: give either max_steps or epochs, got max_steps=1, epochs=1"),
        ({"data": {"image_size": 0}}, "data.image_size: expected pixels such as 32, or [height, width], got 0"),
        ({"data": {"image_size": [32]}}, "data.image_size: expected pixels such as 32, or [height, width], got [32]"),
        ({"data": {"image_size": [32, True]}},
         "data.image_size: expected pixels such as 32, or [height, width], got [32, True]"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_tokenizer_config_is_one_clear_line(group, mistake):
    assert mistakes(TokenizerConfig, TOKENIZER | group) == [mistake]


def test_wrong_union_type_lists_the_types_of_a_tokenizer():
    (line,) = mistakes(TokenizerConfig, TOKENIZER | {"model": {"bottleneck": {"type": "vectr"}}})
    assert line.startswith("model.bottleneck.type: got 'vectr', expected one of ")
    assert "'identity', 'gaussian', " in line
    assert line.endswith("; did you mean 'vector'?")


@pytest.mark.parametrize(
    ("override", "mistake"),
    [
        ("shape.radus=2", "shape.radus: unknown key; did you mean 'radius'?"),
        ("copis=2", "copis: unknown key; did you mean 'copies'?"),
        ("copies=two", "copies: expected a valid integer, got 'two'"),
    ],
)
def test_mistakes_in_overrides_read_like_those_in_files(load, override, mistake):
    with pytest.raises(InputError, match=rf"drawing\.yaml has 1 mistake:\n  {re.escape(mistake)}$"):
        load("shape: {type: round, radius: 1}", override)


@pytest.mark.parametrize("override", ["copies", "=2", "shape..radius=2", ".lr=1", ""])
def test_malformed_override_shows_the_form(load, override):
    with refuses(f"override '{override}'", "expected key=value", "train.lr=1e-4"):
        load("{}", override)


def test_override_with_broken_yaml_says_why(load):
    with refuses("override 'lr=[1'", "not valid YAML", "while parsing a flow seq"):
        load("{}", "lr=[1")


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001"])
def test_floats_may_be_written_in_any_form(load, text):
    assert load(f"lr: {text}").lr == load("", f"lr={text}").lr == 1e-4


def test_a_missing_file_suggests_similar_names(tmp_path):
    (tmp_path / "vae_mnist.yaml").touch()
    (tmp_path / "other.yaml").touch()
    with refuses("vae_mnits.yaml: no such file", "Did you mean vae_mnist.yaml?"):
        load_config(Drawing, tmp_path / "vae_mnits.yaml")
    with refuses("nowhere/x.yaml: no such file", "Fix the path"):
        load_config(Drawing, tmp_path / "nowhere" / "x.yaml")


def test_broken_yaml_is_one_line_with_its_place(load):
    with pytest.raises(InputError, match=r"not valid YAML[^\n]*line 2, column 1[^\n]*$"):
        load("copies: [1, 2\n")


def test_a_file_without_groups_is_refused(load):
    with refuses("drawing.yaml", "expected groups such as `data:` and `train:`", "['copies']"):
        load("- copies")


def test_dumped_configuration_loads_as_the_same(load):
    config = Drawing(shape=Angular(corners=3), lr=1e-7, opacity=0.25)
    assert load(dump_config(config)) == config
    assert yaml.safe_load(dump_config(config))["border"] == 0, "defaults are written too"


def test_differences_are_shown_by_path():
    old = Drawing(copies=2).model_dump(mode="json")
    new = Drawing(lr=0.2, shape=Round(radius=2), copies=2).model_dump(mode="json") | {"added": 1}
    assert describe_differences(old, new) == [
        "shape.radius: was 1.0, now 2.0",
        "lr: was 0.1, now 0.2",
        "added: was '(absent)', now 1",
    ]
    assert describe_differences(old, old) == []


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("tokenizer/*.yaml")), ids=lambda path: path.stem)
def test_every_tokenizer_config_loads(path):
    assert load_config(TokenizerConfig, path).run.dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("prior/*.yaml")), ids=lambda path: path.stem)
def test_every_prior_config_loads(path):
    assert load_config(PriorTrainingConfig, path).run.dir == f"runs/{path.stem}"
