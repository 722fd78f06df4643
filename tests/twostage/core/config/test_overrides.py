"""Text is taken as it stands, other values as YAML; what overrides replace or drop is said, and nothing else is."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import yaml
from pydantic import Field

from stage1_tokenizer.perceptual import LPIPSConfig
from stage1_tokenizer.train_tokenizer import TokenizerConfig
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


class Picture(Section):
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
    """``load(text, *overrides)``: the picture, and what was said."""

    def load(text: str, *overrides: str) -> tuple[Picture, list[str]]:
        (tmp_path / "picture.yaml").write_text(text, encoding="utf-8")
        said: list[str] = []
        return load_config(Picture, tmp_path / "picture.yaml", list(overrides), said.append), said

    return load


def refusal(load, text: str, *overrides: str) -> str:
    with pytest.raises(InputError) as error:
        load(text, *overrides)
    return str(error.value)


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
    picture, said = load("technique: {type: oil}", f"title={text}", f"owner={text}", f"technique.medium={text}")
    assert (picture.title, picture.owner, picture.technique.medium) == (text, text, text)
    assert said == []


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
    ("text", "said"),
    [
        ("title: [wip]", "title: expected text, got ['wip']; quote it if that is its name"),
        ("title: {a: 1}", "title: expected text, got {'a': 1}; quote it if that is its name"),
        ("title: null", "title: expected text, got None; quote it if that is its name"),
        ("title:", "title: expected text, got None; quote it if that is its name"),
        ("title: ''", "title: expected text, got none"),
        ("title: photos: summer", "quote text with special characters"),
        ("title: *star", "quote text with special characters"),
        ("title: '@at'\nowner: @at", "quote text with special characters"),
        ("title: !important", "quote text with special characters"),
    ],
)
def test_a_file_whose_text_is_something_else_says_to_quote_it(load, text, said):
    assert said in refusal(load, text)


def test_null_is_none_where_that_is_allowed(load):
    picture, _ = load("owner: me", "owner=null", "title=null")
    assert (picture.owner, picture.title) == (None, "null")
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
    ("override", "said"),
    [
        ("price=1 # cheap", "everything after # would be dropped as a comment"),
        ("colours=[red] #, blue]", "everything after # would be dropped as a comment"),
        ("colours=[red, #1\n blue]", "everything after # would be dropped as a comment"),
        ("technique={type: ink, brush: my #2}", "not valid YAML"),
        ("technique={type: ink, brush: a, brush: b}", "the key 'brush' is given twice"),
        ("hours=12:30", "hours: expected a valid integer, got '12:30'"),
        ("hours=010", "hours: expected a valid integer, got '010'"),
        ("hours=", "has no value; expected key=value, or key=null for none"),
        ("price= ", "has no value; expected key=value, or key=null for none"),
        ("price=1\n---\n2", "not valid YAML"),
        ("price=[1", "not valid YAML"),
        ("signed=maybe", "signed: expected a valid boolean, got 'maybe'"),
        ("colours=red", "colours: expected a valid list, got 'red'"),
        ("titel=my #2", "titel: unknown key; did you mean 'title'?"),
        ("title.x=1", "title is 'a' and not a group of keys"),
        ("technique.x.y=1", "technique.x: unknown key; known of type 'oil' are type, medium, layers, varnish"),
    ],
)
def test_what_would_be_lost_or_become_something_else_is_an_error(load, override, said):
    assert said in refusal(load, "{title: a, technique: {type: oil}}", override)


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
    picture, said = load(OIL, *overrides)
    assert picture.technique == technique
    kept = "" if any("layers" in one for one in overrides) else "; kept layers"
    assert said == [f"technique.type=ink: the config had the type oil; dropped medium, varnish{kept}"]


def test_the_type_of_before_drops_nothing(load):
    assert load(OIL, "technique.type=oil") == load(OIL)
    assert load("", "technique.type=pencil") == (Picture(technique=Pencil()), [])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["technique.type=pencil", "technique.medium=poppy"], "technique.medium: unknown key"),
        (["technique.medium=poppy", "technique.type=pencil"], "technique.medium: unknown key"),
        (["technique={type: oil, medium: poppy}", "technique.type=pencil"], "technique.medium: unknown key"),
        (["technique.type=ink"], "technique.brush: required, but not given"),
        (["technique.type=inc"], "technique.type: got 'inc', expected one of 'oil', 'ink', 'pencil'"),
        (["technique.type=[ink]"], "technique.type: got '[ink]', expected one of"),
        (["technique.layers=2", "technique={type: pencil}"],
         "replaces the whole group technique, so 'technique.layers=2' before it would be lost"),
        (["frame.type=oil", "frame=null"], "so 'frame.type=oil' before it would be lost; give that one after it"),
        (["canvas={width: 2}", "canvas={height: 2}"], "so 'canvas={width: 2}' before it would be lost"),
    ],
)  # fmt: skip
def test_an_override_is_never_dropped(load, overrides, said):
    error = refusal(load, OIL, *overrides)
    assert said in error
    assert error.count("\n") <= 1


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
    picture, said = load("frame: {type: ink, brush: b, layers: 2}", *overrides)
    assert picture.frame == frame
    whole = next(one for one in overrides if one.startswith("frame="))
    assert said == ([f"{whole}: replaces the whole group; the config had {shown}"] if shown else [])


@pytest.mark.parametrize(
    ("text", "overrides", "length", "said"),
    [
        ("days: 2", ["hours=5"], (5, None), ["hours=5: takes the place of days=2"]),
        ("hours: 2", ["days=5"], (None, 5), ["days=5: takes the place of hours=2"]),
        ("", ["hours=5", "days=2"], (None, 2), ["days=2: takes the place of hours=5"]),
        ("hours: 1", ["days=2", "hours=3"], (3, None),
         ["days=2: takes the place of hours=1", "hours=3: takes the place of days=2"]),
        ("hours: 1", ["hours=null", "days=2"], (None, 2), []),
        ("hours: 1", ["days=null"], (1, None), []),
        ("hours: 1", ["hours=2", "hours=3"], (3, None), []),
    ],
)  # fmt: skip
def test_of_two_keys_that_exclude_each_other_the_last_one_given_stays(load, text, overrides, length, said):
    picture, heard = load(text, *overrides)
    assert (picture.hours, picture.days) == length
    assert heard == said


# --- the real ones --------------------------------------------------------------------------------------------------


def load_real(name: str, *overrides: str) -> tuple[TokenizerConfig, list[str]]:
    said: list[str] = []
    return load_config(TokenizerConfig, CONFIGS / "tokenizer" / f"{name}.yaml", list(overrides), said.append), said


def test_lpips_in_the_place_of_a_feature_network():
    config, said = load_real("vqgan_cifar10", "loss.perceptual.type=lpips")
    assert config.loss.perceptual == LPIPSConfig(weight=0.3)
    assert said == ["loss.perceptual.type=lpips: the config had the type features; dropped path; kept weight"]


def test_steps_in_the_place_of_epochs_and_the_other_way_round():
    config, said = load_real("vae_mnist", "train.max_steps=50")
    assert (config.train.max_steps, config.train.epochs) == (50, None)
    assert re.fullmatch(r"train.max_steps=50: takes the place of train.epochs=\d+", *said)
    config, said = load_real("vqgan_cifar10", "train.epochs=2")
    assert (config.train.max_steps, config.train.epochs) == (None, 2)
    assert said == ["train.epochs=2: takes the place of train.max_steps=1500"]


@pytest.mark.parametrize("kind", ["identity", "gaussian", "class_gaussian", "residual"])
@pytest.mark.parametrize("name", ["vqvae_cifar10", "fsq_mnist", "lfq_mnist", "rvq_mnist"])
def test_any_bottleneck_in_the_place_of_another(name, kind):
    assert load_real(name, f"model.bottleneck.type={kind}")[0].model.bottleneck.type == kind


def test_both_lengths_in_one_file_stay_an_error(tmp_path):
    document: dict[str, Any] = yaml.safe_load((CONFIGS / "tokenizer" / "vae_mnist.yaml").read_text())
    document["train"] |= {"max_steps": 3, "epochs": 3}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(InputError, match="give either max_steps or epochs, got max_steps=3, epochs=3"):
        load_config(TokenizerConfig, tmp_path / "both.yaml")
