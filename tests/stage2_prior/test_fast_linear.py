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


@pytest.fixture
def always_packed(monkeypatch):
    """As on a machine where packed weights win, however the clock runs on this one."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(module, "WORTH_IT", 0.0)
    module._packing_wins.cache_clear()
    yield
    module._packing_wins.cache_clear()


@pytest.mark.parametrize("rows", [1, 7])
def test_packed_weights_equal_the_layer(layer, rows, always_packed):
    x = torch.randn(rows, 24)
    assert module._packing_wins(40, 24, rows, torch.float32, x.device, 1)
    torch.testing.assert_close(fast_linear(layer, rows)(x), layer(x).detach(), rtol=1e-5, atol=1e-5)


def test_other_types_are_never_packed(layer, always_packed):
    x = torch.randn(3, 24, dtype=torch.double)
    assert torch.equal(fast_linear(layer.double(), 3)(x), layer(x))
