"""A checkpoint exists completely or not at all, and is loaded bit for bit as it was saved."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from twostage.core.runs.checkpoint import Checkpoints, optimizer_tensors, restore_optimizer
from twostage.core.training.optimizer import make_optimizer
from twostage.core.training.train_config import TrainConfig


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, {"model": {"weight": torch.full((4,), float(step))}}, {"facts": {"best": step}})


def latest_step(checkpoints: Checkpoints) -> int | None:
    folder, _ = checkpoints.latest()
    return None if folder is None else checkpoints.load(folder)[1]["step"]


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_no_checkpoint_is_found_before_the_first(checkpoints):
    assert checkpoints.latest() == (None, [])


def test_round_trip_is_bit_exact(checkpoints):
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "model": {"a.weight": torch.randn(3, 4, generator=draw), "transposed": torch.randn(3, 4, generator=draw).T,
                  "half": torch.randn(5, generator=draw).bfloat16(), "count": torch.tensor(2**40),
                  "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-42]), "empty": torch.empty(0, 2)},
        "optimizer": {"a.weight/step": torch.tensor(3.0)},
    }  # fmt: skip
    state = {"facts": {"best_loss": 0.1 + 0.2}, "finished": None, "scaler": None}
    checkpoints.save(7, tensors, state)
    folder, _ = checkpoints.latest()
    assert folder == checkpoints.folder / "step_00000007"
    loaded, loaded_state = checkpoints.load(folder)
    assert loaded_state == {"step": 7, **state}
    assert {name: set(group) for name, group in loaded.items()} == {name: set(group) for name, group in tensors.items()}
    for name, group in tensors.items():
        for key, tensor in group.items():
            found = loaded[name][key]
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(
                found.reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)
            ), key


def test_the_newest_are_kept(checkpoints):
    save(checkpoints, 1, 5, 10, 100_000)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step_00000010", "step_00100000"]
    assert latest_step(checkpoints) == 100_000


def test_a_folder_without_a_manifest_is_ignored(checkpoints):
    save(checkpoints, 1, 2)
    (checkpoints.folder / "step_00000002" / "manifest.json").unlink()
    (checkpoints.folder / "step_00000003").mkdir()
    (checkpoints.folder / ".step_00000004.partial").mkdir()
    assert latest_step(checkpoints) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped byte", "cut short", "missing"])
def test_the_checkpoint_before_a_damaged_one_is_found(checkpoints, name, damage):
    save(checkpoints, 1, 2)
    file = checkpoints.folder / "step_00000002" / name
    if damage == "flipped byte":
        flip_a_byte(file)
    elif damage == "cut short":
        file.write_bytes(file.read_bytes()[:-3])
    else:
        file.unlink()
    assert latest_step(checkpoints) == 1


def test_saving_continues_after_damage(checkpoints):
    checkpoints.keep = 1
    save(checkpoints, 3)
    flip_a_byte(checkpoints.folder / "step_00000003" / "model.safetensors")
    save(checkpoints, 2)  # the run started over
    assert latest_step(checkpoints) == 2, "the damaged one does not count among the newest"
    save(checkpoints, 3)
    assert latest_step(checkpoints) == 3


def test_leftovers_of_a_kill_are_overwritten(checkpoints):
    partial = checkpoints.folder / ".step_00000002.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half of")
    (partial / "other.safetensors").write_bytes(b"half of")
    save(checkpoints, 2)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step_00000002"]
    assert list(checkpoints.load(checkpoints.folder / "step_00000002")[0]) == ["model"]


# --- the optimizer --------------------------------------------------------------------------------------------------


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def update(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def bits(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: tensor.reshape(-1).view(torch.int32).tolist() for name, tensor in tensors.items()}


def test_a_restored_optimizer_continues_like_the_uninterrupted_one(checkpoints):
    config = TrainConfig(max_steps=1, lr=0.01, weight_decay=0.1)
    model = make_model()
    optimizer = make_optimizer(model, config)
    assert optimizer.param_groups[0]["fused"], "the optimizer that training uses is tested"
    update(model, optimizer, range(5))
    checkpoints.save(5, {"model": model.state_dict(), "optimizer": optimizer_tensors(model, optimizer)}, {})
    update(model, optimizer, range(5, 10))

    tensors, _ = checkpoints.load(checkpoints.folder / "step_00000005")
    other = make_model()
    other.load_state_dict(tensors["model"])
    restored = make_optimizer(other, config)
    restore_optimizer(other, restored, tensors["optimizer"])
    update(other, restored, range(5, 10))
    assert bits(other.state_dict()) == bits(model.state_dict())
    assert bits(optimizer_tensors(other, restored)) == bits(optimizer_tensors(model, optimizer))


def test_optimizer_state_is_stored_by_parameter_name():
    model = make_model()
    optimizer = make_optimizer(model, TrainConfig(max_steps=1))
    assert optimizer_tensors(model, optimizer) == {}
    update(model, optimizer, range(1))
    names = [name for name, _ in model.named_parameters()]
    tensors = optimizer_tensors(model, optimizer)
    assert set(tensors) == {f"{name}/{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}

    other = copy.deepcopy(model)
    backwards = torch.optim.AdamW(reversed(list(other.parameters())), fused=True)  # the order need not match
    restore_optimizer(other, backwards, tensors)
    assert bits(optimizer_tensors(other, backwards)) == bits(tensors)
    update(other, backwards, range(1, 2))
    assert backwards.state[other[0].weight]["step"] == 2


def test_only_matrices_are_decayed():
    model = make_model()
    matrices, others = make_optimizer(model, TrainConfig(max_steps=1, weight_decay=0.1)).param_groups
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in others["params"]} == {1}
    assert len(matrices["params"]) + len(others["params"]) == len(list(model.parameters()))
