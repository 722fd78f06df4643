"""The two grids of VQ-VAE-2: the bottom is encoded and decoded with the top."""

import pytest
import torch
from messages import refuses
from torch import Tensor

from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.bottlenecks.bottleneck import code_counts
from stage1_tokenizer.bottlenecks.two_level import TwoLevel, TwoLevelConfig
from twostage.core.scales import split_scales
from twostage.core.training.random import BatchRandom

SHAPE, CODES = (4, 5, 6), 16


def build(**options: object) -> TwoLevel:
    torch.manual_seed(0)
    return TwoLevelConfig.model_validate({"codebook_size": CODES} | options).build(SHAPE, 0)


def encodings(count: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def alone(statistics: Tensor) -> Tensor:
    return statistics


def test_the_top_has_half_the_rows_and_columns(whole_batch):
    model, encoded = build(), encodings()
    output = model(encoded, None, whole_batch(8))
    assert model.scales == ((3, 3), (5, 6))
    assert output.z.shape == encoded.shape
    assert output.indices.shape == (8, 1, 39)
    assert torch.equal(model.encode(encoded).indices, output.indices)
    torch.testing.assert_close(model.encode(encoded).z, output.z)
    torch.testing.assert_close(model.lookup(output.indices), output.z)
    counts = code_counts(model, output.indices)
    assert counts.shape == (2, CODES)
    assert counts.sum(1).tolist() == [8 * 9, 8 * 30]


def test_the_bottom_is_encoded_and_decoded_with_the_top(whole_batch):
    """Its codes are those of what the top leaves open: the nearest to a map of the encoder's output and the top."""
    model, encoded = build(), encodings()
    output = model.encode(encoded)
    top, bottom = split_scales(output.indices[:, 0], model.scales)
    decoded = model.down(model.top.lookup(top)).repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :5, :6]
    wanted = model.to_bottom(torch.cat([encoded, decoded], 1)).movedim(1, -1)
    nearest = torch.cdist(wanted.flatten(0, 2), model.bottom.codebook).argmin(1)
    assert torch.equal(bottom.flatten(), nearest)
    changed = output.indices.clone()
    changed[..., 0] = (changed[..., 0] + 1) % CODES
    assert not torch.equal(model.lookup(changed), output.z)


def test_every_part_learns(whole_batch):
    model, encoded = build(codebook="learned"), encodings().requires_grad_()
    output = model(encoded, None, whole_batch(8))
    (output.z.square().mean() + sum(output.losses.values())).backward()
    assert encoded.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert output.losses.keys() == {"commitment", "codebook"}


def test_the_losses_are_those_of_both_grids(whole_batch):
    model, encoded = build(commitment_weight=0.5), encodings()
    top = model.top(model.up(encoded), None, whole_batch(8))
    decoded = model._decoded(top.z)
    bottom = model.bottom(model.to_bottom(torch.cat([encoded, decoded], 1)), None, whole_batch(8))
    found = build(commitment_weight=0.5)(encoded, None, whole_batch(8)).losses["commitment"]
    torch.testing.assert_close(found, top.losses["commitment"] + bottom.losses["commitment"])


def test_two_processes_count_like_one():
    whole, *halves = (build(revive_below=0.5) for _ in range(3))
    for step in range(2):
        encoded = encodings(seed=step)
        whole(encoded, None, BatchRandom(step, slice(0, 8), 8))
        whole.update_codebook(alone)
        for half, rows in zip(halves, [slice(0, 4), slice(4, 8)], strict=True):
            half(encoded[rows], None, BatchRandom(step, rows, 8))
        pending = [{name: one.clone() for name, one in half.named_buffers() if "pending" in name} for half in halves]
        for half in halves:
            for name, tensor in half.named_buffers():
                if "pending" in name:
                    tensor.copy_(pending[0][name] + pending[1][name])
            half.update_codebook(alone)
            torch.testing.assert_close(half.state_dict(), whole.state_dict(), rtol=1e-4, atol=1e-5)


def test_it_starts_from_data_and_recovers_from_a_collapse():
    model = build(revive_below=0.2, ema_decay=0.8)
    model.initialize(encodings(64), torch.Generator().manual_seed(0))
    for quantizer in (model.top, model.bottom):
        quantizer.codebook.fill_(3.0)
        quantizer.ema_sums.fill_(3.0)
    for step in range(40):
        model(encodings(64, seed=step), None, BatchRandom(step, slice(0, 64), 64))
        model.update_codebook(alone)
    used = (code_counts(model, model.encode(encodings(64, seed=99)).indices) > 0).float().mean(1)
    assert (used > 0.9).all()


def test_a_model_folder_keeps_codes_and_images(tiny_autoencoder, random_images, tmp_path):
    model, images = tiny_autoencoder("two_level").eval(), random_images(3)
    model.save_pretrained(tmp_path)
    loaded, codes = Autoencoder.from_pretrained(tmp_path), model.encode_indices(images)
    assert codes.shape == (3, *model.code_grid) == (3, 1, 20)
    assert torch.equal(loaded.encode_indices(images), codes)
    torch.testing.assert_close(loaded.decode_indices(codes), model.reconstruct(images))
    assert loaded.content_hash() == model.content_hash()


@pytest.mark.parametrize("grid", [(1, 1), (1, 4)])
def test_a_grid_that_cannot_be_halved_is_refused(grid):
    with refuses("model.bottleneck.type 'two_level'", f"{grid[0]}x{grid[1]}", "2x2"):
        TwoLevelConfig().build((4, *grid), 0)
