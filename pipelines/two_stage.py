"""`TwoStagePipeline`: a prior and its tokenizer as one object that makes images. For inference only.

pipeline = TwoStagePipeline.from_pretrained("my_pipeline")
pipeline(num_images=8, class_names=["star"], seed=0).images[0].save("star.png")
"""

import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.config import parse_config
from core.errors import InputError
from core.images import to_pil, to_uint8
from core.model_folder import find_model_folder, write_json
from core.pictures import contact_sheet
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.prior import Prior
from stage2_prior.sampling import SamplingConfig, image_seeds

__all__ = ["PipelineOutput", "TwoStagePipeline", "class_sheet", "load_pipeline"]

# Matrix products of other row counts may take other kernels, whose last bits differ; padding to this keeps an image
# the same, whatever stands beside it in a batch.
ROWS = 8


@dataclass
class PipelineOutput:
    """What was generated."""

    images: Any
    """A list of PIL images ("pil"), (n, C, H, W) uint8 ("pt"), or (n, H, W, C) uint8 ("np")."""
    codes: Tensor
    """(n, h, w) int64."""
    labels: list[int] | None
    """Each image's class, or None for a prior without classes."""


class TwoStagePipeline:
    """Samples codes from the prior and decodes them.

    Raises:
        InputError: the prior was trained on the codes of another tokenizer (both hashes are shown).
    """

    def __init__(self, tokenizer: Autoencoder, prior: Prior) -> None:
        found, expected = tokenizer.content_hash(), prior.config.tokenizer.hash
        if found != expected:
            raise InputError(
                f"this prior was trained on the codes of the tokenizer {expected[:12]} (it was at "
                f"{prior.config.tokenizer.path}), but the tokenizer given is {found[:12]}: their codes mean different "
                "things. Give the tokenizer that the codes were made with, or encode again and train a prior on that"
            )
        self.tokenizer, self.prior = tokenizer.eval(), prior.eval()

    @property
    def class_names(self) -> list[str] | None:
        return self.prior.config.class_names

    @property
    def device(self) -> torch.device:
        return next(self.prior.parameters()).device

    def to(self, device: str | torch.device) -> "TwoStagePipeline":
        """Moves both models."""
        self.tokenizer.to(device)
        self.prior.to(device)
        return self

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "TwoStagePipeline":
        """Reads a pipeline folder (pipeline.json, tokenizer/, prior/), or a hub id `owner/name` of one."""
        folder = Path(path)
        if not folder.exists() and str(path).count("/") == 1 and not str(path).startswith((".", "/", "~", "runs/")):
            folder = _download(str(path))
        if not (folder / "pipeline.json").is_file():
            what = "holds no pipeline (pipeline.json is missing)" if folder.exists() else "no such folder"
            raise InputError(f"{path}: {what}; expected a folder that save_pretrained wrote, or runs/PRIOR of a prior")
        try:
            kind = json.loads((folder / "pipeline.json").read_text(encoding="utf-8")).get("kind")
        except ValueError:
            raise InputError(f"{folder / 'pipeline.json'}: not valid JSON; save the pipeline again") from None
        if kind != "two_stage_pipeline":
            raise InputError(f"{folder / 'pipeline.json'}: is of the kind {kind!r}, expected 'two_stage_pipeline'")
        return cls(Autoencoder.from_pretrained(folder / "tokenizer"), Prior.from_pretrained(folder / "prior"))

    @classmethod
    def from_runs(cls, prior: str | Path, tokenizer: str | Path | None = None) -> "TwoStagePipeline":
        """Reads a prior's run folder, and the tokenizer's: by default the one that its codes were made with."""
        return cls.from_prior(Prior.from_pretrained(prior), prior, tokenizer)

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
        folder = Path(path)
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.prior.save_pretrained(folder / "prior")
        write_json(folder / "pipeline.json", {"format_version": 1, "kind": "two_stage_pipeline"})

    def labels_for(self, class_names: list[str] | None) -> list[int] | None:
        """The classes that images take in turn: those named, or all; None for a prior without classes.

        Raises:
            InputError: a name that is not there; the valid ones are listed.
        """
        known = self.class_names
        if not known:
            if class_names:
                raise InputError(f"class name {class_names[0]!r}: this prior was trained without classes")
            return None
        for name in class_names or []:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise InputError(f"class name {name!r}: not a class of this prior{hint} It knows: {', '.join(known)}")
        return [known.index(name) for name in class_names or known]

    def __call__(
        self,
        num_images: int = 16,
        class_names: list[str] | None = None,
        labels: list[int] | None = None,
        seed: int = 0,
        batch_size: int = 32,
        output_type: Literal["pil", "pt", "np"] = "pil",
        **sampling: Any,
    ) -> PipelineOutput:
        """Generates images. Image i depends on its class, the sampling settings, ``seed`` and i alone.

        Args:
            class_names: image i is of the class ``i % len(class_names)`` of these; None: of all classes in turn.
            labels: the same by number; not beside ``class_names``.
            batch_size: images worked on at a time; changes memory and speed, no image.
            sampling: `temperature`, `top_k`, `top_p`, `guidance_scale`, `num_steps` ...: :class:`SamplingConfig`.
        """
        if num_images < 1 or batch_size < 1:
            raise InputError(f"num_images {num_images}, batch_size {batch_size}: expected at least 1 of each")
        if output_type not in ("pil", "pt", "np"):
            raise InputError(f"output_type {output_type!r}: expected 'pil', 'pt' or 'np'")
        if labels is not None and class_names is not None:
            raise InputError("labels, class_names: give one of them, got both")
        if labels is not None:
            count = len(self.class_names or [])
            if not count:
                raise InputError(f"labels {labels}: this prior was trained without classes; leave them out")
            if not labels or not all(0 <= label < count for label in labels):
                raise InputError(f"labels {labels}: expected numbers from 0 to {count - 1}")
        settings = parse_config(SamplingConfig, sampling, "the sampling settings")
        cycle = labels if labels is not None else self.labels_for(class_names)
        parts = list(self.generate(range(num_images), cycle, settings, seed, batch_size))
        pixels, codes = torch.cat([p for p, _ in parts]), torch.cat([c for _, c in parts])
        chosen = None if cycle is None else [cycle[i % len(cycle)] for i in range(num_images)]
        return PipelineOutput(_as_type(pixels, output_type), codes, chosen)

    @torch.no_grad()
    def generate(
        self,
        numbers: range,
        cycle: list[int] | None,
        sampling: SamplingConfig,
        seed: int,
        batch_size: int,
        progress: Callable[[float], object] = lambda codes: None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (n, C, H, W) uint8 and codes (n, h, w) of the images ``numbers`` of a seed, batch by batch.

        Args:
            progress: told how many codes of these images were drawn since it was told last.
        """
        for start in range(numbers.start, numbers.stop, batch_size):
            count = min(batch_size, numbers.stop - start)
            padded = -(-count // ROWS) * ROWS
            labels = None
            if cycle is not None:
                labels = torch.tensor([cycle[i % len(cycle)] for i in range(start, start + padded)])
            share = count / padded
            codes = self.prior.sample(
                labels, sampling, image_seeds(seed, start, padded), progress=lambda n, share=share: progress(n * share)
            )
            images = torch.cat([self.tokenizer.decode_indices(part) for part in codes.split(ROWS)])
            yield to_uint8(images[:count]).cpu(), codes[:count].cpu()


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


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub's libraries raise several families of errors when offline
        raise InputError(
            f"{name}: no such folder here, and it could not be had from the Hugging Face hub "
            f"({type(error).__name__}). Without a network, copy its files into a folder and give that"
        ) from None


def load_pipeline(path: str | Path, tokenizer: str | Path | None = None) -> TwoStagePipeline:
    """A pipeline from a pipeline folder, a hub id, or a prior's run folder."""
    if Path(path).exists() and not (Path(path) / "pipeline.json").is_file():
        find_model_folder(path)
        return TwoStagePipeline.from_runs(path, tokenizer)
    if tokenizer is not None:
        raise InputError(f"--tokenizer {tokenizer}: {path} is a pipeline, which holds its own tokenizer; leave it out")
    return TwoStagePipeline.from_pretrained(path)
