"""A GPU without data. Under :func:`fake_gpu`, operations on CUDA tensors only compute shapes, types and devices, on any
machine. Tensors of two devices in one operation fail, and so does everything that would make the host wait for a
value, such as `.item()` or a shape that depends on data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from twostage.core.training.dry_run import DryRun
from twostage.core.training.random import BatchRandom

__all__ = ["GPU", "different_configs", "fake_gpu", "gradients", "outside", "take_one_step", "without_waiting"]

GPU = torch.device("cuda")


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Inside, tensors on `GPU` are fake; tensors from outside can be used as inputs."""
    generator = BatchRandom.generator
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        # torch has no generators and no autocast for a GPU that is not there, and its autograd asks the driver.
        patch.setattr(
            BatchRandom,
            "generator",
            lambda self, what, device: None if device.type == "cuda" else generator(self, what, device),
        )
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**40))
        patch.setattr(FakeTensor, "__deepcopy__", _copy, raising=False)  # that of torch asks for an address
        patch.setattr(FakeTensor, "data_ptr", lambda self: id(self), raising=False)
        patch.setattr(nn.Module, "_apply", _apply)
        patch.setattr(torch.autograd, "grad", _grad)
        patch.setattr(Tensor, "backward", _backward)
        yield


class _NoBlockingCopies(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        match func.overloadpacket.__name__:
            case "_to_copy":
                source, target = args[0].device, kwargs.get("device") or args[0].device
                blocks = not kwargs.get("non_blocking", False)
            case "copy_":
                source, target = args[1].device, args[0].device
                blocks = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            case _:
                return func(*args, **kwargs)
        if blocks and source.type != target.type:
            raise AssertionError(f"a copy from {source} to {target}: the host waits for the GPU. Set non_blocking=True")
        return func(*args, **kwargs)


@contextmanager
def without_waiting() -> Iterator[None]:
    """Inside, under :func:`fake_gpu`, copies between the host and the GPU fail if the host waits for them. (A real GPU
    first does all work that it was given before.)"""
    with _NoBlockingCopies():
        yield


def outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but its tensors have data, also if it is called inside :func:`fake_gpu`."""

    def with_data(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return with_data


def different_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """The configs of a folder by name, without those that differ from an earlier one only in numbers, data and
    folders."""
    documents = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.yaml"))}
    outlines = {}
    for name, document in documents.items():
        parts = {key: value for key, value in document.items() if key not in ("run", "data", "codes")}
        outlines.setdefault(repr(_outline(parts)), name)
    return {name: documents[name] for name in outlines.values()}


def _outline(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _outline(each)
            for key, each in sorted(value.items())
            if key not in ("path", "epochs", "max_steps", "patience")
        }
    return value if isinstance(value, str | bool) else None


def take_one_step(monkeypatch: pytest.MonkeyPatch, reads_data: Mapping[Any, Sequence[str]]) -> None:
    """From now on, a dry run trains on `GPU`, for one step.

    Args:
        reads_data: names in modules and classes of what has to run :func:`outside`.
    """

    def steps(run: DryRun[Any], read: Callable[[Tensor], Any], read_ahead: bool) -> Iterator[list[Any]]:
        batch = outside(run.batches.at)(run.step, read)
        run.begin_step()
        with without_waiting():
            yield batch

    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", GPU.type)
    monkeypatch.setattr(DryRun, "steps", steps)
    monkeypatch.setattr(DryRun, "end", lambda run, num_held_out: None)
    for place, names in reads_data.items():
        for name in names:
            monkeypatch.setattr(place, name, outside(getattr(place, name)))


def _copy(self: Tensor, memo: object) -> Tensor:
    copied = self.detach().clone()
    return nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied


def _apply(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """What `.to()` calls. torch's own cannot move fake weights."""
    for module in self.children():
        module._apply(function)
    for tensors in (self._parameters, self._buffers):
        for name, tensor in tensors.items():
            if tensor is not None:
                moved = function(tensor.detach())
                if any(getattr(moved, part) != getattr(tensor, part) for part in ("device", "dtype")):
                    tensors[name] = nn.Parameter(moved, tensor.requires_grad) if tensors is self._parameters else moved
    return self


def gradients(output: Tensor, wanted: Sequence[Tensor], gradient: Tensor | None = None) -> list[Tensor | None]:
    """``torch.autograd.grad`` in Python: calls each node of the graph after all nodes that lead to it."""
    goals = {_edge(tensor): place for place, tensor in enumerate(wanted)}
    found: list[Tensor | None] = [None] * len(wanted)
    start = _edge(output)
    pending = {start: torch.ones_like(output) if gradient is None else gradient}
    for node in _in_order(start[0]):
        number = len(node._input_metadata)
        arriving = [pending.pop((node, place), None) for place in range(number)]
        for place, each in enumerate(arriving):
            if (goal := goals.get((node, place))) is not None:
                found[goal] = each
        if hasattr(node, "variable") or all(each is None for each in arriving):
            continue
        leaving = node(*arriving) if callable(node) else node.apply(*arriving)  # of a Function in Python
        leaving = leaving if isinstance(leaving, tuple) else (leaving,)
        for edge, each in zip(node.next_functions, leaving, strict=False):
            if edge[0] is not None and each is not None:
                form = edge[0]._input_metadata[edge[1]]
                each = each.sum_to_size(tuple(form.shape)).to(form.dtype)
                pending[edge] = each if edge not in pending else pending[edge] + each
    return found


def _edge(tensor: Tensor) -> tuple[Any, int]:
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _in_order(root: Any) -> list[Any]:
    """All nodes below ``root``, each after all nodes that lead to it."""
    order, seen, stack = [], set(), [(root, iter(root.next_functions))]
    while stack:
        node, rest = stack[-1]
        below = next(
            ((each, iter(each.next_functions)) for each, _ in rest if each is not None and each not in seen), None
        )
        if below is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(below[0])
            stack.append(below)
    return order[::-1]


def _grad(
    outputs: Tensor, inputs: Any, grad_outputs: Tensor | None = None, create_graph: bool = False, **_: Any
) -> Any:
    wanted = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    with torch.set_grad_enabled(create_graph):
        return tuple(gradients(outputs, wanted, grad_outputs))


def _backward(self: Tensor, gradient: Tensor | None = None, *_: Any, **__: Any) -> None:
    leaves = [node.variable for node in _in_order(_edge(self)[0]) if hasattr(node, "variable")]
    with torch.no_grad():
        for leaf, found in zip(leaves, gradients(self, leaves, gradient), strict=True):
            if found is not None:
                leaf.grad = found if leaf.grad is None else leaf.grad + found
