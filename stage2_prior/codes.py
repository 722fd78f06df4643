"""The code cache: what stage one hands to stage two.

`manifest.json` beside memory-mapped arrays, `SPLIT.codes.npy` (n, h, w) uint16 or int32 and `SPLIT.labels.npy` (n,).
"""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from core.config import Count, Section, Size, parse_config
from core.errors import InputError

__all__ = ["CodeCache", "CodeSplit", "Manifest", "SplitFiles", "TokenizerReference", "code_dtype"]


class TokenizerReference(Section):
    """The tokenizer that the codes are of."""

    hash: str
    """Its content hash: over the form of the images, the encoder and the codebook."""
    path: str
    """Where it was when the codes were made."""


class SplitFiles(Section):
    """One split's arrays, by file name."""

    rows: Size
    codes: str
    labels: str | None


class Manifest(Section):
    """`manifest.json`: what the codes are and what is known of their distribution."""

    format_version: Literal[1] = 1
    tokenizer: TokenizerReference
    source: str
    image_size: tuple[Count, Count]
    channels: Count
    grid: tuple[Count, Count]
    """Cells (h, w)."""
    codebook_size: Count
    class_names: list[str] | None
    validation_split: str
    splits: dict[str, SplitFiles]
    codes_used: Count
    """Codes that occur in the training split."""
    entropy_nats_per_code: float
    """Of the training split's code frequencies; log(codebook_size) where all are used alike."""
    unigram_nats_per_code: dict[str, float]
    """What predicting each code by its training frequency costs on each split (add-one smoothing): the baseline that a
    prior has to beat."""


def code_dtype(codebook_size: int) -> type[np.integer]:
    """The smallest type on disk that holds the codes."""
    return np.uint16 if codebook_size <= 2**16 else np.int32


class CodeSplit:
    """The code grids of one split, read from disk by row."""

    def __init__(self, codes: np.ndarray, labels: np.ndarray | None) -> None:
        self.codes, self.labels = codes, labels

    def __len__(self) -> int:
        return len(self.codes)

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes (B, h, w) int64 and labels (B,) int64 or None."""
        index = rows.numpy()
        codes = torch.from_numpy(self.codes[index].astype(np.int64))
        return codes, None if self.labels is None else torch.from_numpy(self.labels[index])


class CodeCache:
    """Opens a folder that `twostage encode` wrote.

    Raises:
        InputError: no such folder, no code cache, or one that was cut short (named file, expected and found rows).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / "manifest.json"
        if not file.is_file():
            what = "no code cache (manifest.json is missing)" if self.path.exists() else "no such folder"
            raise InputError(f"codes {self.path}: {what}; make one with: twostage encode runs/TOKENIZER --out {path}")
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(f"codes {file}: not valid JSON; encode the images again") from None
        self.manifest = parse_config(Manifest, document, f"codes {file}")
        self.splits = {name: self._open(files) for name, files in self.manifest.splits.items()}

    @property
    def validation(self) -> CodeSplit:
        return self.splits[self.manifest.validation_split]

    def _open(self, files: SplitFiles) -> CodeSplit:
        expected = (files.rows, *self.manifest.grid)
        codes = self._map(files.codes, expected)
        # Labels are small and wanted as int64; the codes stay on disk.
        labels = None if files.labels is None else np.array(self._map(files.labels, expected[:1]), dtype=np.int64)
        return CodeSplit(codes, labels)

    def _map(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        file = self.path / Path(name).name
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:  # an empty file is an EOFError
            raise InputError(
                f"codes {file}: missing or cut short ({error}), expected the shape {shape}; encode the images again"
            ) from None
        if array.shape != shape:
            raise InputError(f"codes {file}: expected the shape {shape}, found {array.shape}; encode the images again")
        return array
