"""A tokenizer as two programs that run without this project: images to codes, and codes to images, as ONNX and by
`torch.export`. Each is compared with PyTorch as soon as it is written, and a wrong one is not kept."""

import copy
import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from stage1_tokenizer.autoencoder import Autoencoder
from twostage.core.data.shapes import draw_shapes
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_float

__all__ = ["Decoder", "Encoder", "Format", "check_libraries", "export_programs"]

Format = Literal["onnx", "torch_export"]
Run = Callable[[Tensor], Tensor]

SUFFIX = {"onnx": "onnx", "torch_export": "pt2"}
BATCHES = (1, 5, *[16] * 4)
"""Sizes that are tried: 70 images in all."""
TOLERANCE = 1e-4
"""Of pixels in [-1, 1], and of latents beside their largest value."""
ROUNDING = 1e-5
"""Of the encoder's largest output: where so much noise changes a code, two codes are equally near within rounding."""
NOISE_DRAWS = 16


class Encoder(nn.Module):
    """Images (B, C, H, W) float32 in [-1, 1] -> codes (B, h, w) int64, or z (B, latent_channels, h, w) of a continuous
    family. A copy without the decoder's weights."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        del self.model.decoder

    def forward(self, images: Tensor) -> Tensor:
        output = self.model.encode(images)
        return output.z.contiguous() if output.indices is None else output.indices


class Decoder(nn.Module):
    """What :class:`Encoder` gives -> images (B, C, H, W) float32 in [-1, 1]. A copy without the encoder's weights."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        del self.model.encoder

    def forward(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes) if self.model.codebook_size is None else self.model.decode_indices(codes)


def check_libraries() -> None:
    """Refuses to write ONNX where its libraries are missing.

    Raises:
        InputError: names those that are missing.
    """
    names = ("onnx", "onnxscript", "onnxruntime")
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise InputError(f"--onnx: needs {' and '.join(missing)}; run pip install 'twostage[export]'")


@torch.no_grad()
def export_programs(model: Autoencoder, folder: Path, formats: Sequence[Format]) -> list[str]:
    """Writes `onnx/encoder.onnx`, `onnx/decoder.onnx`, `torch_export/encoder.pt2`, `torch_export/decoder.pt2`, those
    of the ``formats``; any batch size fits. ``model`` is on the CPU.

    Returns:
        For each, a sentence: how it was compared and how well it agrees.

    Raises:
        InputError: one cannot be written, or does not compute what PyTorch does; that one is removed.
    """
    size, channels = model.config.image_size, model.config.channels
    images = to_float(torch.from_numpy(draw_shapes(0, sum(BATCHES), size, channels)))
    encoder, decoder = Encoder(model), Decoder(model)
    continuous = model.codebook_size is None
    sentences = []
    for name, module, values in (("encoder", encoder, images), ("decoder", decoder, encoder(images))):
        given, made = ("images", "z" if continuous else "codes")[:: 1 if name == "encoder" else -1]
        exported = _trace(module, values[:2], name)
        for form in formats:
            file = folder / form / f"{name}.{SUFFIX[form]}"
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of the exporters' own making: nothing that a user can mend
                    run = _write(exported, file, form, given, made)
                agreement = _compare(module, run, values)
            except InputError as error:
                file.unlink(missing_ok=True)
                raise InputError(f"{form}/{file.name}: {error}; the file was removed") from None
            sentences.append(f"{form}/{file.name}: {given} to {made}, {agreement}")
    return sentences


def _trace(module: nn.Module, example: Tensor, name: str) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # the tracer's errors have no common family
        raise InputError(f"the {name} cannot be exported by this torch ({_first_line(error)})") from None


def _write(exported: torch.export.ExportedProgram, file: Path, form: Format, given: str, made: str) -> Run:
    """Writes the program, and reads it back: what runs it."""
    try:
        if form == "torch_export":
            torch.export.save(exported, file)
            return torch.export.load(file).module()
        torch.onnx.export(
            exported,
            f=file,
            input_names=[given],
            output_names=[made],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors alone
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # nor have the exporters' and the runtime's
        raise InputError(f"cannot be written by this torch and onnxruntime ({_first_line(error)})") from None
    return lambda values: torch.from_numpy(session.run([made], {given: values.numpy()})[0])


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _compare(module: Encoder | Decoder, run: Run, values: Tensor) -> str:
    """How well ``run`` agrees with ``module``, batch by batch, in words.

    Raises:
        InputError: it does not.
    """
    worst, limit, flips, cells = 0.0, TOLERANCE, 0, 0
    for part in values.split(list(BATCHES)):
        expected, found = module(part), run(part)
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise InputError(
                f"gives {tuple(found.shape)} {found.dtype} for {len(part)} at a time where PyTorch gives "
                f"{tuple(expected.shape)} {expected.dtype}"
            )
        if expected.is_floating_point():
            limit = max(limit, TOLERANCE * expected.abs().max().item())
            worst = max(worst, (found - expected).abs().nan_to_num(math.inf).max().item())
            continue
        differing = found != expected
        cells, flips = cells + differing.numel(), flips + int(differing.sum())
        if differing.any() and (differing & ~_within_rounding(module.model, part, found)).any():
            raise InputError(f"gives other codes than PyTorch in {int(differing.sum())} of {differing.numel()} cells")
    if worst > limit:
        raise InputError(f"differs from PyTorch by up to {worst:.2g}, expected at most {limit:.2g}")
    how = f"compared with PyTorch on {len(values)} drawn images, 1, 5 and 16 at a time"
    if not cells:
        return f"{how}: the same to {worst:.1e}"
    if not flips:
        return f"{how}: the same in all {cells:,} cells"
    return f"{how}: the same in all of {cells:,} cells but {flips}, where two codes are equally near within rounding"


def _within_rounding(model: Autoencoder, images: Tensor, found: Tensor) -> Tensor:
    """Where noise of the size of rounding errors gives the codes ``found`` (B, h, w): bool, for all codes of a cell
    together."""
    encoded, depth = model.run_encoder(images), model.bottleneck.depth
    reached, generator = torch.zeros_like(found, dtype=torch.bool), torch.Generator().manual_seed(0)
    for _ in range(NOISE_DRAWS):
        noise = torch.randn(encoded.shape, generator=generator) * ROUNDING * encoded.abs().max()
        codes = model.bottleneck.encode(encoded + noise).indices
        reached |= (codes == found).unflatten(-1, (-1, depth)).all(-1).repeat_interleave(depth, -1)
    return reached
