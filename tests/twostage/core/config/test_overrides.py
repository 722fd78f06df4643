"""Text values are used as written, other values are YAML; each key that an override replaces or drops is reported."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import yaml
from messages import assert_names, refuses
from pydantic import Field

from stage1_tokenizer.losses.perceptual import LPIPSConfig
from stage1_tokenizer.tokenizer_training import TokenizerConfig
from twostage.core.config.sections import Count, Flag, Number, PathName, Section, load_config
from twostage.core.errors import InputError

CONFIGS = Path(__file__).parents[4] / "configs"


class Oil(Section):
    type: Literal["oil"] = "oil"
    medium: str = "linseed"
    layers: Count = 1
    varnish: Flag = False


class Ink(Section):
    type: Literal["ink"] = "ink"
    brush: str
    layers: Count = 1


class Pencil(Section):
    type: Literal["pencil"] = "pencil"


Technique = Annotated[Oil | Ink | Pencil, Field(discriminator="type")]


class Canvas(Section):
    width: Count = 1
    height: Count = 1


class Painting(Section):
    exclusive_keys: ClassVar = (("hours", "days"),)

    title: PathName = "untitled"
    owner: PathName | None = "nobody"
    style: Literal["no", "yes", "on"] = "yes"
    signed: Flag = True
    price: Number = 1.0
    colours: list[str] = Field(default_factory=list)
    hours: Count | None = None
    days: Count | None = None
    technique: Technique = Oil()
    frame: Technique | None = None
    canvas: Canvas | None = None


@pytest.fixture
def load(tmp_path):
    """``load(text, *overrides)``: the config, and the notices."""

    def load(text: str, *overrides: str) -> tuple[Painting, list[str]]:
        (tmp_path / "painting.yaml").write_text(text, encoding="utf-8")
        notices: list[str] = []
        return load_config(Painting, tmp_path / "painting.yaml", list(overrides), notices.append), notices

    return load


# --- text -----------------------------------------------------------------------------------------------------------

TEXTS = [
    *("my pics #2", "try #2", "#", "2024", "12:30", "1:30:00", "on", "off", "Yes", "true", "[wip]", "photos: summer"),
    *(
        "1e3",
        "0x10",
        "010",
        "1_000",
        "2024-01-31",
        ".5",
        ".inf",
        "{a: b}",
        "- a",
        "a, b",
        "*star",
        "&and",
        "!important",
    ),
    *("%percent", "@at", "`tick`", "'quoted'", '"quoted"', "a=b=c", " before", "after ", "tab\tinside", "a\\nb", "~x"),
    *("null ", "NULL", "?", "|", ">", "...", "---", "<<", "=", "owner/name", "ünïcødé ☃", "two  spaces", "end:", ": a"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_of_an_override_is_taken_as_it_stands(load, text):
    painting, notices = load("technique: {type: oil}", f"title={text}", f"owner={text}", f"technique.medium={text}")
    assert (painting.title, painting.owner, painting.technique.medium) == (text, text, text)
    assert notices == []


@pytest.mark.parametrize("text", TEXTS)
def test_a_file_means_the_same_text_where_it_is_quoted(load, text):
    assert load(yaml.safe_dump({"title": text}))[0].title == text


@pytest.mark.parametrize(
    "text",
    ["2024", "12:30", "1:30:00", "on", "off", "Yes", "true", "1e3", "0x10", "010", "1_000", "2024-01-31", "2024-13-99",
     ".5", ".inf", "-0.0", "owner/name", "a#b", "=", "2024-01-31 12:30:00"],
)  # fmt: skip
def test_a_file_need_not_quote_what_only_looks_like_a_number(load, text):
    for document in (f"title: {text}", f"{{title: {text}, technique: {{type: oil, medium: {text}}}}}"):
        assert load(document)[0].title == text
    assert load("", f"technique={{type: oil, medium: {text}}}")[0].technique == Oil(medium=text)
    assert load(f"colours: [{text}, red]")[0].colours == load("", f"colours=[{text}, red]")[0].colours == [text, "red"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("title: [wip]", ["title: expected text, got ['wip']", "quotes"]),
        ("title: {a: 1}", ["title: expected text, got {'a': 1}", "quotes"]),
        ("title: null", ["title: expected text, got None", "quotes"]),
        ("title:", ["title: expected text, got None", "quotes"]),
        ("title: ''", ["title: expected text, got ''"]),
        ("title: photos: summer", ["special characters in quotes"]),
        ("title: *star", ["special characters in quotes"]),
        ("title: '@at'\nowner: @at", ["special characters in quotes"]),
        ("title: !important", ["special characters in quotes"]),
    ],
)
def test_text_that_yaml_reads_as_something_else_needs_quotes(load, text, parts):
    with refuses("painting.yaml", *parts):
        load(text)


def test_null_is_none_where_that_is_allowed(load):
    painting, _ = load("owner: me", "owner=null", "title=null")
    assert (painting.owner, painting.title) == (None, "null")
    assert load("owner: null")[0].owner is None


@pytest.mark.parametrize("word", ["no", "on", "yes"])
def test_a_word_of_a_few_is_no_truth_value(load, word):
    assert load(f"style: {word}")[0].style == load("", f"style={word}")[0].style == word


# --- other values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [("signed=off", False), ("signed=false", False), ("price=1e-3", 0.001), ("price=2", 2.0), ("hours=1_000", 1000),
     ("hours=0x10", 16), ("hours=null", None), ("colours=[a b, '#1']", ["a b", "#1"]), ("colours=[]", []),
     ("colours=[a#b]", ["a#b"]), ("hours= 3 ", 3), ("price=.5", 0.5), ("canvas={width: 2}", Canvas(width=2))],
)  # fmt: skip
def test_other_values_are_yaml(load, override, value):
    assert getattr(load("", override)[0], override.partition("=")[0]) == value


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("price=1 # cheap", ["'price=1 # cheap'", "everything after # as a comment"]),
        ("colours=[red] #, blue]", ["everything after # as a comment"]),
        ("colours=[red, #1\n blue]", ["everything after # as a comment"]),
        ("technique={type: ink, brush: my #2}", ["not valid YAML"]),
        ("technique={type: ink, brush: a, brush: b}", ["duplicate key 'brush'"]),
        ("hours=12:30", ["hours: expected a valid integer, got '12:30'"]),
        ("hours=010", ["hours: expected a valid integer, got '010'"]),
        ("hours=", ["'hours='", "expected key=value, or key=null", "no value"]),
        ("price= ", ["'price= '", "expected key=value, or key=null", "no value"]),
        ("price=1\n---\n2", ["not valid YAML"]),
        ("price=[1", ["not valid YAML"]),
        ("signed=maybe", ["signed: expected a valid boolean, got 'maybe'"]),
        ("colours=red", ["colours: expected a valid list, got 'red'"]),
        ("titel=my #2", ["titel: unknown key", "'title'"]),
        ("title.x=1", ["'title.x=1'", "expected title to be a group of keys", "got 'a'"]),
        ("technique.x.y=1", ["technique.x: unknown key", "'oil'", "type, medium, layers, varnish"]),
    ],
)
def test_a_value_that_would_be_lost_or_misread_is_an_error(load, override, parts):
    with refuses(*parts):
        load("{title: a, technique: {type: oil}}", override)


# --- groups ---------------------------------------------------------------------------------------------------------

OIL = "technique: {type: oil, medium: walnut, varnish: true, layers: 7}"


@pytest.mark.parametrize(
    ("overrides", "technique"),
    [
        (["technique.type=ink", "technique.brush=#2"], Ink(brush="#2", layers=7)),
        (["technique.brush=#2", "technique.type=ink"], Ink(brush="#2", layers=7)),
        (["technique.layers=2", "technique.type=ink", "technique.brush=b"], Ink(brush="b", layers=2)),
    ],
)
def test_a_group_of_another_type_keeps_what_both_know(load, overrides, technique):
    painting, notices = load(OIL, *overrides)
    assert painting.technique == technique
    kept = "" if any("layers" in one for one in overrides) else "; kept layers"
    assert notices == [f"technique.type=ink: the config had type oil; dropped medium, varnish{kept}"]


def test_the_type_of_before_drops_nothing(load):
    assert load(OIL, "technique.type=oil") == load(OIL)
    assert load("", "technique.type=pencil") == (Painting(technique=Pencil()), [])


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["technique.type=pencil", "technique.medium=poppy"], ["technique.medium: unknown key"]),
        (["technique.medium=poppy", "technique.type=pencil"], ["technique.medium: unknown key"]),
        (["technique={type: oil, medium: poppy}", "technique.type=pencil"], ["technique.medium: unknown key"]),
        (["technique.type=ink"], ["technique.brush: required"]),
        (["technique.type=inc"], ["technique.type: got 'inc'", "expected one of 'oil', 'ink', 'pencil'"]),
        (["technique.type=[ink]"], ["technique.type: got '[ink]'", "expected one of"]),
        (
            ["technique.layers=2", "technique={type: pencil}"],
            ["whole group technique", "'technique.layers=2'"],
        ),
        (["frame.type=oil", "frame=null"], ["whole group frame", "Move 'frame.type=oil' after"]),
        (["canvas={width: 2}", "canvas={height: 2}"], ["whole group canvas", "Move 'canvas={width: 2}' after"]),
    ],
)
def test_an_override_is_never_dropped(load, overrides, parts):
    with pytest.raises(InputError) as error:
        load(OIL, *overrides)
    assert_names(str(error.value), *parts)
    assert str(error.value).count("\n") <= 1


@pytest.mark.parametrize(
    ("overrides", "frame", "shown"),
    [
        (["frame=null"], None, "type: 'ink', brush: 'b', layers: 2"),
        (["frame={type: ink, brush: c}"], Ink(brush="c"), "layers: 2"),
        (["frame={type: pencil}"], Pencil(), "brush: 'b', layers: 2"),
        (["frame={type: ink, brush: c, layers: 3}"], Ink(brush="c", layers=3), None),
        (["frame={type: ink, brush: c}", "frame.layers=4"], Ink(brush="c", layers=4), "layers: 2"),
        (["frame.layers=5", "frame={type: ink, brush: c, layers: 3}"], Ink(brush="c", layers=3), None),
    ],
)
def test_a_whole_group_that_is_replaced_is_shown(load, overrides, frame, shown):
    painting, notices = load("frame: {type: ink, brush: b, layers: 2}", *overrides)
    assert painting.frame == frame
    whole = next(one for one in overrides if one.startswith("frame="))
    assert notices == ([f"{whole}: replaces the whole group; the config had {shown}"] if shown else [])


@pytest.mark.parametrize(
    ("text", "overrides", "length", "notices"),
    [
        ("days: 2", ["hours=5"], (5, None), ["hours=5: replaces days=2"]),
        ("hours: 2", ["days=5"], (None, 5), ["days=5: replaces hours=2"]),
        ("", ["hours=5", "days=2"], (None, 2), ["days=2: replaces hours=5"]),
        ("hours: 1", ["days=2", "hours=3"], (3, None),
         ["days=2: replaces hours=1", "hours=3: replaces days=2"]),
        ("hours: 1", ["hours=null", "days=2"], (None, 2), []),
        ("hours: 1", ["days=null"], (1, None), []),
        ("hours: 1", ["hours=2", "hours=3"], (3, None), []),
    ],
)  # fmt: skip
def test_of_two_keys_that_exclude_each_other_the_last_one_given_stays(load, text, overrides, length, notices):
    painting, heard = load(text, *overrides)
    assert (painting.hours, painting.days) == length
    assert heard == notices


# --- the real ones --------------------------------------------------------------------------------------------------


def load_real(name: str, *overrides: str) -> tuple[TokenizerConfig, list[str]]:
    notices: list[str] = []
    config = load_config(TokenizerConfig, CONFIGS / "tokenizer" / f"{name}.yaml", list(overrides), notices.append)
    return config, notices


def test_lpips_in_the_place_of_a_feature_network():
    config, notices = load_real("vqgan_cifar10", "loss.perceptual.type=lpips")
    assert config.loss.perceptual == LPIPSConfig(weight=0.3)
    assert notices == ["loss.perceptual.type=lpips: the config had type features; dropped path; kept weight"]


def test_steps_in_the_place_of_epochs_and_the_other_way_round():
    config, notices = load_real("vae_mnist", "train.max_steps=50")
    assert (config.train.max_steps, config.train.epochs) == (50, None)
    assert re.fullmatch(r"train.max_steps=50: replaces train.epochs=\d+", *notices)
    config, notices = load_real("vqgan_cifar10", "train.epochs=2")
    assert (config.train.max_steps, config.train.epochs) == (None, 2)
    assert notices == ["train.epochs=2: replaces train.max_steps=450"]


@pytest.mark.parametrize("kind", ["identity", "gaussian", "class_gaussian", "residual"])
@pytest.mark.parametrize("name", ["vqvae_cifar10", "fsq_mnist", "lfq_mnist", "rvq_mnist"])
def test_any_bottleneck_in_the_place_of_another(name, kind):
    assert load_real(name, f"model.bottleneck.type={kind}")[0].model.bottleneck.type == kind


def test_both_lengths_in_one_file_stay_an_error(tmp_path):
    document: dict[str, Any] = yaml.safe_load((CONFIGS / "tokenizer" / "vae_mnist.yaml").read_text())
    document["train"] |= {"max_steps": 3, "epochs": 3}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(document))
    with refuses("train: ", "max_steps=3", "epochs=3"):
        load_config(TokenizerConfig, tmp_path / "both.yaml")
