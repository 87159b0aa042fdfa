"""What a step does on the host beside passes and forwards, counted in calls: nobody's time, and the same on every machine.

Belongs here: how the calls of a step grow with its tensors, and that what saves them changes nothing that is told. Does not belong here: times
(benchmarks/against.py), what is told of a change inside a step (test_faults.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zo_kernels as zk
from benchmarks.harness import calls
from zo_kernels import looks
from zo_kernels._backends._extension import extension
from zo_kernels.optim.groups import Accepted
from zo_kernels.views.memory import Owners

built = not isinstance(extension(), str)
Made = tuple[nn.Module, Callable[[], Any]]


def chain(tensors: int) -> Made:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(tensors // 2)])
    x = torch.randn(2, 4)
    return model, lambda: model(x).square().mean()


def captured(tensors: int) -> Made:
    """The closure has the parameters themselves."""
    model, _ = chain(tensors)
    params = list(model.parameters())
    return model, lambda: sum(float(p.sum()) for p in params)


def in_one_storage(tensors: int) -> Made:
    """As a file that is mapped into memory has them."""
    model, closure = captured(tensors)
    memory = torch.randn(tensors, 16)
    for row, p in zip(memory, model.parameters(), strict=True):
        p.data = row[: p.numel()].view(p.shape)
    return model, closure


def of_steps(make: Callable[[int], Made], tensors: int, steps: int, **options: Any) -> list[int]:
    torch.manual_seed(0)
    model, closure = make(tensors)
    step = zk.MeZOStep(model, lr=1e-3, seed=1, **options)
    return [calls(lambda: step.step(closure)) for _ in range(steps)]


SCRATCH = {"perturbation": "scratch"}
SMALL = {"perturbation": "scratch", "scratch_bytes": 1 << 10}  # not all values fit: shadows stand before the parameters
IN_PLACE = {"perturbation": "inplace"}


@pytest.mark.filterwarnings("ignore::zo_kernels.ZOWarning")
@pytest.mark.parametrize("make", [chain, captured, in_one_storage])
@pytest.mark.parametrize("options", [SCRATCH, SMALL, IN_PLACE], ids=["scratch", "small", "inplace"])
def test_the_first_steps_are_linear_in_the_tensors(make: Callable[[int], Made], options: dict[str, Any]) -> None:
    few, more, many = (of_steps(make, n, 3, **options) for n in (20, 50, 110))
    for a, b, c in zip(few, more, many, strict=True):
        assert c - b <= 1.1 * 2 * (b - a), (a, b, c)


@pytest.mark.filterwarnings("ignore::zo_kernels.ZOWarning")
@pytest.mark.parametrize(("options", "most"), [(SCRATCH, 4.5), (SMALL, 4.5), (IN_PLACE, 0.0)], ids=["scratch", "small", "inplace"])
def test_calls_of_a_step_by_tensor(options: dict[str, Any], most: float) -> None:
    """Beside forwards: a module's place is two calls in a scratch step and their dicts' own; in place no call is a tensor's."""

    def still(tensors: int) -> Made:
        losses = iter(range(1, 100))
        return chain(tensors)[0], lambda: float(next(losses))

    few, many = (of_steps(still, n, 6, **options)[-1] for n in (20, 120))
    assert many - few <= most * 100, (few, many)


def test_calls_of_a_step_beside_its_tensors() -> None:
    """In a process where nothing waits in a global generator: a normal number that another test left there is read at every look."""
    random.seed(0)
    np.random.seed(0)
    losses = iter(range(1, 100))
    found = of_steps(lambda n: (chain(n)[0], lambda: float(next(losses))), 2, 7, **IN_PLACE)
    # 444 alone; a handler of Python for a signal, such as the tests' own time limit, is a dozen more
    assert found[-1] <= 475, found


# ---- what saves them ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["extension", "Python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "Python":
        monkeypatch.setattr(looks, "_C", "it is not built")
    elif not built:
        pytest.fail("no extension")
    return str(request.param)


CHANGES: dict[str, tuple[looks.Look, Callable[[Tensor], Any]]] = {
    "written": (looks.VERSIONS, lambda p: p.add_(1.0)),
    "moved": (looks.ADDRESSES, lambda p: setattr(p, "data", p.data.clone())),
    "a part": (looks.MEMORY, lambda p: setattr(p, "data", p.data[:2])),
    "transposed": (looks.MEMORY, lambda p: setattr(p, "data", p.data.t())),
    "converted": (looks.MEMORY, lambda p: setattr(p, "data", p.data.view(torch.int32))),
    "frozen": (looks.Look("requires_grad"), lambda p: p.requires_grad_(True)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_first_change_is_found(way: str, change: str) -> None:
    look, make = CHANGES[change]
    tensors = [torch.zeros(4, 4) for _ in range(6)]
    before = look.at(tensors)
    assert look.first_change(tensors, before) == -1
    for k in (5, 3, 4):
        make(tensors[k])
    assert look.first_change(tensors, before) == 3
    assert look.first_change([], look.at([])) == -1


def test_what_a_look_raises_comes_through(way: str) -> None:
    with torch.inference_mode():
        t = torch.zeros(2)
    with pytest.raises(RuntimeError, match="Inference tensors"):
        looks.VERSIONS.first_change([t], ([0],))


class Own(nn.Module):
    """Its table is no attribute of its own dict."""

    table: ClassVar[dict[str, Any]] = {}


def test_the_first_that_is_replaced_is_found(way: str) -> None:
    owners = [nn.Linear(2, 2) for _ in range(4)]
    names, values = ["weight"] * 4, [m.weight for m in owners]
    assert looks.first_replaced(owners, "_parameters", names, values) == -1
    owners[3].weight = nn.Parameter(torch.zeros(2, 2))
    del owners[2].weight
    assert looks.first_replaced(owners, "_parameters", names, values) == 2
    owners[1]._parameters = {}
    assert looks.first_replaced(owners, "_parameters", names, values) == 1
    own = Own()
    own.table["a"] = names
    assert looks.first_replaced([own], "table", ["a"], [names]) == -1
    assert looks.first_replaced([own], "table", ["a"], [values]) == 0


@pytest.mark.skipif(not built, reason="it asks the extension")
def test_the_extension_refuses_what_it_cannot_look_at() -> None:
    module: Any = extension()
    with pytest.raises(TypeError):
        module.first_change([object()], looks.VERSIONS.descriptors, ([0],))
    with pytest.raises(ValueError, match="columns"):
        module.first_change([torch.zeros(1)], looks.VERSIONS.descriptors, ())
    with pytest.raises(IndexError):
        module.first_change([torch.zeros(1)], looks.VERSIONS.descriptors, ([],))
    with pytest.raises(ValueError, match="names and values"):
        module.first_replaced([nn.Linear(1, 1)], "_parameters", [], [])


def test_numbers_of_groups_are_read_again_when_they_change() -> None:
    model, closure = chain(4)
    step = zk.MeZOStep(model, lr=1e-3)
    accepted, method = Accepted(), step._run.method
    first = accepted.of(step.param_groups, method, None)
    assert accepted.of(step.param_groups, method, None) is first
    step.param_groups[0]["lr"] = 2e-3
    assert accepted.of(step.param_groups, method, None).lr == [2e-3]
    step.param_groups[0]["lr"] = rate = torch.tensor(3e-3, dtype=torch.float64)
    assert accepted.of(step.param_groups, method, None).lr == [3e-3]
    rate.fill_(4e-3)  # the same tensor
    assert accepted.of(step.param_groups, method, None).lr == [4e-3]
    step.param_groups[0]["lr"] = 1.0
    assert accepted.of(step.param_groups, method, None).lr == [1.0]
    for wrong in (True, torch.zeros(2), -1.0):  # True == 1.0
        step.param_groups[0]["lr"] = wrong
        with pytest.raises(ValueError, match="lr"):
            accepted.of(step.param_groups, method, None)
    del step.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="lr"):
        step.step(closure)


def test_a_profile_has_the_range_of_a_step() -> None:
    model, closure = chain(4)
    step = zk.MeZOStep(model, lr=1e-3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step.step(closure)
    assert "Optimizer.step#MeZOStep.step" in {event.key for event in profile.key_averages()}


def test_owners_of_one_storage_are_those_whose_memory_meets() -> None:
    memory = torch.zeros(100)
    spans = [(0, 10), (10, 20), (5, 60), (30, 40), (90, 100), (30, 31)]
    owners = Owners((memory[a:b], k) for k, (a, b) in enumerate(spans))
    for a, b in [(0, 1), (9, 11), (20, 30), (35, 36), (59, 91), (60, 90), (0, 100), (30, 31)]:
        assert owners.of(memory[a:b]) == [k for k, (c, d) in enumerate(spans) if a < d and c < b], (a, b)
    assert owners.of(memory[20:80].view(6, 10)[:, ::2]) == [2, 3, 5]
    assert owners.of(torch.zeros(4)) == [] and owners.of(1.0) == []
