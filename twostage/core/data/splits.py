"""How the splits of a dataset are spelled in the names of folders, files and Hugging Face splits."""

import re

__all__ = ["HELD_OUT", "SPLIT_WORDS", "exact_split", "reads_as_held_out", "spelled_splits"]

SPLIT_WORDS = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words of each split, the same as in Hugging Face's `datasets.data_files.SPLIT_KEYWORDS`."""
HELD_OUT = {"val", "test"}
_SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words}
_WORD = re.compile(rf"(?<![^-._\s0-9])(?:{'|'.join(_SPLIT_OF)})(?![^-._\s0-9])", re.IGNORECASE)


def exact_split(name: str) -> str | None:
    """The split (`train`, `val`, `test`) that ``name`` is a word for: `Validation` is `val`; None for other names."""
    return _SPLIT_OF.get(name.casefold())


def spelled_splits(name: str) -> set[str]:
    """The splits whose words occur in ``name``, between digits and any of `-._ `, as `datasets` reads names.

    `my-dev_2.parquet` gives {`val`}, `train_vs_test` two splits, `testimony` none.
    """
    return {_SPLIT_OF[word.casefold()] for word in _WORD.findall(name)}


_HELD_OUT_LIKE = re.compile(
    r"(?<![A-Za-z])(?i:test|tst|testing|val|valid|validation|dev|eval|evaluation|hold[-_]?out|held[-_]?out)(?![a-z])"
)


def reads_as_held_out(name: str) -> bool:
    """Whether a person may have meant a held-out split by ``name``, though `datasets` knows no such word: `testA`,
    `split=test`, `holdout`. A reason to ask, not to decide."""
    return _HELD_OUT_LIKE.search(name) is not None
