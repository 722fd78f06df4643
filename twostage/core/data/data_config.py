"""`data`: which images to use, and in what form."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from twostage.core.cache_files import cache_folder
from twostage.core.config.sections import (
    CHANGES_NO_NUMBER,
    MAY_CHANGE,
    Count,
    Flag,
    Number,
    PathName,
    Section,
    Size,
    Width,
)
from twostage.core.data.decoded_cache import DecodedCache
from twostage.core.data.maps import MapKind
from twostage.core.data.records import AUTO, Columns
from twostage.core.data.vectors import VECTOR_FILE
from twostage.core.files import expand_home

__all__ = ["DataConfig"]

MAX_SIDE = 65_536  # pixels
Share = Annotated[Number, Field(gt=0.0, lt=1.0)]


class DataConfig(Section):
    """The images to use, and their size, channels and value range."""

    source: PathName = "shapes"
    """`shapes`, `captioned_shapes`, a folder of images, a table (parquet, arrow), archive (tar, zip) or file of arrays
    (npy, npz) or a folder of these, a name under $TWOSTAGE_DATA, or a Hugging Face dataset `owner/name`."""
    image_size: Count | tuple[Count, Count] = 32
    """Pixels: one number for squares, or [height, width]. Other images are cropped at the centre, then resized."""
    channels: Width = 3
    """1 grey, 3 RGB, 4 RGBA; any other number for arrays and for TIFF files with a page for each channel."""
    bits: Annotated[Literal[8, 16] | None, MAY_CHANGE] = None
    """Bits per pixel and channel; null: 16 if the files need them, else 8."""
    shown_channels: Annotated[tuple[Size, ...] | None, CHANGES_NO_NUMBER] = None
    """The channels that sheets show, counted from 0: one as grey, or three as red, green and blue, such as [3, 1, 0];
    null: all of 1, 3 or 4, the first of 2, and the first three of more."""
    label_column: Annotated[str, Field(min_length=1)] | None = AUTO
    """The column of a table with the classes; `auto` looks for `label`, `class` and similar names; null: no classes."""
    caption_column: Annotated[str, Field(min_length=1)] | None = AUTO
    """The column of a table or of a metadata file with the captions: a text, or a list of texts; `auto` looks for
    `caption`, `text`, `prompt` and similar names, and for text files beside the images; null: no captions."""
    on_missing_caption: Literal["error", "skip", "empty"] = "error"
    """Whether images without a caption stop `twostage encode`, are skipped, or have an empty caption."""
    vector_column: Annotated[str, Field(min_length=1)] | None = None
    """The column with a vector for each image: lists of numbers, all of the same length. Or a `.npz` file of
    `twostage embed`."""
    maps: PathName | None = None
    """A map for each image, such as a segmentation: another image column, or a folder of images with the same names."""
    map_kind: MapKind = "labels"
    """`labels`: the grey values or palette indices of maps are classes, and are never blended; `image`: maps are
    ordinary images."""
    map_names: tuple[str, ...] | None = None
    """The names of the classes of maps, from class 0 on, such as [ground, sky, tree]; the page shows them."""
    train_on: Literal["images", "maps"] = "images"
    """`maps`: the maps beside the images are the images of this model, for a tokenizer of maps; those of classes are
    shown in fixed colours."""
    value_range: tuple[Number, Number] | None = None
    """The values in the files that become black and white, such as [0, 4095] for 12 bits stored in 16; null: the range
    of the files' type, which is 0 to 1 for floats."""
    horizontal_flip: Flag = False
    """Mirrors each training image with probability 1/2."""
    random_crop: Share | None = None
    """The smallest share of an image's sides that a tokenizer sees of it in training, such as 0.8: each time a window
    of random size and place. Training images are then kept larger (1/0.8 times as large), so that no window has to be
    enlarged, if the files are large enough. null: whole images."""
    num_images: Count | None = None
    """The maximum number of training images; null: all (20,000 for `shapes` and `captioned_shapes`)."""
    validation_share: Share = 0.05
    """The share of `train` to hold out if the source has neither `val` nor `test`."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Whether unreadable images stop the run before training, or are skipped and counted."""
    in_memory_gb: Number = Field(default=4.0, ge=0.0)
    """Datasets with up to this many gigabytes of pixels are kept decoded in memory. The larger images that
    `random_crop` needs are kept too if they fit beside the plain ones."""
    cache: Annotated[str | None, Field(min_length=1), CHANGES_NO_NUMBER] = AUTO
    """The folder that keeps decoded images for later starts; `auto`: `~/.cache/twostage`; `false` or null: none."""
    cache_gb: Annotated[Number, Field(gt=0.0), CHANGES_NO_NUMBER] = 16.0
    """The most gigabytes of decoded images in that folder; those that were not used for the longest time are removed
    first."""

    @field_validator("image_size", mode="before")
    @classmethod
    def _pixels(cls, value: Any) -> Any:
        sides = list(value) if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
        if not all(type(side) is int and 0 < side <= MAX_SIDE for side in sides):
            raise ValueError(f"expected pixels such as 32, or [height, width], got {value!r}")
        return value

    @field_validator("cache", mode="before")
    @classmethod
    def _no_cache(cls, value: Any) -> Any:
        return None if value is False or value == "false" else value

    @field_validator("value_range")
    @classmethod
    def _range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError(f"expected [black, white] with black below white, such as [0, 4095], got {list(value)}")
        return value

    @model_validator(mode="after")
    def _shows_what_there_is(self) -> "DataConfig":
        shown = self.shown_channels
        if shown is not None and (len(shown) not in (1, 3) or max(shown) >= self.channels):
            raise ValueError(
                f"shown_channels {list(shown)}: expected one or three of the channels 0 to {self.channels - 1} "
                f"(channels={self.channels})"
            )
        return self

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def decoded_cache(self) -> DecodedCache:
        """Where decoded images are kept.

        Raises:
            InputError: the folder that ``cache`` names cannot be written.
        """
        if self.cache in (AUTO, None):
            return DecodedCache(None if self.cache is None else cache_folder(), 1e9 * self.cache_gb)
        return DecodedCache.at(expand_home(self.cache), 1e9 * self.cache_gb)

    @property
    def columns(self) -> Columns:
        """What to read beside the images."""
        vectors = None if self.vector_file else self.vector_column
        return Columns(self.label_column, self.caption_column, vectors, self.maps)

    @property
    def vector_file(self) -> Path | None:
        """The file that ``vector_column`` names, if it is no column."""
        given = self.vector_column
        return Path(given) if given is not None and given.endswith(VECTOR_FILE) else None
