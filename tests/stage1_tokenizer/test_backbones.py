import pytest
import torch
from torch import nn

from core.config import parse_config
from core.errors import InputError
from stage1_tokenizer.backbones import ConvConfig, MLPConfig, ResBlock, UnitRange, build_backbone, grid_of

CONV = ConvConfig(channels=8, channel_mult=[1, 2, 1], num_res_blocks=[0, 1, 1])
MLP = MLPConfig(hidden_sizes=[16, 12])


@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("config", [CONV, MLP], ids=["conv", "mlp"])
def test_images_become_latents_and_latents_images(config, channels, size):
    encoder, decoder = build_backbone(config, channels, size, encoded_channels=10, latent_channels=5)
    grid = (1, 1) if config is MLP else (size[0] // 4, size[1] // 4)
    assert grid_of(config, size) == grid
    assert encoder(torch.zeros(2, channels, *size)).shape == (2, 10, *grid)
    assert decoder(torch.zeros(2, 5, *grid)).shape == (2, channels, *size)


@pytest.mark.parametrize("size", [(10, 12), (12, 10), (2, 8)])
def test_a_size_that_cannot_be_halved_is_refused_and_the_suggested_one_works(size):
    with pytest.raises(InputError, match="halves each side 2 times, so both must be multiples of 4") as refusal:
        grid_of(CONV, size)
    height, width = str(refusal.value).rpartition("try ")[2].split(" x ")
    assert min(grid_of(CONV, (int(height), int(width)))) > 0
    with pytest.raises(InputError, match=f"data.image_size {size[0]}x{size[1]}"):
        build_backbone(CONV, 3, size, 4, 4)


def test_no_halving_keeps_every_size():
    assert grid_of(ConvConfig(channel_mult=[1], num_res_blocks=[0]), (7, 5)) == (7, 5)


def test_lists_of_unequal_lengths_are_refused():
    with pytest.raises(InputError, match=r"channel_mult \[1, 2\] and num_res_blocks \[1\] must be equally long"):
        parse_config(ConvConfig, {"channel_mult": [1, 2], "num_res_blocks": [1]}, "backbone")


def test_the_mlp_decoder_mirrors_the_encoder():
    encoder, decoder = build_backbone(MLP, 1, (4, 4), encoded_channels=6, latent_channels=3)
    widths = [[layer.out_features for layer in part.modules() if isinstance(layer, nn.Linear)]
              for part in (encoder, decoder)]  # fmt: skip
    assert widths == [[16, 12, 6], [12, 16, 16]]


def test_the_mlp_is_fed_pixels_from_0_to_1():
    images = torch.tensor([-1.0, 0.0, 1.0])
    assert UnitRange()(images).tolist() == [0.0, 0.5, 1.0]
    assert images.tolist() == [-1.0, 0.0, 1.0]  # the caller's images stay as they are
    encoder, _ = build_backbone(MLP, 1, (2, 2), 4, 4)
    assert isinstance(encoder[0], UnitRange)


@pytest.mark.parametrize("config", [CONV, MLP], ids=["conv", "mlp"])
def test_nothing_bounds_what_the_decoder_gives(config):
    _, decoder = build_backbone(config, 1, (8, 8), 4, 4)
    last = [layer for layer in decoder.modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
    nn.init.zeros_(last.weight)
    for value in (-7.0, 7.0):
        nn.init.constant_(last.bias, value)
        assert (decoder(torch.zeros(1, 4, *grid_of(config, (8, 8)))) == value).all()


@pytest.mark.parametrize("width", [1, 6, 64])
def test_a_residual_block_adds_to_its_input(width):
    block, x = ResBlock(width), torch.randn(2, width, 4, 4)
    assert block(x).shape == x.shape
    assert not torch.equal(block(x), x)
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    assert torch.equal(block(x), x)
