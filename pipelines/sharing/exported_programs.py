"""A tokenizer as two programs that run without twostage, images to codes and codes to images: as ONNX and by
`torch.export`. Each is compared with PyTorch as soon as it is written, and a wrong one is removed."""

import copy
import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from stage1_tokenizer.autoencoder import Autoencoder
from twostage.core.data.shapes import draw_shapes
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_float
from twostage.core.machine.installation import pip_install
from twostage.core.wording import one_line

__all__ = ["FORMATS", "Decoder", "Encoder", "Format", "export_programs"]

Format = Literal["onnx", "torch_export"]
FORMATS: tuple[Format, ...] = get_args(Format)
Run = Callable[[Tensor], Tensor]

OPTIONS = {"onnx": "--onnx", "torch_export": "--torch-export"}
SUFFIX = {"onnx": "onnx", "torch_export": "pt2"}
BATCHES = (1, 5, *[16] * 4)
"""The batch sizes of the comparison: 70 images in all."""
TOLERANCE = 1e-4
"""The largest difference that passes: absolute for pixels in [-1, 1], relative to the largest value for latents."""
ROUNDING = 1e-5
"""Noise relative to the encoder's largest output. If so little noise changes a code, two codes are equally near."""
NOISE_DRAWS = 16


class Encoder(nn.Module):
    """Images (B, C, H, W) float32 in [-1, 1] -> codes (B, h, w) int64, or z (B, latent_channels, h, w) of a continuous
    family. A copy of the model without its decoder."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        del self.model.decoder

    def forward(self, images: Tensor) -> Tensor:
        output = self.model.encode(images)
        return output.z.contiguous() if output.indices is None else output.indices


class Decoder(nn.Module):
    """:class:`Encoder`'s output -> images (B, C, H, W) float32 in [-1, 1]. A copy of the model without its encoder."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        del self.model.encoder

    def forward(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes) if self.model.codebook_size is None else self.model.decode_indices(codes)


@torch.no_grad()
def export_programs(model: Autoencoder, folder: Path, formats: Sequence[Format]) -> list[str]:
    """Write `onnx/encoder.onnx` and `onnx/decoder.onnx`, or `torch_export/encoder.pt2` and `torch_export/decoder.pt2`,
    for any batch size. ``model`` is on the CPU.

    Returns:
        A sentence for each program: how it was compared and how well it agrees.

    Raises:
        InputError: the model sees a condition, libraries are missing, a program cannot be written, or it does not
            compute what PyTorch does. A program that fails is removed.
    """
    if not formats:
        return []
    for name in model.conditions:
        options = ", ".join(OPTIONS[form] for form in formats)
        raise InputError(
            f"{options}: programs take images or latents only, but this model also sees a condition (model.condition "
            f"{name!r}). Omit the option; the exported folder works with twostage"
        )
    libraries = ("onnx", "onnxscript", "onnxruntime") if "onnx" in formats else ()
    if missing := [name for name in libraries if importlib.util.find_spec(name) is None]:
        raise InputError(f"--onnx: {' and '.join(missing)} not installed. Run: {pip_install('export')}")
    size, channels = model.config.image_size, model.config.channels
    images = to_float(torch.from_numpy(draw_shapes(0, sum(BATCHES), size, channels)))
    encoder, decoder = Encoder(model), Decoder(model)
    latent = "z" if model.codebook_size is None else "codes"
    sentences = []
    for name, module, values, input_name, output_name in (
        ("encoder", encoder, images, "images", latent),
        ("decoder", decoder, encoder(images), latent, "images"),
    ):
        exported = _trace(module, values[:2], name)
        for form in formats:
            file = folder / form / f"{name}.{SUFFIX[form]}"
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the exporters' own, which users cannot fix
                    run = _write(exported, file, form, input_name, output_name)
                agreement = _compare(module, run, values)
            except InputError as error:
                file.unlink(missing_ok=True)
                raise InputError(f"{form}/{file.name}: {error}. The file was removed.") from None
            sentences.append(f"{form}/{file.name}: {input_name} to {output_name}, {agreement}")
    return sentences


def _trace(module: nn.Module, example: Tensor, name: str) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # the tracer raises errors of many kinds
        raise InputError(
            f"this torch cannot export the {name} ({type(error).__name__}: {one_line(error)}). "
            "Install another version of torch"
        ) from None


def _write(exported: torch.export.ExportedProgram, file: Path, form: Format, input_name: str, output_name: str) -> Run:
    """Write the program and read it back; returns a function that runs it."""
    try:
        if form == "torch_export":
            torch.export.save(exported, file)
            return torch.export.load(file).module()
        torch.onnx.export(
            exported,
            f=file,
            input_names=[input_name],
            output_names=[output_name],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # exporters and the runtime raise nearly anything
        raise InputError(
            f"this torch or onnxruntime cannot write it ({type(error).__name__}: {one_line(error)}). Try other versions"
        ) from None
    return lambda values: torch.from_numpy(session.run([output_name], {input_name: values.numpy()})[0])


def _compare(module: Encoder | Decoder, run: Run, values: Tensor) -> str:
    """How well ``run`` agrees with ``module``, batch by batch, in words.

    Raises:
        InputError: it does not agree.
    """
    worst, limit, flips, cells = 0.0, TOLERANCE, 0, 0
    for part in values.split(list(BATCHES)):
        expected, found = module(part), run(part)
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise InputError(
                f"returns {tuple(found.shape)} {found.dtype} for a batch of {len(part)}, PyTorch returns "
                f"{tuple(expected.shape)} {expected.dtype}"
            )
        if expected.is_floating_point():
            limit = max(limit, TOLERANCE * expected.abs().max().item())
            worst = max(worst, (found - expected).abs().nan_to_num(math.inf).max().item())
            continue
        differing = found != expected
        cells, flips = cells + differing.numel(), flips + int(differing.sum())
        if differing.any() and (differing & ~_within_rounding(module.model, part, found)).any():
            raise InputError(f"{int(differing.sum())} of {differing.numel()} codes differ from PyTorch, expected none")
    if worst > limit:
        raise InputError(f"differs from PyTorch by up to {worst:.2g}, expected at most {limit:.2g}")
    how = f"compared with PyTorch on {len(values)} images in batches of 1, 5 and 16"
    if not cells:
        return f"{how}: largest difference {worst:.1e}"
    if not flips:
        return f"{how}: all {cells:,} codes equal"
    return (
        f"{how}: {cells - flips:,} of {cells:,} codes equal; at the others, two codes are equally near within rounding"
    )


def _within_rounding(model: Autoencoder, images: Tensor, found: Tensor) -> Tensor:
    """(B, h, w) bool: where noise as small as rounding errors leads to the codes ``found``, in all codes of a cell."""
    # Finer scales encode what coarser ones leave over, so all scales belong together.
    encoded, together = (
        model.run_encoder(images),
        found.shape[-1] if model.bottleneck.scales else model.bottleneck.depth,
    )
    reached, generator = torch.zeros_like(found, dtype=torch.bool), torch.Generator().manual_seed(0)
    for _ in range(NOISE_DRAWS):
        noise = torch.randn(encoded.shape, generator=generator) * ROUNDING * encoded.abs().max()
        codes = model.bottleneck.encode(encoded + noise).indices
        reached |= (codes == found).unflatten(-1, (-1, together)).all(-1).repeat_interleave(together, -1)
    return reached
