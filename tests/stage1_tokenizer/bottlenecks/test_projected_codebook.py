import copy

import pytest
import torch
from messages import refuses
from torch import Tensor

from stage1_tokenizer.autoencoder_config import ModelConfig
from stage1_tokenizer.bottlenecks import projected_codebook
from stage1_tokenizer.bottlenecks.projected_codebook import ProjectedCodebook, ProjectedCodebookConfig
from twostage.core.config.sections import parse_config


def make(trained: bool = True, **options: object) -> ProjectedCodebook:
    """A quantizer; ``trained``: its bridge does something."""
    torch.manual_seed(0)
    settings = {"codebook_size": 8, "patch_codes": 2, "width": 8, "heads": 2} | options
    quantizer = ProjectedCodebook(ProjectedCodebookConfig(**settings), 3)
    if trained:
        torch.nn.init.normal_(quantizer.bridge.recover.weight, std=0.3)
        quantizer._project()
    return quantizer


def encodings(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 2, 3, generator=torch.Generator().manual_seed(1))


def alone(statistics: Tensor) -> Tensor:
    return statistics


def test_the_bridge_has_the_gradient_of_its_output():
    bridge = make().bridge.double()
    codes = torch.randn(8, 3, generator=torch.Generator().manual_seed(2), dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(bridge, (codes,))


def test_losses_and_their_gradients_are_those_of_the_projected_codes(whole_batch, monkeypatch):
    """|z - sg e|^2 and |sg z - e|^2 with e = bridge(c), in float64."""
    monkeypatch.setattr(projected_codebook, "nearest_codes", lambda x, codes: torch.cdist(x, codes).argmin(1))
    monkeypatch.setattr(ProjectedCodebook, "_gather_statistics", lambda *_: None)
    quantizer = make(commitment_weight=0.5).double()
    vectors = encodings().movedim(1, -1).reshape(-1, 3).double().requires_grad_()
    indices, _, losses = quantizer.quantize(vectors, whole_batch(8))
    projected = quantizer.bridge(quantizer.codebook)
    assert torch.equal(indices, torch.cdist(vectors, projected).argmin(1))
    expected = {
        "commitment": 0.5 * (vectors - projected[indices].detach()).square().mean(),
        "codebook": (vectors.detach() - projected[indices]).square().mean(),
    }
    torch.testing.assert_close(losses, expected)
    tensors = [vectors, *quantizer.parameters()]
    for name in expected:
        found, wanted = (
            torch.autograd.grad(value[name], tensors, retain_graph=True, allow_unused=True)
            for value in (losses, expected)
        )
        torch.testing.assert_close(found, wanted)


def test_codes_that_nothing_chose_move_with_the_others(whole_batch):
    quantizer = make()
    output = quantizer(encodings(1), None, whole_batch(1))
    assert len(output.indices.unique()) < 8
    sum(output.losses.values()).backward()
    assert (quantizer.codebook.grad.abs().sum(1) > 0).all()


def test_inference_uses_the_codes_projected_after_the_update(whole_batch):
    quantizer, encoded = make(revive_below=0.0), encodings()
    output = quantizer(encoded, None, whole_batch(8))
    torch.testing.assert_close(output.z, quantizer.encode(encoded).z)
    with torch.no_grad():
        quantizer.codebook.add_(0.1)
    before = quantizer.codes().clone()
    quantizer.update_codebook(alone)
    assert not torch.equal(quantizer.codes(), before)
    torch.testing.assert_close(quantizer.codes(), quantizer.bridge(quantizer.codebook).detach())
    assert torch.equal(quantizer.lookup(torch.arange(8).view(1, 1, 8))[0, :, 0].T, quantizer.codes())
    evaluated = copy.deepcopy(quantizer).eval()
    torch.testing.assert_close(evaluated(encoded, None, whole_batch(8)).z, evaluated.encode(encoded).z)


def test_a_new_bridge_changes_nothing_so_codes_start_on_the_data():
    quantizer, encoded = make(trained=False, codebook_size=12), encodings(2)
    quantizer.initialize(encoded, torch.Generator().manual_seed(0))
    torch.testing.assert_close(quantizer.encode(encoded).z, encoded)


def test_a_dead_code_moves_close_to_a_vector_of_the_batch(whole_batch):
    quantizer, encoded = make(ema_decay=0.5, revive_below=0.2), encodings()
    with torch.no_grad():
        quantizer.codebook[0] = 50.0
        quantizer._project()
    before = quantizer.codes()[0].clone()
    quantizer(encoded, None, whole_batch(8))
    quantizer.update_codebook(alone)
    nearest = torch.cdist(quantizer.codes()[:1], encoded.movedim(1, -1).reshape(-1, 3)).min()
    assert nearest < 0.1 * before.norm()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"codebook_size": 10, "patch_codes": 4}, ["patch_codes 4", "divisor of codebook_size 10", "Change one"]),
        ({"width": 10, "heads": 4}, ["heads 4", "divisor of width 10", "Change one"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, said):
    with refuses("bottleneck", *said):
        parse_config(ModelConfig, {"bottleneck": {"type": "projected", **settings}}, "model")
