"""Find `train`, `val` and `test` in the names of folders, files and Hugging Face splits."""

import re

__all__ = ["HELD_OUT", "SPLIT_COLUMN", "SPLIT_WORDS", "exact_split", "reads_as_held_out", "spelled_splits"]

SPLIT_WORDS = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words for each split, as in Hugging Face's `datasets.data_files.SPLIT_KEYWORDS`."""
HELD_OUT = {"val", "test"}
SPLIT_COLUMN = "split"
"""The column of files beside images that names the split of each."""
_SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words}
_WORD = re.compile(rf"(?<![^-._\s0-9])(?:{'|'.join(_SPLIT_OF)})(?![^-._\s0-9])", re.IGNORECASE)
_HELD_OUT_LIKE = re.compile(
    r"(?<![A-Za-z])(?i:test|tst|testing|val|valid|validation|dev|eval|evaluation|hold[-_]?out|held[-_]?out)(?![a-z])"
)


def exact_split(name: str) -> str | None:
    """The split that ``name`` is a word for (`Validation` is `val`), or None."""
    return _SPLIT_OF.get(name.casefold())


def spelled_splits(name: str) -> set[str]:
    """The splits whose words occur in ``name``, delimited by digits or any of `-._ `, as `datasets` reads names.

    `my-dev_2.parquet` gives {`val`}, `train_vs_test` two splits, `testimony` none.
    """
    return {_SPLIT_OF[word.casefold()] for word in _WORD.findall(name)}


def reads_as_held_out(name: str) -> bool:
    """Whether a person may have meant a held-out split that `datasets` does not recognize, such as `testA`,
    `split=test` or `holdout`. Use it for a warning, not for a decision."""
    return _HELD_OUT_LIKE.search(name) is not None
