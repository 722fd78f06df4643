"""A pipeline on disk: `pipeline.json` beside `tokenizer/` and, where there is one, `prior/`. `pipeline.json` is written
last and lists every file with its hash, so that a folder that was copied by half is not taken for a whole one."""

import os
import re
from pathlib import Path
from typing import Any

from pipelines.saved.proxies import broken_proxy
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.prior import Prior
from twostage.core.errors import InputError
from twostage.core.files import read_json
from twostage.core.runs.model_folder import check_format, file_sha256, write_json

__all__ = [
    "FORMAT_VERSION",
    "HUB_ID",
    "download_pipeline",
    "is_hub_id",
    "is_pipeline_folder",
    "push_folder",
    "read_pipeline_folder",
    "write_pipeline_folder",
]

FORMAT_VERSION = 2
"""1 had no hashes, and always a prior."""
DOCUMENT = "pipeline.json"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""`owner/name`."""
NEEDED = ["*.json", "*.safetensors", "training/*.yaml"]
"""What a download takes; pictures and exported programs stay on the hub."""


def is_pipeline_folder(path: str | Path) -> bool:
    """Whether ``path`` holds a pipeline, be it a part of one: a pipeline.json, or the tokenizer beside it."""
    return any((Path(path) / file).is_file() for file in (DOCUMENT, "tokenizer/config.json"))


def is_hub_id(name: str) -> bool:
    """Whether ``name`` can be an id of the Hugging Face hub: `owner/name`, and not `runs/NAME`."""
    return bool(HUB_ID.fullmatch(name)) and not name.startswith("runs/")


def write_pipeline_folder(folder: Path, tokenizer: Autoencoder, prior: Prior | None) -> None:
    """Writes both models, then what lists them."""
    (folder / DOCUMENT).unlink(missing_ok=True)
    parts = {"tokenizer": tokenizer} | ({"prior": prior} if prior else {})
    for name, model in parts.items():
        model.save_pretrained(folder / name)
    files = [f"{name}/{file}" for name in parts for file in ("config.json", "model.safetensors")]
    write_json(
        folder / DOCUMENT,
        {
            "format_version": FORMAT_VERSION,
            "kind": "two_stage_pipeline",
            "sha256": {name: file_sha256(folder / name) for name in files},
        },
    )


def read_pipeline_folder(folder: Path) -> tuple[Autoencoder, Prior | None]:
    """Both models, in evaluation mode, on the CPU; None for a pipeline without a prior.

    Raises:
        InputError: no pipeline, one of another format, or files that are missing or not those that were written (all
            of them are named).
    """
    if not (folder / DOCUMENT).is_file():
        what = f"holds no pipeline ({DOCUMENT} is missing)" if folder.exists() else "no such folder"
        raise InputError(
            f"{folder}: {what}; expected a folder that twostage export wrote, or runs/NAME of a trained model"
        )
    file = folder / DOCUMENT
    document = read_json(file, "save the pipeline again")
    kind = document.get("kind")
    if kind != "two_stage_pipeline":
        raise InputError(f"{file}: is of the kind {kind!r}, expected 'two_stage_pipeline'")
    version: Any = document.get("format_version")
    check_format(version, FORMAT_VERSION, file)
    hashes = document.get("sha256", {})
    if not isinstance(hashes, dict) or (version > 1 and not hashes):
        raise InputError(f"{file}: `sha256` is no list of files with their hashes; save the pipeline again")
    _check_files(folder, hashes)
    has_prior = version == 1 or "prior/config.json" in hashes
    tokenizer = Autoencoder.from_pretrained(folder / "tokenizer")
    return tokenizer, Prior.from_pretrained(folder / "prior") if has_prior else None


def _check_files(folder: Path, hashes: dict[str, str]) -> None:
    """Names every file that is missing or damaged; only names within the folder are looked at."""
    problems = []
    for name, expected in hashes.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name or "\\" in name:
            raise InputError(f"{folder / DOCUMENT}: lists {name!r}, which is no file of this folder; save it again")
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif (found := file_sha256(file)) != expected:
            problems.append(f"{name} has the hash {found[:12]} instead of {str(expected)[:12]}")
    if problems:
        raise InputError(f"{folder}: the pipeline is not whole: {'; '.join(problems)}. Copy or export it again")


def download_pipeline(name: str) -> Path:
    """The local copy of the pipeline with the hub id `owner/name`.

    Raises:
        InputError: the hub cannot be reached or has no such pipeline.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=NEEDED))
    except Exception as error:  # the hub's libraries raise several families of errors when offline
        kept = os.environ.get("HF_HOME", "~/.cache/huggingface")
        raise InputError(
            f"{name}: no such folder here, and the Hugging Face hub did not give it "
            f"({broken_proxy() or type(error).__name__}); looked also for a copy downloaded earlier, in {kept}. "
            "Without a network, copy the pipeline's folder here and give that"
        ) from None


def push_folder(folder: Path, repo_id: str, private: bool = False) -> str:
    """Uploads a folder to the Hugging Face hub, where ``repo_id`` (`owner/name`) is made if it is not there; returns
    its address.

    Raises:
        InputError: no such name, or the hub did not take it, such as when offline or not logged in.
    """
    if not HUB_ID.fullmatch(repo_id):
        raise InputError(f"{repo_id!r}: no id of the Hugging Face hub; expected owner/name")
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        address = hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="twostage export")
    except Exception as error:  # as above
        reason = broken_proxy() or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(
            f"{repo_id}: the Hugging Face hub did not take it ({reason}); log in (hf auth login) as one who may write "
            "there, check the network, and push again"
        ) from None
    return str(address)
