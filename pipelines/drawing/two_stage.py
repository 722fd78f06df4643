"""`TwoStagePipeline`: a tokenizer and its prior as one object that makes and edits images. For inference only.

pipeline = TwoStagePipeline.from_pretrained("my_pipeline")
pipeline(num_images=8, class_names=["star"], seed=0).images[0].save("star.png")
"""

import difflib
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipelines.drawing import edits, redraw
from pipelines.drawing.batch_size import ROWS, fitting_batch_size
from pipelines.files.class_sheet import class_sheet
from pipelines.saved.model_card import CardFields, ModelCard, gather_records
from pipelines.saved.pipeline_folder import (
    push_folder,
    read_pipeline_folder,
    write_pipeline_folder,
)
from pipelines.saved.saved_model import SavedModel, check_tokenizer
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.prior import Prior
from stage2_prior.sampling import SamplingConfig, image_seeds
from twostage.core.config.sections import parse_config
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_pil, to_uint8

__all__ = ["PipelineOutput", "TwoStagePipeline"]


CARD_SAMPLES = 40


@dataclass
class PipelineOutput:
    """What was generated."""

    images: Any
    """A list of PIL images ("pil"), (n, C, H, W) uint8 ("pt"), or (n, H, W, C) uint8 ("np")."""
    codes: Tensor | None
    """(n, h, w) int64; None for a variational autoencoder, which has none, and for pictures beyond the model's size."""
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
        if prior:
            check_tokenizer(tokenizer, prior.config)
        self.tokenizer, self.prior = tokenizer.eval(), prior.eval() if prior else None
        self.saved_tokenizer: SavedModel | None = None
        """Where the tokenizer was read from; None: from a pipeline folder, or from no folder."""

    @property
    def _conditional(self) -> Prior | Autoencoder | None:
        """The model that is given the class."""
        return self.prior or (self.tokenizer if self.tokenizer.class_conditional else None)

    @property
    def label_names(self) -> list[str] | None:
        """The class of each label, by number; None where there are no classes."""
        return self._conditional.config.class_names if self._conditional else None

    @property
    def class_names(self) -> list[str] | None:
        """The classes that images can be asked for: those that had training images; None where there are no classes."""
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
    def from_pretrained(cls, path: str | Path, tokenizer: str | Path | None = None) -> "TwoStagePipeline":
        """Loads a pipeline folder, the run folder of a prior or of a variational autoencoder, or a hub id `owner/name`.

        Args:
            tokenizer: the run folder of a prior's tokenizer, if it is no longer where its codes were made.

        Raises:
            InputError: no model there, an incomplete one (the message names what is missing or damaged), or another
                tokenizer than the one whose codes the prior was trained on.
        """
        return cls.from_saved(SavedModel.find(path), tokenizer)

    @classmethod
    def from_runs(cls, run: str | Path, tokenizer: str | Path | None = None) -> "TwoStagePipeline":
        """:meth:`from_pretrained` for run folders."""
        return cls.from_saved(SavedModel.find_run(run), tokenizer)

    @classmethod
    def from_saved(cls, saved: SavedModel, tokenizer: str | Path | None = None) -> "TwoStagePipeline":
        """:meth:`from_pretrained` for a model that is found already."""
        if saved.kind in ("pipeline", "tokenizer") and tokenizer is not None:
            what = "a pipeline, which holds its own tokenizer" if saved.kind == "pipeline" else "itself a tokenizer"
            raise InputError(f"--tokenizer {tokenizer}: {saved.path} is {what}. Omit --tokenizer")
        if saved.kind == "pipeline":
            return cls(*read_pipeline_folder(saved.folder))
        if saved.kind == "tokenizer":
            pipeline = cls(Autoencoder.from_pretrained(saved.path))
            pipeline.saved_tokenizer = saved
            return pipeline
        return cls.from_prior(Prior.from_pretrained(saved.path), saved, tokenizer)

    @classmethod
    def from_prior(cls, prior: Prior, saved: SavedModel, tokenizer: str | Path | None = None) -> "TwoStagePipeline":
        """:meth:`from_pretrained` for a prior that is loaded already from ``saved``."""
        if tokenizer is None:
            where, model = saved.find_tokenizer(prior.config)
        else:
            where, model = SavedModel.find_run(Path(tokenizer)), Autoencoder.from_pretrained(tokenizer)
        pipeline = cls(model, prior)
        pipeline.saved_tokenizer = where
        return pipeline

    def save_pretrained(self, path: str | Path) -> None:
        """Writes a pipeline folder: all that generation needs, without the runs."""
        write_pipeline_folder(Path(path), self.tokenizer, self.prior)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool = False,
        license: str | None = None,
        data_license: str | None = None,
        run: str | Path | None = None,
    ) -> str:
        """Uploads a pipeline folder with a model card to the Hugging Face hub; returns its address.

        Args:
            repo_id: `owner/name`.
            license: of the weights, by its id on the hub, such as `mit`.
            data_license: of the pictures that it was trained on, in words.
            run: the run or pipeline folder that this was read from, whose figures and configuration the card shows.

        Raises:
            InputError: no such id or licence, or the hub did not take it, such as when offline or not logged in.
        """
        fields = CardFields(license, data_license, where=repo_id)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            records = gather_records(SavedModel.find(run)) if run else {}
            self.write_card(Path(folder), records, fields)
            return push_folder(Path(folder), repo_id, private)

    def write_card(self, folder: Path, records: dict[str, bytes], fields: CardFields) -> None:
        """Writes the model card of this pipeline into its ``folder``: README.md, samples.png and the ``records``."""
        names = self.class_names
        each = min(len(names), CARD_SAMPLES) if names else 8
        images = self(CARD_SAMPLES // each * each, seed=0, output_type="pt").images
        samples = class_sheet(images, names, self.labels_for(None))
        ModelCard(self.tokenizer, self.prior, names, records, fields).write(folder, samples)

    def labels_for(self, class_names: list[str] | None) -> list[int] | None:
        """The classes that images take in turn: those named, or all; None for a prior without classes.

        Raises:
            InputError: a name that is not there; the valid ones are listed.
        """
        known, every = self.class_names, self.label_names
        if not known or not every:
            if class_names:
                raise InputError(f"class name {class_names[0]!r}: this model was trained without classes")
            return None
        if isinstance(class_names, str):
            raise InputError(f"class_names {class_names!r}: expected a list of names, such as [{class_names!r}]")
        for name in class_names or []:
            if name in every and name not in known:
                raise InputError(
                    f"class name {name!r}: no training image was of this class, so the model has not learned it; "
                    f"expected one of: {', '.join(known)}"
                )
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                raise InputError(
                    f"class name {name!r}: not a class of this model{hint} Its classes: {', '.join(known)}"
                )
        return [every.index(name) for name in class_names or known]

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
        advance = redraw.share_of(callback, num_images)
        parts = list(self.generate(range(num_images), cycle, settings, seed, batch_size, advance))
        pixels, codes = torch.cat([p for p, _ in parts]), [c for _, c in parts if c is not None]
        chosen = None if cycle is None else [cycle[i % len(cycle)] for i in range(num_images)]
        return PipelineOutput(_as_type(pixels, output_type), torch.cat(codes) if codes else None, chosen)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (n, C, H, W) uint8 there and back; each the same whatever stands beside it.

        Raises:
            InputError: images of another form.
        """
        edits.check_image(self.tokenizer, images, "images", batch=True)
        return edits.reconstruct(self.tokenizer, images)

    def interpolate(self, first: Tensor, second: Tensor, num_images: int = 9) -> Tensor:
        """Pictures from ``first`` to ``second``, both (C, H, W) uint8: (num_images, C, H, W) uint8, ends included, by
        the rule of `edits.interpolate`.

        Raises:
            InputError: images of another form, fewer than 2 of them.
        """
        edits.check_image(self.tokenizer, first, "first image")
        edits.check_image(self.tokenizer, second, "second image")
        return edits.interpolate(self.tokenizer, first, second, num_images)

    def inpaint(
        self,
        image: Tensor,
        mask: Tensor,
        num_images: int = 4,
        class_name: str | None = None,
        seed: int = 0,
        feather: float = 0,
        callback: Callable[[float], object] | None = None,
        **sampling: Any,
    ) -> PipelineOutput:
        """Draws the masked part of an image anew. Completion i depends on the seed and i alone.

        A code is drawn again if any pixel of its cell is masked. What the image shows below the mask has no influence;
        its other pixels come back exactly as they were.

        Args:
            image: (C, H, W) uint8.
            mask: (H, W) bool, True where the image is to be drawn again: any with a masked transformer; with another
                prior what comes after some cell in its order, such as the lower half.
            class_name: what to draw; None: without a class, which the prior must have been trained for.
            feather: kept pixels nearer than so many pixels to the mask blend into what is drawn, all others stay exact.
            callback, sampling: as of a call.

        Returns:
            The completions as (num_images, C, H, W) uint8, and their codes.

        Raises:
            InputError: an image or mask of another form, nothing masked, a mask that this prior's order does not
                allow, no class where one is needed, no such class or setting, a variational autoencoder.
        """
        return PipelineOutput(
            *redraw.inpaint(self, image, mask, num_images, class_name, seed, feather, callback, sampling)
        )

    def outpaint(
        self,
        image: Tensor,
        left: int = 0,
        right: int = 0,
        top: int = 0,
        bottom: int = 0,
        num_images: int = 1,
        class_name: str | None = None,
        seed: int = 0,
        callback: Callable[[float], object] | None = None,
        **sampling: Any,
    ) -> PipelineOutput:
        """Goes on with an image beyond its borders, by windows of the model's size of which about half is known each.

        Args:
            image: (C, H, W) uint8; its pixels come back exactly as they were.
            left, right, top, bottom: pixels to add. Any with a masked transformer; with another prior where its order
                allows it: `bottom` for one that writes row by row.
            class_name, callback, sampling: as of :meth:`inpaint`; image i depends on the seed and i alone.

        Returns:
            (num_images, C, top + H + bottom, left + W + right) uint8; no codes.

        Raises:
            InputError: nothing to add, and those of :meth:`inpaint`.
        """
        sides = {"left": left, "right": right, "top": top, "bottom": bottom}
        pixels, labels = redraw.outpaint(self, image, sides, num_images, class_name, seed, callback, sampling)
        return PipelineOutput(pixels, None, labels)

    def _check_labels(self, labels: list[int]) -> None:
        names = self.label_names
        if not names:
            raise InputError(f"labels {labels}: this model was trained without classes; leave them out")
        if not labels or not all(0 <= label < len(names) for label in labels):
            raise InputError(f"labels {labels}: expected numbers from 0 to {len(names) - 1}")
        self.labels_for([names[label] for label in labels])

    @torch.no_grad()
    def generate(
        self,
        numbers: range,
        cycle: list[int] | None,
        sampling: SamplingConfig,
        seed: int,
        batch_size: int | None = None,
        progress: Callable[[float], object] = lambda images: None,
        known: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Images (n, C, H, W) uint8 and codes (n, h, w), or None, of the images ``numbers`` of a seed, batch by batch.

        Args:
            cycle: image i is of the class ``cycle[i % len(cycle)]``; None: of no class.
            batch_size: None: what fits the memory that is free.
            progress: told how many more of these images (a part of one, too) were drawn since it was told last.
            known: (len(numbers), h, w): codes that are given and kept, -1 where one is to be drawn, in the same cells
                of all; None: all are drawn.
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
                to_draw = math.prod(self.prior.config.grid) if known is None else int((known[0] < 0).sum())
                each = count / padded / to_draw  # of an image, in a code
                rows = torch.arange(start, start + padded).clamp(max=numbers.stop - 1) - numbers.start
                kept = None if known is None else known[rows]
                codes = self.prior.sample(labels, sampling, seeds, kept, lambda n, each=each: progress(n * each))
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


def _as_type(pixels: Tensor, output_type: str) -> list[Image.Image] | Tensor | np.ndarray:
    match output_type:
        case "pil":
            return [to_pil(image) for image in pixels]
        case "pt":
            return pixels
        case _:
            return pixels.permute(0, 2, 3, 1).numpy()
