import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from stage1_tokenizer.bottlenecks import index_backpropagation, vector_quantizer
from stage1_tokenizer.bottlenecks.index_backpropagation import IndexBackpropagation, IndexBackpropagationConfig

SIZE, DIM = 12, 5


def make(**options: object) -> IndexBackpropagation:
    torch.manual_seed(0)
    return IndexBackpropagation(IndexBackpropagationConfig(codebook_size=SIZE, **options), DIM)


def encodings(count: int = 8) -> Tensor:
    return torch.randn(count, DIM, 2, 3, generator=torch.Generator().manual_seed(1))


def as_vectors(encoded: Tensor) -> Tensor:
    return rearrange(encoded, "b d h w -> (b h w) d")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts of 16 vectors: the 48 vectors of 8 images need three."""
    monkeypatch.setattr(index_backpropagation, "CPU_TILE", 1)


def test_values_and_gradients_are_those_of_a_matrix_of_all_choices(whole_batch, monkeypatch):
    """Equations 4 to 6 with the (N, K) one-hot and softmax of -|z - e|^2 / 2, in float64."""
    monkeypatch.setattr(IndexBackpropagation, "_gather_statistics", lambda *_: None)
    monkeypatch.setattr(vector_quantizer, "nearest_codes", lambda x, codes: torch.cdist(x, codes).argmin(1))
    quantizer = make(temperature=0.3, entropy_weight=0.2).double()
    vectors = as_vectors(encodings()).double().requires_grad_()
    indices, z, losses = quantizer.quantize(vectors, whole_batch(8))
    codebook = quantizer.codebook
    logits = (vectors[:, None] - codebook).square().sum(2) / -2
    soft = logits.softmax(1)
    one_hot = F.one_hot(logits.argmax(1), SIZE) + soft - soft.detach()
    expected = one_hot @ codebook
    hard = codebook[logits.argmax(1)]
    choice = (logits / 0.3).softmax(1)
    expected_losses = {
        "codebook": (hard - vectors.detach()).square().mean() + (expected - vectors).square().mean(),
        "commitment": 0.25 * (vectors - hard.detach()).square().mean(),
        "code_entropy": 0.2 * torch.special.entr(choice).sum(1).mean(),
        "codebook_entropy": -0.2 * torch.special.entr(choice.mean(0)).sum(),
    }
    assert torch.equal(indices, logits.argmax(1))
    torch.testing.assert_close(z, expected)
    assert losses.keys() == expected_losses.keys()
    weights = torch.randn(48, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    pairs = [((z * weights).sum(), (expected * weights).sum()), *((losses[n], expected_losses[n]) for n in losses)]
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted)
        for tensor in (vectors, codebook):
            gradients = [
                torch.autograd.grad(value, tensor, retain_graph=True, allow_unused=True)[0] for value in (found, wanted)
            ]
            torch.testing.assert_close(*gradients)


def test_the_decoder_trains_every_code(whole_batch):
    quantizer = make()
    output = quantizer(encodings(1), None, whole_batch(1))
    assert len(output.indices.unique()) < SIZE
    output.z.square().sum().backward()
    assert (quantizer.codebook.grad.abs().sum(1) > 0).all()


def test_no_matrix_of_all_choices_is_kept(whole_batch):
    quantizer, kept = make(), []
    vectors = torch.randn(4800, DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        quantizer.quantize(vectors, whole_batch(8))
    assert 0 < max(kept) <= vectors.numel() < len(vectors) * SIZE


def test_encode_gives_the_codes_of_forward_and_exactly_their_vectors(whole_batch):
    quantizer, encoded = make(), encodings()
    output, encoded_only = quantizer(encoded, None, whole_batch(8)), quantizer.encode(encoded)
    assert torch.equal(output.indices, encoded_only.indices)
    assert torch.equal(encoded_only.z.movedim(1, -1), quantizer.codebook[output.indices])
    torch.testing.assert_close(output.z, encoded_only.z)


def test_without_weight_no_entropy_is_computed(whole_batch):
    assert make(entropy_weight=0.0)(encodings(), None, whole_batch(8)).losses.keys() == {"codebook", "commitment"}
