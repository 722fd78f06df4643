"""Measures a trained tokenizer (or AE, VAE ...) on held-out images, and says whether it is ready for stage two."""

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.evaluation.evaluation_document import (
    DIGESTS_OF_IMAGES,
    NO_NETWORK,
    choose_split,
    described_rows,
    described_weights,
    figure_lines,
    sorted_figures,
    versions,
)
from pipelines.evaluation.evaluation_report import Picture, write_evaluation
from pipelines.evaluation.frechet import ReconstructionJudge, open_features
from pipelines.evaluation.independence import LPIPS_REASON, not_evidence
from pipelines.evaluation.measurements import measure, ssim_window
from pipelines.evaluation.verdict import verdict
from pipelines.saved.figures import TOKENIZER_ROWS, evidence_warnings
from pipelines.saved.saved_model import SavedModel
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.perceptual import MIN_SIDE, TRUNK, LPIPSConfig, Perceptual, build_perceptual, find_trunk
from stage1_tokenizer.validation import ACTIVE_VARIANCE
from twostage.core.data.dataset import ImageSplit, load_images
from twostage.core.data.spread import spread, spread_over_classes
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_float, to_uint8
from twostage.core.images.sheets import contact_sheet
from twostage.core.machine.processes import join_processes
from twostage.core.runs.model_folder import file_sha256

__all__ = ["evaluate_tokenizer", "tokenizer_table", "typical"]

NUM_SHOWN = 12
CAPTIONS = {
    "worst": "The images with the worst reconstructions, by PSNR.",
    "typical": "Typical images: those whose PSNR is nearest to the median{}.",
}
OF_JUDGE = ("recognised", "rfid")
SEED = 0  # of the posterior's noise, and of a denoising autoencoder's corruption
ROWS = TOKENIZER_ROWS


def evaluate_tokenizer(
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
        out: a folder for evaluation.json, evaluation.html, worst.png and typical.png; None: nothing is written.

    Returns:
        `figures` (numbers by name; None: not measured), `protocol` (how they came about, in plain JSON) and `verdict`
        (`ready` and `sentences`).

    Raises:
        InputError: no tokenizer there, no such split, or a network that is asked for and cannot be used.
    """
    state = join_processes()
    model = Autoencoder.from_pretrained(tokenizer).to(state.device)
    size, channels = model.config.image_size, model.config.channels
    network = open_features(inception, features, channels)
    data_config = SavedModel.find_run(tokenizer).training_data(source)
    data = load_images(data_config)
    name, images = choose_split(data, split, data_config)
    if model.class_conditional and images.labels is None:
        raise InputError(
            f"--split {name}: has no labels, but {tokenizer} was trained with classes; choose another split"
        )
    if model.class_conditional and data.class_names != model.config.class_names:
        raise InputError(
            f"{tokenizer}: was trained on the classes {model.config.class_names}, data.source {data_config.source} has "
            f"{data.class_names}; give images of the same classes"
        )
    rows = spread(len(images), num_images)
    perceptual, about_lpips = _perceptual(channels, size, weights_dir)
    found = measure(
        model,
        images,
        rows,
        batch_size,
        SEED,
        state,
        perceptual.to(state.device) if perceptual else None,
        ReconstructionJudge(network, len(rows), torch.device(state.device or "cpu"), data.class_names)
        if network
        else None,
    )
    about = {"lpips": about_lpips, "rfid": found.judged or {}}
    missing = found.missing | ({"lpips": about_lpips["not_measured"]} if "not_measured" in about_lpips else {})
    missing |= {} if network else {"rfid": NO_NETWORK}
    figures, missing = sorted_figures(found.figures, missing, ROWS)
    measured = [name for name in OF_JUDGE if figures.get(name) is not None]
    doubts = not_evidence(model.config, tokenizer, network, features, data_config.source, measured)
    if figures.get("lpips") is not None and any(net.type == "lpips" for net in model.config.trained_against):
        doubts["lpips"] = LPIPS_REASON
    document = {
        "figures": figures,
        "protocol": {
            "tokenizer": described_weights(tokenizer, hash=model.content_hash()),
            "data": {
                "source": data_config.source,
                "split": name,
                "images": len(rows),
                "chosen": described_rows(len(rows), len(images)),
                "sha256": found.sha256,
                "sha256_of": DIGESTS_OF_IMAGES,
                "duplicates": found.duplicates,
            },
            "image_size": list(size),
            "channels": channels,
            "resize": "cropped at the centre, then Lanczos with antialiasing",
            "pixels": "reconstructions are clipped and rounded to 8 bits before PSNR, SSIM, LPIPS and rFID",
            **_methods(model, size),
            **about,
            "trained_against": [net.model_dump() for net in model.config.trained_against],
            "not_evidence": doubts,
            "not_measured": missing,
            "batch_size": batch_size,
            "device": torch.device(state.device or "cpu").type,
            "versions": versions(),
        },
        "verdict": asdict(verdict(figures, doubts)),
    }
    if out and state.is_main_process:
        notes = [*_measured_on(document), *_notes(document)]
        pictures = _pictures(model, images, rows, found.psnr)
        write_evaluation(Path(out), f"Evaluation of {tokenizer}", document, ROWS, notes, pictures)
    state.wait_for_everyone()
    return document


def _perceptual(
    channels: int, size: tuple[int, int], weights_dir: str | Path | None
) -> tuple[Perceptual | None, dict[str, str]]:
    """LPIPS and its protocol, or why there is none. Nothing is downloaded."""
    if min(size) < MIN_SIDE:
        return None, {"not_measured": f"images of {size[0]}x{size[1]} are smaller than VGG's {MIN_SIDE}x{MIN_SIDE}"}
    trunk, folders = find_trunk(weights_dir)
    if trunk is None:
        return None, {"not_measured": f"no {TRUNK} in {' or '.join(map(str, folders))}; give --weights-dir DIR"}
    try:
        perceptual = build_perceptual(LPIPSConfig(), channels, size, trunk.parent)
    except InputError as error:
        return None, {"not_measured": str(error)}
    return perceptual, {"network": f"VGG-16, heads of lpips {version('lpips')}", "hash": file_sha256(trunk)}


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
        methods["active_units"] = (
            f"variance of the posterior's mean over the images above {ACTIVE_VARIANCE} (Burda et al. 2016)"
        )
    return methods


def typical(ratios: Tensor, labels: Tensor | None, count: int) -> Tensor:
    """Which of n images are typical: of each class in turn those whose PSNR is nearest to the class's median.

    Args:
        ratios: (n,) dB.
        labels: (n,) int64; None: the images are one class.

    Returns:
        (min(count, n),) int64.
    """

    def nearest_to_median(places: Tensor, wanted: int) -> Tensor:
        return places[(ratios[places] - ratios[places].median()).abs().argsort(stable=True)[:wanted]]

    return spread_over_classes(labels, len(ratios), count, nearest_to_median)


def _pictures(model: Autoencoder, images: ImageSplit, rows: Tensor, ratios: Tensor) -> list[Picture]:
    pictures = []
    worst, labels = torch.sort(ratios, stable=True).indices[:NUM_SHOWN], images.read_labels(rows)
    shown = {"worst": worst, "typical": typical(ratios, labels, NUM_SHOWN)}
    of_class = "" if labels is None else " of their class, the classes in turn"
    for name, places in shown.items():
        originals = images.read(rows[places])
        device = next(model.parameters()).device
        images_back = to_uint8(model.reconstruct(to_float(originals.to(device)))).cpu()
        captions = [f"row {row}" for row in rows[places].tolist()]
        captions += [f"{ratio:.1f} dB" for ratio in ratios[places].tolist()]
        titles = ["original", "reconstruction"]
        sheet = contact_sheet(torch.cat([originals, images_back]), len(places), captions, titles)
        pictures.append((name, sheet, CAPTIONS[name].format(of_class)))
    return pictures


def tokenizer_table(document: dict[str, Any]) -> str:
    """What the command prints of :func:`evaluate_tokenizer`'s result."""
    figures = {name: value for name, value in document["figures"].items() if (name, value) != ("codebooks", 1)}
    lines = figure_lines(figures, document["protocol"], ROWS)
    return "\n".join([*_measured_on(document), *lines, *_notes(document)])


def _measured_on(document: dict[str, Any]) -> list[str]:
    data = document["protocol"]["data"]
    lines = [f"{data['source']}, {data['split']}: {data['images']:,} images ({data['chosen']}), {data['sha256'][:12]}"]
    return lines + ([f"{data['duplicates']} of them are copies of others among them"] if data["duplicates"] else [])


def _notes(document: dict[str, Any]) -> list[str]:
    """How to read the figures, and the verdict."""
    protocol, notes = document["protocol"], []
    for name in ("lpips", "rfid"):
        if "network" in protocol[name]:
            notes.append(f"{ROWS[name][0]} in {protocol[name]['network']}, {protocol[name]['hash'][:12]}")
        notes += [protocol[name]["warning"]] if "warning" in protocol[name] else []
    return [*notes, *evidence_warnings(protocol["not_evidence"], ROWS), *document["verdict"]["sentences"]]
