"""Measures a trained tokenizer (or AE, VAE ...) on held-out images, and says whether it is ready for stage two.

accelerate launch -m pipelines.evaluate runs/TOKENIZER [--features runs/features_NAME] [--json FILE]
"""

import hashlib
import json
import math
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import PartialState
from torch import Tensor

from core.command import run_command
from core.data import DataConfig, ImageData, ImageSplit, load_images
from core.errors import InputError
from core.images import to_float, to_uint8
from core.model_folder import find_model_folder, write_json
from core.pictures import contact_sheet, save_picture
from core.training import join_processes
from pipelines.encode_dataset import training_data
from pipelines.frechet import FrechetDistances, open_features
from pipelines.measurements import Measurements, measure, ssim_window
from pipelines.verdict import verdict
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.perceptual import SMALLEST_SIDE, TRUNK, LPIPSConfig, Perceptual, build_perceptual

__all__ = ["evaluate"]

NUM_PICTURED = 12
SEED = 0  # of the posterior's noise, and of a denoising autoencoder's corruption
PACKAGES = ("torch", "torchmetrics", "numpy", "pillow")
NO_NETWORK = "give --features runs/NAME (twostage train-features), or --inception FILE"
ROWS = {  # of the table: what each figure is called there, and how it is written
    "images": ("images", "{:.0f}"),
    "psnr": ("PSNR", "{:.2f} dB"),
    "psnr_corrupted": ("  from corrupted images", "{:.2f} dB"),
    "ssim": ("SSIM", "{:.4f}"),
    "lpips": ("LPIPS", "{:.4f}"),
    "rfid": ("rFID", "{:.4g}"),
    "rfid_of_halves": ("  of the originals' halves", "{:.4g}"),
    "nats_per_image": ("negative ELBO", "{:.2f} nats per image"),
    "bits_per_dim": ("  per dimension", "{:.4f} bits"),
    "kl": ("  of it KL", "{:.2f} nats per image"),
    "active_units": ("active units", "{:.0f}"),
    "latent_units": ("  of", "{:.0f}"),
    "codebook_size": ("codebook", "{:.0f} codes"),
    "codebooks": ("  codebooks", "{:.0f}, one for each code of a cell"),
    "codes_used": ("  used", "{:.0f}"),
    "dead_codes": ("  dead", "{:.0f}"),
    "codebook_usage": ("  usage", "{:.1%}"),
    "perplexity": ("  perplexity", "{:.1f}"),
    "entropy_nats_per_code": ("  entropy", "{:.3f} nats per code"),
    "cells": ("grid", "{:.0f} cells"),
    "code_bits_per_pixel": ("  holds", "{:.4f} bits per pixel"),
    "code_bits_per_dim": ("  per dimension", "{:.4f} bits"),
}


def evaluate(
    tokenizer: str | Path,
    source: str | None = None,
    split: str | None = None,
    *,
    features: str | Path | None = None,
    inception: str | Path | None = None,
    weights_dir: str | Path | None = None,
    num_images: int | None = None,
    batch_size: int = 64,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Measures a trained stage-one model, the images shared by the processes.

    Args:
        source: of the images; by default what it was trained on.
        split: `val`, `test` or `train`; by default what its training validated on.
        features: a feature network's run folder, for rFID.
        inception: the Inception weights of published FIDs, a file of torch-fidelity.
        weights_dir: where the VGG weights of LPIPS lie.
        num_images: spread evenly over the split; None: all.
        out: a folder for evaluation.json, worst.png and typical.png; None: nothing is written.

    Returns:
        `figures` (numbers by name; None: not measured), `protocol` (how they came about, in plain JSON) and `verdict`
        (`ready` and `sentences`).

    Raises:
        InputError: no tokenizer there, no such split, or a network that is asked for and cannot be used.
    """
    state = join_processes()
    _check_kind(tokenizer)
    model = Autoencoder.from_pretrained(tokenizer).to(state.device)
    size, channels = model.config.image_size, model.config.channels
    network = open_features(inception, features, channels)
    data_config = training_data(tokenizer, source)
    data = load_images(data_config)
    name, images = _choose(data, split, data_config)
    if model.class_conditional and data.class_names != model.config.class_names:
        raise InputError(
            f"{tokenizer}: was trained on the classes {model.config.class_names}, data.source {data_config.source} has "
            f"{data.class_names}; give images of the same classes"
        )
    rows = _spread(len(images), num_images)
    perceptual, about_lpips = _perceptual(channels, size, weights_dir)
    found = measure(
        model,
        images,
        rows,
        batch_size,
        SEED,
        state,
        perceptual.to(state.device) if perceptual else None,
        FrechetDistances(network, len(rows), torch.device(state.device or "cpu")) if network else None,
    )
    about = {"lpips": about_lpips, "rfid": found.frechet or {"not_measured": NO_NETWORK}}
    missing = {key: lines["not_measured"] for key, lines in about.items() if "not_measured" in lines}
    missing |= {key: "not finite" for key, value in found.figures.items() if not math.isfinite(value)}
    figures = found.figures | dict.fromkeys(missing)
    document = {
        "figures": {key: figures[key] for key in ROWS if key in figures},
        "protocol": {
            "tokenizer": {
                "path": str(tokenizer),
                "hash": model.content_hash(),
                "weights_sha256": _sha256(find_model_folder(tokenizer) / "model.safetensors"),
            },
            "data": {
                "source": data_config.source,
                "split": name,
                "images": len(rows),
                "chosen": "all" if len(rows) == len(images) else f"spread evenly over {len(images)}",
                "sha256": found.sha256,
                "sha256_of": "the images' own sha256 digests (uint8, channels x height x width), in order",
                "duplicates": found.duplicates,
            },
            "image_size": list(size),
            "channels": channels,
            "resize": "cropped at the centre, then Lanczos with antialiasing",
            "pixels": "reconstructions are clipped and rounded to 8 bits before PSNR, SSIM, LPIPS and rFID",
            **_methods(model, size),
            **about,
            "not_measured": missing,
            "batch_size": batch_size,
            "device": torch.device(state.device or "cpu").type,
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        },
        "verdict": asdict(verdict(figures)),
    }
    if out and state.is_main_process:
        _write(Path(out), document, model, images, rows, found)
    state.wait_for_everyone()
    return document


def _check_kind(tokenizer: str | Path) -> None:
    try:
        kind = json.loads((find_model_folder(tokenizer) / "config.json").read_text(encoding="utf-8")).get("kind")
    except ValueError:
        return  # from_pretrained says what is wrong with it
    if kind == "prior":
        raise InputError(
            f"{tokenizer}: holds a prior; evaluate takes tokenizers so far, such as the one it was made for"
        )


def _choose(data: ImageData, split: str | None, config: DataConfig) -> tuple[str, ImageSplit]:
    name = split or data.validation_name
    if name not in data.splits:
        raise InputError(
            f"--split {name}: data.source {config.source} has {' and '.join(data.splits)}; give one of them"
        )
    return name, data.splits[name]


def _spread(total: int, wanted: int | None) -> Tensor:
    """Every row, or so many at equal distances: a split may be sorted by class."""
    count = min(wanted or total, total)
    return torch.arange(count) * total // count


def _perceptual(
    channels: int, size: tuple[int, int], weights_dir: str | Path | None
) -> tuple[Perceptual | None, dict[str, str]]:
    """LPIPS and its protocol, or why there is none. Nothing is downloaded."""
    if min(size) < SMALLEST_SIDE:
        return None, {
            "not_measured": f"images of {size[0]}x{size[1]} are smaller than VGG's {SMALLEST_SIDE}x{SMALLEST_SIDE}"
        }
    folders = [Path(weights_dir)] if weights_dir else []
    folders.append(Path(torch.hub.get_dir()) / "checkpoints")
    trunk = next((folder / TRUNK for folder in folders if (folder / TRUNK).is_file()), None)
    if trunk is None:
        return None, {"not_measured": f"no {TRUNK} in {' or '.join(map(str, folders))}; give --weights-dir DIR"}
    try:
        perceptual = build_perceptual(LPIPSConfig(), channels, size, trunk.parent)
    except InputError as error:
        return None, {"not_measured": str(error)}
    return perceptual, {"network": f"VGG-16, heads of lpips {version('lpips')}", "hash": _sha256(trunk)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _methods(model: Autoencoder, size: tuple[int, int]) -> dict[str, Any]:
    window = ssim_window(size)
    narrow = "" if window == 11 else " (the images have no room for the usual 11)"
    methods: dict[str, Any] = {
        "psnr": "of each image's mean squared error, peak 255; mean over the images",
        "ssim": f"Gaussian window {window}x{window}{narrow}, borders reflected, data range 255; mean over the images",
    }
    if model.config.loss.corruption:
        methods["psnr_corrupted"] = f"of images corrupted as in its training, seed {SEED}"
    if model.variational:
        methods["reconstruction"] = "from the posterior's mean"
        methods["elbo"] = f"one sample of the posterior an image, seed {SEED}; the loss's own likelihood, KL weight 1"
        if model.config.loss.corruption:
            methods["elbo"] += "; of corrupted images, as in its training"
        methods["active_units"] = "variance of the posterior's mean over the images above 0.01 (Burda et al. 2016)"
    return methods


def _write(
    out: Path, document: dict[str, Any], model: Autoencoder, images: ImageSplit, rows: Tensor, found: Measurements
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    order = torch.sort(found.psnr, stable=True).indices
    for name, places in {"worst": order[:NUM_PICTURED], "typical": torch.arange(len(rows))[:NUM_PICTURED]}.items():
        originals = images.read(rows[places])
        device = next(model.parameters()).device
        pictures = to_uint8(model.reconstruct(to_float(originals.to(device)))).cpu()
        captions = [f"row {row}" for row in rows[places].tolist()]
        captions += [f"{ratio:.1f} dB" for ratio in found.psnr[places].tolist()]
        titles = ["original", "reconstruction"]
        save_picture(
            contact_sheet(torch.cat([originals, pictures]), len(places), captions, titles), out / f"{name}.png"
        )
    write_json(out / "evaluation.json", document)


def _table(document: dict[str, Any]) -> str:
    protocol = document["protocol"]
    data, missing = protocol["data"], protocol["not_measured"]
    lines = [f"{data['source']}, {data['split']}: {data['images']:,} images ({data['chosen']}), {data['sha256'][:12]}"]
    if data["duplicates"]:
        lines.append(f"{data['duplicates']} of them are copies of others among them")
    for name, value in document["figures"].items():
        if name == "codebooks" and value == 1:
            continue
        title, form = ROWS[name]
        lines.append(f"  {title:<27} {form.format(value) if value is not None else 'not measured: ' + missing[name]}")
    for name in ("lpips", "rfid"):
        if "network" in protocol[name]:
            lines.append(f"{ROWS[name][0]} in {protocol[name]['network']}, {protocol[name]['hash'][:12]}")
        lines += [protocol[name]["warning"]] if "warning" in protocol[name] else []
    return "\n".join([*lines, *document["verdict"]["sentences"]])


def command(
    tokenizer: Annotated[str, typer.Argument(help="runs/NAME of a trained tokenizer (or AE, VAE ...).")],
    data: Annotated[str | None, typer.Option(help="Another source than it was trained on.")] = None,
    split: Annotated[str | None, typer.Option(help="val, test or train; what its training validated on.")] = None,
    features: Annotated[str | None, typer.Option(help="runs/NAME of a feature network, for rFID.")] = None,
    inception: Annotated[Path | None, typer.Option(help="Inception weights (torch-fidelity's .pth), for rFID.")] = None,
    weights_dir: Annotated[Path | None, typer.Option(help="Where the VGG weights of LPIPS lie.")] = None,
    num_images: Annotated[int | None, typer.Option(min=1, help="Evenly spread over the split; all by default.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="Another file for what is measured.")] = None,
) -> None:
    """Measure a tokenizer on held-out images, and say whether it is ready for stage two."""
    if json_file and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise InputError(f"--json {json_file}: expected a file in a folder that is there")
    folder = find_model_folder(tokenizer)
    out = (folder.parent if folder.name == "model" else folder) / "evaluation"
    document = evaluate(
        tokenizer,
        data,
        split,
        features=features,
        inception=inception,
        weights_dir=weights_dir,
        num_images=num_images,
        batch_size=batch_size,
        out=out,
    )
    if not PartialState().is_main_process:
        return
    if json_file:
        write_json(json_file, document)
    print(_table(document))
    print(f"{out / 'evaluation.json'}; pictures: {out / 'worst.png'}, {out / 'typical.png'}")


if __name__ == "__main__":
    run_command(command)
