"""Decode codes, reconstruct images and blend between two images with a tokenizer. No prior is needed.

Axes: n images, C channels, H and W pixels, h and w cells of the code grid.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.drawing.batch_size import ROWS, ROWS_DECODED_ON_GPU
from pipelines.saved.saved_model import tokenizer_of_codes
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.codes import CodeCache
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_float, to_integers, to_shown
from twostage.core.machine.command import print_once

__all__ = [
    "blend_images",
    "check_image",
    "decode_codes",
    "encode_images",
    "encode_in_parts",
    "find_decoder",
    "rebuild_images",
]


@torch.no_grad()
def decode_codes(tokenizer: Autoencoder, codes: Tensor) -> Tensor:
    """Codes (n, h, w) -> images (n, C, H, W) uint8 or uint16 on the CPU, each independent of the others."""
    padded = F.pad(codes, (0, 0, 0, 0, 0, -len(codes) % ROWS))
    at_once = ROWS if codes.device.type == "cpu" else ROWS_DECODED_ON_GPU
    images = [to_integers(tokenizer.decode_indices(part), tokenizer.config.bits) for part in padded.split(at_once)]
    return torch.cat(images).cpu()[: len(codes)]


def find_decoder(codes: str) -> Callable[[Tensor], Tensor] | None:
    """Decodes by the tokenizer that wrote the codes, into images to show; None, and a line with the reason, without it.

    Raises:
        InputError: there are no such codes.
    """
    cache = CodeCache(codes)
    try:
        tokenizer = tokenizer_of_codes(cache)
    except (InputError, OSError) as error:
        print_once(f"No samples are drawn during training: {error}")
        return None
    shown = tokenizer.config.shown_channels
    return lambda given: to_shown(decode_codes(tokenizer.to(given.device), given), shown)


@torch.no_grad()
def rebuild_images(tokenizer: Autoencoder, images: Tensor, given: Tensor | None = None) -> Tensor:
    """The reconstructions of images (n, C, H, W) uint8 or uint16; each is independent of the others in its batch.

    Args:
        given: (n, ...), what the tokenizer sees beside each image, see :meth:`Autoencoder.read_given`.
    """
    latents = [tokenizer.bottleneck.encode(part).z for part in encode_in_parts(tokenizer, images, given)]
    return _decode_parts(tokenizer, latents, len(images), given)


@torch.no_grad()
def blend_images(
    tokenizer: Autoencoder, first: Tensor, second: Tensor, num_images: int, given: Tensor | None = None
) -> Tensor:
    """Images from ``first`` to ``second``, both (C, H, W): (num_images, C, H, W) of the same type. The first and the
    last are the reconstructions of the two.

    The outputs of the encoder are blended linearly, then passed through the bottleneck as usual. So the latents of a
    plain autoencoder, and the posterior means of a variational one, are blended as they are. For a quantizer, each cell
    takes the code nearest to its blend, so that every image between the two can be written in codes.

    Args:
        given: (1, ...), what the tokenizer sees beside both, such as their class.

    Raises:
        InputError: fewer than 2 images.
    """
    if num_images < 2:
        raise InputError(f"num_images {num_images}: expected at least 2, which include both ends")
    given = None if given is None else given.expand(num_images, *given.shape[1:])
    (both,) = encode_in_parts(tokenizer, torch.stack([first, second]), None if given is None else given[:2])
    shares = torch.linspace(0, 1, num_images, device=both.device).view(-1, 1, 1, 1)
    blends = _in_parts(torch.lerp(both[:1], both[1:2], shares))
    return _decode_parts(tokenizer, [tokenizer.bottleneck.encode(part).z for part in blends], num_images, given)


def check_image(tokenizer: Autoencoder, image: Tensor, name: str = "image", batch: bool = False) -> None:
    """Refuses anything but an image (C, H, W), or a ``batch`` of them (n, C, H, W), of the model's shape and bits.

    Raises:
        InputError: another shape or type.
    """
    expected = (tokenizer.config.channels, *tokenizer.config.image_size)
    bits = tokenizer.config.bits
    if image.dtype != getattr(torch, f"uint{bits}") or tuple(image.shape[-3:]) != expected or image.ndim != 3 + batch:
        axes = "(channels, height, width)" + " each" * batch
        raise InputError(
            f"{name}: expected uint{bits} with the shape {expected}, {axes}, got {image.dtype} with "
            f"{tuple(image.shape)}. "
            "given_images.read_image converts an image file to that shape"
        )


def encode_in_parts(tokenizer: Autoencoder, images: Tensor, given: Tensor | None = None) -> list[Tensor]:
    """The encoder's output for images (n, C, H, W) uint8 or uint16, in batches of `ROWS`, the last one filled up."""
    device, parts = next(tokenizer.parameters()).device, _in_parts(images)
    pairs = zip(parts, _given_of_parts(given, len(parts)), strict=True)
    return [tokenizer.run_encoder(to_float(part.to(device)), beside) for part, beside in pairs]


@torch.no_grad()
def encode_images(tokenizer: Autoencoder, images: Tensor) -> Tensor:
    """Images (n, C, H, W) uint8 -> codes (n, h, w) int64; each is independent of the others in its batch."""
    parts = [tokenizer.bottleneck.encode(part).indices for part in encode_in_parts(tokenizer, images)]
    return torch.cat([part for part in parts if part is not None])[: len(images)]


def _in_parts(rows: Tensor) -> tuple[Tensor, ...]:
    """Batches of `ROWS` rows, the last one filled up, so that the result for a row does not depend on their number."""
    return rows[torch.arange(-(-len(rows) // ROWS) * ROWS).clamp(max=len(rows) - 1)].split(ROWS)


def _given_of_parts(given: Tensor | None, num_parts: int) -> Sequence[Tensor | None]:
    return [None] * num_parts if given is None else _in_parts(given)


def _decode_parts(tokenizer: Autoencoder, latents: list[Tensor], count: int, given: Tensor | None) -> Tensor:
    """The first ``count`` images (count, C, H, W) uint8 or uint16, on the CPU."""
    pairs = zip(latents, _given_of_parts(given, len(latents)), strict=True)
    images = [to_integers(tokenizer.decode(z, beside), tokenizer.config.bits).cpu() for z, beside in pairs]
    return torch.cat(images)[:count]
