import pytest
import torch
from messages import refuses
from torch import Tensor

from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.autoencoder_config import AutoencoderConfig, ModelConfig
from stage1_tokenizer.bottlenecks.product_quantizer import ProductConfig
from stage1_tokenizer.bottlenecks.residual_quantizer import ResidualConfig
from stage1_tokenizer.bottlenecks.vector_quantizer import VectorConfig, VectorQuantizer
from twostage.core.config.sections import parse_config

EACH = [
    {"type": "vector", "codebook_size": 8},
    {"type": "vector", "codebook_size": 8, "codebook": "learned"},
    {"type": "residual", "codebook_size": 8, "depth": 3},
    {"type": "finite_scalar", "levels": [4, 3, 3]},
    {"type": "lookup_free"},
    {"type": "binary_spherical"},
    {"type": "gumbel_softmax", "codebook_size": 8},
    {"type": "index_backpropagation", "codebook_size": 8},
    {"type": "diveq", "codebook_size": 8},
    {"type": "projected", "codebook_size": 8, "width": 8, "heads": 2},
]


def build(each: dict[str, object], groups: int = 2, dim: int = 3):
    torch.manual_seed(0)
    config = ModelConfig.model_validate(
        {"latent_channels": groups * dim, "bottleneck": {"type": "product", "groups": groups, "each": each}}
    )
    return config.bottleneck.build((groups * dim, 2, 3), 0)


def encodings(channels: int, count: int = 8) -> Tensor:
    return torch.randn(count, channels, 2, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("each", EACH, ids=lambda each: "_".join(map(str, each.values()))[:20])
def test_groups_are_quantized_side_by_side(each, whole_batch):
    product = build(each)
    encoded = encodings(product.encoded_channels)
    output = product.encode(encoded)
    depth = product.quantizers[0].depth
    assert product.depth == 2 * depth
    assert output.indices.shape == (8, 2, 3 * 2 * depth)
    cells = output.indices.view(8, 2, 3, 2, depth)
    for group, (quantizer, part) in enumerate(zip(product.quantizers, encoded.chunk(2, 1), strict=True)):
        own = quantizer.encode(part)
        assert torch.equal(cells[:, :, :, group].flatten(2), own.indices)
        assert torch.equal(output.z[:, 3 * group : 3 * group + 3], own.z)
    assert torch.equal(product.lookup(output.indices), output.z)
    trained = product(encoded.requires_grad_(), None, whole_batch(8))
    assert torch.equal(trained.indices, output.indices)
    (trained.z.square().sum() + sum(trained.losses.values())).backward()
    assert (encoded.grad.flatten(2).abs().sum((0, 2)) > 0).all()
    product.update_codebook(lambda statistics: statistics)


def test_losses_are_those_of_ungrouped_channels(whole_batch):
    product, encoded = build({"type": "vector", "codebook_size": 8}), encodings(6)
    output = product(encoded, None, whole_batch(8))
    torch.testing.assert_close(output.losses, {"commitment": 0.25 * (encoded - output.z).square().mean()})
    assert output.metrics.keys() == {"perplexity", "codebook_usage"}


def test_each_group_has_its_own_codebook_and_noise(whole_batch):
    product = build({"type": "gumbel_softmax", "codebook_size": 4})
    first, second = product.quantizers
    assert not torch.equal(first.codebook, second.codebook)
    second.load_state_dict(first.state_dict())
    product.progress = 0.0
    scores = torch.zeros(2, 8, 2, 3)
    z = product(scores, None, whole_batch(2)).z
    assert not torch.equal(z[:, :3], z[:, 3:])
    assert first.progress == 0.0


def test_each_group_starts_on_its_channels():
    product, encoded = build({"type": "vector", "codebook_size": 12}), encodings(6, count=2)
    assert product.starts_from_data
    product.initialize(encoded, torch.Generator().manual_seed(0))
    torch.testing.assert_close(product.encode(encoded).z, encoded)
    assert all(isinstance(each, VectorQuantizer) for each in product.quantizers)


@pytest.mark.parametrize(
    ("channels", "bottleneck", "said"),
    [
        (7, {"groups": 2}, ["latent_channels 7", "2 groups", "latent_channels to 8"]),
        (6, {"each": {"type": "finite_scalar", "levels": [8, 5]}}, ["of 2 groups", "latent_channels 3", "[8, 5]"]),
        (4, {"groups": 1}, ["groups", "greater than or equal to 2", "1"]),
        (4, {"each": {"type": "vectr"}}, ["each", "'vectr'", "vector"]),
        (4, {"each": {"type": "vector", "codebook_sise": 4}}, ["codebook_sise", "codebook_size"]),
    ],
)
def test_bad_settings_are_refused(channels, bottleneck, said):
    document = {"latent_channels": channels, "bottleneck": {"type": "product", **bottleneck}}
    with refuses(*said):
        parse_config(ModelConfig, document, "model")


@pytest.mark.parametrize("kind", ["identity", "gaussian", "class_gaussian"])
def test_groups_need_codes(kind):
    with refuses("model.bottleneck.each.type", f"'{kind}'", "no codes", "each={type: vector}"):
        ProductConfig.model_validate({"each": {"type": kind}}).build((4, 2, 2), 3)


def test_the_hash_has_the_type_of_the_groups():
    def dumped(each: VectorConfig | ResidualConfig) -> object:
        return ProductConfig(each=each).model_dump(mode="json", exclude_defaults=True)

    assert dumped(VectorConfig(codebook_size=8)) == {"each": {"type": "vector", "codebook_size": 8}}
    assert dumped(ResidualConfig(codebook_size=8)) == {"each": {"type": "residual", "codebook_size": 8}}
    model = Autoencoder(AutoencoderConfig(image_size=8, model=ModelConfig(bottleneck=ProductConfig())))
    assert len(model.content_hash()) == 64
