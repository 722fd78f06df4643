"""From captions to numbers: words, bytes, or byte pairs learned from the training captions."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Literal

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from twostage.core.config.sections import Section
from twostage.core.errors import InputError
from twostage.core.wording import some_of

__all__ = ["Units", "Vocabulary"]

Units = Literal["words", "bytes", "byte_pairs"]
_WORD = re.compile(r"\w+(?:-\w+)*|[^\w\s]")
"""A word with its hyphens, because `medium-dark` is neither `medium` nor `dark`; or a punctuation mark."""
_SPACED_WORD = Regex(r" ?\w+(?:-\w+)*| ?[^\w\s]")
"""The same with the space before it; no byte pair reaches across."""
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
"""The 256 characters that stand for bytes in `tokenizers`."""


class Vocabulary(Section):
    """How a caption becomes tokens, numbered from 1; 0 is padding. Upper and lower case are the same."""

    units: Units
    entries: tuple[str, ...] = ()
    """The words, or the pairs of units that are merged ("l a"), in order."""

    @classmethod
    def learned_from(cls, captions: Iterable[str], units: Units = "byte_pairs", size: int = 1024) -> "Vocabulary":
        """The vocabulary of the training ``captions``, with at most ``size`` entries if they are words, and ``size``
        tokens if they are byte pairs (Sennrich et al. 2015, arXiv 1508.07909)."""
        match units:
            case "bytes":
                return cls(units=units)
            case "words":
                counts = Counter(word for caption in captions for word in _words(caption))
                return cls(units=units, entries=tuple(sorted(word for word, _ in counts.most_common(size))))
            case "byte_pairs":
                learned = _byte_pair_tokenizer([])
                trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=_BYTES, show_progress=False)
                learned.train_from_iterator(map(_spaced, captions), trainer)
                merges = _merges_of(learned)
                return cls(units=units, entries=tuple(merges))

    @property
    def size(self) -> int:
        """The number of tokens, with padding."""
        return 1 + len(self.entries) + (0 if self.units == "words" else len(_BYTES))

    @property
    def token_names(self) -> list[str]:
        """The text of each token, by its number; that of padding is empty."""
        if self.units == "words":
            return ["", *self.entries]
        return ["", *_byte_units(pair.replace(" ", "") for pair in self.entries)]

    def tokens(self, caption: str) -> list[int]:
        """The tokens of a caption, without the words that :meth:`check` refuses."""
        if self.units == "words":
            return [self._numbers[word] for word in _words(caption) if word in self._numbers]
        return [1 + number for number in self._byte_pairs.encode(_spaced(caption)).ids]

    def check(self, prompt: str) -> None:
        """Refuses a prompt with words that never occur in the training captions, if the units are words.

        Raises:
            InputError: such a word.
        """
        if unknown := self.unknown_words(prompt):
            raise InputError(
                f"prompt {prompt!r}: the model does not know {some_of(map(repr, unknown))}, because the training "
                f"captions never use {'it' if len(unknown) == 1 else 'them'}. Use some of its "
                f"{len(self.entries):,} words: {some_of(self.entries, 60)}"
            )

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that have no token; there are none if the units are not words."""
        return sorted({word for word in _words(text) if word not in self._numbers}) if self.units == "words" else []

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.entries, 1)}

    @cached_property
    def _byte_pairs(self) -> Tokenizer:
        return _byte_pair_tokenizer([(first, second) for first, second in map(str.split, self.entries)])


def _plain(caption: str) -> str:
    """The caption in small letters, with single spaces, in Unicode's composed form."""
    return " ".join(unicodedata.normalize("NFC", caption).lower().split())


def _spaced(caption: str) -> str:
    """The plain caption with a space before it, so that a word is the same at the beginning as elsewhere."""
    return f" {plain}" if (plain := _plain(caption)) else ""


def _words(caption: str) -> list[str]:
    return _WORD.findall(_plain(caption))


def _byte_pair_tokenizer(merges: list[tuple[str, str]]) -> Tokenizer:
    units = _byte_units(first + second for first, second in merges)
    tokenizer = Tokenizer(models.BPE(vocab={unit: i for i, unit in enumerate(units)}, merges=merges))
    words = pre_tokenizers.Split(_SPACED_WORD, "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])  # type: ignore[assignment]
    return tokenizer


def _byte_units(merged: Iterable[str]) -> list[str]:
    """All units in order: the bytes, then each merged pair once."""
    return [*_BYTES, *dict.fromkeys(merged)]


def _merges_of(tokenizer: Tokenizer) -> list[str]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [" ".join(pair) if isinstance(pair, list) else pair for pair in merges]
