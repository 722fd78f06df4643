import pytest
import torch
from messages import refuses

from stage1_tokenizer.bottlenecks import nearest_codes
from stage1_tokenizer.bottlenecks.code_perturbation import (
    PerturbationConfig,
    code_vectors,
    perturb_codes,
    perturb_latent,
)
from stage1_tokenizer.bottlenecks.nearest_codes import neighbour
from twostage.core.training.random import BatchRandom

CODEBOOK = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
NEAREST = torch.cdist(CODEBOOK.double(), CODEBOOK.double()).argsort(1)[:, 1:]
INDICES = torch.randint(24, (300, 4, 5), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tile", [1, 1 << 20])
def test_neighbours_equal_brute_force_in_tiles(tile, monkeypatch):
    monkeypatch.setattr(nearest_codes, "CPU_TILE", tile)
    codes, ranks = INDICES.flatten()[:100], torch.arange(100) % 6
    assert torch.equal(neighbour(CODEBOOK, codes, ranks, 6), NEAREST[codes, ranks])
    assert neighbour(CODEBOOK, codes[:0], ranks[:0], 6).shape == (0,)


def test_a_code_is_no_neighbour_of_itself_even_beside_its_copy():
    found = [neighbour(torch.zeros(3, 2), torch.arange(3), torch.full((3,), rank), 2) for rank in range(2)]
    assert torch.stack(found, 1).sort().values.tolist() == [[1, 2], [0, 2], [0, 1]]


def test_each_image_loses_its_share_of_codes_to_neighbours(whole_batch):
    share = torch.tensor([0.0, 0.3, 1.0]).repeat_interleave(100)
    perturbed = perturb_codes(INDICES, CODEBOOK, share, 4, whole_batch(300))
    changed = perturbed != INDICES
    found = changed.view(3, -1).float().mean(1)
    assert found[[0, 2]].tolist() == [0.0, 1.0]
    assert 0.25 < found[1] < 0.35
    ranks = (NEAREST[INDICES[changed]] == perturbed[changed, None]).int().argmax(1)
    counts = torch.bincount(ranks, minlength=24)
    assert counts[4:].sum() == 0
    assert (counts[:4] > 0.2 * counts.sum()).all(), "each of the four equally likely"


def test_an_image_loses_the_same_codes_in_any_process(whole_batch):
    share = torch.linspace(0, 1, 300)
    whole = perturb_codes(INDICES, CODEBOOK, share, 4, whole_batch(300))
    rows = slice(0, 100), slice(100, 300)
    parts = [perturb_codes(INDICES[part], CODEBOOK, share[part], 4, BatchRandom(0, part, 300)) for part in rows]
    assert torch.equal(torch.cat(parts), whole)


def test_no_size_depends_on_the_codes_on_a_gpu(whole_batch, monkeypatch):
    """The device `meta`, whose tensors have no values, stands in for a GPU."""
    monkeypatch.setattr(
        BatchRandom, "uniform", lambda _, purpose, shape, device: torch.empty(300, *shape, device=device)
    )
    share = torch.ones(300, device="meta")
    assert perturb_codes(INDICES.to("meta"), CODEBOOK.to("meta"), share, 4, whole_batch(300)).shape == INDICES.shape


@pytest.mark.parametrize("family", ["vector", "simvq", "l2", "finite_scalar", "lookup_free"])
def test_the_decoder_gets_other_codes_and_the_encoder_the_same_gradient(
    family, tiny_autoencoder, random_images, whole_batch
):
    model, images = tiny_autoencoder(family), random_images(200)
    latent = model.bottleneck(model.run_encoder(images), None, whole_batch(200))
    config = PerturbationConfig(image_share=0.5, code_share=1.0, neighbours=2)
    z = latent.z.detach().requires_grad_()
    other = perturb_latent(z, latent.indices, model.bottleneck, config, whole_batch(200))
    changed = (other != z).flatten(1).any(1)
    assert 70 < changed.sum() < 130
    table = {tuple(vector.tolist()) for vector in code_vectors(model.bottleneck, z.device)}
    assert {tuple(vector.tolist()) for vector in other.detach().movedim(1, -1).reshape(-1, z.shape[1])} <= table
    weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    (other * weights).sum().backward()
    assert torch.equal(z.grad, weights)


def test_training_with_perturbation_reconstructs_worse(tiny_autoencoder, random_images, whole_batch):
    model, images = tiny_autoencoder(), random_images(64)
    config = PerturbationConfig(image_share=1.0, code_share=1.0, neighbours=3)
    plain, perturbed = (model(images, None, whole_batch(64), each) for each in (None, config))
    assert torch.equal(plain.bottleneck.indices, perturbed.bottleneck.indices)
    assert (plain.decoded != perturbed.decoded).flatten(1).any(1).float().mean() > 0.9


@pytest.mark.parametrize("family", ["identity", "gaussian", "residual"])
def test_a_bottleneck_without_one_code_per_cell_is_refused(family, tiny_autoencoder):
    with refuses("loss.perturbation", family, "vector", "Remove"):
        PerturbationConfig().check(tiny_autoencoder(family).bottleneck, family)


def test_more_neighbours_than_codes_are_refused(tiny_autoencoder):
    PerturbationConfig(neighbours=7).check(tiny_autoencoder().bottleneck, "vector")
    with refuses("loss.perturbation.neighbours 8", "8 codes", "at most 7"):
        PerturbationConfig(neighbours=8).check(tiny_autoencoder().bottleneck, "vector")
