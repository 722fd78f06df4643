import pytest
import torch
from messages import refuses
from torch import nn

from stage1_tokenizer.backbones.backbone import ResBlock, group_norm
from stage1_tokenizer.backbones.conv_backbone import AttentionBlock, ConvConfig
from stage1_tokenizer.backbones.mlp_backbone import MLPConfig, UnitRange
from twostage.core.config.sections import parse_config

CONV = ConvConfig(channels=8, channel_mult=[1, 2, 1], num_res_blocks=[0, 1, 1])
PATCHES = ConvConfig(patch_size=2, channels=16, channel_mult=[1, 2], num_res_blocks=[0, 1], group_channels=16)
MLP = MLPConfig(hidden_sizes=[16, 12])


@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("config", [CONV, PATCHES, MLP], ids=["conv", "patches", "mlp"])
def test_images_become_latents_and_latents_images(config, channels, size):
    encoder, decoder = config.build((channels, *size), encoded_channels=10, latent_channels=5)
    grid = (1, 1) if config is MLP else (size[0] // 4, size[1] // 4)
    assert config.grid(size) == grid
    assert encoder(torch.zeros(2, channels, *size)).shape == (2, 10, *grid)
    assert decoder(torch.zeros(2, 5, *grid)).shape == (2, channels, *size)


@pytest.mark.parametrize(("size", "grid"), [((10, 12), (3, 3)), ((2, 8), (1, 2)), ((1, 1), (1, 1))])
def test_a_grid_covers_images_of_any_size(size, grid):
    assert CONV.factor == 4
    assert CONV.grid(size) == grid


@pytest.mark.parametrize("attention_factors", [[], [4], [1, 2, 4]])
def test_attention_sees_every_cell_and_convolutions_only_near_ones(attention_factors):
    config = ConvConfig(
        channels=8, channel_mult=[1, 1, 1], num_res_blocks=[0, 0, 0], attention_factors=attention_factors
    )
    encoder, decoder = config.build((1, 64, 64), 2, 2)
    assert sum(isinstance(m, AttentionBlock) for m in encoder.modules()) == len(attention_factors)
    assert sum(isinstance(m, AttentionBlock) for m in decoder.modules()) == len(attention_factors)
    images = torch.randn(1, 1, 64, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(encoder(images)[0, 0, 0, 0], images)
    assert bool(gradient[0, 0, 40:, 40:].abs().sum() > 0) == bool(attention_factors)


def test_attention_at_an_unknown_resolution_is_refused():
    document = {"channel_mult": [1, 1], "num_res_blocks": [0, 0], "attention_factors": [2, 3]}
    with refuses("attention_factors [3]", "expected", "[1, 2]"):
        parse_config(ConvConfig, document, "b")
    with refuses("attention_factors [3]", "expected", "[2, 4]"):
        parse_config(ConvConfig, document | {"patch_size": 2}, "b")


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (6, 1), (8, 2), (64, 16), (128, 32), (256, 32), (48, 8)])
def test_groups_hold_at_least_four_channels(channels, groups):
    assert group_norm(channels).num_groups == groups


def test_no_halving_keeps_every_size():
    assert ConvConfig(channel_mult=[1], num_res_blocks=[0]).grid((7, 5)) == (7, 5)


def test_lists_of_unequal_lengths_are_refused():
    with refuses("channel_mult [1, 2]", "num_res_blocks [1]", "same length"):
        parse_config(ConvConfig, {"channel_mult": [1, 2], "num_res_blocks": [1]}, "backbone")


def test_the_mlp_decoder_mirrors_the_encoder():
    encoder, decoder = MLP.build((1, 4, 4), encoded_channels=6, latent_channels=3)
    widths = [[layer.out_features for layer in part.modules() if isinstance(layer, nn.Linear)]
              for part in (encoder, decoder)]  # fmt: skip
    assert widths == [[16, 12, 6], [12, 16, 16]]


def test_the_mlp_is_fed_pixels_from_0_to_1():
    images = torch.tensor([-1.0, 0.0, 1.0])
    assert UnitRange()(images).tolist() == [0.0, 0.5, 1.0]
    assert images.tolist() == [-1.0, 0.0, 1.0]  # the caller's images stay as they are
    encoder, _ = MLP.build((1, 2, 2), 4, 4)
    assert isinstance(encoder[0], UnitRange)


def test_a_patch_is_seen_and_written_pixel_by_pixel():
    config = ConvConfig(patch_size=4, channels=16, channel_mult=[1], num_res_blocks=[0])
    encoder, decoder = config.build((1, 8, 8), 16, 16)
    images = torch.randn(1, 1, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(encoder(images)[0].sum(), images)
    assert (gradient != 0).all()
    assert decoder(torch.randn(1, 16, 2, 2)).unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).std(-1).min() > 0
    assert all(layer.kernel_size != (4, 4) for layer in decoder.modules() if isinstance(layer, nn.ConvTranspose2d))


def test_wide_groups_keep_the_channels_last_in_memory():
    for config, expected in ((PATCHES, True), (CONV, False)):
        encoder, _ = config.build((3, 8, 8), 16, 4)
        assert encoder(torch.zeros(2, 3, 8, 8)).is_contiguous(memory_format=torch.channels_last) == expected
        sizes = [n.num_channels // n.num_groups for n in encoder.modules() if isinstance(n, nn.GroupNorm)]
        assert min(sizes) >= config.group_channels or not expected


@pytest.mark.parametrize("config", [CONV, PATCHES, MLP], ids=["conv", "patches", "mlp"])
def test_the_decoders_output_is_unbounded(config):
    _, decoder = config.build((1, 8, 8), 4, 4)
    last = [layer for layer in decoder.modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
    nn.init.zeros_(last.weight)
    for value in (-7.0, 7.0):
        nn.init.constant_(last.bias, value)
        assert (decoder(torch.zeros(1, 4, *config.grid((8, 8)))) == value).all()


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (6, 6), (64, 64), (8, 12), (12, 8)])
def test_a_residual_block_adds_to_its_shortcut(inputs, outputs):
    block, x = ResBlock(inputs, outputs, group_norm), torch.randn(2, inputs, 4, 4)
    assert isinstance(block.shortcut, nn.Identity) == (inputs == outputs)
    assert block(x).shape == (2, outputs, 4, 4)
    assert not torch.equal(block(x), block.shortcut(x))
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    assert torch.equal(block(x), block.shortcut(x))
