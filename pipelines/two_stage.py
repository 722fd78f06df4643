"""`TwoStagePipeline`: a tokenizer and its prior as one object that makes and edits images. For inference only.

pipeline = TwoStagePipeline.from_pretrained("my_pipeline")
pipeline(num_images=8, class_names=["star"], seed=0).images[0].save("star.png")
"""

import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from core.config import parse_config
from core.errors import InputError
from core.images import to_pil, to_uint8
from core.pictures import contact_sheet
from pipelines.batch_size import ROWS, fitting_batch_size
from pipelines.evaluation_document import model_kind
from pipelines.pipeline_folder import (
    find_pipeline_folder,
    is_pipeline_folder,
    read_pipeline_folder,
    write_pipeline_folder,
)
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.prior import Prior
from stage2_prior.sampling import SamplingConfig, image_seeds

__all__ = ["PipelineOutput", "TwoStagePipeline", "class_sheet", "load_pipeline", "load_tokenizer"]


@dataclass
class PipelineOutput:
    """What was generated."""

    images: Any
    """A list of PIL images ("pil"), (n, C, H, W) uint8 ("pt"), or (n, H, W, C) uint8 ("np")."""
    codes: Tensor | None
    """(n, h, w) int64; None for a variational autoencoder, which has none."""
    labels: list[int] | None
    """Each image's class, or None for a model without classes."""


class TwoStagePipeline:
    """Draws codes from the prior and decodes them; or, of a variational autoencoder, latents from its own prior.

    Args:
        prior: over the codes of ``tokenizer``; None for a variational autoencoder (`gaussian`, `class_gaussian`).

    Raises:
        InputError: the prior was trained on the codes of another tokenizer (both hashes are shown), or there is none
            and ``tokenizer`` has no prior of its own.
    """

    def __init__(self, tokenizer: Autoencoder, prior: Prior | None = None) -> None:
        if prior is None and not tokenizer.variational:
            raise InputError(
                f"a tokenizer with the bottleneck {tokenizer.config.model.bottleneck.type!r} makes no images by "
                "itself: train a prior over its codes (twostage encode, twostage train-prior) and give that"
            )
        if prior and (found := tokenizer.content_hash()) != (expected := prior.config.tokenizer.hash):
            raise InputError(
                f"this prior was trained on the codes of the tokenizer {expected[:12]} (it was at "
                f"{prior.config.tokenizer.path}), but the tokenizer given is {found[:12]}: their codes mean different "
                "things. Give the tokenizer that the codes were made with, or encode again and train a prior on that"
            )
        self.tokenizer, self.prior = tokenizer.eval(), prior.eval() if prior else None

    @property
    def class_names(self) -> list[str] | None:
        """What images can be asked for; None where there are no classes."""
        if self.prior:
            return self.prior.config.class_names
        return self.tokenizer.config.class_names if self.tokenizer.class_conditional else None

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images."""
        return self.tokenizer.config.image_size

    @property
    def channels(self) -> int:
        """1 grey, 3 RGB, 4 RGBA."""
        return self.tokenizer.config.channels

    @property
    def device(self) -> torch.device:
        """Where both models are."""
        return next(self.tokenizer.parameters()).device

    def to(self, device: str | torch.device) -> "TwoStagePipeline":
        """Moves both models."""
        self.tokenizer.to(device)
        if self.prior:
            self.prior.to(device)
        return self

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "TwoStagePipeline":
        """Reads a pipeline folder (pipeline.json, tokenizer/, prior/), or a hub id `owner/name` of one.

        Raises:
            InputError: no pipeline there, or one that is not whole (what is missing or damaged is named).
        """
        return cls(*read_pipeline_folder(find_pipeline_folder(path)))

    @classmethod
    def from_runs(cls, run: str | Path, tokenizer: str | Path | None = None) -> "TwoStagePipeline":
        """Reads a prior's run folder, and the tokenizer's: by default the one that its codes were made with. Or a
        variational autoencoder's run folder."""
        if model_kind(run) == "tokenizer":
            if tokenizer is not None:
                raise InputError(f"--tokenizer {tokenizer}: {run} is a tokenizer itself; leave it out")
            return cls(Autoencoder.from_pretrained(run))
        return cls.from_prior(Prior.from_pretrained(run), run, tokenizer)

    @classmethod
    def from_prior(cls, prior: Prior, path: str | Path, tokenizer: str | Path | None = None) -> "TwoStagePipeline":
        """The same of a prior that was read from ``path`` already.

        Raises:
            InputError: the tokenizer is gone, or another one is there.
        """
        where = tokenizer or prior.config.tokenizer.path
        if tokenizer is None and not Path(where).exists():
            raise InputError(f"{path}: its tokenizer was at {where}, which is gone; give --tokenizer runs/TOKENIZER")
        return cls(Autoencoder.from_pretrained(where), prior)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes a pipeline folder: all that generation needs, without the runs."""
        write_pipeline_folder(Path(path), self.tokenizer, self.prior)

    def labels_for(self, class_names: list[str] | None) -> list[int] | None:
        """The classes that images take in turn: those named, or all; None for a prior without classes.

        Raises:
            InputError: a name that is not there; the valid ones are listed.
        """
        known = self.class_names
        if not known:
            if class_names:
                raise InputError(f"class name {class_names[0]!r}: this model was trained without classes")
            return None
        for name in class_names or []:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise InputError(f"class name {name!r}: not a class of this model{hint} It knows: {', '.join(known)}")
        return [known.index(name) for name in class_names or known]

    def check_sampling(self, sampling: SamplingConfig) -> None:
        """Refuses settings that this pipeline cannot sample with.

        Raises:
            InputError: those of :meth:`Prior.check_sampling`; of a variational autoencoder all but the temperature.
        """
        if self.prior:
            return self.prior.check_sampling(sampling)
        for name, value in sampling.model_dump(exclude_defaults=True).items():
            if name != "temperature":
                raise InputError(
                    f"{name} {value}: is of priors over codes, this is a variational autoencoder, which takes "
                    "temperature alone (the standard deviation of its noise); leave it out"
                )
        return None

    def __call__(
        self,
        num_images: int = 16,
        class_names: list[str] | None = None,
        labels: list[int] | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        output_type: Literal["pil", "pt", "np"] = "pil",
        callback: Callable[[float], object] | None = None,
        **sampling: Any,
    ) -> PipelineOutput:
        """Generates images. Image i depends on its class, the sampling settings, ``seed`` and i alone.

        Args:
            class_names: image i is of the class ``i % len(class_names)`` of these; None: of all classes in turn.
            labels: the same by number; not beside ``class_names``.
            batch_size: images worked on at a time, which changes memory and speed, no image; None: what fits the
                memory that is free.
            callback: told now and then what share of the work is done, in [0, 1].
            sampling: `temperature`, `top_k`, `top_p`, `guidance_scale`, `num_steps` ...: :class:`SamplingConfig`.

        Raises:
            InputError: no such class, output type or setting.
        """
        if num_images < 1 or (batch_size is not None and batch_size < 1):
            raise InputError(f"num_images {num_images}, batch_size {batch_size}: expected at least 1 of each")
        if output_type not in ("pil", "pt", "np"):
            raise InputError(f"output_type {output_type!r}: expected 'pil', 'pt' or 'np'")
        if labels is not None and class_names is not None:
            raise InputError("labels, class_names: give one of them, got both")
        if labels is not None:
            self._check_labels(labels)
        settings = parse_config(SamplingConfig, sampling, "the sampling settings")
        self.check_sampling(settings)
        cycle = labels if labels is not None else self.labels_for(class_names)
        done = 0.0

        def advance(images: float) -> None:
            nonlocal done
            done += images
            if callback:
                callback(min(1.0, done / num_images))

        parts = list(self.generate(range(num_images), cycle, settings, seed, batch_size, advance))
        pixels, codes = torch.cat([p for p, _ in parts]), [c for _, c in parts if c is not None]
        chosen = None if cycle is None else [cycle[i % len(cycle)] for i in range(num_images)]
        return PipelineOutput(_as_type(pixels, output_type), torch.cat(codes) if codes else None, chosen)

    def _check_labels(self, labels: list[int]) -> None:
        count = len(self.class_names or [])
        if not count:
            raise InputError(f"labels {labels}: this model was trained without classes; leave them out")
        if not labels or not all(0 <= label < count for label in labels):
            raise InputError(f"labels {labels}: expected numbers from 0 to {count - 1}")

    @torch.no_grad()
    def generate(
        self,
        numbers: range,
        cycle: list[int] | None,
        sampling: SamplingConfig,
        seed: int,
        batch_size: int | None = None,
        progress: Callable[[float], object] = lambda images: None,
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Images (n, C, H, W) uint8 and codes (n, h, w), or None, of the images ``numbers`` of a seed, batch by batch.

        Args:
            cycle: image i is of the class ``cycle[i % len(cycle)]``; None: of no class.
            batch_size: None: what fits the memory that is free.
            progress: told how many more of these images (a part of one, too) were drawn since it was told last.
        """
        batch_size = batch_size or fitting_batch_size(self.prior, sampling, self.device)
        for start in range(numbers.start, numbers.stop, batch_size):
            count = min(batch_size, numbers.stop - start)
            padded = -(-count // ROWS) * ROWS
            labels = None
            if cycle is not None:
                labels = torch.tensor([cycle[i % len(cycle)] for i in range(start, start + padded)])
            seeds = image_seeds(seed, start, padded)
            if self.prior:
                each = count / padded / math.prod(self.prior.config.grid)  # of an image, in a code
                codes = self.prior.sample(labels, sampling, seeds, progress=lambda n, each=each: progress(n * each))
                yield self.decode(codes[:count]), codes[:count].cpu()
            else:
                pixels = self._from_latents(labels, sampling.temperature, seeds)[:count]
                progress(count)
                yield pixels, None

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (n, h, w) as images (n, C, H, W) uint8 on the CPU, each the same whatever stands beside it."""
        padded = F.pad(codes, (0, 0, 0, 0, 0, -len(codes) % ROWS))
        images = [to_uint8(self.tokenizer.decode_indices(part)).cpu() for part in padded.split(ROWS)]
        return torch.cat(images)[: len(codes)]

    def _from_latents(self, labels: Tensor | None, temperature: float, seeds: list[int]) -> Tensor:
        """Images (n, C, H, W) uint8 on the CPU from the tokenizer's own prior, for n a multiple of `ROWS`."""
        shape = self.tokenizer.latent_shape
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        rows = torch.stack(noise).mul_(temperature).to(self.device).split(ROWS)
        classes = [None] * len(rows) if labels is None else labels.split(ROWS)
        images = [self.tokenizer.sample_from(part, given) for part, given in zip(rows, classes, strict=True)]
        return to_uint8(torch.cat(images)).cpu()


def class_sheet(pixels: Tensor, names: list[str] | None) -> Image.Image:
    """A contact sheet of images (n, C, H, W) uint8, of which image i is of the class ``names[i % len(names)]``: one
    class a column, where that fits."""
    columns = len(names) if names and 4 <= len(names) <= 12 else 8
    captions = [names[i % len(names)] for i in range(len(pixels))] if names else None
    return contact_sheet(pixels, min(columns, len(pixels)), captions)


def _as_type(pixels: Tensor, output_type: str) -> list[Image.Image] | Tensor | np.ndarray:
    match output_type:
        case "pil":
            return [to_pil(image) for image in pixels]
        case "pt":
            return pixels
        case _:
            return pixels.permute(0, 2, 3, 1).numpy()


def load_pipeline(path: str | Path, tokenizer: str | Path | None = None) -> TwoStagePipeline:
    """A pipeline from a pipeline folder, a hub id, or the run folder of a prior or of a variational autoencoder."""
    if is_pipeline_folder(path) or not Path(path).exists():
        if tokenizer is not None:
            raise InputError(
                f"--tokenizer {tokenizer}: {path} is a pipeline, which holds its own tokenizer; leave it out"
            )
        return TwoStagePipeline.from_pretrained(path)
    return TwoStagePipeline.from_runs(path, tokenizer)


def load_tokenizer(path: str | Path) -> Autoencoder:
    """The tokenizer (or AE, VAE ...) of its own run folder, of a prior's, of a pipeline folder or of a hub id."""
    if Path(path).exists() and not is_pipeline_folder(path) and model_kind(path) != "prior":
        return Autoencoder.from_pretrained(path)
    return load_pipeline(path).tokenizer
