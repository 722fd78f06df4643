"""Turns a data set into codes with a trained tokenizer.

accelerate launch -m pipelines.encode_dataset runs/TOKENIZER [--out DIR] [--data SOURCE]
"""

import math
import shutil
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from tqdm import tqdm

from core.command import run_command
from core.config import parse_config
from core.data import DataConfig, ImageData, ImageSplit, load_images
from core.errors import InputError
from core.images import to_float
from core.model_folder import find_model_folder, write_json
from core.run_folder import RunFolder
from core.training import join_processes
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.codes import CodeCache, Manifest, SplitFiles, TokenizerReference, code_dtype

__all__ = ["encode_dataset", "training_data"]

BATCH_SIZE = 256


def training_data(tokenizer: str | Path, source: str | None) -> DataConfig:
    """The `data` group that a tokenizer was trained with, with another source where one is given."""
    run = find_model_folder(tokenizer).parent
    stored = RunFolder(run).stored_config() if (run / "config.yaml").is_file() else None
    if stored is None and source is None:
        raise InputError(f"{tokenizer}: no config.yaml says what it was trained on; give --data SOURCE")
    document = stored["data"] if stored else {}
    model = Autoencoder.from_pretrained(tokenizer).config
    document |= {"image_size": list(model.image_size), "channels": model.channels}
    return parse_config(DataConfig, document | ({"source": source} if source else {}), "data")


def encode_dataset(tokenizer: str | Path, out: str | Path | None = None, source: str | None = None) -> Path:
    """Encodes every split into ``out`` (codes/NAME by default), the rows shared by the processes.

    Returns:
        The folder: a code cache.

    Raises:
        InputError: no tokenizer there, one without codes, or a folder that holds other codes already.
    """
    state = join_processes()
    model = Autoencoder.from_pretrained(tokenizer).to(state.device)
    if model.codebook_size is None:
        kind = model.config.model.bottleneck.type
        raise InputError(
            f"{tokenizer}: its bottleneck is {kind!r}, which has no codes; train one with "
            "`vector`, `finite_scalar`, `lookup_free` or `residual`"
        )
    data_config = training_data(tokenizer, source)
    folder = find_model_folder(tokenizer)
    name = folder.parent.name if folder.name == "model" else folder.name
    final = Path(out) if out else Path("codes") / name
    reference = TokenizerReference(hash=model.content_hash(), path=str(tokenizer))
    if _already_there(final, reference, data_config):
        _say(state, f"{final}: already holds the codes of this tokenizer; nothing to do")
        return final

    data = load_images(data_config)
    for line in [data.description, *data.notices]:
        _say(state, line)
    partial = final.with_name(f".{final.name}.partial")
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    state.wait_for_everyone()
    counts = {split: _encode_split(model, images, split, partial, state) for split, images in data.splits.items()}
    if state.is_main_process:
        manifest = _manifest(model, data, data_config, reference, counts)
        write_json(partial / "manifest.json", manifest.model_dump(mode="json"))
        partial.rename(final)
        unigram = manifest.unigram_nats_per_code[manifest.validation_split]
        print(
            f"{final}: {sum(len(s) for s in data.splits.values()):,} images, "
            f"grid {model.code_grid[0]}x{model.code_grid[1]}, "
            f"{manifest.codes_used} of {manifest.codebook_size} codes used, entropy "
            f"{manifest.entropy_nats_per_code:.3f} and held-out unigram {unigram:.3f} nats per code "
            f"(uniform {math.log(manifest.codebook_size):.3f})"
        )
    state.wait_for_everyone()
    return final


def _already_there(final: Path, reference: TokenizerReference, data: DataConfig) -> bool:
    if not final.exists():
        return False
    manifest = CodeCache(final).manifest
    if manifest.tokenizer.hash != reference.hash:
        raise InputError(
            f"--out {final}: holds the codes of the tokenizer {manifest.tokenizer.hash[:12]}, this one is "
            f"{reference.hash[:12]}; nothing was changed. Give another --out, or remove the folder"
        )
    if manifest.source != data.source:
        raise InputError(
            f"--out {final}: holds the codes of {manifest.source!r}, this is {data.source!r}; give another --out"
        )
    return True


@torch.no_grad()
def _encode_split(model: Autoencoder, images: ImageSplit, name: str, folder: Path, state: PartialState) -> Tensor:
    """Writes one split's arrays; returns how often each code occurs, (codebook_size,) int64, over all processes."""
    assert model.codebook_size is not None
    file = folder / f"{name}.codes.npy"
    if state.is_main_process:
        dtype = code_dtype(model.codebook_size)
        np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=(len(images), *model.code_grid)).flush()
        if images.labels is not None:
            np.save(folder / f"{name}.labels.npy", images.labels.numpy().astype(np.int32))
    state.wait_for_everyone()
    codes = np.load(file, mmap_mode="r+")
    counts = torch.zeros(model.codebook_size, dtype=torch.long, device=state.device)
    parts = torch.arange(len(images)).split(BATCH_SIZE)[state.process_index :: state.num_processes]
    for rows in tqdm(parts, desc=name, unit="batch", disable=not state.is_main_process, leave=False):
        indices = model.encode(to_float(images.read(rows).to(state.device))).indices
        assert indices is not None
        counts += torch.bincount(indices.flatten(), minlength=len(counts))
        codes[int(rows[0]) : int(rows[-1]) + 1] = indices.cpu().numpy()
    codes.flush()  # type: ignore[attr-defined]
    total = reduce(counts, "sum")
    state.wait_for_everyone()
    assert isinstance(total, Tensor)
    return total.cpu()


def _manifest(
    model: Autoencoder,
    data: ImageData,
    data_config: DataConfig,
    reference: TokenizerReference,
    counts: dict[str, Tensor],
) -> Manifest:
    assert model.codebook_size is not None
    train = counts["train"].double()
    shares = train / train.sum()
    smoothed = (train + 1) / (train + 1).sum()
    unigram = {split: -(count.double() / count.sum() * smoothed.log()).sum().item() for split, count in counts.items()}
    return Manifest(
        tokenizer=reference,
        source=data_config.source,
        image_size=model.config.image_size,
        channels=model.config.channels,
        grid=model.code_grid,
        codebook_size=model.codebook_size,
        class_names=data.class_names,
        validation_split=data.validation_name,
        splits={
            split: SplitFiles(
                rows=len(images),
                codes=f"{split}.codes.npy",
                labels=None if images.labels is None else f"{split}.labels.npy",
            )
            for split, images in data.splits.items()
        },
        codes_used=int((train > 0).sum()),
        entropy_nats_per_code=torch.special.entr(shares).sum().item(),
        unigram_nats_per_code=unigram,
    )


def _say(state: PartialState, message: str) -> None:
    if state.is_main_process:
        print(message)


def command(
    tokenizer: Annotated[str, typer.Argument(help="runs/NAME of a trained tokenizer, or its model folder.")],
    out: Annotated[str | None, typer.Option(help="Where the codes go; codes/NAME by default.")] = None,
    data: Annotated[str | None, typer.Option(help="Another source than the tokenizer was trained on.")] = None,
) -> None:
    """Turn a data set into codes with a trained tokenizer."""
    encode_dataset(tokenizer, out, data)


if __name__ == "__main__":
    run_command(command)
