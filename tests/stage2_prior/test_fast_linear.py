import pytest
import torch
from torch import nn

from stage2_prior import fast_linear as module
from stage2_prior.fast_linear import fast_linear


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def layer(request) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 40, bias=request.param)


@pytest.mark.parametrize("rows", [1, 7])
def test_equals_the_layer(layer, rows):
    x = torch.randn(rows, 24)
    result = fast_linear(layer, rows)(x)
    torch.testing.assert_close(result, layer(x).detach(), rtol=1e-5, atol=1e-5)
    assert not result.requires_grad


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("rows", [1, 7])
def test_packed_weights_equal_the_layer_whether_they_win_or_not(layer, rows):
    x = torch.randn(rows, 24)
    packed = module._packed(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
    torch.testing.assert_close(packed(x), layer(x).detach(), rtol=1e-5, atol=1e-5)


def test_other_types_are_never_packed(layer):
    x = torch.randn(3, 24, dtype=torch.double)
    assert torch.equal(fast_linear(layer.double(), 3)(x), layer(x))
