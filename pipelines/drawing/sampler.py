"""The sampler: from classes, prompts and a seed to codes, and from codes to images, batch by batch.

Axes: n images, C channels, H and W pixels, h and w cells of the code grid.
"""

import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from pipelines.drawing.asked import Asked, Cycle, values_of
from pipelines.drawing.batch_size import ROWS, fitting_batch_size
from pipelines.drawing.rebuilt_images import decode_codes, encode_images
from pipelines.saved.saved_model import check_map_tokenizer, check_tokenizer
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.prior import Prior
from stage2_prior.sampling import image_seeds
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.conditions.condition import ConditionedSplit
from twostage.core.conditions.map_condition import MapConditionConfig
from twostage.core.conditions.map_form import MapCodes
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_integers, to_shown
from twostage.core.images.map_colours import maps_as_images
from twostage.core.images.sheets import class_sheet, prompt_sheet

__all__ = ["ImageSampler", "PipelineOutput", "in_shares"]


@dataclass
class PipelineOutput:
    """Generated images."""

    images: Any
    """A list of PIL images ("pil"), (n, C, H, W) uint8 or uint16 ("pt"), or (n, H, W, C) ("np")."""
    codes: Tensor | None
    """(n, h, w) int64; None for a variational autoencoder and for images larger than the model's size."""
    labels: list[int] | None
    """The class of each image, or None for a model without classes."""
    prompts: list[str] | None = None
    """The prompt of each image, or None."""


class ImageSampler:
    """Draws codes from a prior and decodes them; or decodes latents from a variational autoencoder's own prior.

    Args:
        prior: over the codes of ``tokenizer``; None for a variational autoencoder (`gaussian`, `class_gaussian`).
        map_tokenizer: turns maps into codes, for a prior that was trained on such codes.

    Raises:
        InputError: the prior was trained on the codes of other tokenizers (the message shows both hashes), or there
            is none and ``tokenizer`` has no prior of its own.
    """

    def __init__(
        self, tokenizer: Autoencoder, prior: Prior | None = None, map_tokenizer: Autoencoder | None = None
    ) -> None:
        if prior is None and not tokenizer.variational:
            raise InputError(
                f"a tokenizer with the bottleneck {tokenizer.config.model.bottleneck.type!r} makes no images by "
                "itself. Train a prior over its codes (twostage encode, twostage train-prior) and give that"
            )
        if prior:
            check_tokenizer(tokenizer, prior.config)
        self.tokenizer, self.prior = tokenizer.eval(), prior.eval() if prior else None
        self.map_tokenizer = map_tokenizer.eval() if map_tokenizer else None
        if map_tokenizer:
            check_map_tokenizer(map_tokenizer, self.map_config)

    # --- what it draws ----------------------------------------------------------------------------------------------

    @property
    def model(self) -> Prior | Autoencoder:
        """The one that makes new images: the prior, or a variational autoencoder."""
        return self.prior or self.tokenizer

    @property
    def _conditional(self) -> Prior | Autoencoder | None:
        """The model that is conditioned on the class."""
        return self.prior or (self.tokenizer if self.tokenizer.class_conditional else None)

    @property
    def label_names(self) -> list[str] | None:
        """The class of each label, by number; None for a model without classes."""
        return self._conditional.config.class_names if self._conditional else None

    @property
    def class_names(self) -> list[str] | None:
        """The classes that can be asked for: those that had training images. None for a model without classes."""
        if not self._conditional or not self.label_names:
            return None
        return [name for name in self.label_names if name not in self._conditional.config.untrained_classes]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images."""
        return self.tokenizer.config.image_size

    @property
    def channels(self) -> int:
        """1 grey, 3 RGB, 4 RGBA."""
        return self.tokenizer.config.channels

    @property
    def bits(self) -> int:
        """Those of each channel of a pixel: 8 or 16."""
        return self.tokenizer.config.bits

    @property
    def map_channels(self) -> int | None:
        """Those of the maps that new images are conditioned on, if they are images; None for labels, and without
        maps."""
        return self.map_config and self.map_config.channels

    @property
    def map_config(self) -> MapConditionConfig | None:
        """What the maps are that new images are conditioned on; None: they are not."""
        configs = self.model.config.conditions
        return next((config for config in configs if isinstance(config, MapConditionConfig)), None)

    @property
    def draws_alone(self) -> bool:
        """Whether a single image has the codes that it has in a batch, so that it needs no batch of `ROWS`. On a
        GPU, kernels for other batches may differ in their last bits, and `ROWS` images take no longer than one."""
        return self.prior is not None and self.prior.config.model.draws_alone and self.device.type == "cpu"

    @property
    def device(self) -> torch.device:
        """The device of both models."""
        return next(self.tokenizer.parameters()).device

    def to(self, device: str | torch.device) -> Self:
        """Moves all models."""
        for model in filter(None, (self.tokenizer, self.prior, self.map_tokenizer)):
            model.to(device)
        return self

    # --- checks -----------------------------------------------------------------------------------------------------

    def labels_for(self, class_names: list[str] | None) -> list[int] | None:
        """The labels that images cycle through: those of ``class_names``, or all; None for a model without classes.

        Raises:
            InputError: an unknown class name; the message lists the known ones.
        """
        if isinstance(class_names, str):
            raise InputError(f"class_names {class_names!r}: expected a list of names, such as [{class_names!r}]")
        known, every = self.class_names, self.label_names
        if not known or not every:
            if class_names:
                raise InputError(
                    f"class name {class_names[0]!r}: this model was trained without classes. Omit the class name"
                )
            return None
        for name in class_names or []:
            if name in every and name not in known:
                raise InputError(
                    f"class name {name!r}: the model has not learned this class because it had no training images. "
                    f"Expected one of: {', '.join(known)}"
                )
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                raise InputError(
                    f"class name {name!r}: not a class of this model{hint} Its classes: {', '.join(known)}"
                )
        return [every.index(name) for name in class_names or known]

    def check_labels(self, labels: list[int]) -> None:
        """Refuses labels that this model has not learned.

        Raises:
            InputError: no classes, no labels, a number out of range, or a class without training images.
        """
        names = self.label_names
        if not names:
            raise InputError(f"labels {labels}: this model was trained without classes. Omit labels")
        if not labels or not all(0 <= label < len(names) for label in labels):
            raise InputError(f"labels {labels}: expected numbers from 0 to {len(names) - 1}")
        self.labels_for([names[label] for label in labels])

    def check_sampling(self, sampling: SamplingConfig) -> None:
        """Refuses settings that this model cannot sample with.

        Raises:
            InputError: see :meth:`Prior.check_sampling`; for a variational autoencoder, anything but the temperature.
        """
        if self.prior:
            return self.prior.check_sampling(sampling)
        for name, value in sampling.model_dump(exclude_defaults=True).items():
            if name != "temperature":
                raise InputError(
                    f"{name} {value}: only applies to priors over codes. This is a variational autoencoder, which "
                    f"only takes temperature (the standard deviation of its noise). Omit {name}"
                )
        return None

    def cycle(self, asked: Asked) -> Cycle:
        """What ``asked`` means for this model.

        Raises:
            InputError: a class, prompt, map or vector that it cannot draw; the message says why.
        """
        cycle = values_of(self._with_codes(asked), self.model)
        shows_class = asked.class_names is not None or not cycle.values or not self.prior or self.prior.needs("class")
        return replace(cycle, labels=self.labels_for(asked.class_names) if shows_class else None)

    def _with_codes(self, asked: Asked) -> Asked:
        """With the codes of its maps, if the prior was trained on such.

        Raises:
            InputError: a map that the prior cannot have, or no tokenizer of maps.
        """
        config = self.map_config
        if asked.maps is None or config is None or config.codes is None:
            return asked
        read = [config.read_map(value).to(torch.uint8) for value in asked.maps]
        return replace(asked, maps=list(self._encode_maps(torch.cat(read), config.codes)) if read else [])

    def read_given(self, split: ConditionedSplit, rows: Tensor) -> dict[str, Tensor]:
        """The values of the prior's conditions for some images of a split.

        Raises:
            InputError: the prior sees codes of maps, and there is no tokenizer of maps.
        """
        assert self.prior
        given, maps = self.prior.conditions.read(split, rows), split.read_maps(rows)
        if maps is None or self.map_config is None or self.map_config.codes is None:
            return given
        return given | {"map": self._encode_maps(maps, self.map_config.codes)}

    def _encode_maps(self, maps: Tensor, codes: MapCodes) -> Tensor:
        """Maps (n, H, W) or (n, C, H, W) uint8 -> their codes (n, h, w) int32."""
        if self.map_tokenizer is None:
            raise InputError(
                f"map: this prior sees maps as codes of the tokenizer {codes.hash[:12]}, which was at {codes.path} but "
                "is not there. Move it back, or give it as map_tokenizer of TwoStagePipeline"
            )
        images = maps_as_images(maps, self.map_tokenizer.config.channels)
        return encode_images(self.map_tokenizer, images).cpu().int()

    def sheet(self, images: Tensor) -> Image.Image:
        """A contact sheet of images (n, C, H, W) of a request that asks for nothing in particular: below each is
        its prompt or its class."""
        images = self.to_shown(images)
        if prompts := self.model.example_prompts():
            return prompt_sheet(images, prompts)
        return class_sheet(images, self.class_names, self.labels_for(None))

    def to_shown(self, images: Tensor) -> Tensor:
        """Images (..., C, H, W) in the form in which sheets show them, see :func:`to_shown`."""
        return to_shown(images, self.tokenizer.config.shown_channels)

    # --- drawing ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def draw(
        self,
        numbers: range,
        cycle: Cycle,
        sampling: SamplingConfig,
        seed: int,
        batch_size: int | None = None,
        on_progress: Callable[[float], object] = lambda images: None,
        known: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Draws the images ``numbers`` of a seed in batches: (n, C, H, W) uint8 or uint16, and codes (n, h, w) or None.

        Args:
            cycle: what the images show.
            batch_size: None: as many images as fit in the free memory.
            on_progress: called with the number of images (or fractions of one) drawn since the last call.
            known: (len(numbers), h, w): codes to keep, and -1 where one is to be drawn, in the same cells for all
                images; None: all are drawn.
        """
        batch_size = batch_size or fitting_batch_size(self.prior, sampling, self.device)
        for start in range(numbers.start, numbers.stop, batch_size):
            count = min(batch_size, numbers.stop - start)
            padded = 1 if count == 1 and self.draws_alone else -(-count // ROWS) * ROWS
            drawn = range(start, start + padded)
            given = cycle.given(drawn)
            seeds = image_seeds(seed, start, padded)
            if self.prior:
                to_draw = math.prod(self.prior.config.grid) if known is None else int((known[0] < 0).sum())
                images_per_code = count / padded / to_draw
                rows = torch.tensor(drawn).clamp(max=numbers.stop - 1) - numbers.start
                kept = None if known is None else known[rows]
                codes = self.prior.sample(
                    given, sampling, seeds, kept, lambda n, each=images_per_code: on_progress(n * each),
                    cycle.against(drawn),
                )  # fmt: skip
                yield self.decode(codes[:count]), codes[:count].cpu()
            else:
                pixels = self._from_latents(next(iter(given.values()), None), sampling.temperature, seeds)[:count]
                on_progress(count)
                yield pixels, None

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (n, h, w) -> images (n, C, H, W) uint8 or uint16, see :func:`decode_codes`."""
        return decode_codes(self.tokenizer, codes)

    def _from_latents(self, given: Tensor | None, temperature: float, seeds: list[int]) -> Tensor:
        """Images (n, C, H, W) uint8 or uint16 on the CPU from the tokenizer's own prior; n is a multiple of `ROWS`."""
        shape = self.tokenizer.latent_shape
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        rows = torch.stack(noise).mul_(temperature).to(self.device).split(ROWS)
        values = [None] * len(rows) if given is None else given.split(ROWS)
        images = [self.tokenizer.sample_from(part, value) for part, value in zip(rows, values, strict=True)]
        return to_integers(torch.cat(images), self.bits).cpu()


def in_shares(on_progress: Callable[[float], object] | None, total: int) -> Callable[[float], None]:
    """A callback for amounts of work; it calls ``on_progress`` with the share of ``total`` that is done, in [0, 1]."""
    done = 0.0

    def advance(more: float) -> None:
        nonlocal done
        done += more
        if on_progress:
            on_progress(min(1.0, done / total))

    return advance
