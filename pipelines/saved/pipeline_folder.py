"""A pipeline on disk: `pipeline.json` beside `tokenizer/` and, if there are such, `prior/` and `map_tokenizer/`.
`pipeline.json` is written last and lists every file with its hash, so that an incomplete copy is detected."""

import os
import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pipelines.saved.proxies import broken_proxy
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.prior import Prior
from twostage.core.errors import InputError
from twostage.core.files import file_sha256, read_json, write_json
from twostage.core.runs.model_folder import check_format
from twostage.core.wording import one_line

__all__ = [
    "StoredWeights",
    "download_pipeline",
    "is_hub_id",
    "is_pipeline_folder",
    "push_folder",
    "read_pipeline_folder",
    "write_pipeline_folder",
    "write_rounded_tokenizer",
]

FORMAT_VERSION = 2
"""Format 1 had no hashes, and always a prior."""
DOCUMENT = "pipeline.json"
StoredWeights = Literal["float32", "bfloat16"]
"""The precision of weights on disk; in memory all weights are float32. With `bfloat16`, the prior and the decoder take
half the space, and so do the encoder and the codebook if they were rounded before the prior was trained."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""`owner/name`."""
DOWNLOADED = ["*.json", "*.safetensors", "training/*.yaml"]
"""The files of a download; images and exported programs stay on the hub."""


def is_pipeline_folder(path: str | Path) -> bool:
    """Whether ``path`` holds a pipeline, even an incomplete one: a pipeline.json, or the tokenizer beside it."""
    return any((Path(path) / file).is_file() for file in (DOCUMENT, "tokenizer/config.json"))


def is_hub_id(name: str) -> bool:
    """Whether ``name`` can be an id of the Hugging Face hub: `owner/name`, and not `runs/NAME`."""
    return bool(HUB_ID.fullmatch(name)) and not name.startswith("runs/")


def write_pipeline_folder(
    folder: Path,
    tokenizer: Autoencoder,
    prior: Prior | None,
    map_tokenizer: Autoencoder | None = None,
    weights: StoredWeights = "float32",
) -> None:
    """Writes the models, then pipeline.json."""
    (folder / DOCUMENT).unlink(missing_ok=True)
    tokenizers = {"tokenizer": tokenizer} | ({"map_tokenizer": map_tokenizer} if map_tokenizer else {})
    for name, model in tokenizers.items():
        model.save_pretrained(folder / name, _stored(model, weights))
    if prior:
        prior.save_pretrained(folder / "prior", _stored(prior, weights), tokenizer="tokenizer")
    parts = [*tokenizers, *(["prior"] if prior else [])]
    files = [f"{name}/{file}" for name in parts for file in ("config.json", "model.safetensors")]
    hashes = {name: file_sha256(folder / name) for name in files}
    write_json(folder / DOCUMENT, {"format_version": FORMAT_VERSION, "kind": "two_stage_pipeline", "sha256": hashes})


def write_rounded_tokenizer(folder: Path, tokenizer: Autoencoder) -> None:
    """Writes the model folder of a new tokenizer: ``tokenizer`` with all weights rounded to bfloat16. Its codes and its
    content hash differ; a pipeline with a prior over its codes is stored in bfloat16 throughout."""
    rounded = {name: _rounded(tensor) for name, tensor in tokenizer.state_dict().items()}
    tokenizer.load_state_dict(rounded)  # the hash is that of the rounded weights
    tokenizer.save_pretrained(folder, rounded)


def _stored(model: Autoencoder | Prior, weights: StoredWeights) -> dict[str, Tensor]:
    """The tensors to write. What determines the codes is never changed, so the tokenizer keeps its content hash: the
    prior was trained on these very codes. It is stored in bfloat16 if that loses nothing."""
    state = model.state_dict()
    if weights == "float32":
        return state
    exact = ("encoder.", "bottleneck.", "condition.") if isinstance(model, Autoencoder) else ()
    rounded = {name: _rounded(tensor) for name, tensor in state.items()}
    return {
        name: tensor if name.startswith(exact) and not torch.equal(rounded[name].to(tensor.dtype), tensor)
        else rounded[name] for name, tensor in state.items()
    }  # fmt: skip


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.bfloat16() if tensor.is_floating_point() else tensor


def read_pipeline_folder(folder: Path) -> tuple[Autoencoder, Prior | None, Autoencoder | None]:
    """The tokenizer, the prior and the tokenizer of maps, in evaluation mode, on the CPU; None for those that the
    pipeline does not have.

    Raises:
        InputError: no pipeline, one in another format, or files that are missing or damaged (all of them are named).
    """
    file = folder / DOCUMENT
    if not file.is_file():
        raise InputError(f"{folder}: holds no pipeline ({DOCUMENT} is missing). Copy or export it again")
    document = read_json(file, "save the pipeline again")
    kind = document.get("kind")
    if kind != "two_stage_pipeline":
        raise InputError(f"{file}: has the kind {kind!r}, expected 'two_stage_pipeline'")
    version: Any = document.get("format_version")
    check_format(version, FORMAT_VERSION, file)
    hashes = document.get("sha256", {})
    if not isinstance(hashes, dict) or (version > 1 and not hashes):
        raise InputError(f"{file}: `sha256` is not a list of files with their hashes. Save the pipeline again")
    _check_files(folder, hashes)
    has_prior = version == 1 or "prior/config.json" in hashes
    prior = Prior.from_pretrained(folder / "prior") if has_prior else None
    has_maps = "map_tokenizer/config.json" in hashes
    map_tokenizer = Autoencoder.from_pretrained(folder / "map_tokenizer") if has_maps else None
    return Autoencoder.from_pretrained(folder / "tokenizer"), prior, map_tokenizer


def _check_files(folder: Path, hashes: dict[str, str]) -> None:
    """Refuses missing and damaged files, and names that lead out of the folder."""
    problems = []
    for name, expected in hashes.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name or "\\" in name:
            raise InputError(
                f"{folder / DOCUMENT}: lists {name!r}, which is not a file of this folder. Save the pipeline again"
            )
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif (found := file_sha256(file)) != expected:
            problems.append(f"{name} has the hash {found[:12]} instead of {str(expected)[:12]}")
    if problems:
        raise InputError(f"{folder}: the pipeline is incomplete: {'; '.join(problems)}. Copy or export it again")


def download_pipeline(name: str) -> Path:
    """The local copy of the pipeline with the hub id `owner/name`.

    Raises:
        InputError: the hub cannot be reached or has no such pipeline.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=DOWNLOADED))
    except Exception as error:  # the hub's libraries raise several families of errors when offline
        kept = os.environ.get("HF_HOME", "~/.cache/huggingface")
        raise InputError(
            f"{name}: no such folder here, not available from the Hugging Face hub "
            f"({broken_proxy() or type(error).__name__}), and not among earlier downloads in {kept}. "
            "Without a network, copy the pipeline's folder here and give that"
        ) from None


def push_folder(folder: Path, repo_id: str, private: bool = False) -> str:
    """Uploads a folder to the Hugging Face hub and returns its address. ``repo_id`` (`owner/name`) is created if it
    does not exist.

    Raises:
        InputError: an invalid id, or the hub refused the upload, for example when offline or not logged in.
    """
    if not HUB_ID.fullmatch(repo_id):
        raise InputError(f"{repo_id!r}: not an id of the Hugging Face hub; expected owner/name")
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        address = hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="twostage export")
    except Exception as error:  # the hub's library raises nearly anything
        reason = broken_proxy() or f"{type(error).__name__}: {one_line(error)}"
        raise InputError(
            f"{repo_id}: the Hugging Face hub refused the upload ({reason}). Log in (hf auth login) with an account "
            "that may write there, check the network, and push again"
        ) from None
    return str(address)
