"""The images to encode: each one plain and, if requested, also cropped and mirrored."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from stage2_prior.codes import Augmentation
from twostage.core.data.dataset import load_larger
from twostage.core.data.image_data import ImageData, ImageSplit
from twostage.core.training.random import seed_for

__all__ = ["ImageVariants", "image_variants"]


class ImageVariants:
    """The images of one split with their variants; variant v of image i is row v * images + i.

    Args:
        images: the plain images.
        larger: the same images at a larger size, from which crops are cut; None without crops.
        augmentation: the variants.
    """

    def __init__(self, images: ImageSplit, larger: ImageSplit | None, augmentation: Augmentation) -> None:
        assert larger is None or len(larger) == len(images)
        self.images, self.larger, self.augmentation = images, larger, augmentation

    @property
    def rows(self) -> int:
        """Images times variants."""
        return len(self.images) * self.augmentation.variants

    def labels(self) -> np.ndarray | None:
        """(rows,) int32, or None."""
        labels = self.images.labels
        return None if labels is None else np.tile(labels.numpy().astype(np.int32), self.augmentation.variants)

    def read(self, images: Tensor) -> Iterator[Tensor]:
        """One variant of these images after another: (B, C, H, W) uint8 each.

        An image is decoded only once for each size, however many variants there are.
        """
        larger = None if self.larger is None else self.larger.read(images)
        return self._variants(images, self.images.read(images), larger)

    def read_maps(self, images: Tensor) -> Iterator[Tensor] | None:
        """The maps of the same variants, cropped and mirrored as they are: (B, H, W) or (B, C, H, W) uint8 each; None
        without maps."""
        plain = self.images.read_maps(images)
        larger = None if self.larger is None else self.larger.read_maps(images)
        return None if plain is None else self._variants(images, plain, larger)

    def _variants(self, images: Tensor, plain: Tensor, larger: Tensor | None) -> Iterator[Tensor]:
        for mirrored in (False, True)[: 1 + self.augmentation.horizontal_flip]:
            yield plain.flip(-1) if mirrored else plain
            for crop in range(self.augmentation.crops):
                assert larger is not None
                cropped = _windows(larger, images, crop, self.images.config.size)
                yield cropped.flip(-1) if mirrored else cropped


def _windows(larger: Tensor, images: Tensor, crop: int, size: tuple[int, int]) -> Tensor:
    """A window (B, ..., *size) of each of ``larger`` (B, ..., H, W); the numbers of image and crop alone determine its
    position."""
    windows = larger.unfold(-2, size[0], 1).unfold(-2, size[1], 1)  # a view (B, ..., places down, places across, *size)
    seeds = torch.tensor([seed_for("crop", image, crop) for image in images.tolist()])
    down, across = windows.shape[-4:-2]
    places = zip(windows, (seeds % down).tolist(), (seeds // down % across).tolist(), strict=True)
    return torch.stack([window[..., top, left, :, :] for window, top, left in places])


def image_variants(data: ImageData, augmentation: Augmentation) -> dict[str, ImageVariants]:
    """All splits of ``data``. Only the training split has more than plain images."""
    larger = None
    if augmentation.crops:
        height, width = ((11 * side + 9) // 10 for side in data.splits["train"].config.size)  # 1.1 times, rounded up
        larger = load_larger(data, (height, width))
    plain = {name: ImageVariants(images, None, Augmentation()) for name, images in data.splits.items()}
    return plain | {"train": ImageVariants(data.splits["train"], larger, augmentation)}
