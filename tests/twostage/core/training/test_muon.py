import copy

import pytest
import torch
from accelerate import Accelerator
from messages import refuses
from torch import Tensor, nn

from twostage.core.runs.checkpoint import optimizer_tensors, restore_optimizer
from twostage.core.training.eager_adamw import EagerAdamW
from twostage.core.training.muon import hidden_matrices, orthogonalized
from twostage.core.training.optimizer import TrainedNetwork, check_gradient, make_optimizer
from twostage.core.training.train_config import TrainConfig

MUON = TrainConfig(max_steps=1, lr=0.01, weight_decay=0.1, optimizer="muon")


class Network(nn.Module):
    adamw_layers = ("head",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.hidden = nn.Conv2d(12, 16, 3, padding=1)
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.hidden(self.first(images).relu()).mean((2, 3))
        return self.head(self.narrow(self.wide(x).relu()))


def backpropagate(model: nn.Module, batch: int) -> None:
    model.zero_grad()
    model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(batch))).square().sum().backward()


def test_an_orthogonal_matrix_keeps_the_directions_and_equalises_their_strength():
    torch.manual_seed(0)
    matrices = [torch.randn(8, 24), torch.randn(24, 8), torch.randn(8, 8), torch.randn(8, 24) * 1e3]
    for before, after in zip(matrices, orthogonalized(matrices, torch.float32), strict=True):
        u, _, vh = torch.linalg.svd(before, full_matrices=False)
        strengths = u.T @ after @ vh.T
        assert after.shape == before.shape
        assert (strengths - strengths.diag().diag()).abs().max() < 1e-4
        assert ((strengths.diag() > 0.3) & (strengths.diag() < 1.3)).all()


def test_matrices_are_updated_as_by_torchs_own_muon():
    model = Network()
    matrices = [model.wide.weight, model.narrow.weight]
    twins = [nn.Parameter(matrix.detach().clone()) for matrix in matrices]
    peer = torch.optim.Muon(twins, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    optimizer = make_optimizer(model, MUON.model_copy(update={"mixed_precision": "bf16"}), muon=True)
    for _ in range(3):
        for twin, matrix in zip(twins, matrices, strict=True):
            matrix.grad = torch.randn_like(matrix)  # of full rank, so rounding does not decide a direction
            twin.grad = matrix.grad.clone()
        optimizer.step()
        peer.step()
    torch.testing.assert_close(matrices, twins, rtol=0, atol=1e-3)  # a step is 0.01, and bfloat16 rounds it


def test_muon_is_for_layers_with_many_inputs_and_outputs_except_the_head():
    model = Network()
    matrices = [model.hidden.weight, model.wide.weight, model.narrow.weight]
    assert {id(p) for p in hidden_matrices(model)} == {id(p) for p in matrices}
    before = copy.deepcopy(model)
    optimizer = make_optimizer(model, MUON, muon=True)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    backpropagate(model, 0)
    optimizer.step()
    for (name, weight), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(weight, old), name
        assert optimizer.state[weight].keys() == (
            {"momentum"} if any(weight is p for p in matrices) else {"step", "exp_avg", "exp_avg_sq"}
        )


def test_a_restored_muon_continues_with_the_same_bits():
    model = Network()
    optimizer = make_optimizer(model, MUON, muon=True)
    for batch in range(3):
        backpropagate(model, batch)
        optimizer.step()
    other = copy.deepcopy(model)
    restored = make_optimizer(other, MUON, muon=True)
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    restore_optimizer(other, restored, tensors)
    for network, its_optimizer in ((model, optimizer), (other, restored)):
        for batch in range(3, 6):
            backpropagate(network, batch)
            its_optimizer.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_an_update_that_is_not_finite_can_be_skipped():
    train = MUON.model_copy(update={"on_not_finite": "skip"})
    model, accelerator = Network(), Accelerator(cpu=True)
    optimizer = make_optimizer(model, train, muon=True)
    backpropagate(model, 0)
    check_gradient(model, optimizer, accelerator, train)
    optimizer.step()
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer_tensors(model, optimizer))
    backpropagate(model, 1)
    assert model.first.weight.grad is not None
    model.first.weight.grad[0] = torch.nan
    check_gradient(model, optimizer, accelerator, train)
    optimizer.step()
    torch.testing.assert_close((model.state_dict(), optimizer_tensors(model, optimizer)), before, rtol=0, atol=0)


def test_a_second_network_can_keep_adamw():
    network = TrainedNetwork(Network(), MUON, Accelerator(cpu=True), name="discriminator", muon=False)
    assert type(network.optimizer) is EagerAdamW


def test_muon_refuses_sharded_weights():
    with refuses("train.optimizer", "muon", "train.optimizer=adamw", "train.lr", "gpu_8.yaml"):
        TrainedNetwork(Network(), MUON, Accelerator(cpu=True), units_to_shard=["Linear"])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_matrices_decay_like_those_of_adamw(decay):
    optimizer = make_optimizer(Network(), MUON.model_copy(update={"weight_decay": decay}), muon=True)
    (matrices,) = [group for group in optimizer.param_groups if group.get("matrices")]
    assert matrices["weight_decay"] == decay
    assert matrices["initial_lr"] == matrices["lr"] == MUON.lr
