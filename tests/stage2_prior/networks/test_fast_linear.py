import pytest
import torch
import torch.nn.functional as F
from messages import refuses
from torch import Tensor, nn

from stage2_prior.networks import fast_linear as module
from stage2_prior.networks.fast_linear import TrainedLinear, check_weights, fast_linear, linear
from twostage.core.errors import InputError
from twostage.core.machine.onednn import AVAILABLE
from twostage.core.machine.precision import reason_for_precision

needs_onednn = pytest.mark.skipif(not AVAILABLE, reason="this torch has no oneDNN")


def supported(weights: str) -> bool:
    try:
        fast_linear(torch.ones(8, 8), None, weights)  # type: ignore[arg-type]
    except InputError:
        return False
    return True


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def layer(request) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 40, bias=request.param)


@pytest.fixture(params=[0, 2**16], ids=["packed", "plain"])
def worth_packing(request, monkeypatch) -> int:
    monkeypatch.setattr(module, "MIN_PACKED", request.param)
    return request.param


def error(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("rows", [1, 7])
def test_fast_linear_equals_the_layer(layer, rows, gelu, worth_packing):
    x, added = torch.randn(rows, 24), torch.randn(rows, 40)
    product = fast_linear(layer.weight, layer.bias, gelu=gelu)
    expected = F.gelu(layer(x), approximate="tanh").detach() if gelu else layer(x).detach()
    torch.testing.assert_close(product(x), expected, rtol=1e-5, atol=1e-5)
    if not gelu:
        torch.testing.assert_close(product(x, added), expected + added, rtol=1e-5, atol=1e-5)
    assert not product(x).requires_grad


@needs_onednn
def test_large_layers_are_packed_and_small_ones_are_not(monkeypatch):
    packed = []
    monkeypatch.setattr(module, "_packed", lambda weight, *_: packed.append(tuple(weight.shape)))
    for shape in ((256, 256), (255, 256)):
        fast_linear(torch.ones(shape), None)
    fast_linear(torch.ones(256, 256, dtype=torch.double), None)
    assert packed == [(256, 256)]


@pytest.mark.parametrize("weights", [w for w in ("bfloat16", "int8") if supported(w)])
def test_rounded_weights_give_close_but_different_results(layer, weights):
    x, added = torch.randn(50, 24), torch.randn(50, 40)
    product = fast_linear(layer.weight, layer.bias, weights)
    tolerance = {"bfloat16": 0.006, "int8": 0.02}[weights]
    assert tolerance / 20 < error(product(x), layer(x).detach()) < tolerance
    assert error(product(x, added), layer(x).detach() + added) < tolerance
    activated = fast_linear(layer.weight, layer.bias, weights, gelu=True)(x)
    assert error(activated, F.gelu(layer(x), approximate="tanh").detach()) < 2 * tolerance
    assert product(x).dtype == activated.dtype == product(x, added).dtype == torch.float32


@pytest.mark.skipif(not supported("int8"), reason="this torch has no int8 products")
def test_with_int8_weights_no_row_depends_on_another(layer):
    x = torch.randn(5, 24) * torch.tensor([1e-3, 1.0, 0.0, 50.0, 1.0])[:, None]
    product = fast_linear(layer.weight, layer.bias, "int8")
    together, expected = product(x), layer(x).detach()
    for row in range(5):
        assert torch.equal(product(x[row : row + 1])[0], together[row])
    without_bias = fast_linear(layer.weight, None, "int8")(x)
    for row in (0, 1, 3, 4):  # each has a scale of its own: a small row keeps its precision beside a large one
        assert error(without_bias[row], F.linear(x[row], layer.weight).detach()) < 0.03
    torch.testing.assert_close(together[2], expected[2])


@pytest.mark.skipif(not supported("int8"), reason="this torch has no int8 products")
def test_the_largest_weights_and_inputs_do_not_overflow():
    weight, x = torch.ones(3, 512), torch.ones(2, 512)
    torch.testing.assert_close(fast_linear(weight, None, "int8")(x), torch.full((2, 3), 512.0))
    torch.testing.assert_close(fast_linear(-weight, None, "int8")(x), torch.full((2, 3), -512.0))
    assert (fast_linear(0 * weight, None, "int8")(x) == 0).all()


@pytest.mark.parametrize(
    ("weights", "missing"), [("bfloat16", "has_bfloat16"), ("int8", None)], ids=["bfloat16", "int8"]
)
def test_without_such_products_the_message_names_alternatives(weights, missing, monkeypatch):
    if missing:
        monkeypatch.setattr(module, missing, lambda: False)
    else:
        monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", [])
    with refuses(f"weights '{weights}'", "Use float32"):
        fast_linear(torch.ones(4, 4), None, weights)


def test_a_gpu_without_bfloat16_is_told_what_works(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with refuses("weights 'bfloat16'", "emulates", "float32"):
        check_weights("bfloat16", torch.device("cuda"))
    check_weights("float32", torch.device("cuda"))
    assert reason_for_precision(torch.device("cuda"))[0] == "no"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    check_weights("bfloat16", torch.device("cuda"))
    assert reason_for_precision(torch.device("cuda"))[0] == "bf16"


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 24), (24,)], ids=str)
def test_gradients_equal_those_of_the_layer(layer, shape, worth_packing):
    x, y = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    result, expected = linear(x, layer.weight, layer.bias), F.linear(y, layer.weight, layer.bias)
    assert type(result.grad_fn).__name__.startswith("_OneDNN") == (worth_packing == 0 and AVAILABLE)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    parameters = list(layer.parameters())
    ours = torch.autograd.grad(result.square().sum(), [x, *parameters])
    theirs = torch.autograd.grad(expected.square().sum(), [y, *parameters])
    for gradient, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_gradients_of_the_weights_only(layer, monkeypatch):
    monkeypatch.setattr(module, "MIN_PACKED", 0)
    x = torch.randn(3, 24)
    linear(x, layer.weight, layer.bias).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(40, -1), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_training_is_deterministic_and_leaves_autocast_and_float64_to_torch(monkeypatch):
    monkeypatch.setattr(module, "MIN_PACKED", 0)
    torch.manual_seed(0)
    layer, x = TrainedLinear(24, 40), torch.randn(9, 24)
    gradients = []
    for _ in range(2):
        gradients.append(torch.autograd.grad(layer(x).square().sum(), list(layer.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer.double()(x.double()), F.linear(x.double(), layer.weight, layer.bias))
