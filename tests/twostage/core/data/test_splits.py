"""Splits are spelled as Hugging Face's `datasets` spells them."""

import datasets.data_files
import pytest

from twostage.core.data.splits import SPLIT_WORDS, exact_split, spelled_splits

THEIRS = {"train": "train", "validation": "val", "test": "test"}
WORDS = [(split, word) for split, words in SPLIT_WORDS.items() for word in words]


def test_every_word_of_theirs_is_known():
    theirs = {THEIRS[str(split)]: set(words) for split, words in datasets.data_files.SPLIT_KEYWORDS.items()}
    assert {split: set(words) for split, words in SPLIT_WORDS.items()} == theirs


@pytest.mark.parametrize(("split", "word"), WORDS)
def test_a_word_is_a_split_in_any_case(split, word):
    assert exact_split(word) == exact_split(word.upper()) == exact_split(word.title()) == split
    assert exact_split(f"{word}s") is exact_split(f"{word}_2") is None


@pytest.mark.parametrize("form", ["{}", "my-{}", "{}_2", "a.{}.b", "data {} 01", "x3{}7", "{}-00000-of-00002"])
@pytest.mark.parametrize(("split", "word"), WORDS)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_names_mean_what_they_mean_to_datasets(tmp_path, form, split, word, kind):
    name = form.format(word)
    file = tmp_path / (f"{name}.parquet" if kind == "file" else f"{name}/part.parquet")
    file.parent.mkdir(exist_ok=True)
    file.touch()
    patterns = datasets.data_files.get_data_patterns(str(tmp_path))
    found = {THEIRS.get(str(theirs), str(theirs)) for theirs in patterns}
    assert found == {split} == spelled_splits(name)


@pytest.mark.parametrize("name", ["testimony", "trainee", "evaluate", "devil", "trainval", "contest", "", "7"])
def test_other_words_are_no_splits(name):
    assert spelled_splits(name) == set()
    assert exact_split(name) is None


def test_two_splits_in_one_name_are_both_found():
    assert spelled_splits("train_vs_test-2") == {"train", "test"}
