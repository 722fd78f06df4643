"""Captions as tokens."""

import pytest
from messages import refuses

from twostage.core.conditions.vocabulary import Vocabulary

CAPTIONS = ["A small red star, on white", "a  RED star", "the smaller star"] * 3


@pytest.mark.parametrize("units", ["words", "bytes", "byte_pairs"])
def test_tokens_are_numbers_below_the_size_and_do_not_depend_on_case_or_spaces(units):
    vocabulary = Vocabulary.learned_from(CAPTIONS, units, 300)
    for caption in CAPTIONS:
        tokens = vocabulary.tokens(caption)
        assert tokens
        assert 0 < min(tokens) <= max(tokens) < vocabulary.size
    assert vocabulary.tokens("a RED  star ") == vocabulary.tokens("a red star")
    assert vocabulary.tokens("a red star") != vocabulary.tokens("a star red")
    assert vocabulary.tokens(" ") == []
    assert Vocabulary.model_validate_json(vocabulary.model_dump_json()).tokens("a red star") == vocabulary.tokens(
        "a red star"
    )


def test_byte_pairs_are_shorter_than_bytes_and_write_any_text():
    bytes_, pairs = (Vocabulary.learned_from(CAPTIONS, units, 300) for units in ("bytes", "byte_pairs"))
    assert len(pairs.tokens(CAPTIONS[0])) < len(bytes_.tokens(CAPTIONS[0])) / 2
    assert len(pairs.tokens("星 ünknown")) == len(bytes_.tokens("星 ünknown"))
    assert pairs.size <= 301


def test_a_word_that_was_never_seen_is_refused_by_a_list_of_words_only():
    words, pairs = (Vocabulary.learned_from(CAPTIONS, units, 300) for units in ("words", "byte_pairs"))
    with refuses("'purple'", "never use it", "red"):
        words.check("a purple star")
    assert words.tokens("a purple star") == words.tokens("a star")
    pairs.check("a purple star")


def test_a_mark_has_no_space_of_its_own():
    text = "medium-dark, (tall) woman's"
    assert len(Vocabulary(units="bytes").tokens(text)) == len(f" {text}"), "a byte each, and one space before"
    assert Vocabulary.learned_from([text] * 3, "words", 9).entries == (
        "'",
        "(",
        ")",
        ",",
        "medium-dark",
        "s",
        "tall",
        "woman",
    )
