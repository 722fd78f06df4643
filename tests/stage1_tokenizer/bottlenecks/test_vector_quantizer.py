import copy

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from stage1_tokenizer.bottlenecks import shortlist
from stage1_tokenizer.bottlenecks.nearest_codes import k_means, nearest_codes
from stage1_tokenizer.bottlenecks.vector_quantizer import VectorConfig, VectorQuantizer
from twostage.core.machine.memory import peak_memory
from twostage.core.training.random import BatchRandom

GRID = (2, 3)


def make_quantizer(size: int = 6, dim: int = 4, **options: object) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(VectorConfig(codebook_size=size, **options), dim)


def encodings(count: int = 8, dim: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, *GRID, generator=torch.Generator().manual_seed(seed))


def as_vectors(encoded: Tensor) -> Tensor:
    return rearrange(encoded, "b d h w -> (b h w) d")


def brute_force(vectors: Tensor, codebook: Tensor) -> Tensor:
    differences = vectors.double()[:, None] - codebook.double()[None]
    return differences.square().sum(2).argmin(1)


def alone(statistics: Tensor) -> Tensor:
    """The sum over the processes of a single process."""
    return statistics


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def everything(quantizer: VectorQuantizer) -> dict[str, Tensor]:
    """All parameters and buffers, the statistics that wait for an update among them."""
    tensors = dict(quantizer.named_parameters()) | dict(quantizer.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# --- the nearest code -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize(("count", "size", "dim"), [(1, 2, 1), (16, 5, 3), (333, 50, 8)])
def test_nearest_codes_equal_brute_force_in_tiles(count, size, dim, scale, monkeypatch):
    monkeypatch.setattr(shortlist, "VECTORS", 100)  # 333 is no multiple
    vectors = torch.randn(count, dim, generator=generator(1))
    codebook = torch.randn(size, dim, generator=generator(2)) * scale
    assert torch.equal(nearest_codes(vectors, codebook), brute_force(vectors, codebook))


def test_long_vectors_do_not_hide_the_differences_between_codes():
    codebook = torch.randn(64, 4, generator=generator()) * 1e-4
    vectors = torch.randn(500, 4, generator=generator(1)) * 100
    assert torch.equal(nearest_codes(vectors, codebook), brute_force(vectors, codebook))


def hard_cases() -> dict[str, tuple[Tensor, Tensor]]:
    """Vectors and codebooks in which scores in bfloat16, or float32, cannot tell codes apart."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source)

    source = generator(3)
    vectors, codes = randn(300, 8), randn(700, 8)
    clusters = randn(4, 8)[torch.arange(700) % 4]
    middle = (codes[:300] + codes[1:301]) / 2
    nudged = torch.cat([codes, torch.nextafter(codes, torch.zeros(()))])
    return {
        "plain": (vectors, codes),
        "bfloat16 inputs": (vectors.bfloat16().float(), codes.bfloat16().float()),
        "unit length": (F.normalize(vectors), F.normalize(codes)),
        "far from zero": (vectors + 1000, codes + 1000),
        "close clusters": (clusters[:300] + randn(300, 8) * 1e-3, clusters + randn(700, 8) * 1e-3),
        "one cluster": (vectors, codes * 1e-5 + 1),
        "halfway between two codes": (middle, codes),
        "one bit apart": (vectors, nudged),
        "short vectors": (vectors * 1e-6, codes),
        "tiny": (vectors * 1e-30, codes * 1e-30),
        "one long code": (vectors, torch.cat([codes, torch.full((1, 8), 1e4)])),
    }


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("name", hard_cases())
def test_codes_are_those_of_float64_on_every_processor(name, bfloat16, monkeypatch):
    monkeypatch.setattr(shortlist, "reason_for_precision", lambda _: ("bf16" if bfloat16 else "no", ""))
    vectors, codebook = hard_cases()[name]
    assert torch.equal(nearest_codes(vectors, codebook), brute_force(vectors, codebook))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_shortlist_answers_without_comparing_all_codes(dtype):
    vectors, codebook = hard_cases()["plain"]
    found = shortlist._shortlist(codebook, dtype)(vectors)
    assert found is not None
    assert torch.equal(found, brute_force(vectors, codebook))
    assert shortlist._shortlist(codebook[:1].expand(700, 8), dtype)(vectors) is None


def test_a_large_codebook_needs_no_matrix_of_all_scores():
    """It would take 256 MiB."""
    vectors, codebook = torch.randn(2048, 4, generator=generator()), torch.randn(65_536, 4, generator=generator(1))
    with peak_memory(torch.device("cpu")) as peak:
        nearest_codes(vectors, codebook)
    assert peak() < 60 * 2**20


def test_the_first_of_equal_codes_is_found():
    codebook = torch.randn(5, 4, generator=generator())[torch.tensor([3, 1, 4, 0, 2])].repeat(100, 1)
    assert nearest_codes(codebook, codebook).tolist() == list(range(5)) * 100


def test_vectors_that_are_not_finite_get_some_code():
    vectors, codebook = hard_cases()["plain"]
    vectors = vectors.index_fill(0, torch.arange(100), torch.nan).index_fill(0, torch.arange(100, 150), torch.inf)
    codes = nearest_codes(vectors, codebook)
    assert 0 <= codes.min() <= codes.max() < 700
    assert torch.equal(codes[150:], brute_force(vectors[150:], codebook))


def test_a_code_finds_itself():
    codebook = torch.randn(40, 5, generator=generator())
    assert torch.equal(nearest_codes(codebook, codebook), torch.arange(40))


# --- forward, encode, lookup ----------------------------------------------------------------------------------------


def test_forward_gives_the_nearest_codes_of_every_cell(whole_batch):
    quantizer, encoded = make_quantizer(), encodings()
    output = quantizer(encoded, None, whole_batch(8))
    assert torch.equal(output.indices, brute_force(as_vectors(encoded), quantizer.codebook).view(8, *GRID))
    torch.testing.assert_close(output.z, quantizer.lookup(output.indices))


def test_encode_gives_the_codes_of_forward_and_exactly_their_vectors(whole_batch):
    quantizer, encoded = make_quantizer(), encodings()
    encoded_only = quantizer.encode(encoded)
    assert torch.equal(encoded_only.indices, quantizer(encoded, None, whole_batch(8)).indices)
    for image, row, column in [(0, 0, 0), (3, 1, 2), (7, 0, 1)]:
        code = encoded_only.indices[image, row, column]
        assert torch.equal(encoded_only.z[image, :, row, column], quantizer.codebook[code])


@pytest.mark.parametrize("weight", [0.0, 0.25, 2.0])
def test_the_commitment_weight_scales_only_the_encoders_gradient(weight, whole_batch):
    quantizer = make_quantizer(codebook="learned", commitment_weight=weight)
    encoded = encodings().requires_grad_()
    output = quantizer(encoded, None, whole_batch(8))
    sum(output.losses.values()).backward()
    distance = (encoded - quantizer.lookup(output.indices)).detach()
    torch.testing.assert_close(encoded.grad, weight * 2 * distance / encoded.numel())
    expected = torch.zeros_like(quantizer.codebook)  # of mean |code - vector|^2, whatever the weight
    expected.index_add_(0, output.indices.flatten(), as_vectors(-2 * distance / encoded.numel()))
    torch.testing.assert_close(quantizer.codebook.grad, expected)


def test_losses_by_hand(whole_batch):
    quantizer, encoded = make_quantizer(codebook="learned", commitment_weight=0.25), encodings()
    output = quantizer(encoded, None, whole_batch(8))
    distance = (encoded - quantizer.lookup(output.indices)).square().mean()
    torch.testing.assert_close(output.losses, {"commitment": 0.25 * distance, "codebook": distance})


@pytest.mark.parametrize("codebook", ["ema", "learned"])
def test_the_decoders_gradient_goes_straight_through(codebook, whole_batch):
    quantizer, encoded = make_quantizer(codebook=codebook), encodings().requires_grad_()
    z = quantizer(encoded, None, whole_batch(8)).z
    gradient = encodings(seed=5)
    z.backward(gradient)
    assert torch.equal(encoded.grad, gradient)
    assert quantizer.codebook.grad is None


def test_an_ema_codebook_is_not_a_parameter(whole_batch):
    quantizer = make_quantizer(codebook="ema")
    output = quantizer(encodings().requires_grad_(), None, whole_batch(8))
    assert list(quantizer.parameters()) == []
    assert list(output.losses) == ["commitment"]
    assert not quantizer.codebook.requires_grad


def test_a_learned_codebook_is_the_only_parameter():
    assert [name for name, _ in make_quantizer(codebook="learned").named_parameters()] == ["codebook"]


def test_float32_under_autocast(whole_batch):
    quantizer, encoded = make_quantizer(size=200), encodings(64)
    expected = quantizer(encoded, None, whole_batch(64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, encoded_only = quantizer(encoded, None, whole_batch(64)), quantizer.encode(encoded)
        low = quantizer(encoded.bfloat16(), None, whole_batch(64))
    assert output.z.dtype == output.losses["commitment"].dtype == low.z.dtype == torch.float32
    assert torch.equal(output.indices, expected.indices)
    assert torch.equal(encoded_only.indices, expected.indices)
    assert torch.equal(output.losses["commitment"], expected.losses["commitment"])
    assert torch.equal(low.indices.flatten(), brute_force(as_vectors(encoded.bfloat16()), quantizer.codebook))


def test_perplexity_is_the_number_of_equally_used_codes(whole_batch):
    quantizer = make_quantizer(size=6)
    quantizer.ema_counts.copy_(torch.tensor([3.0, 3.0, 3.0, 0.0, 0.0, 0.0]))
    assert quantizer(encodings(), None, whole_batch(8)).metrics["perplexity"].item() == pytest.approx(3.0)


# --- the codebook's updates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook", ["ema", "learned"])
def test_nothing_changes_before_an_update_or_in_evaluation(codebook, whole_batch):
    quantizer = make_quantizer(codebook=codebook)
    stored = copy.deepcopy(quantizer.state_dict())
    quantizer(encodings(), None, whole_batch(8))
    assert_same(quantizer.state_dict(), stored)
    before = everything(quantizer.eval())
    quantizer(encodings(seed=1), None, whole_batch(8))
    quantizer.encode(encodings(seed=2))
    assert_same(everything(quantizer), before)


def test_the_ema_update_is_the_papers_formula(whole_batch):
    quantizer, encoded = make_quantizer(size=6, ema_decay=0.9, revive_below=0.0), encodings()
    counts, sums = torch.ones(6, dtype=torch.double), quantizer.codebook.double()
    for seed in range(3):
        indices = brute_force(as_vectors(encoded), quantizer.codebook)
        quantizer(encoded, None, whole_batch(8, seed))
        quantizer.update_codebook(alone)
        for code in range(6):
            chosen = as_vectors(encoded).double()[indices == code]
            counts[code] = 0.9 * counts[code] + 0.1 * len(chosen)
            sums[code] = 0.9 * sums[code] + 0.1 * chosen.sum(0)
        smoothed = (counts + 1e-5) / (counts.sum() + 6 * 1e-5) * counts.sum()
        torch.testing.assert_close(quantizer.codebook, (sums / smoothed[:, None]).float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(quantizer.ema_counts, counts.float())


def test_updating_a_learned_codebook_moves_only_dead_codes(whole_batch):
    quantizer = make_quantizer(codebook="learned", revive_below=0.0)
    codes = quantizer.codebook.detach().clone()
    quantizer(encodings(), None, whole_batch(8))
    quantizer.update_codebook(alone)
    assert torch.equal(quantizer.codebook, codes)
    assert not torch.equal(quantizer.ema_counts, torch.ones(6))


@pytest.mark.parametrize("codebook", ["ema", "learned"])
def test_a_dead_code_moves_onto_a_vector_of_the_batch_and_stays_alive(codebook, whole_batch):
    quantizer = make_quantizer(codebook=codebook, ema_decay=0.5, revive_below=0.2)
    with torch.no_grad():
        quantizer.codebook[0] = 1e3
    if codebook == "ema":
        quantizer.ema_sums[0] = 1e3
    vectors = as_vectors(encodings())
    quantizer(encodings(), None, whole_batch(8))
    quantizer.update_codebook(alone)
    revived, count = quantizer.codebook[0].detach().clone(), quantizer.ema_counts[0].item()
    assert (vectors == revived).all(1).any()
    assert count == pytest.approx(2 * 0.2 * (6 + len(vectors)) / 2 / 6)  # twice the count below which a code is dead

    indices = quantizer(encodings(), None, whole_batch(8, seed=1)).indices
    quantizer.update_codebook(alone)
    chosen = vectors[indices.flatten() == 0]
    assert len(chosen)
    assert quantizer.ema_counts[0] == pytest.approx(0.5 * count + 0.5 * len(chosen))
    moved = (count * revived + chosen.sum(0)) / (count + len(chosen))
    torch.testing.assert_close(quantizer.codebook[0], moved if codebook == "ema" else revived, rtol=1e-4, atol=1e-4)


def test_revive_below_0_never_revives(whole_batch):
    quantizer = make_quantizer(codebook="learned", ema_decay=0.0, revive_below=0.0)
    with torch.no_grad():
        quantizer.codebook[0] = 1e3
    for seed in range(3):
        quantizer(encodings(), None, whole_batch(8, seed))
        quantizer.update_codebook(alone)
    assert quantizer.ema_counts[0] == 0
    assert (quantizer.codebook[0] == 1e3).all()


def test_usage_recovers_from_identical_distant_codes(whole_batch):
    quantizer = make_quantizer(size=32)
    quantizer.initialize(torch.full((8, 4, *GRID), 100.0), generator())
    clusters = 3 * torch.randn(32, 4, generator=generator())

    def toy_data(seed: int) -> Tensor:
        random = generator(seed)
        members = clusters[torch.randint(32, (32, *GRID), generator=random)]
        return (members + 0.1 * torch.randn(members.shape, generator=random)).movedim(-1, 1)

    assert len(quantizer.encode(toy_data(0)).indices.unique()) == 1
    for seed in range(1, 300):
        quantizer(toy_data(seed), None, whole_batch(32, seed))
        quantizer.update_codebook(alone)
    used = torch.cat([quantizer.encode(toy_data(seed)).indices.flatten() for seed in range(300, 310)]).unique()
    assert len(used) > 0.9 * 32


# --- several processes, several parts of a batch --------------------------------------------------------------------


def exchange(one: VectorQuantizer, other: VectorQuantizer) -> None:
    """Updates both as two processes do, whose reduction adds what each sends."""
    sent: dict[VectorQuantizer, list[Tensor]] = {one: [], other: []}
    for quantizer, tensors in sent.items():
        copy.deepcopy(quantizer).update_codebook(lambda t, tensors=tensors: tensors.append(t.clone()) or t)
    for quantizer, partner in [(one, other), (other, one)]:
        received = iter(sent[partner])
        quantizer.update_codebook(lambda t, received=received: t + next(received))


@pytest.mark.parametrize("codebook", ["ema", "learned"])
def test_two_processes_get_the_same_codebook_as_one(codebook):
    whole = make_quantizer(size=24, codebook=codebook, ema_decay=0.5, revive_below=0.5)
    halves = [copy.deepcopy(whole), copy.deepcopy(whole)]
    initial = whole.codebook.detach().clone()
    for step in range(4):
        encoded = encodings(seed=step)
        whole(encoded, None, BatchRandom(step, slice(0, 8), 8))
        whole.update_codebook(alone)
        for half, rows in zip(halves, [slice(0, 4), slice(4, 8)], strict=True):
            half(encoded[rows], None, BatchRandom(step, rows, 8))
        exchange(*halves)
        assert_same(everything(halves[0]), everything(halves[1]))
        torch.testing.assert_close(everything(halves[0]), everything(whole), rtol=1e-5, atol=1e-5)
    assert not torch.equal(whole.codebook, initial)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_update_like_the_whole_batch(parts):
    whole = make_quantizer(size=24, ema_decay=0.5, revive_below=0.5)
    in_parts, encoded = copy.deepcopy(whole), encodings()
    whole(encoded, None, BatchRandom(0, slice(0, 8), 8))
    for start in range(0, 8, 8 // parts):
        rows = slice(start, start + 8 // parts)
        in_parts(encoded[rows], None, BatchRandom(0, rows, 8))
    for quantizer in (whole, in_parts):
        quantizer.update_codebook(alone)
    torch.testing.assert_close(everything(in_parts), everything(whole))
    revived = torch.cdist(whole.codebook, as_vectors(encoded)).amin(1) < 1e-6
    assert revived.sum() > 2


# --- the start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_k_means_finds_the_centres_of_two_clusters(seed):
    noise = 0.1 * torch.randn(40, 3, generator=generator(seed))
    clusters = [noise[:15] - 5, noise[15:] + 5]
    centres = k_means(torch.cat(clusters), 2, generator(seed))
    centres = centres[centres[:, 0].argsort()]
    torch.testing.assert_close(centres, torch.stack([cluster.mean(0) for cluster in clusters]))


def test_k_means_puts_centres_into_every_cluster_and_nowhere_else():
    corners = torch.tensor([[0.0, 0.0], [0.0, 9.0], [9.0, 0.0], [9.0, 9.0]])
    vectors = corners.repeat(25, 1) + 0.1 * torch.randn(100, 2, generator=generator())
    distances = torch.cdist(corners, k_means(vectors, 24, generator()))
    assert (distances.amin(1) < 0.5).all()
    assert (distances.amin(0) < 0.5).all()


def test_k_means_works_with_fewer_vectors_than_centres():
    vectors = torch.randn(3, 2, generator=generator())
    centres = k_means(vectors, 7, generator())
    assert centres.shape == (7, 2)
    assert torch.cdist(centres, vectors).amin(1).max() < 1e-6
    assert torch.cdist(vectors, centres).amin(1).max() < 1e-6


@pytest.mark.parametrize("codebook", ["ema", "learned"])
def test_initialize_puts_the_codes_onto_the_data(codebook, whole_batch):
    quantizer, encoded = make_quantizer(size=12, codebook=codebook), encodings(2)  # 2 x 6 cells: a code for each
    quantizer.initialize(encoded, generator())
    assert quantizer(encoded, None, whole_batch(2)).indices.unique().tolist() == list(range(12))
    torch.testing.assert_close(quantizer.encode(encoded).z, encoded)
    codes = quantizer.codebook.detach().clone()
    quantizer.update_codebook(alone)
    torch.testing.assert_close(quantizer.codebook.detach(), codes, rtol=1e-4, atol=1e-4)  # the statistics fit the codes
