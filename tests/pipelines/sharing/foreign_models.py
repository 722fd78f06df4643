"""Helpers for the tests of imported tokenizers: images, the comparison, and the tokenizers of taming-transformers and
LlamaGen, which no package index has, written by the names of their weights."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.sharing.imported_tokenizer import import_tokenizer
from stage1_tokenizer.autoencoder import Autoencoder
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_float

__all__ = ["Reference", "agree", "images", "imported", "refused"]

LAYOUTS = {
    "taming": {"down": "encoder.down", "up": "decoder.up", "block": "block", "attn": "attn",
               "mid": ("mid.block_1", "mid.attn_1", "mid.block_2")},
    "llamagen": {"down": "encoder.conv_blocks", "up": "decoder.conv_blocks", "block": "res", "attn": "attn",
                 "mid": ("mid.0", "mid.1", "mid.2")},
}  # fmt: skip


@dataclass
class Reference:
    """The forward pass of taming's `VQModel` and of LlamaGen's VQ over a state dict; missing weights
    are drawn when they are first used."""

    layout: str = "taming"
    ch: int = 32
    ch_mult: tuple[int, ...] = (1, 1, 2)
    blocks: int = 1
    attended: tuple[int, ...] = (2,)
    """Levels, 0 being the full resolution."""
    inner: int = 12
    dim: int = 4
    channels: int = 3
    cosine: bool = False
    state: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names, self.generator = LAYOUTS[self.layout], torch.Generator().manual_seed(0)
        vectors = self.encode(images(4, self.channels)).transpose(0, 1).flatten(1).t()  # so that codes are used
        lengths = torch.rand(len(vectors), 1, generator=self.generator) + 0.5
        noise = torch.randn(vectors.shape, generator=self.generator)
        self.state["quantize.embedding.weight"] = (vectors + 0.1 * vectors.std() * noise)[:48] * lengths[:48]
        self.decode_codes(self.codes(images(1, self.channels)))

    def weights(self, name: str, mean: float, *shape: int) -> Tensor:
        if name not in self.state:
            fan_in = 16 if len(shape) == 1 else shape[1] * shape[2] * shape[3]
            self.state[name] = mean + torch.randn(shape, generator=self.generator) * fan_in**-0.5
        return self.state[name]

    def conv(self, name: str, x: Tensor, width: int, kernel: int = 3, **options: int) -> Tensor:
        weight = self.weights(f"{name}.weight", 0, width, x.shape[1], kernel, kernel)
        return F.conv2d(x, weight, self.weights(f"{name}.bias", 0, width), **options)

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights(f"{name}.weight", 1, x.shape[1]), self.weights(f"{name}.bias", 0, x.shape[1])
        return F.group_norm(x, 32, weight, bias, eps=1e-6)

    def residual(self, name: str, x: Tensor, width: int) -> Tensor:
        y = self.norm(f"{name}.norm1", x)
        y = self.conv(f"{name}.conv1", y * torch.sigmoid(y), width, padding=1)
        y = self.norm(f"{name}.norm2", y)
        y = self.conv(f"{name}.conv2", y * torch.sigmoid(y), width, padding=1)
        return y + (x if x.shape[1] == width else self.conv(f"{name}.nin_shortcut", x, width, 1))

    def attention(self, name: str, x: Tensor) -> Tensor:
        y, width = self.norm(f"{name}.norm", x), x.shape[1]
        query, key, value = (self.conv(f"{name}.{part}", y, width, 1).flatten(2) for part in "qkv")
        shares = torch.bmm(query.transpose(1, 2), key).mul(width**-0.5).softmax(2)
        return x + self.conv(f"{name}.proj_out", torch.bmm(value, shares.transpose(1, 2)).view_as(x), width, 1)

    def middle(self, part: str, x: Tensor) -> Tensor:
        first, attention, last = (f"{part}.{name}" for name in self.names["mid"])
        return self.residual(last, self.attention(attention, self.residual(first, x, x.shape[1])), x.shape[1])

    def level(self, name: str, x: Tensor, level: int, blocks: int) -> Tensor:
        for i in range(blocks):
            x = self.residual(f"{name}.{self.names['block']}.{i}", x, self.ch * self.ch_mult[level])
            if level in self.attended:
                x = self.attention(f"{name}.{self.names['attn']}.{i}", x)
        return x

    def end(self, part: str, x: Tensor, width: int) -> Tensor:
        x = self.norm(f"{part}.norm_out", x)
        return self.conv(f"{part}.conv_out", x * torch.sigmoid(x), width, padding=1)

    def encode(self, x: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", x, self.ch, padding=1)
        for level in range(len(self.ch_mult)):
            name = f"{self.names['down']}.{level}"
            x = self.level(name, x, level, self.blocks)
            if level < len(self.ch_mult) - 1:
                x = self.conv(f"{name}.downsample.conv", F.pad(x, (0, 1, 0, 1)), x.shape[1], stride=2)
        return self.conv("quant_conv", self.end("encoder", self.middle("encoder", x), self.inner), self.dim, 1)

    def codebook(self) -> Tensor:
        codebook = self.state["quantize.embedding.weight"]
        return F.normalize(codebook, dim=-1) if self.cosine else codebook

    def codes(self, x: Tensor) -> Tensor:
        vectors = self.encode(x).permute(0, 2, 3, 1)
        vectors = F.normalize(vectors, dim=-1) if self.cosine else vectors
        return (vectors[..., None, :] - self.codebook()).square().sum(-1).argmin(-1)

    def decode_codes(self, codes: Tensor) -> Tensor:
        x = self.conv("post_quant_conv", self.codebook()[codes].permute(0, 3, 1, 2), self.inner, 1)
        x = self.middle("decoder", self.conv("decoder.conv_in", x, self.ch * self.ch_mult[-1], padding=1))
        for i, level in enumerate(reversed(range(len(self.ch_mult)))):
            name = f"{self.names['up']}.{level if self.layout == 'taming' else i}"
            x = self.level(name, x, level, self.blocks + 1)
            if level:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self.conv(f"{name}.upsample.conv", x, x.shape[1], padding=1)
        return self.end("decoder", x, self.channels)

    def config(self, **changes) -> dict:
        """The YAML file of a taming checkpoint; ``changes`` are to `ddconfig`."""
        ddconfig = {
            "double_z": False, "z_channels": self.inner, "resolution": 16, "in_channels": self.channels,
            "out_ch": self.channels, "ch": self.ch, "ch_mult": list(self.ch_mult), "num_res_blocks": self.blocks,
            "attn_resolutions": [16 >> level for level in self.attended], "dropout": 0.0,
        }  # fmt: skip
        params = {"embed_dim": self.dim, "n_embed": 48, "ddconfig": ddconfig | changes, "lossconfig": {"target": "x"}}
        return {"model": {"base_learning_rate": 4.5e-6, "target": "taming.models.vqgan.VQModel", "params": params}}


def images(count: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return to_float(torch.randint(0, 256, (count, channels, 16, 16), generator=generator, dtype=torch.uint8))


def imported(*arguments, **options) -> Autoencoder:
    """The imported tokenizer."""
    return import_tokenizer(*arguments, **options)[0]


def agree(model: Autoencoder, folder: Path, x: Tensor, codes: Tensor, pixels: Tensor, at_least: int = 12) -> None:
    """Check that the imported model, also when read back from its folder, gives the source's codes and pixels."""
    assert len(codes.unique()) >= at_least  # with few codes, equality would prove little
    for each in (model, Autoencoder.from_pretrained(folder)):
        encoded = each.encode(x)
        assert encoded.indices is not None
        assert torch.equal(encoded.indices, codes)
        assert (each.decode_indices(codes) - pixels.clamp(-1, 1)).abs().max() < 1e-4
        assert (each.decode(encoded.z) - pixels.clamp(-1, 1)).abs().max() < 1e-4
        with torch.no_grad():
            assert (each.decoder(encoded.z) - pixels).abs().max() < 1e-4 * pixels.abs().max()
    assert pixels.std() > 0.1


def refused(*arguments, **options) -> str:
    """The message that refuses the import."""
    with pytest.raises(InputError) as refusal:
        import_tokenizer(*arguments, **options)
    return str(refusal.value)
