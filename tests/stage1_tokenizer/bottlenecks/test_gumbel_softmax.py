import math

import pytest
import torch
from messages import refuses
from torch import Tensor

from stage1_tokenizer.autoencoder_config import ModelConfig
from stage1_tokenizer.bottlenecks.gumbel_softmax import Annealing, GumbelSoftmax, GumbelSoftmaxConfig, annealed
from twostage.core.config.sections import parse_config
from twostage.core.training.random import BatchRandom

SIZE, DIM = 6, 4


def make(**options: object) -> GumbelSoftmax:
    torch.manual_seed(0)
    return GumbelSoftmax(GumbelSoftmaxConfig(codebook_size=SIZE, **options), DIM)


def scores(count: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(count, SIZE, 2, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_the_soft_choice_and_its_gradients_are_the_papers(progress, whole_batch):
    """y = softmax((l + g) / T), z = y E; dL/dl_k = y_k (G.e_k - sum_j y_j G.e_j) / T and dL/dE = sum y G, float64."""
    quantizer = make().double()
    quantizer.progress = progress
    logits = scores().double().requires_grad_()
    z = quantizer._relaxed(logits, whole_batch(8))
    gradient = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    z.backward(gradient)
    temperature = annealed(quantizer.config.temperature, progress)
    uniform = whole_batch(8).uniform("gumbel", (SIZE, 2, 3), z.device).double()
    noisy = (logits.detach() - (-uniform.log()).log()) / temperature
    choice = noisy.exp() / noisy.exp().sum(1, keepdim=True)
    codebook = quantizer.codebook.detach()
    torch.testing.assert_close(z.detach(), torch.einsum("bkhw,kd->bdhw", choice, codebook), rtol=1e-4, atol=1e-5)
    pull = torch.einsum("bdhw,kd->bkhw", gradient, codebook)
    expected = choice * (pull - (choice * pull).sum(1, keepdim=True)) / temperature
    torch.testing.assert_close(logits.grad, expected, rtol=1e-3, atol=1e-4)
    wanted = torch.einsum("bkhw,bdhw->kd", choice, gradient)
    torch.testing.assert_close(quantizer.codebook.grad, wanted, rtol=1e-3, atol=1e-4)


def test_the_divergence_from_uniform_is_that_of_torch(whole_batch):
    quantizer = make(kl_weight={"start": 0.0, "end": 0.7, "over": 0.5})
    logits = scores().requires_grad_()
    loss = quantizer(logits, None, whole_batch(8)).losses["choice_kl"]
    choice = torch.distributions.Categorical(logits=logits.movedim(1, -1).double())
    uniform = torch.distributions.Categorical(logits=torch.zeros(SIZE, dtype=torch.double))
    expected = 0.7 * torch.distributions.kl_divergence(choice, uniform).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("progress", "value"), [(0.0, 1.0), (0.25, 0.0625 + 0.9375 / 2), (0.5, 0.0625), (0.8, 0.0625), (1.0, 0.0625)]
)
def test_schedules_depend_on_the_progress_alone(progress, value):
    assert annealed(Annealing(start=1.0, end=1 / 16, over=0.5), progress) == pytest.approx(value)
    assert annealed(Annealing(start=1.0, end=2.0, over=0.0), progress) == 2.0


def test_a_low_temperature_gives_nearly_a_single_code(whole_batch):
    quantizer = make()
    distances = []
    for quantizer.progress in (0.0, 1.0):
        z = quantizer(scores(), None, whole_batch(8)).z.movedim(1, -1).reshape(-1, DIM)
        distances.append(torch.cdist(z, quantizer.codebook).amin(1).mean().item())
    assert distances[1] < 0.2 * distances[0]


def test_inference_takes_the_highest_score(whole_batch):
    quantizer, logits = make(), scores()
    output = quantizer.encode(logits)
    assert torch.equal(output.indices, logits.argmax(1))
    assert torch.equal(output.z.movedim(1, -1), quantizer.codebook[output.indices])
    assert torch.equal(quantizer(logits, None, whole_batch(8)).indices, output.indices)
    quantizer.eval().progress = 0.0
    evaluated = quantizer(logits, None, whole_batch(8))
    assert torch.equal(evaluated.z, output.z)
    assert evaluated.losses["choice_kl"] > 0, "held-out losses have the final weight at any time"


def test_noise_belongs_to_the_image(whole_batch):
    quantizer, logits = make(), scores()
    whole = quantizer(logits, None, whole_batch(8)).z
    halves = [quantizer(logits[rows], None, BatchRandom(0, rows, 8)).z for rows in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(torch.cat(halves), whole)
    assert not torch.equal(quantizer(logits, None, whole_batch(8, seed=1)).z, whole)


def test_the_divergence_spreads_scores_that_agree_on_one_code(whole_batch):
    quantizer = make(kl_weight={"end": 1.0, "over": 0.0})
    points = scores(16).index_add(1, torch.tensor([0]), torch.full((16, 1, 2, 3), 6.0)).requires_grad_()
    start = quantizer(points, None, whole_batch(16)).losses["choice_kl"].item()
    optimizer = torch.optim.Adam([points], lr=0.1)
    for step in range(100):
        optimizer.zero_grad()
        quantizer(points, None, whole_batch(16, step)).losses["choice_kl"].backward()
        optimizer.step()
    assert start > 0.8 * math.log(SIZE)
    assert quantizer(points, None, whole_batch(16)).losses["choice_kl"] < 0.05


@pytest.mark.parametrize("revive_below", [0.0, 0.05])
def test_codes_without_a_gradient_restart(revive_below, whole_batch):
    """An encoder that is sure of one code has no gradient; a restart gives all codes a chance."""
    torch.manual_seed(0)
    encoder, quantizer = torch.nn.Conv2d(DIM, SIZE, 1), make(revive_below=revive_below)
    with torch.no_grad():
        encoder.bias[0] += 100.0
    optimizer = torch.optim.Adam([*encoder.parameters(), *quantizer.parameters()], lr=0.01)
    points = torch.randn(64, DIM, 2, 3, generator=torch.Generator().manual_seed(3))

    def used() -> int:
        return len(quantizer.encode(encoder(points)).indices.unique())

    assert used() == 1
    for step in range(150):
        optimizer.zero_grad()
        output = quantizer(encoder(points), None, whole_batch(64, step))
        ((output.z - points).square().mean() + sum(output.losses.values())).backward()
        if step == 0:
            assert encoder.weight.grad.abs().max() < 1e-6
        optimizer.step()
        quantizer.update_codebook(lambda statistics: statistics)
    assert used() == (SIZE if revive_below else 1)


def test_a_code_that_is_only_rare_keeps_its_score(whole_batch):
    quantizer, logits = make(ema_decay=0.0, revive_below=0.5), scores()
    logits[:, 0] -= 5  # 0.7% of the average probability
    quantizer(logits, None, whole_batch(8))
    quantizer.update_codebook(lambda statistics: statistics)
    assert quantizer.ema_counts[0] == 0
    assert torch.equal(quantizer.offset, torch.zeros(SIZE))


def test_extreme_scores_stay_finite(whole_batch):
    logits = (1e4 * scores()).requires_grad_()
    output = make()(logits, None, whole_batch(8))
    (output.z.sum() + output.losses["choice_kl"]).backward()
    assert output.z.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": {"end": 0.0}}, ["temperature.end", "greater than 0", "0.0"]),
        ({"kl_weight": {"over": 2}}, ["kl_weight.over", "less than or equal to 1", "2"]),
        ({"codebook_size": 1}, ["codebook_size", "greater than or equal to 2", "1"]),
    ],
)
def test_bad_settings_are_refused(settings, said):
    with refuses(*said):
        parse_config(ModelConfig, {"bottleneck": {"type": "gumbel_softmax", **settings}}, "model")
