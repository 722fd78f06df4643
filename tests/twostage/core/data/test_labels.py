"""Labels of tables: each kind of column gives the right classes, or one error message."""

import numpy as np
import pyarrow as pa
import pytest
from messages import assert_names, refuses

from twostage.core.data.labels import label_candidates, label_column, table_labels


def table(values, **more) -> pa.Table:
    return pa.table({"image": [b""] * len(values), "label": values, **more})


def names_and_labels(values, **more):
    names, labels, _ = table_labels({"train": table(values, **more)}, "label", "here")
    return names, None if labels["train"] is None else labels["train"].tolist()


def with_names(content: pa.Table, names: list[str]) -> pa.Table:
    import json

    about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    return content.replace_schema_metadata({"huggingface": json.dumps(about)})


@pytest.mark.parametrize(
    ("values", "names", "labels"),
    [
        ([3, 1, 3], ["1", "3"], [1, 0, 1]),
        ([10**8, 5], ["5", "100000000"], [1, 0]),
        ([2**63 - 1, -(2**63)], ["-9223372036854775808", "9223372036854775807"], [1, 0]),
        ([-1, 1, -1], ["-1", "1"], [0, 1, 0]),
        ([-1, 0, 1], ["-1", "0", "1"], [0, 1, 2]),
        ([2.0, 1.0], ["1", "2"], [1, 0]),
        (["b", "a"], ["a", "b"], [1, 0]),
        (["10", "9"], ["10", "9"], [0, 1]),
        ([b"b", b"a"], ["a", "b"], [1, 0]),
        ([True, False], ["False", "True"], [1, 0]),
        ([[2], [1]], ["1", "2"], [1, 0]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ["a", "b"], [1, 0, 1]),
        (pa.array([1, 2], pa.uint64()), ["1", "2"], [0, 1]),
        (["żółć", "猫"], ["żółć", "猫"], [0, 1]),
        ([None, None], None, None),
        (["", ""], None, None),
        ([float("nan")] * 2, None, None),
        ([-1, -1], ["-1"], [0, 0]),
    ],
)
def test_values_become_classes(values, names, labels):
    assert names_and_labels(values) == (names, labels)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ([[1, 2], [3]], ["row 0: label is [1, 2]", "expected one class per image"]),
        ([[0], []], ["row 1: label is []", "expected one class per image"]),
        ([0.0, 0.5], ["row 1: label is 0.5", "expected one class per image"]),
        ([{"x": 1}], ["row 0: label is {'x': 1}", "expected one class per image"]),
        (["a", None, "b"], ["1 of 3 rows have no label", "row 1", "remove them"]),
        (["a", ""], ["1 of 2 rows have no label", "row 1"]),
        ([1.0, float("nan")], ["1 of 2 rows have no label", "row 1"]),
    ],
)
def test_a_value_that_is_not_a_class_is_refused(values, parts):
    with refuses("data.source here: `train`", *parts, "set data.label_column to another column, or to null"):
        names_and_labels(values)


def test_with_class_names_numbers_and_names_are_labels_and_minus_one_is_none():
    train, test = with_names(table([2, 0, 0]), ["ant", "bee", "cow"]), table([-1, -1])
    names, labels, said = table_labels({"train": train, "test": test}, "label", "here")
    assert (names, labels["train"].tolist(), labels["test"]) == (["ant", "bee", "cow"], [2, 0, 0], None)
    assert said == ["`test` has no labels and is used without classes"]
    named = with_names(table(["bee", "ant"]), ["ant", "bee"])
    assert table_labels({"train": named}, "label", "here")[1]["train"].tolist() == [1, 0]
    with refuses("row 1: label is 'cat'", "expected a number from 0 to 1 or a class name", "data.label_column"):
        table_labels({"train": with_names(table(["bee", "cat"]), ["ant", "bee"])}, "label", "here")


@pytest.mark.parametrize("form", ['{"feature": %s, "_type": "Sequence"}', '{"feature": %s, "_type": "List"}', "[%s]"])
def test_lists_of_one_named_class_keep_the_names(form):
    feature = form % '{"names": ["ant", "bee"], "_type": "ClassLabel"}'
    metadata = {"huggingface": f'{{"info": {{"features": {{"label": {feature}}}}}}}'}
    content = table([[1], [0]]).replace_schema_metadata(metadata)
    names, labels, _ = table_labels({"train": content}, "label", "here")
    assert (names, labels["train"].tolist()) == (["ant", "bee"], [1, 0])


def test_numbers_in_one_split_and_texts_in_another_are_the_same_classes():
    names, labels, _ = table_labels({"train": table([10, 9, 10]), "test": table(["9", "10"])}, "label", "here")
    assert (names, labels["train"].tolist(), labels["test"].tolist()) == (["10", "9"], [0, 1, 0], [1, 0])


@pytest.mark.parametrize("missing", [[-1, -1], [None, None], None])
def test_a_split_without_labels_has_none(missing):
    test = table([0]).drop_columns("label") if missing is None else table(missing)
    names, labels, said = table_labels({"train": table([0, 1]), "test": test}, "label", "here")
    assert (names, labels["test"], said) == (["0", "1"], None, ["`test` has no labels and is used without classes"])


def test_where_training_has_no_labels_there_are_no_classes():
    tables = {"train": table([None, None]), "test": table(["a", "b"])}
    names, labels, said = table_labels(tables, "label", "here")
    assert (names, labels) == (None, {"train": None, "test": None})
    assert_names(said[-1], "`train` has no labels", "no split has classes")


def test_a_number_of_each_image_is_pointed_out():
    *_, said = table_labels({"train": table(list(range(20)))}, "label", "here")
    assert_names(said[0], "'label' has 20 classes for 20 images", "data.label_column")
    assert table_labels({"train": table(list(range(10)) * 4)}, "label", "here")[2] == []


def test_the_column_is_found_by_its_name():
    def found(*names: str, wanted: str | None = "auto") -> str | None:
        schema = pa.schema([("image", pa.binary()), *((name, pa.int64()) for name in names)])
        return label_column(wanted, [schema], "image", "here")[0]

    assert (found("label", "id"), found("class"), found("coarse_label", "fine_label")) == (
        "label",
        "class",
        "fine_label",
    )
    assert found("breed") is None
    assert found("breed", "label", wanted="breed") == "breed"
    assert found("label", wanted=None) is None
    with refuses("data.label_column 'race'", "expected a column of here", "['image', 'breed']"):
        found("breed", wanted="race")


def test_a_column_of_named_classes_is_found_whatever_it_is_called():
    content = with_names(table([0, 1]), ["a", "b"])
    metadata = {"huggingface": content.schema.metadata[b"huggingface"].replace(b'"label"', b'"breed"')}
    schema = content.rename_columns(["image", "breed"]).replace_schema_metadata(metadata).schema
    column, (notice,) = label_column("auto", [schema], "image", "here")
    assert column == "breed"
    assert_names(notice, "the column 'breed'", "data.label_column=NAME")


def test_columns_that_could_hold_classes_are_offered():
    content = pa.table({
        "image": [b""] * 8, "breed": ["pug", "cat"] * 4, "id": list(range(8)), "age": [1, 2, 3, 4] * 2,
        "score": np.arange(8.0),
    })  # fmt: skip
    (said,) = label_candidates(content, "image")
    assert said.endswith("set data.label_column to one of: breed (2 values), age (4 values)")
    assert label_candidates(content.select(["image", "id"]), "image") == []
