import torch
from torch import Tensor

from stage1_tokenizer.bottlenecks.differentiable_vector import DiVeQ, DiVeQConfig
from twostage.core.training.random import BatchRandom


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(variance: float = 1e-3) -> DiVeQ:
    torch.manual_seed(0)
    return DiVeQ(DiVeQConfig(codebook_size=6, noise_variance=variance), 4)


def pairs() -> tuple[Tensor, Tensor, Tensor]:
    """Vectors, codes and the decoder's gradient for 2 images of 3 cells, in float64."""
    return tuple(torch.randn(6, 4, generator=generator(seed), dtype=torch.double) for seed in range(3))  # type: ignore


def test_the_gradient_is_that_of_the_papers_equation(whole_batch):
    """z_q = z + |e - z| u with a constant u: dL/dz = G - n (u.G) and dL/de = n (u.G), where n = (e - z) / |e - z|."""
    vectors, codes, gradient = pairs()
    vectors.requires_grad_()
    codes.requires_grad_()
    z = make(0.5).passed_on(vectors, codes, whole_batch(2))
    z.backward(gradient)
    error = (codes - vectors).detach()
    noise = whole_batch(2).normal("diveq", (3, 4), error.device).flatten(0, 1).double()
    direction = error + 0.5**0.5 * noise
    direction = direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(z.detach(), vectors.detach() + error.norm(dim=1, keepdim=True) * direction)
    along = error / error.norm(dim=1, keepdim=True) * (direction * gradient).sum(1, keepdim=True)
    torch.testing.assert_close(codes.grad, along)
    torch.testing.assert_close(vectors.grad, gradient - along)


def test_without_noise_the_decoder_gets_the_codes(whole_batch):
    vectors, codes, _ = pairs()
    torch.testing.assert_close(make(0.0).passed_on(vectors, codes, whole_batch(2)), codes)


def test_a_vector_on_its_code_has_a_finite_gradient(whole_batch):
    vectors = torch.randn(6, 4, generator=generator()).requires_grad_()
    make(0.0).passed_on(vectors, vectors.detach(), whole_batch(2)).sum().backward()
    assert vectors.grad.isfinite().all()


def test_noise_belongs_to_the_image_and_inference_has_none(whole_batch):
    quantizer, encoded = make(), torch.randn(8, 4, 2, 3, generator=generator())
    whole = quantizer(encoded, None, whole_batch(8)).z
    halves = [quantizer(encoded[rows], None, BatchRandom(0, rows, 8)).z for rows in (slice(0, 4), slice(4, 8))]
    assert torch.equal(torch.cat(halves), whole)
    output = quantizer.encode(encoded)
    assert not torch.equal(output.z, whole)
    assert torch.equal(output.z.movedim(1, -1), quantizer.codebook[output.indices])


def test_the_decoder_alone_trains_the_chosen_codes(whole_batch):
    quantizer, encoded = make(), torch.randn(8, 4, 2, 3, generator=generator()).requires_grad_()
    output = quantizer(encoded, None, whole_batch(8))
    assert output.losses == {}
    output.z.square().sum().backward()
    chosen = torch.zeros(6, dtype=torch.bool).index_fill_(0, output.indices.flatten(), True)
    assert torch.equal(quantizer.codebook.grad.abs().sum(1) > 0, chosen)
    assert encoded.grad.abs().sum() > 0
