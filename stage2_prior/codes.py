"""The code cache, through which stage one passes codes to stage two: a folder with `manifest.json` and memory-mapped
arrays.

    SPLIT.codes.npy           (n, h, w) uint16 or int32; (n, 1, N) for the N codes of several scales
    SPLIT.labels.npy          (n,)
    SPLIT.captions.npy        (b,) uint8: all captions, see `StoredCaptions`
    SPLIT.caption_starts.npy  (m + 1,) int64
    SPLIT.vectors.npy         (m, d) float32
    SPLIT.maps.npy            (n, H, W) uint8 classes, (n, C, H, W) uint8 images, or (n, h', w') uint16 or int32: their
                              codes by a tokenizer of their own

Axes: m images, n = m * variants rows, h and w cells, H and W pixels. Row v * m + i is variant v of image i; its caption
and its vector are those of the image.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from stage2_prior.stored_captions import StoredCaptions
from twostage.core.conditions.condition import ConditionSource
from twostage.core.conditions.map_form import MapForm
from twostage.core.config.sections import Count, Flag, Section, Size, parse_config
from twostage.core.data.spread import names_without_images
from twostage.core.errors import InputError
from twostage.core.files import read_json
from twostage.core.runs.contents import Contents, Record
from twostage.core.runs.model_folder import check_format
from twostage.core.scales import describe_grids, num_codes

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
_ROWS_AT_ONCE = 4096  # when a whole array is read


class TokenizerReference(Section):
    """The tokenizer that wrote the codes."""

    hash: str
    """Its content hash: of the image size and channels, the encoder and the codebook."""
    path: str
    """Its folder when it wrote the codes."""


class Augmentation(Section):
    """The variants of each training image that have rows of their own. Other splits contain only the plain images."""

    horizontal_flip: Flag = False
    """Whether each variant also appears mirrored."""
    crops: Size = 0
    """The number of windows of the image at 1.1 times its size."""

    @property
    def variants(self) -> int:
        """Rows for each image. Variant v of image i is row v * images + i: first the plain image, then its crops, then
        the mirrored variants in the same order."""
        return (1 + self.crops) * (1 + self.horizontal_flip)


class SplitFiles(Section):
    """One split's arrays, by file name."""

    rows: Size
    codes: str
    labels: str | None
    captions: str | None = None
    caption_starts: str | None = None
    vectors: str | None = None
    maps: str | None = None


class Manifest(Section):
    """`manifest.json`: what the codes are, and their statistics."""

    format_version: Count = FORMAT_VERSION
    tokenizer: TokenizerReference
    source: str
    """The `data.source` of the images: absolute, or relative to one of the folders above this one."""
    images: Record | None = None
    """The content and location of the images; None for codes of earlier versions."""
    image_size: tuple[Count, Count]
    channels: Count
    grid: tuple[Count, Count]
    """Cells (h, w); (1, N) for codes of several scales."""
    scales: tuple[tuple[Count, Count], ...] = ()
    """The grids (h, w) of codes of several scales, coarse to fine; their N codes make one row. Empty: a single grid."""
    codebook_size: Count
    digits: list[Count] | None = None
    """If each code is a number whose digits say what it is, such as the bits of lookup-free codes: the base of each
    digit, the least significant first. None: the codes are names."""
    class_names: list[str] | None
    vector_length: Count | None = None
    """The numbers in the vector of each image; None: no vectors."""
    maps: MapForm | None = None
    """None: no maps."""
    condition_settings: dict[str, str | list[str] | None] | None = None
    """The `data` settings of captions, vectors and maps; None for codes of earlier versions."""
    validation_split: str
    augmentation: Augmentation = Augmentation()
    splits: dict[str, SplitFiles]
    codes_used: Count
    """The number of different codes in the training split."""
    entropy_nats_per_code: float
    """The entropy of the code frequencies in the training split; log(codebook_size) if all are equally frequent."""
    unigram_nats_per_code: dict[str, float]
    """For each split, the mean -log p of a code by its training frequency (add-one smoothing): the baseline that a
    prior has to beat."""

    @model_validator(mode="after")
    def _is_consistent(self) -> "Manifest":
        for field, found in {"splits": self.splits, "unigram_nats_per_code": self.unigram_nats_per_code}.items():
            if not {"train", self.validation_split} <= found.keys():
                raise ValueError(
                    f"{field}: expected 'train' and the validation_split {self.validation_split!r}, got "
                    f"{list(found)}. Encode the images again"
                )
        if self.digits is not None and math.prod(self.digits) != self.codebook_size:
            raise ValueError(
                f"digits: the product of {self.digits} is {math.prod(self.digits)}, expected the codebook_size "
                f"{self.codebook_size}. Encode the images again"
            )
        return self

    @model_validator(mode="after")
    def _scales_fill_the_grid(self) -> "Manifest":
        if self.scales and self.grid != (1, num_codes(self.scales)):
            raise ValueError(
                f"grid {self.grid}: the scales {describe_grids((), self.scales)} have {num_codes(self.scales)} codes, "
                f"expected the grid (1, {num_codes(self.scales)}). Encode the images again"
            )
        return self

    @model_serializer(mode="wrap")
    def _readable_by_earlier_versions(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """They do not know `scales` and `digits`, so these are written only if there are any."""
        return {key: value for key, value in handler(self).items() if key not in ("scales", "digits") or value}

    @property
    def has_captions(self) -> bool:
        """Whether every row has captions."""
        return all(files.captions is not None for files in self.splits.values())

    @property
    def map_classes(self) -> int | None:
        """One more than the highest class in the maps of the training split; None without label maps."""
        return None if self.maps is None or not self.maps.classes else max(self.maps.classes) + 1


def code_dtype(codebook_size: int) -> type[np.integer]:
    """The type of codes on disk: the smaller one that can hold them."""
    return np.uint16 if codebook_size <= 2**16 else np.int32


def code_statistics(splits: dict[str, np.ndarray], codebook_size: int) -> dict[str, Any]:
    """The statistics in :class:`Manifest`, from the codes (n, h, w) of each split."""
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
    """The number of times that each code occurs, (codebook_size,) float64."""
    counts = np.zeros(codebook_size)
    for start in range(0, len(codes), _ROWS_AT_ONCE):
        counts += np.bincount(codes[start : start + _ROWS_AT_ONCE].ravel(), minlength=codebook_size)
    return counts


class CodeSplit:
    """The code grids of one split. Rows are read from disk when they are needed."""

    def __init__(
        self,
        codes: np.ndarray,
        labels: np.ndarray | None,
        *,
        captions: StoredCaptions | None = None,
        vectors: np.ndarray | None = None,
        maps: np.ndarray | None = None,
    ) -> None:
        self.codes, self.labels = codes, labels
        self.captions, self.vectors, self.maps = captions, vectors, maps

    def __len__(self) -> int:
        return len(self.codes)

    def read(self, rows: Tensor) -> Tensor:
        """Codes (B, h, w) int64."""
        return torch.from_numpy(np.take(self.codes, rows.numpy(), axis=0)).long()  # reads only these rows

    def read_labels(self, rows: Tensor) -> Tensor | None:
        """Labels (B,) int64, or None."""
        return None if self.labels is None else torch.from_numpy(self.labels[rows.numpy()])

    def read_captions(self, rows: Tensor) -> list[tuple[str, ...]] | None:
        """One or more captions for each of B rows; None without captions."""
        return None if self.captions is None else self.captions.read((rows % len(self.captions)).tolist())

    def read_vectors(self, rows: Tensor) -> Tensor | None:
        """(B, d) float32, or None."""
        if self.vectors is None:
            return None
        return torch.from_numpy(np.take(self.vectors, rows.numpy() % len(self.vectors), axis=0))

    def read_maps(self, rows: Tensor) -> Tensor | None:
        """(B, H, W) uint8 classes, (B, C, H, W) uint8 images, or their codes (B, h', w'); None without maps."""
        return None if self.maps is None else torch.from_numpy(np.take(self.maps, rows.numpy(), axis=0))


class CodeCache:
    """A folder that `twostage encode` wrote.

    Raises:
        InputError: there is no such folder, it is not a code cache, or an array is missing, truncated, or not of the
            shape and type in the manifest.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / "manifest.json"
        if not file.is_file():
            what = "not a code cache (manifest.json is missing)" if self.path.exists() else "no such folder"
            raise InputError(f"codes {self.path}: {what}. Create it with: twostage encode runs/TOKENIZER --out {path}")
        document = read_json(file, "encode the images again")
        check_format(document.get("format_version"), FORMAT_VERSION, f"codes {self.path}")
        self.manifest = parse_config(Manifest, document, f"codes {file}")
        self.splits = {name: self._open(name, files) for name, files in self.manifest.splits.items()}

    @property
    def validation(self) -> CodeSplit:
        return self.splits[self.manifest.validation_split]

    @property
    def untrained_classes(self) -> list[str]:
        """The classes without a row in the training split."""
        return names_without_images(self.splits["train"].labels, self.manifest.class_names)

    def condition_source(self) -> ConditionSource:
        """What conditions learn from."""
        manifest, count = self.manifest, len(self.splits["train"])
        return ConditionSource(
            f"codes {self.path}", self.splits, self.validation, count // manifest.augmentation.variants,
            manifest.image_size, manifest.class_names, manifest.maps,
            manifest.maps.names if manifest.maps else (),
        )  # fmt: skip

    def contents(self) -> Contents:
        """The identity of these codes, independent of their folder and of file names."""
        manifest, digest = self.manifest, hashlib.sha256()
        for split in self.splits.values():
            for start in range(0, len(split), _ROWS_AT_ONCE):
                digest.update(np.ascontiguousarray(split.codes[start : start + _ROWS_AT_ONCE]).data)
            if split.labels is not None:
                digest.update(split.labels.data)
            captions = [split.captions.text, split.captions.starts] if split.captions else []
            for array in [a for a in (*captions, split.vectors, split.maps) if a is not None]:
                for start in range(0, len(array), _ROWS_AT_ONCE):
                    digest.update(np.ascontiguousarray(array[start : start + _ROWS_AT_ONCE]).data)
        facts = {
            "tokenizer": manifest.tokenizer.hash,
            "grid": list(manifest.grid),
            **({"scales": [list(grid) for grid in manifest.scales]} if manifest.scales else {}),
            "codebook_size": manifest.codebook_size,
            "augmentation": manifest.augmentation.model_dump(mode="json"),
            "rows": {name: files.rows for name, files in manifest.splits.items()},
            "classes": {str(label): name for label, name in enumerate(manifest.class_names or [])},
            "sha256": digest.hexdigest(),
        }
        if manifest.maps and manifest.maps.codes:
            facts["map_tokenizer"] = manifest.maps.codes.hash
        return Contents("codes", self.path.absolute(), facts)

    def check_codes(self) -> None:
        """Reads all codes once, all captions and vectors, and all labels if the manifest names classes.

        Raises:
            InputError: a code is outside the codebook, a label is not a class, captions are damaged, or a vector is not
                finite (the message names file and row).
        """
        size, classes = self.manifest.codebook_size, len(self.manifest.class_names or [])
        map_size = self.manifest.maps.codes.codebook_size if self.manifest.maps and self.manifest.maps.codes else 0
        for name, split in self.splits.items():
            files = self.manifest.splits[name]
            self._check_range(files.codes, split.codes, "code", size, f"codebook_size {size}")
            if classes and split.labels is not None and files.labels is not None:
                self._check_range(files.labels, split.labels, "label", classes, f"{classes} class_names")
            if map_size and split.maps is not None and files.maps is not None:
                self._check_range(files.maps, split.maps, "code", map_size, f"maps.codes.codebook_size {map_size}")
            if split.captions is not None and (row := split.captions.first_bad()) is not None:
                raise InputError(
                    f"codes {self._file(files.captions or '')}: the captions of row {row} are damaged, expected UTF-8 "
                    f"between the offsets in {files.caption_starts}. {self._remedy}"
                )
            vectors = [] if split.vectors is None else split.vectors
            for start in range(0, len(vectors), _ROWS_AT_ONCE):
                finite = np.isfinite(vectors[start : start + _ROWS_AT_ONCE]).all(axis=1)
                if not finite.all():
                    raise InputError(
                        f"codes {self._file(files.vectors or '')}: row {start + int(finite.argmin())} contains NaN or "
                        f"infinity, expected finite numbers. {self._remedy}"
                    )

    def _check_range(self, name: str, values: np.ndarray, what: str, limit: int, why: str) -> None:
        for start in range(0, len(values), _ROWS_AT_ONCE):
            part = values[start : start + _ROWS_AT_ONCE]
            if part.max() >= limit or part.min() < 0:
                wrong = np.argwhere((part >= limit) | (part < 0))[0]  # its row, and its cell in a grid
                raise InputError(
                    f"codes {self._file(name)}: row {start + wrong[0]} contains the {what} {part[tuple(wrong)]}, "
                    f"expected {what}s from 0 to {limit - 1} ({why} in manifest.json). {self._remedy}"
                )

    @property
    def _remedy(self) -> str:
        return f"Remove {self.path} and encode the images again"

    def _file(self, name: str) -> Path:
        return self.path / Path(name).name  # always inside the folder, even if the manifest is malicious

    def _open(self, name: str, files: SplitFiles) -> CodeSplit:
        manifest, shape = self.manifest, (files.rows, *self.manifest.grid)
        images = files.rows // (manifest.augmentation.variants if name == "train" else 1)
        codes = self._map(files.codes, shape)
        # Labels are small and needed as int64; the codes stay on disk.
        labels = None if files.labels is None else np.array(self._map(files.labels, shape[:1]), dtype=np.int64)
        captions = vectors = maps = None
        if files.captions is not None and files.caption_starts is not None:
            starts = self._map(files.caption_starts, (images + 1,))
            captions = StoredCaptions(self._map(files.captions, (int(starts[-1]),)), starts)
        if files.vectors is not None and manifest.vector_length is not None:
            vectors = self._map(files.vectors, (images, manifest.vector_length), np.floating)
        if files.maps is not None and manifest.maps is not None:
            channels = () if manifest.maps.channels is None else (manifest.maps.channels,)
            form = manifest.maps.codes.grid if manifest.maps.codes else (*channels, *manifest.image_size)
            maps = self._map(files.maps, (files.rows, *form))
        return CodeSplit(codes, labels, captions=captions, vectors=vectors, maps=maps)

    def _map(self, name: str, shape: tuple[int, ...], kind: type[np.number] = np.integer) -> np.ndarray:
        file = self._file(name)
        if not file.is_file():
            raise InputError(f"codes {file}: missing, expected an array of the shape {shape}. {self._remedy}")
        size = file.stat().st_size
        with file.open("rb") as opened:
            try:
                first = np.lib.format.read_magic(opened) == (1, 0)
                read_header = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
                found, _, dtype = read_header(opened)
                header = opened.tell()
            except ValueError:  # the header itself is truncated
                found, dtype, header = shape, np.dtype(np.uint16 if kind is np.integer else np.float32), size
        if not np.issubdtype(dtype, kind):
            numbers = "integers" if kind is np.integer else "floats"
            raise InputError(f"codes {file}: expected {numbers}, found {dtype}. {self._remedy}")
        if found != shape:
            raise InputError(f"codes {file}: expected the shape {shape}, found {found}. {self._remedy}")
        rows = (size - header) // (dtype.itemsize * math.prod(shape[1:]))
        if rows < shape[0]:
            raise InputError(f"codes {file}: truncated, expected {shape[0]} rows, found {rows}. {self._remedy}")
        return np.load(file, mmap_mode="r", allow_pickle=False)
