import pytest
import torch
from messages import refuses
from torch.distributions import Normal, kl_divergence

from stage1_tokenizer.bottlenecks.binary_spherical import BinarySphericalConfig
from stage1_tokenizer.bottlenecks.continuous import ClassGaussianConfig, Gaussian, GaussianConfig, IdentityConfig
from stage1_tokenizer.bottlenecks.differentiable_vector import DiVeQConfig
from stage1_tokenizer.bottlenecks.finite_scalar import FiniteScalarConfig
from stage1_tokenizer.bottlenecks.gumbel_softmax import GumbelSoftmaxConfig
from stage1_tokenizer.bottlenecks.index_backpropagation import IndexBackpropagationConfig
from stage1_tokenizer.bottlenecks.lookup_free import LookupFreeConfig
from stage1_tokenizer.bottlenecks.product_quantizer import ProductConfig
from stage1_tokenizer.bottlenecks.projected_codebook import ProjectedCodebookConfig
from stage1_tokenizer.bottlenecks.residual_quantizer import ResidualConfig
from stage1_tokenizer.bottlenecks.vector_quantizer import VectorConfig
from twostage.core.training.random import BatchRandom


@pytest.fixture
def encoded():
    """What an encoder gives a Gaussian bottleneck of 3 channels: means and log-variances, (8, 6, 2, 2)."""
    return torch.randn(8, 6, 2, 2, generator=torch.Generator().manual_seed(0))


def posterior(encoded: torch.Tensor) -> Normal:
    mean, log_variance = encoded.double().chunk(2, dim=1)
    return Normal(mean, log_variance.exp().sqrt())


def test_each_type_builds_its_bottleneck():
    configs = [
        *(IdentityConfig(), GaussianConfig(), ClassGaussianConfig(), VectorConfig(codebook_size=4)),
        *(FiniteScalarConfig(levels=[4, 3, 5]), LookupFreeConfig(), ResidualConfig(codebook_size=4, depth=2)),
        *(GumbelSoftmaxConfig(codebook_size=5), BinarySphericalConfig(), IndexBackpropagationConfig(codebook_size=4)),
        *(DiVeQConfig(codebook_size=4), ProjectedCodebookConfig(codebook_size=4)),
        ProductConfig(groups=3, each=GumbelSoftmaxConfig(codebook_size=5)),
    ]
    built = [config.build((3, 2, 2), num_classes=2) for config in configs]
    names = "Identity Gaussian Gaussian VectorQuantizer FiniteScalar LookupFree ResidualQuantizer "
    names += "GumbelSoftmax BinarySpherical IndexBackpropagation DiVeQ ProjectedCodebook ProductQuantizer"
    assert [type(bottleneck).__name__ for bottleneck in built] == names.split()
    assert [bottleneck.encoded_channels for bottleneck in built] == [3, 6, 6, 3, 3, 3, 3, 5, 3, 3, 3, 3, 15]
    assert [bottleneck.codebook_size for bottleneck in built] == [0, 0, 0, 4, 60, 8, 4, 5, 8, 4, 4, 4, 5]
    assert [bottleneck.depth for bottleneck in built] == [1, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 3]
    assert [bottleneck.variational for bottleneck in built] == [False, True, True, *[False] * 10]
    assert built[2].class_means.shape == (2, 3, 2, 2)
    assert built[1].class_means is None


def test_a_class_bottleneck_needs_classes_and_labels(encoded, whole_batch):
    with refuses("model.bottleneck.type 'class_gaussian'", "no classes", "model.bottleneck.type=gaussian"):
        ClassGaussianConfig().build((3, 2, 2), num_classes=0)
    with refuses("model.bottleneck.type 'class_gaussian'", "no labels", "labelled data"):
        Gaussian((3, 2, 2), num_classes=2)(encoded, None, whole_batch(8))


def test_the_class_kl_is_to_a_unit_gaussian_around_the_class_mean(encoded, whole_batch):
    """L = 1/2 sum[(mu - mu_y)^2 + sigma^2 - log sigma^2 - 1], its value and its gradients."""
    bottleneck, labels = Gaussian((3, 2, 2), num_classes=2), torch.tensor([0, 1] * 4)
    torch.nn.init.normal_(bottleneck.class_means)
    encoded.requires_grad_()
    kl = bottleneck(encoded, labels, whole_batch(8)).losses["kl"]
    prior = Normal(bottleneck.class_means[labels].double(), 1.0)
    expected = kl_divergence(posterior(encoded), prior).flatten(1).sum(1).mean()
    torch.testing.assert_close(kl.double(), expected, rtol=1e-6, atol=1e-6)
    for tensor in (encoded, bottleneck.class_means):
        gradients = [torch.autograd.grad(value, tensor, retain_graph=True)[0] for value in (kl, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_samples_of_a_class_lie_around_its_mean():
    bottleneck, labels = Gaussian((3, 1, 1), num_classes=2), torch.tensor([0, 1]).repeat(4000)
    torch.nn.init.normal_(bottleneck.class_means, std=5)
    z = bottleneck.sample(torch.randn(8000, 3, 1, 1, generator=torch.Generator().manual_seed(0)), labels)
    for label in (0, 1):
        difference = z[labels == label].mean(0) - bottleneck.class_means[label]
        assert difference.abs().max() < 0.07
        assert (z[labels == label].std(0) - 1).abs().max() < 0.05


def test_identity_passes_the_latent_on(encoded, whole_batch):
    identity = IdentityConfig().build((6, 2, 2), num_classes=0)
    for output in (identity(encoded, None, whole_batch(8)), identity.encode(encoded)):
        assert torch.equal(output.z, encoded)
        assert output.indices is None
        assert output.losses == {}


def test_kl_and_its_gradient_equal_those_of_torch_distributions(encoded, whole_batch):
    encoded.requires_grad_()
    kl = Gaussian((3, 2, 2))(encoded, None, whole_batch(8)).losses["kl"]
    expected = kl_divergence(posterior(encoded), Normal(0.0, 1.0)).flatten(1).sum(1).mean()
    torch.testing.assert_close(kl.double(), expected, rtol=1e-6, atol=1e-6)
    gradient, expected_gradient = (torch.autograd.grad(value, encoded)[0] for value in (kl, expected))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


def test_kl_of_the_prior_itself_is_zero(whole_batch):
    assert Gaussian((3, 1, 1))(torch.zeros(4, 6, 1, 1), None, whole_batch(4)).losses["kl"] == 0


def test_samples_have_the_posteriors_moments(whole_batch):
    count, mean, std = 20_000, torch.tensor([-2.0, 0.5]), torch.tensor([0.3, 2.0])
    encoded = torch.cat([mean, 2 * std.log()]).view(1, 4, 1, 1).expand(count, -1, -1, -1)
    z = Gaussian((2, 1, 1))(encoded, None, whole_batch(count)).z[:, :, 0, 0]
    assert ((z.mean(0) - mean).abs() < 4 * std / count**0.5).all()
    torch.testing.assert_close(z.std(0), std, rtol=0.03, atol=0)


def test_the_gradient_passes_through_the_sample(encoded, whole_batch):
    encoded.requires_grad_()
    z = Gaussian((3, 2, 2))(encoded, None, whole_batch(8)).z
    by_mean, by_log_variance = torch.autograd.grad(z.sum(), encoded)[0].chunk(2, dim=1)
    assert (by_mean == 1).all()
    deviation = z - encoded.chunk(2, dim=1)[0]  # std x noise, whose derivative by the log-variance is half of it
    torch.testing.assert_close(by_log_variance, deviation / 2)


def test_encode_gives_the_mean_without_noise(encoded):
    assert torch.equal(Gaussian((3, 2, 2)).encode(encoded).z, encoded[:, :3])


def test_noise_depends_on_the_image_not_on_the_process(encoded, whole_batch):
    gaussian = Gaussian((3, 2, 2))
    whole = gaussian(encoded, None, whole_batch(8, seed=1)).z
    halves = [gaussian(encoded[rows], None, BatchRandom(1, rows, 8)).z for rows in (slice(0, 4), slice(4, 8))]
    assert torch.equal(torch.cat(halves), whole)
    assert not torch.equal(gaussian(encoded, None, whole_batch(8, seed=2)).z, whole)


@pytest.mark.parametrize("value", [-1e6, 1e6])
def test_extreme_encodings_stay_finite(value, whole_batch):
    encoded = torch.cat([torch.zeros(2, 3, 1, 1), torch.full((2, 3, 1, 1), value)], dim=1)
    output = Gaussian((3, 1, 1))(encoded, None, whole_batch(2))
    assert output.z.isfinite().all()
    assert output.losses["kl"].isfinite()


def test_the_latent_is_float32_under_mixed_precision(encoded, whole_batch):
    output = Gaussian((3, 2, 2))(encoded.bfloat16(), None, whole_batch(8))
    assert output.z.dtype == output.losses["kl"].dtype == torch.float32


def test_samples_without_classes_are_the_noise():
    noise = torch.randn(4, 3, 2, 1)
    assert torch.equal(Gaussian((3, 2, 1)).sample(noise, None), noise)
