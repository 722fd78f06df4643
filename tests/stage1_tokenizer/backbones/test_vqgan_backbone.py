"""VQGAN's encoder and decoder: their sizes, their layers, and that diffusers' own model has as many weights."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import VQModel
from messages import refuses
from torch import nn

from stage1_tokenizer.backbones.vqgan_backbone import (
    Attention,
    Downsample,
    Level,
    Upsample,
    VQGANConfig,
    VQGANDecoder,
    VQGANEncoder,
)
from twostage.core.config.sections import parse_config

TINY = {"channels": 8, "channel_mult": [1, 2, 1], "num_res_blocks": 1, "inner_channels": 6, "norm_groups": 4}


def tiny(**changes) -> VQGANConfig:
    return VQGANConfig.model_validate(TINY | changes)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("channel_mult", "factor"), [([1], 1), ([2, 1], 2), ([1, 2, 1], 4)])
def test_images_become_latents_and_latents_images(channel_mult, factor, channels):
    config = tiny(channel_mult=channel_mult)
    encoder, decoder = config.build((channels, 8, 12), encoded_channels=10, latent_channels=5)
    assert config.factor == factor
    assert encoder(torch.zeros(2, channels, 8, 12)).shape == (2, 10, 8 // factor, 12 // factor)
    assert decoder(torch.zeros(2, 5, 8 // factor, 12 // factor)).shape == (2, channels, 8, 12)


def test_every_weight_learns():
    torch.manual_seed(0)
    encoder, decoder = VQGANEncoder(tiny(), 3, 4), VQGANDecoder(tiny(), 3, 4)
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    (decoder(encoder(images)) - images).square().mean().backward()
    for part in (encoder, decoder):
        for name, parameter in part.named_parameters():
            if name.endswith("key.bias"):
                continue  # softmax does not see it
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_the_last_layer_gives_unbounded_pixels():
    decoder = VQGANDecoder(tiny(), 3, 4)
    nn.init.zeros_(decoder.conv_out.weight)
    for value in (-7.0, 7.0):
        assert decoder.conv_out.bias is not None
        nn.init.constant_(decoder.conv_out.bias, value)
        assert (decoder(torch.randn(1, 4, 2, 2)) == value).all()


def test_the_pixels_stay_float32_under_autocast():
    decoder = VQGANDecoder(tiny(), 3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decoder(torch.randn(1, 4, 2, 2)).dtype == torch.float32


def only_tap(layer: nn.Conv2d, row: int, column: int) -> nn.Conv2d:
    """The kernel that copies one pixel of its 3x3 window."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    layer.weight.data[:, :, row, column] = torch.eye(layer.in_channels)
    return layer


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 0), (2, 2)])
def test_halving_pads_below_and_on_the_right(row, column):
    x = torch.arange(24.0).view(1, 1, 4, 6).add(1)
    padded = torch.zeros(1, 1, 5, 7)
    padded[:, :, :4, :6] = x
    assert torch.equal(
        only_tap(Downsample(1), row, column)(x), padded[:, :, row : row + 3 : 2, column : column + 5 : 2]
    )


@pytest.mark.parametrize("grid", [(2, 3), (16, 17)])
def test_doubling_repeats_each_cell(grid):
    x = torch.randn(1, 2, *grid)
    assert torch.equal(only_tap(Upsample(2), 1, 1)(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("grid", [(15, 17), (16, 17)])  # fewer than 256 cells, and more
def test_doubling_in_one_operation_has_the_gradients_of_the_two_steps(grid):
    torch.manual_seed(2)
    layer, x = Upsample(3).double(), torch.randn(2, 3, *grid).double().requires_grad_()
    wanted = [x, layer.weight, layer.bias]
    two_steps = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), layer.weight, layer.bias, padding=1)
    one = layer(x)
    torch.testing.assert_close(one, two_steps)
    pull = torch.randn_like(one)
    torch.testing.assert_close(torch.autograd.grad(one, wanted, pull), torch.autograd.grad(two_steps, wanted, pull))


def test_attention_is_softmax_attention_in_one_head_plus_its_input():
    torch.manual_seed(1)
    block, x = Attention(8, tiny().norm), torch.randn(2, 8, 3, 5)
    y = F.group_norm(x, 4, eps=1e-6)
    query, key, value = (layer(y).flatten(2) for layer in (block.query, block.key, block.value))  # (B, c, h w)
    weights = torch.einsum("bci,bcj->bij", query, key).div(8**0.5).softmax(-1)
    expected = x + block.out(torch.einsum("bij,bcj->bci", weights, value).view_as(x))
    torch.testing.assert_close(block(x), expected)


def attended(part: nn.Module) -> list[bool]:
    return [isinstance(level.attentions[0], Attention) for level in part.modules() if isinstance(level, Level)]


@pytest.mark.parametrize(
    ("changes", "encoder", "decoder"),
    [
        ({}, [False, False, True], [True, False, False]),
        ({"attention_factors": []}, [False] * 3, [False] * 3),
        ({"attention_factors": [1, 2]}, [True, True, False], [False, True, True]),
        ({"attention_factors": [2], "decoder_attention_factors": []}, [False, True, False], [False] * 3),
        ({"attention_factors": [], "decoder_attention_factors": [4]}, [False] * 3, [True, False, False]),
    ],
)
def test_attention_follows_the_blocks_that_the_config_names(changes, encoder, decoder):
    config = tiny(**changes)
    assert attended(VQGANEncoder(config, 3, 4)) == encoder
    assert attended(VQGANDecoder(config, 3, 4)) == decoder


def test_the_middle_attends_or_does_not():
    for attend in (True, False):
        encoder = VQGANEncoder(tiny(middle_attention=attend), 3, 4)
        assert isinstance(encoder.middle.attention, Attention) == attend


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"norm_groups": 3}, ["norm_groups 3", "multiple", "got 8"]),
        ({"attention_factors": [16]}, ["attention_factors [16]", "expected", "[1, 2, 4]"]),
        ({"decoder_attention_factors": [1, 3]}, ["decoder_attention_factors [3]", "expected", "[1, 2, 4]"]),
        ({"num_res_blocks": 0}, ["num_res_blocks", "0"]),
        ({"channel_mult": []}, ["channel_mult", "[]"]),
    ],
)
def test_what_cannot_be_built_is_refused(changes, parts):
    with refuses(*parts):
        parse_config(VQGANConfig, TINY | changes, "backbone")


@pytest.mark.parametrize("attend", [True, False])
def test_the_default_is_as_large_as_that_of_another_implementation(attend):
    widths = (128, 128, 256, 256, 512)
    down = ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"]
    up = ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 4
    with torch.device("meta"):
        theirs = VQModel(
            down_block_types=tuple(down), up_block_types=tuple(up), block_out_channels=widths, layers_per_block=2,
            latent_channels=256, num_vq_embeddings=1024, vq_embed_dim=256, mid_block_add_attention=attend,
        )  # fmt: skip
        config = VQGANConfig(middle_attention=attend)
        ours = nn.ModuleList([VQGANEncoder(config, 3, 256), VQGANDecoder(config, 3, 256)])
    codebook = theirs.quantize.embedding.weight.numel()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) - codebook
