"""The code cache: what stage one hands to stage two.

`manifest.json` beside memory-mapped arrays, `SPLIT.codes.npy` (n, h, w) uint16 or int32 and `SPLIT.labels.npy` (n,).
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from twostage.core.config.sections import Count, Flag, Section, Size, parse_config
from twostage.core.data.spread import names_without_images
from twostage.core.errors import InputError
from twostage.core.files import read_json
from twostage.core.runs.model_folder import check_format
from twostage.core.runs.places import Contents, Record

__all__ = [
    "Augmentation",
    "CodeCache",
    "CodeSplit",
    "Manifest",
    "SplitFiles",
    "TokenizerReference",
    "code_dtype",
    "code_statistics",
]

FORMAT_VERSION = 1
_ROWS_AT_ONCE = 4096  # where a whole array is gone through


class TokenizerReference(Section):
    """The tokenizer that the codes are of."""

    hash: str
    """Its content hash: over the form of the images, the encoder and the codebook."""
    path: str
    """Where it was when the codes were made."""


class Augmentation(Section):
    """The variants of each training image that have rows of their own; other splits have the plain images alone."""

    horizontal_flip: Flag = False
    """Every other variant is there mirrored, too."""
    crops: Size = 0
    """Windows of the image read at 1.1 times the size."""

    @property
    def variants(self) -> int:
        """Rows of each image: variant v of image i is row v * images + i; 0 is the plain one, 1 ... crops the crops,
        and the mirrored ones follow in the same order."""
        return (1 + self.crops) * (1 + self.horizontal_flip)


class SplitFiles(Section):
    """One split's arrays, by file name."""

    rows: Size
    codes: str
    labels: str | None


class Manifest(Section):
    """`manifest.json`: what the codes are and what is known of their distribution."""

    format_version: Count = FORMAT_VERSION
    tokenizer: TokenizerReference
    source: str
    """The `data.source` of the images: absolute, or relative to one of the folders above this one."""
    images: Record | None = None
    """Where the images were, and what; None: not known, of codes made by earlier versions."""
    image_size: tuple[Count, Count]
    channels: Count
    grid: tuple[Count, Count]
    """Cells (h, w)."""
    codebook_size: Count
    class_names: list[str] | None
    validation_split: str
    augmentation: Augmentation = Augmentation()
    splits: dict[str, SplitFiles]
    codes_used: Count
    """Codes that occur in the training split."""
    entropy_nats_per_code: float
    """Of the training split's code frequencies; log(codebook_size) where all are used alike."""
    unigram_nats_per_code: dict[str, float]
    """What predicting each code by its training frequency costs on each split (add-one smoothing): the baseline that a
    prior has to beat."""

    @model_validator(mode="after")
    def _has_what_is_trained_and_validated_on(self) -> "Manifest":
        for field, found in {"splits": self.splits, "unigram_nats_per_code": self.unigram_nats_per_code}.items():
            if not {"train", self.validation_split} <= found.keys():
                raise ValueError(
                    f"{field}: expected 'train' and the validation_split {self.validation_split!r}, got "
                    f"{list(found)}; encode the images again"
                )
        return self


def code_dtype(codebook_size: int) -> type[np.integer]:
    """The smallest type on disk that holds the codes."""
    return np.uint16 if codebook_size <= 2**16 else np.int32


def code_statistics(splits: dict[str, np.ndarray], codebook_size: int) -> dict[str, Any]:
    """The fields of :class:`Manifest` that follow from the codes of all splits, (n, h, w) each, `train` among them."""
    counts = {name: _code_counts(codes, codebook_size) for name, codes in splits.items()}
    train = counts["train"]
    shares = train[train > 0] / train.sum()
    log_smoothed = np.log((train + 1) / (train + 1).sum())
    return {
        "codes_used": len(shares),
        "entropy_nats_per_code": float((shares * np.log(1 / shares)).sum()),
        "unigram_nats_per_code": {name: float(-(n @ log_smoothed) / n.sum()) for name, n in counts.items()},
    }


def _code_counts(codes: np.ndarray, codebook_size: int) -> np.ndarray:
    """How often each code occurs, (codebook_size,) float64."""
    counts = np.zeros(codebook_size)
    for start in range(0, len(codes), _ROWS_AT_ONCE):
        counts += np.bincount(codes[start : start + _ROWS_AT_ONCE].ravel(), minlength=codebook_size)
    return counts


class CodeSplit:
    """The code grids of one split, read from disk by row."""

    def __init__(self, codes: np.ndarray, labels: np.ndarray | None) -> None:
        self.codes, self.labels = codes, labels

    def __len__(self) -> int:
        return len(self.codes)

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes (B, h, w) int64 and labels (B,) int64 or None."""
        index = rows.numpy()
        codes = torch.from_numpy(np.take(self.codes, index, axis=0)).long()  # the rows alone leave the disk
        return codes, None if self.labels is None else torch.from_numpy(self.labels[index])


class CodeCache:
    """Opens a folder that `twostage encode` wrote.

    Raises:
        InputError: no such folder, no code cache, or an array that is missing, cut short (named file, expected and
            found rows) or of another shape or type than the manifest says.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / "manifest.json"
        if not file.is_file():
            what = "no code cache (manifest.json is missing)" if self.path.exists() else "no such folder"
            raise InputError(f"codes {self.path}: {what}; make one with: twostage encode runs/TOKENIZER --out {path}")
        document = read_json(file, "encode the images again")
        check_format(document.get("format_version"), FORMAT_VERSION, f"codes {self.path}")
        self.manifest = parse_config(Manifest, document, f"codes {file}")
        self.splits = {name: self._open(files) for name, files in self.manifest.splits.items()}

    @property
    def validation(self) -> CodeSplit:
        return self.splits[self.manifest.validation_split]

    @property
    def untrained_classes(self) -> list[str]:
        """The class names that no row of the training split has."""
        return names_without_images(self.splits["train"].labels, self.manifest.class_names)

    def contents(self) -> Contents:
        """What these codes are, wherever they are and however their images were named."""
        manifest, digest = self.manifest, hashlib.sha256()
        for split in self.splits.values():
            for start in range(0, len(split), _ROWS_AT_ONCE):
                digest.update(np.ascontiguousarray(split.codes[start : start + _ROWS_AT_ONCE]).data)
            if split.labels is not None:
                digest.update(split.labels.data)
        facts = {
            "tokenizer": manifest.tokenizer.hash,
            "grid": list(manifest.grid),
            "codebook_size": manifest.codebook_size,
            "augmentation": manifest.augmentation.model_dump(mode="json"),
            "rows": {name: files.rows for name, files in manifest.splits.items()},
            "classes": {str(label): name for label, name in enumerate(manifest.class_names or [])},
            "sha256": digest.hexdigest(),
        }
        return Contents("codes", self.path.absolute(), facts)

    def check_codes(self) -> None:
        """Reads all codes and labels once; labels count only where the manifest names classes.

        Raises:
            InputError: a code that is not below the codebook's size, or a label that is no class (named file and row).
        """
        size, classes = self.manifest.codebook_size, len(self.manifest.class_names or [])
        for name, split in self.splits.items():
            files = self.manifest.splits[name]
            self._check_range(files.codes, split.codes, "code", size, f"codebook_size {size}")
            if classes and split.labels is not None and files.labels is not None:
                self._check_range(files.labels, split.labels, "label", classes, f"{classes} class_names")

    def _check_range(self, name: str, values: np.ndarray, what: str, limit: int, why: str) -> None:
        for start in range(0, len(values), _ROWS_AT_ONCE):
            part = values[start : start + _ROWS_AT_ONCE]
            if part.max() >= limit or part.min() < 0:
                wrong = np.argwhere((part >= limit) | (part < 0))[0]  # its row, and its cell in a grid
                raise InputError(
                    f"codes {self._file(name)}: row {start + wrong[0]} holds the {what} {part[tuple(wrong)]}, expected "
                    f"{what}s from 0 to {limit - 1} ({why} in manifest.json); {self._remedy}"
                )

    @property
    def _remedy(self) -> str:
        return f"remove {self.path} and encode the images again"

    def _file(self, name: str) -> Path:
        return self.path / Path(name).name  # never outside the folder, whatever the manifest says

    def _open(self, files: SplitFiles) -> CodeSplit:
        shape = (files.rows, *self.manifest.grid)
        codes = self._map(files.codes, shape)
        # Labels are small and wanted as int64; the codes stay on disk.
        labels = None if files.labels is None else np.array(self._map(files.labels, shape[:1]), dtype=np.int64)
        return CodeSplit(codes, labels)

    def _map(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        file = self._file(name)
        if not file.is_file():
            raise InputError(f"codes {file}: missing, expected an array of the shape {shape}; {self._remedy}")
        size = file.stat().st_size
        with file.open("rb") as opened:
            try:
                first = np.lib.format.read_magic(opened) == (1, 0)
                read_header = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
                found, _, dtype = read_header(opened)
                header = opened.tell()
            except ValueError:  # not even a whole header
                found, dtype, header = shape, np.dtype(np.uint16), size
        if not np.issubdtype(dtype, np.integer):
            raise InputError(f"codes {file}: expected integers, found {dtype}; {self._remedy}")
        if found != shape:
            raise InputError(f"codes {file}: expected the shape {shape}, found {found}; {self._remedy}")
        rows = (size - header) // (dtype.itemsize * math.prod(shape[1:]))
        if rows < shape[0]:
            raise InputError(f"codes {file}: cut short, expected {shape[0]} rows, found {rows}; {self._remedy}")
        return np.load(file, mmap_mode="r", allow_pickle=False)
