"""The multi-scale tokenizer against VAR's algorithms, written out here with torch's own interpolation."""

import pytest
import torch
import torch.nn.functional as F
from messages import refuses
from pydantic import ValidationError
from torch import Tensor

from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.bottlenecks.bottleneck import code_counts
from stage1_tokenizer.bottlenecks.multi_scale import MultiScale, MultiScaleConfig
from twostage.core.scales import Resize, describe_grids, join_scales, split_scales
from twostage.core.training.random import BatchRandom

SHAPE, SCALES, CODES = (4, 4, 5), ((1, 1), (2, 2), (3, 5), (4, 5)), 16
KINDS = {
    "ema": {"type": "vector", "codebook_size": CODES},
    "learned": {"type": "vector", "codebook_size": CODES, "codebook": "learned"},
    "finite_scalar": {"type": "finite_scalar", "levels": [3, 4, 3, 5]},
}


def build(kind: str = "ema", **options: object) -> MultiScale:
    torch.manual_seed(0)
    return MultiScaleConfig.model_validate({"scales": SCALES, "codes": KINDS[kind] | options}).build(SHAPE, 0)


def encodings(count: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def alone(statistics: Tensor) -> Tensor:
    return statistics


def plain_sums(model: MultiScale, encoded: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The codes and the sum after each scale, by algorithm 1 of VAR."""
    left, total, codes, sums = encoded, torch.zeros_like(encoded), [], []
    for scale in SCALES:
        small = F.interpolate(left, scale, mode="area")
        vectors = small.permute(0, 2, 3, 1)
        chosen = torch.cdist(vectors.flatten(0, 2), model.quantizer.codes()).argmin(1)
        codes.append(chosen.view(vectors.shape[:3]))
        part = F.interpolate(model.quantizer.codes()[codes[-1]].permute(0, 3, 1, 2), SHAPE[1:], mode="bicubic")
        total, left = total + part, left - part
        sums.append(total)
    return codes, sums


@pytest.mark.parametrize(("size", "new"), [((4, 5), (2, 3)), ((4, 5), (1, 1)), ((2, 3), (4, 5)), ((4, 5), (4, 5))])
def test_resizing_is_that_of_torch(size, new):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    mode = "area" if new[0] <= size[0] else "bicubic"
    torch.testing.assert_close(Resize(size, new)(x), F.interpolate(x, new, mode=mode), rtol=1e-5, atol=1e-6)


def test_scales_are_split_and_joined():
    codes = torch.arange(2 * 25).view(2, 25)
    grids = split_scales(codes, ((1, 1), (2, 2), (4, 5)))
    assert [tuple(grid.shape) for grid in grids] == [(2, 1, 1), (2, 2, 2), (2, 4, 5)]
    assert torch.equal(join_scales(grids), codes)
    assert (describe_grids((7, 7)), describe_grids((1, 5), ((1, 1), (2, 2)))) == ("7x7", "1x1 + 2x2")


def averages(x: Tensor) -> list[Tensor]:
    """x (B, C, h, w) averaged down to the grid of each scale."""
    return [F.interpolate(x, scale, mode="area") for scale in SCALES]


@pytest.mark.parametrize("kind", ["ema", "learned"])
def test_each_scale_encodes_what_the_coarser_ones_leave_over(kind, whole_batch):
    model, encoded = build(kind), encodings()
    output = model(encoded, None, whole_batch(8))
    codes, sums = plain_sums(model, encoded)
    assert output.indices.shape == (8, 1, 40)
    assert torch.equal(output.indices[:, 0], join_scales(codes))
    torch.testing.assert_close(output.z, sums[-1])
    pairs = zip(averages(encoded), sums, range(len(SCALES)), strict=True)
    error = sum(F.mse_loss(averages(total)[scale], mine) for mine, total, scale in pairs)
    losses = {"commitment": 0.25 * error} | ({"codebook": error} if kind == "learned" else {})
    torch.testing.assert_close(output.losses, losses)
    torch.testing.assert_close(output.metrics["error_2x2"], F.mse_loss(sums[1], encoded))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_enough_for_z(kind, whole_batch):
    model, encoded = build(kind).eval(), encodings()
    output = model.encode(encoded)
    trained = model(encoded, None, whole_batch(8))
    assert torch.equal(trained.indices, output.indices)
    torch.testing.assert_close(model.lookup(output.indices), output.z)
    torch.testing.assert_close(trained.z, output.z)
    assert output.indices.max() < model.codebook_size


@pytest.mark.parametrize("kind", KINDS)
def test_who_learns_from_what(kind, whole_batch):
    """The decoder's gradient reaches the encoder unchanged, `commitment` the encoder alone, `codebook` the codes."""
    model, encoded = build(kind), encodings().requires_grad_()
    output, own = model(encoded, None, whole_batch(8)), [*model.parameters()]
    assert len(own) == (kind == "learned")
    assert output.losses.keys() == {"commitment", "codebook"} if own else {"commitment"}
    gradient = torch.randn(output.z.shape, generator=torch.Generator().manual_seed(1))
    found, *others = torch.autograd.grad(output.z, [encoded, *own], gradient, retain_graph=True, allow_unused=True)
    assert torch.equal(found, gradient)
    assert others == [None] * len(own)
    found, *others = torch.autograd.grad(
        output.losses["commitment"], [encoded, *own], retain_graph=True, allow_unused=True
    )
    assert found.abs().sum() > 0
    assert others == [None] * len(own)
    if own:
        found, codes = torch.autograd.grad(output.losses["codebook"], [encoded, *own], allow_unused=True)
        assert found is None
        assert codes.abs().sum() > 0


def test_the_gradients_are_those_of_the_losses(whole_batch):
    """They are compared with those in float64, and these with finite differences. The codes are held fixed."""
    model, encoded = build("learned"), encodings().requires_grad_()
    output = model(encoded, None, whole_batch(8))
    found = torch.autograd.grad(output.losses["commitment"], encoded, retain_graph=True)
    found += torch.autograd.grad(output.losses["codebook"], model.quantizer.codebook)
    grids = split_scales(output.indices[:, 0], SCALES)

    def error(encoded: Tensor, codebook: Tensor) -> Tensor:
        total, errors = torch.zeros_like(encoded), []
        for scale, (size, grid) in enumerate(zip(SCALES, grids, strict=True)):
            total = total + F.interpolate(codebook[grid].permute(0, 3, 1, 2), SHAPE[1:], mode="bicubic")
            errors.append(F.mse_loss(averages(total)[scale], F.interpolate(encoded, size, mode="area")))
        return torch.stack(errors).sum()

    inputs = [x.detach().double().requires_grad_() for x in (encoded, model.quantizer.codebook)]
    assert torch.autograd.gradcheck(error, inputs, fast_mode=True)
    expected = torch.autograd.grad(error(*inputs), inputs)
    for mine, theirs, weight in zip(found, expected, (0.25, 1.0), strict=True):
        torch.testing.assert_close(mine.double(), weight * theirs, rtol=1e-4, atol=1e-7)


def test_all_scales_count_once_in_the_codebook(whole_batch):
    model, encoded = build(), encodings()
    indices = model(encoded, None, whole_batch(8)).indices
    counts = torch.bincount(indices.flatten(), minlength=CODES).float()
    assert torch.equal(model.quantizer.pending_counts, counts)
    model.update_codebook(alone)
    torch.testing.assert_close(model.quantizer.ema_counts, 0.99 + 0.01 * counts)
    of_scale = torch.bincount(indices[:, 0, 1:5].flatten(), minlength=CODES).float()
    torch.testing.assert_close(model.ema_scale_counts[1], 0.99 + 0.01 * of_scale)
    assert torch.equal(code_counts(model, indices), counts.long()[None])


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_count_like_one(kind):
    whole, *halves = (build(kind, **({"revive_below": 0.5} if kind != "finite_scalar" else {})) for _ in range(3))
    for step in range(2):
        encoded, parts = encodings(seed=step), [slice(0, 4), slice(4, 8)]
        whole(encoded, None, BatchRandom(step, slice(0, 8), 8))
        whole.update_codebook(alone)
        for half, rows in zip(halves, parts, strict=True):
            half(encoded[rows], None, BatchRandom(step, rows, 8))
        pending = [{name: one.clone() for name, one in half.named_buffers() if "pending" in name} for half in halves]
        for half in halves:
            for name, tensor in half.named_buffers():
                if "pending" in name:
                    tensor.copy_(pending[0][name] + pending[1][name])
            half.update_codebook(alone)
            torch.testing.assert_close(half.state_dict(), whole.state_dict(), rtol=1e-4, atol=1e-5)


def test_it_starts_from_data_and_recovers_from_a_collapse(whole_batch):
    model = build(revive_below=0.2, ema_decay=0.8)
    colours = encodings(CODES // 2)[:, :, :1, :1].repeat(4, 1, *SHAPE[1:])  # images of one vector each
    model.initialize(colours, torch.Generator().manual_seed(0))
    first = model.down[0](colours)
    started, untrained = ((each.quantizer.encode(first).z - first).square().mean() for each in (model, build()))
    assert started < 0.4 * untrained
    model.quantizer.codebook.fill_(3.0)
    model.quantizer.ema_sums.fill_(3.0)
    for step in range(40):
        model(encodings(64, seed=step), None, BatchRandom(step, slice(0, 64), 64))
        model.update_codebook(alone)
    indices = model.encode(encodings(64, seed=99)).indices
    assert len(indices.unique()) > 0.9 * CODES


def test_a_model_folder_keeps_codes_and_images(tiny_autoencoder, random_images, tmp_path):
    model, images = tiny_autoencoder("multi_scale").eval(), random_images(3)
    model.save_pretrained(tmp_path)
    loaded, codes = Autoencoder.from_pretrained(tmp_path), model.encode_indices(images)
    assert model.code_grid == (1, 26)
    assert loaded.content_hash() == model.content_hash()
    assert codes.shape == (3, 1, 26)
    assert torch.equal(loaded.encode_indices(images), codes)
    torch.testing.assert_close(loaded.decode_indices(codes), model.reconstruct(images))
    loaded.bottleneck.quantizer.codebook.mul_(2)
    assert loaded.content_hash() != model.content_hash()


def test_impossible_scales_are_refused():
    for scales, problem in (([2, 1], "2x2 before 1x1"), ([1, 1], "1x1 before 1x1"), ([1, [4, 5], [5, 4]], "4x5")):
        with pytest.raises(ValidationError, match=f"{problem}.*grids that grow"):
            MultiScaleConfig(scales=scales)
    with refuses("model.bottleneck.scales 1x1 + 2x2", "4x5"):
        MultiScaleConfig(scales=[1, 2]).build(SHAPE, 0)
    with pytest.raises(ValidationError, match="l2_normalize"):
        MultiScaleConfig.model_validate({"codes": {"type": "vector", "l2_normalize": True}})
    with pytest.raises(ValueError, match="latent_channels 3"):
        MultiScaleConfig.model_validate({"codes": KINDS["finite_scalar"]}).check_channels(3)
