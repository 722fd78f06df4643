import pytest
import torch
import torch.nn.functional as F
from messages import refuses
from torch import Tensor, nn

from stage2_prior.networks.causal_transformer import CausalTransformerConfig
from stage2_prior.networks.transformer import (
    QUERIES,
    Block,
    FastBlock,
    Transformer,
    attention,
    rotate,
    rotations,
    turn,
)
from twostage.core.conditions.context import Context, ContextForm
from twostage.core.config.sections import parse_config
from twostage.core.training.random import BatchRandom

CODES, GRID = 5, (2, 3)


def build(**options: object) -> Transformer:
    torch.manual_seed(0)
    config = CausalTransformerConfig.model_validate(
        {"hidden_size": 16, "depth": 2, "num_heads": 2, "dropout": 0.0} | options
    )
    return Transformer(config, CODES, CODES + 1, GRID, ContextForm(num_classes=2), causal=False)


def test_rotated_heads_see_only_the_distance_between_two_cells():
    grid, width = (5, 6), 8
    rotation = rotations(grid, width)
    q, k = (torch.randn(width, generator=torch.Generator().manual_seed(i)).expand(30, -1) for i in range(2))
    scores = (rotate(q, rotation) @ rotate(k, rotation).T).view(*grid, *grid)  # one head's, from cell to cell
    torch.testing.assert_close(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1], rtol=1e-4, atol=1e-5)
    turned = rotate(q, rotation)  # (30, 8): a different direction at every cell
    assert (torch.cdist(turned, turned) + torch.eye(30)).min() > 0.1
    torch.testing.assert_close(turned.norm(dim=1), q.norm(dim=1))


@pytest.mark.parametrize("cells", [7, QUERIES, 2 * QUERIES + 5])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_bfloat16_equals_that_in_float32(causal, cells):
    generator = torch.Generator().manual_seed(0)
    q, k, v, pull = torch.randn(4, 2, 3, cells, 8, generator=generator).bfloat16()
    wanted = [x.requires_grad_() for x in (q, k, v)]
    attended = attention(q, k, v, causal)
    expected = F.scaled_dot_product_attention(*(x.float() for x in wanted), is_causal=causal)
    torch.testing.assert_close(attended.float(), expected, rtol=0.02, atol=0.02)
    gradients = torch.autograd.grad(attended, wanted, pull), torch.autograd.grad(expected, wanted, pull.float())
    for ours, exact in zip(*gradients, strict=True):
        assert (ours.float() - exact.float()).norm() < 0.02 * exact.float().norm()
    changed = v.detach().clone()
    changed[:, :, 4:] += 1
    same = attention(q, k, changed, causal)[:, :, :4] == attention(q, k, v, causal)[:, :, :4]
    assert same.all() if causal else not same.any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fast_block_equals_the_block(dtype):
    torch.manual_seed(0)
    config = CausalTransformerConfig(hidden_size=16, num_heads=2, dropout=0.5)
    block = Block(config, False, GRID, ContextForm()).eval().to(dtype)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
    x, rotation = torch.randn(3, 6, 16, dtype=dtype), rotations(GRID, 8)
    fast, rows = FastBlock(block, "float32"), x.flatten(0, 1)
    qkv = fast.qkv(rows)
    assert qkv.shape == (18, 3, 2, 8)
    qkv = qkv.view(3, 6, 3, 2, 8)
    turn(qkv, torch.complex(*rotation)[:, None, None])
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).reshape(18, 16)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    expected = block(x, Context(3), rotation, None).detach()
    torch.testing.assert_close(fast.finish(rows, attended).view_as(x), expected, rtol=tolerance, atol=tolerance)


def test_a_tied_head_has_no_weights_of_its_own_and_predicts_no_mask():
    tied = build(tied_head=True)
    assert not [name for name in tied.state_dict() if name.startswith("head")]
    assert tied.head_weight.data_ptr() == tied.code_embedding.weight.data_ptr()
    hidden = torch.randn(4, 16)
    torch.testing.assert_close(tied.predict(hidden), hidden @ tied.code_embedding.weight[:CODES].T)
    tied.predict(hidden).sum().backward()
    gradient = tied.code_embedding.weight.grad
    assert isinstance(gradient, Tensor)
    assert (gradient[:CODES] != 0).all()
    assert (gradient[CODES:] == 0).all()


def test_code_dropout_hides_all_codes_of_some_images_in_training_only():
    model, codes = build(code_dropout=0.25), torch.randint(CODES, (200, 6))
    random = BatchRandom(0, slice(0, 200), 200)
    assert model.eval().hide(codes, random) is None
    assert build(code_dropout=0.0).train().hide(codes, random) is None
    hidden = model.train().hide(codes, random)
    assert hidden.float().mean().item() == pytest.approx(0.25, abs=0.08)
    assert torch.equal(hidden.any(1), hidden.all(1))
    embedded = model.embed(codes, hidden)
    assert (embedded[hidden] == 0).all()
    assert torch.equal(embedded[~hidden], model.embed(codes)[~hidden])
    half = model.hide(codes[100:], BatchRandom(0, slice(100, 200), 200))
    assert torch.equal(half, hidden[100:])  # depends on the image, not on the process


@pytest.mark.parametrize(
    ("positions", "learned", "rotary"),
    [("learned", True, False), ("rotary", False, True), ("both", True, True), ("relative", True, False)],
)
def test_positions_match_their_names(positions, learned, rotary):
    model = build(positions=positions)
    assert ("positions" in model.state_dict()) == learned
    assert (model.rotation is not None) == rotary
    assert "rotation" not in model.state_dict()


def test_weights_keep_their_names():
    """Stored models are loaded by these names."""
    block = [f"{layer}.{kind}" for layer in ("norm1", "qkv", "attention_out", "norm2", "mlp_in", "mlp_out")
             for kind in ("weight", "bias")]  # fmt: skip
    assert list(build(depth=1).state_dict()) == [
        "positions", "code_embedding.weight", "class_embedding.weight", *(f"blocks.0.{name}" for name in block),
        "norm.weight", "norm.bias", "head.weight",
    ]  # fmt: skip


def test_heads_must_divide_the_width():
    with refuses("hidden_size 10", "multiple of num_heads 4"):
        parse_config(CausalTransformerConfig, {"hidden_size": 10, "num_heads": 4}, "model")


def test_heads_must_be_wide_enough_for_rows_and_columns():
    with refuses("hidden_size 12 / num_heads 2", "multiple of 4", "positions=learned"):
        parse_config(CausalTransformerConfig, {"hidden_size": 12, "num_heads": 2}, "model")
    parse_config(CausalTransformerConfig, {"hidden_size": 12, "num_heads": 2, "positions": "learned"}, "model")
