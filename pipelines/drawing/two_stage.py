"""`TwoStagePipeline`: a tokenizer and its prior as one object that makes and edits images. For inference only.

pipeline = TwoStagePipeline.from_pretrained("my_pipeline")
pipeline(num_images=8, class_names=["star"], seed=0).images[0].save("star.png")
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.drawing.asked import Asked
from pipelines.drawing.rebuilt_images import blend_images, check_image, rebuild_images
from pipelines.drawing.redraw import InpaintRequest, OutpaintRequest, inpaint, outpaint
from pipelines.drawing.sampler import ImageSampler, PipelineOutput, in_shares
from pipelines.saved.model_card import CardFields, ModelCard, gather_records
from pipelines.saved.pipeline_folder import StoredWeights, push_folder, read_pipeline_folder, write_pipeline_folder
from pipelines.saved.saved_model import SavedModel
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.prior import Prior
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.conditions.conditions import NAMES
from twostage.core.config.sections import parse_config
from twostage.core.errors import InputError
from twostage.core.images.conversion import is_pillow_form, to_pil

__all__ = ["TwoStagePipeline"]

CARD_SAMPLES = 40


class TwoStagePipeline(ImageSampler):
    """An :class:`ImageSampler` that is loaded, saved and shared as one, and edits images.

    Args:
        prior: over the codes of ``tokenizer``; None for a variational autoencoder (`gaussian`, `class_gaussian`).
        map_tokenizer: turns maps into codes, for a prior that was trained on such codes.

    Raises:
        InputError: the prior was trained on the codes of other tokenizers (the message shows both hashes), or there
            is none and ``tokenizer`` has no prior of its own.
    """

    saved_tokenizer: SavedModel | None = None
    """The folder that the tokenizer was loaded from; None: a pipeline folder, or no folder."""

    # --- loading and saving -----------------------------------------------------------------------------------------

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
        """:meth:`from_pretrained` for a :class:`SavedModel`."""
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
        """:meth:`from_pretrained` for a prior that is already loaded from ``saved``."""
        if tokenizer is None:
            where, model = saved.find_tokenizer(prior.config)
        else:
            where, model = SavedModel.find_run(Path(tokenizer)), Autoencoder.from_pretrained(tokenizer)
        pipeline = cls(model, prior, saved.find_map_tokenizer(prior.config))
        pipeline.saved_tokenizer = where
        return pipeline

    def save_pretrained(self, path: str | Path, weights: StoredWeights = "float32") -> None:
        """Writes a pipeline folder: everything that generation needs, without the runs.

        Args:
            weights: `bfloat16` rounds the prior and the decoder, which halves their size. The encoder and the codebook
                stay exact, so that codes and content hash stay the same.
        """
        write_pipeline_folder(Path(path), self.tokenizer, self.prior, self.map_tokenizer, weights)

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
            license: license of the weights, by its id on the hub, such as `mit`.
            data_license: license of the training images, in words.
            run: the run or pipeline folder that this was loaded from; the card shows its figures and configuration.

        Raises:
            InputError: an invalid id or license, or the hub refused the upload, for example when offline or not logged
                in.
        """
        fields = CardFields(license, data_license, where=repo_id)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            self.write_card(Path(folder), gather_records(SavedModel.find(run)) if run else {}, fields)
            return push_folder(Path(folder), repo_id, private)

    def write_card(
        self, folder: Path, records: dict[str, bytes], fields: CardFields, weights: StoredWeights = "float32"
    ) -> None:
        """Writes the model card of this pipeline into its ``folder``: README.md, samples.png and the ``records``;
        ``weights`` is their precision in the folder."""
        names = self.class_names
        each = min(len(names), CARD_SAMPLES) if names else 8
        samples = self.sheet(self(CARD_SAMPLES // each * each, seed=0, output_type="pt").images)
        ModelCard(self.tokenizer, self.prior, names, records, fields, weights).write(folder, samples)

    # --- images -----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        num_images: int = 16,
        class_names: list[str] | None = None,
        labels: list[int] | None = None,
        seed: int = 0,
        *,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        maps: list[Any] | None = None,
        vectors: list[Any] | None = None,
        batch_size: int | None = None,
        output_type: Literal["pil", "pt", "np"] = "pil",
        on_progress: Callable[[float], object] | None = None,
        **sampling: Any,
    ) -> PipelineOutput:
        """Generates images. Image i depends on its class, the sampling settings, ``seed`` and i alone.

        Args:
            class_names: image i has the class ``class_names[i % len(class_names)]``; None: cycle through all classes.
            labels: the same by number; not together with ``class_names``.
            prompt: image i shows ``prompt[i % len(prompt)]``; None: the examples of a model with captions.
            negative_prompt: what guidance leads away from; a list is cycled through like the prompts.
            maps: image i shows the map ``maps[i % len(maps)]``: labels (H, W), or an image (C, H, W) uint8.
            vectors: image i has the vector ``vectors[i % len(vectors)]``.
            batch_size: images to draw at a time, which changes memory and speed but no image; None: as many as fit the
                free memory.
            on_progress: called repeatedly with the share of the work that is done, in [0, 1].
            sampling: `temperature`, `top_k`, `top_p`, `guidance_scale`, `num_steps` ...: :class:`SamplingConfig`.

        Raises:
            InputError: an unknown class, output type or setting, or a prompt, map or vector that the prior cannot
                draw.
        """
        if num_images < 1 or (batch_size is not None and batch_size < 1):
            raise InputError(f"num_images {num_images}, batch_size {batch_size}: expected at least 1 for each")
        self._check_output_type(output_type)
        if labels is not None and class_names is not None:
            raise InputError("labels, class_names: got both, expected one of them")
        if labels is not None:
            self.check_labels(labels)
        settings = parse_config(SamplingConfig, sampling, "the sampling settings")
        self.check_sampling(settings)
        asked = Asked(
            class_names=class_names, prompts=_as_list(prompt), negative_prompts=_as_list(negative_prompt), maps=maps,
            vectors=vectors,
        )  # fmt: skip
        cycle = self.cycle(asked)
        cycle = cycle if labels is None else replace(cycle, labels=labels)
        advance = in_shares(on_progress, num_images)
        parts = list(self.draw(range(num_images), cycle, settings, seed, batch_size, advance))
        pixels, codes = torch.cat([p for p, _ in parts]), [c for _, c in parts if c is not None]
        prompts = [cycle.captions[i % len(cycle.captions)] for i in range(num_images)] if cycle.captions else None
        return PipelineOutput(
            _as_type(pixels, output_type), torch.cat(codes) if codes else None, cycle.labels_of(range(num_images)),
            prompts,
        )  # fmt: skip

    def _check_output_type(self, output_type: str) -> None:
        if output_type not in ("pil", "pt", "np"):
            raise InputError(f"output_type {output_type!r}: expected 'pil', 'pt' or 'np'")
        if output_type == "pil" and not is_pillow_form(self.channels, self.bits):
            raise InputError(
                f"output_type 'pil': Pillow has no images of {self.channels} channels with {self.bits} bits. Set "
                "output_type='pt' or 'np'"
            )

    def reconstruct(
        self,
        images: Tensor,
        labels: list[int] | None = None,
        *,
        prompts: list[str] | None = None,
        maps: list[Any] | None = None,
        vectors: list[Any] | None = None,
    ) -> Tensor:
        """Encodes and decodes images (n, C, H, W) uint8; each is independent of the others in its batch.

        Args:
            labels: the class of each image, for a tokenizer that sees the class.
            prompts, maps, vectors: the same for a tokenizer that sees the caption, the map or the vector.

        Raises:
            InputError: images of another shape, or a condition that is missing or that the tokenizer does not take.
        """
        check_image(self.tokenizer, images, "images", batch=True)
        given = self._given_images(len(images), labels, {"text": prompts, "map": maps, "vector": vectors})
        return rebuild_images(self.tokenizer, images, given)

    def interpolate(
        self,
        first: Tensor,
        second: Tensor,
        num_images: int = 9,
        label: int | None = None,
        *,
        prompt: str | None = None,
        map: Any = None,
        vector: Any = None,
    ) -> Tensor:
        """Images from ``first`` to ``second``, both (C, H, W) uint8: (num_images, C, H, W) uint8, including both ends;
        see :func:`pipelines.drawing.rebuilt_images.blend_images`.

        Args:
            label: the class of both, for a tokenizer that sees the class.
            prompt, map, vector: the same for a tokenizer that sees the caption, the map or the vector.

        Raises:
            InputError: images of another shape, fewer than 2 of them, or a condition that is missing or that the
                tokenizer does not take.
        """
        check_image(self.tokenizer, first, "first image")
        check_image(self.tokenizer, second, "second image")
        others = {"text": prompt, "map": map, "vector": vector}
        listed = {name: None if value is None else [value] for name, value in others.items()}
        given = self._given_images(1, None if label is None else [label], listed)
        return blend_images(self.tokenizer, first, second, num_images, given)

    def _given_images(self, count: int, labels: list[int] | None, others: dict[str, list[Any] | None]) -> Tensor | None:
        """What the tokenizer sees beside given images; it refuses missing values itself.

        Raises:
            InputError: values that do not suit the tokenizer, or another number of them.
        """
        given = {name: self.tokenizer.parse(name, values) for name, values in others.items() if values is not None}
        if labels is not None:
            if "class" not in self.tokenizer.conditions:
                raise InputError(f"labels {labels}: this tokenizer does not see the class of an image. Omit labels")
            self.check_labels(labels)
            given["class"] = torch.tensor(labels)
        for name, values in given.items():
            if len(values) != count:
                shown = f"labels {labels}" if name == "class" else f"{NAMES[name]}: got {len(values)}"
                raise InputError(f"{shown}: expected one for each of {count} images")
        return next(iter(given.values()), None)

    def inpaint(
        self,
        image: Tensor,
        mask: Tensor,
        num_images: int = 4,
        class_name: str | None = None,
        seed: int = 0,
        feather: float = 0,
        on_progress: Callable[[float], object] | None = None,
        prompt: str | None = None,
        **sampling: Any,
    ) -> PipelineOutput:
        """Redraws the masked part of an image. Completion i depends on the seed and i alone.

        A code is redrawn if any pixel of its cell is masked. The masked pixels do not influence the result; all others
        stay exactly as they were.

        Args:
            image: (C, H, W) uint8.
            mask: (H, W) bool, True where the image is to be redrawn. Masked and parallel transformers can redraw any
                part. Other priors can redraw what comes after some cell in their order, such as the bottom half.
            class_name: the class to draw; None: without a class, which only works if the prior was trained for it.
            prompt: what to draw, for a prior with captions; None: without a prompt.
            feather: kept pixels closer than this many pixels to the mask blend into what is drawn.
            on_progress, sampling: as in a call.

        Returns:
            The completions as (num_images, C, H, W) uint8, and their codes.

        Raises:
            InputError: an image or mask of another shape, an empty mask, a mask that does not fit the order of this
                prior, a missing or unknown class, an unknown setting, or a variational autoencoder.
        """
        settings = parse_config(SamplingConfig, sampling, "the sampling settings")
        request = InpaintRequest(
            image=image, mask=mask, num_images=num_images, class_name=class_name, prompt=prompt,
            seed=seed, feather=feather,
            sampling=settings,
        )  # fmt: skip
        return inpaint(self, request, on_progress)

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
        on_progress: Callable[[float], object] | None = None,
        prompt: str | None = None,
        **sampling: Any,
    ) -> PipelineOutput:
        """Extends an image beyond its borders, window by window; about half of each window is already known.

        Args:
            image: (C, H, W) uint8; its pixels stay exactly as they were.
            left, right, top, bottom: pixels to add. Masked and parallel transformers can extend any side. Other
                priors can extend the sides that come last in their order: `bottom` for one that writes row by row.
            class_name, prompt, on_progress, sampling: as in :meth:`inpaint`; image i depends on the seed and i alone.

        Returns:
            (num_images, C, top + H + bottom, left + W + right) uint8; no codes.

        Raises:
            InputError: nothing to add, and what :meth:`inpaint` refuses.
        """
        settings = parse_config(SamplingConfig, sampling, "the sampling settings")
        request = OutpaintRequest(
            image=image, left=left, right=right, top=top, bottom=bottom, num_images=num_images, class_name=class_name,
            prompt=prompt, seed=seed, sampling=settings,
        )  # fmt: skip
        return outpaint(self, request, on_progress)


def _as_list(text: str | list[str] | None) -> list[str] | None:
    return [text] if isinstance(text, str) else text


def _as_type(pixels: Tensor, output_type: str) -> list[Image.Image] | Tensor | np.ndarray:
    match output_type:
        case "pil":
            return [to_pil(image) for image in pixels]
        case "pt":
            return pixels
        case _:
            return pixels.permute(0, 2, 3, 1).numpy()
