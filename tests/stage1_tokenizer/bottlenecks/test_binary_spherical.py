import itertools

import pytest
import torch
from einops import rearrange
from messages import refuses
from torch import Tensor

from stage1_tokenizer.autoencoder_config import ModelConfig
from stage1_tokenizer.bottlenecks.binary_spherical import BinarySpherical, BinarySphericalConfig
from twostage.core.config.sections import parse_config


def encodings(count: int, dim: int) -> Tensor:
    return torch.randn(count, dim, 2, 3, generator=torch.Generator().manual_seed(0))


def corners(dim: int) -> Tensor:
    """All codes (2^D, D) in float64, the last bit first."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=dim)), dtype=torch.double)
    return signs.flip(1) / dim**0.5


def test_codes_are_the_nearest_corners_on_the_sphere(whole_batch):
    quantizer, encoded = BinarySpherical(BinarySphericalConfig(), 4), encodings(50, 4)
    output = quantizer(encoded, None, whole_batch(50))
    vectors = rearrange(encoded, "b d h w -> (b h w) d").double()
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    assert torch.equal(output.indices.flatten(), torch.cdist(unit, corners(4)).argmin(1))
    torch.testing.assert_close(output.z.norm(dim=1), torch.ones(50, 2, 3))
    torch.testing.assert_close(output.z, quantizer.lookup(output.indices))
    assert torch.equal(quantizer.encode(encoded).indices, output.indices)
    torch.testing.assert_close(quantizer.lookup(torch.arange(16).view(1, 1, 16))[0, :, 0].T.double(), corners(4))


def test_the_gradient_is_that_of_the_point_on_the_sphere(whole_batch):
    """dL/dz = (G - u (u.G)) / |z|, in float64."""
    encoded, gradient = encodings(8, 5).requires_grad_(), encodings(9, 5)[1:]
    BinarySpherical(BinarySphericalConfig(), 5)(encoded, None, whole_batch(8)).z.backward(gradient)
    z, g = encoded.detach().double(), gradient.double()
    u = z / z.norm(dim=1, keepdim=True)
    expected = (g - u * (u * g).sum(1, keepdim=True)) / z.norm(dim=1, keepdim=True)
    torch.testing.assert_close(encoded.grad.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dim", "group", "temperature"), [(1, 9, 1.0), (5, 5, 0.1), (5, 2, 0.2), (4, 1, 1.0)])
def test_entropies_equal_those_over_the_corners_of_each_group(dim, group, temperature, whole_batch):
    """p(c) ~ exp(-|u - c|^2 / T) over all 2^D corners, in float64; values and gradients."""
    config = BinarySphericalConfig(temperature=temperature, entropy_weight=0.3, diversity_weight=2.0, group_bits=group)
    encoded = encodings(3, dim).requires_grad_()
    losses = BinarySpherical(config, dim)(encoded, None, whole_batch(3)).losses
    vectors = rearrange(encoded, "b d h w -> (b h w) d").double()
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    choice = torch.softmax(-(unit[:, None] - corners(dim)).square().sum(2) / temperature, 1)
    joint, ones = torch.zeros((), dtype=torch.double), corners(dim) > 0
    for start in range(0, dim, group):
        places = (ones[:, start : start + group] * 2 ** torch.arange(min(group, dim - start))).sum(1)
        marginal = torch.zeros(len(choice), 2**group, dtype=torch.double).index_add(1, places, choice)
        joint = joint + torch.special.entr(marginal.mean(0)).sum()
    expected = {
        "code_entropy": 0.3 * torch.special.entr(choice).sum(1).mean(),
        "codebook_entropy": -0.3 * 2.0 * joint,
    }
    assert losses.keys() == expected.keys()
    assert joint >= torch.special.entr(choice.mean(0)).sum() - 1e-9  # independent groups bound the entropy from above
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].double(), value, rtol=1e-5, atol=1e-6)
        gradients = [torch.autograd.grad(loss, encoded, retain_graph=True)[0] for loss in (losses[name], value)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_the_entropy_terms_spread_vectors_that_share_one_code(whole_batch):
    quantizer = BinarySpherical(BinarySphericalConfig(temperature=0.2), 6)
    points = (1.0 + 0.1 * torch.randn(16, 6, 2, 3, generator=torch.Generator().manual_seed(0))).requires_grad_()
    assert len(quantizer.encode(points).indices.unique()) == 1
    optimizer = torch.optim.Adam([points], lr=0.05)
    for step in range(200):
        optimizer.zero_grad()
        sum(quantizer(points, None, whole_batch(16, step)).losses.values()).backward()
        optimizer.step()
    assert len(quantizer.encode(points).indices.unique()) > 0.6 * 64


@pytest.mark.parametrize(
    ("channels", "settings", "said"),
    [
        (21, {}, ["latent_channels 21", "at most 20"]),
        (4, {"group_bits": 0}, ["group_bits", "greater than or equal to 1"]),
    ],
)
def test_too_many_bits_are_refused(channels, settings, said):
    document = {"latent_channels": channels, "bottleneck": {"type": "binary_spherical", **settings}}
    with refuses(*said):
        parse_config(ModelConfig, document, "model")
