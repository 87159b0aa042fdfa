"""What users do to a run, as they do it: each fault has one behaviour, which docs/faults.md tabulates.

Belongs here: faults of closures, of changes between steps, of copies and of the modes of torch that surround a step. Does not belong here:
what perturbation and update compute (test_views.py, test_mezo.py), the journal's own faults (tests/journal).
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, overrides
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import zo_kernels as zk
from tests.kernels.cases import same_bits
from tests.optim.interrupts import interrupted
from zo_kernels import journal, views
from zo_kernels._backends import cpu
from zo_kernels.views.shadow import PerturbedWeight, Placed

# scratch: a launch a weight; resident: everything fits, and the modules hold the values themselves after the first step.
MODES: dict[str, dict[str, Any]] = {
    "inplace": {"perturbation": "inplace"},
    "lazy": {"perturbation": "inplace", "lazy": True},
    "scratch": {"perturbation": "scratch", "scratch_bytes": 1},
    "resident": {"perturbation": "scratch"},
}
EXACT = ("scratch", "resident")
each_mode = pytest.mark.parametrize("mode", MODES)
later = pytest.mark.parametrize("later", [False, True], ids=["first step", "later step"])  # the first one is watched


class Net(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.5
        if tied:
            self.head.weight = self.embedding.weight
        self.ids = torch.arange(12).reshape(3, 4) % 11

    def forward(self) -> Tensor:
        x = self.hidden(self.norm(self.embedding(self.ids))).tanh()
        return nn.functional.cross_entropy(self.head(x).float().flatten(0, 1), self.ids.flatten())


def optimizer_of(model: nn.Module, mode: str, **options: Any) -> zk.MeZOStep:
    return zk.MeZOStep(model, **{"lr": 1e-2, "eps": 1e-2, "seed": 3, **MODES[mode], **options})


def values(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def is_at(model: nn.Module, before: dict[str, Tensor], mode: str, passes: int = 3) -> bool:
    """The weights are `before`: on every bit in scratch mode, else to within passes whose rounding is at most 2^-24 of |theta| + |eps z|, which is
    below 2.2 here; and the modules are as they were."""
    bound = 0.0 if mode in EXACT else passes * 2.2 * 2.0**-24
    now = dict(model.named_parameters())
    assert now.keys() == before.keys()
    assert not any(isinstance(v, (PerturbedWeight, Placed)) for m in model.modules() for v in m.__dict__.values())
    assert not any(name in m.__dict__ for m in model.modules() for name in m._parameters)
    return all(p.dtype == before[n].dtype and (p - before[n]).abs().max() <= bound for n, p in now.items())


def refused(
    model: nn.Module,
    step: zk.MeZOStep,
    mode: str,
    closure: Callable[[], Any],
    error: type[BaseException],
    match: str,
    passes: int = 6,
) -> None:
    """The step fails with this error, leaves weights, random state and counters alone, and a good step can follow."""
    step.flush()
    before, state, rng = values(model), step.state_dict(), torch.get_rng_state()
    with pytest.raises(error, match=match):
        step.step(closure)
    assert is_at(model, before, mode, passes)
    assert torch.equal(torch.get_rng_state(), rng)
    assert step.state_dict() == state
    follow = step.step(model)
    step.flush()
    assert follow.isfinite()
    assert not is_at(model, before, mode, passes)


# ---- what a closure returns -------------------------------------------------------------------------------------------------------


RETURNS: dict[str, tuple[Any, type[BaseException], str]] = {
    "None": (None, TypeError, "returned None"),
    "tuple": ((torch.ones(()), 1), TypeError, "returned tuple"),
    "str": ("1.5", TypeError, "returned str"),
    "too large": (10**400, TypeError, "returned int"),
    "shape": (torch.ones(2), TypeError, r"shape \(2,\)"),
    "empty": (torch.ones(0), TypeError, r"shape \(0,\)"),
    "complex": (torch.tensor(1 + 2j), TypeError, "complex64 tensor"),
    "python complex": (1 + 2j, TypeError, "returned complex"),
    "meta": (torch.ones((), device="meta"), TypeError, "on meta"),
}


@each_mode
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("what", RETURNS)
def test_what_is_no_loss_is_refused(mode: str, at: int, what: str) -> None:
    """Also in the second call only: a closure whose result changes."""
    model, calls = Net(), 0
    value, error, match = RETURNS[what]

    def closure() -> Any:
        nonlocal calls
        calls += 1
        loss = model()
        return value if calls - 1 == at else loss

    refused(model, optimizer_of(model, mode), mode, closure, error, match)


@each_mode
@pytest.mark.parametrize("kind", [bool, int, float, torch.int64, torch.bool, torch.float16])
def test_any_real_number_is_a_loss_and_kinds_may_differ(mode: str, kind: Any) -> None:
    model = Net()
    results = iter([torch.tensor(1, dtype=kind) if isinstance(kind, torch.dtype) else kind(1), 0.0])
    step = optimizer_of(model, mode)
    assert step.step(lambda: next(results)) == 0.5
    assert step.projected_gradient.item() == pytest.approx(50.0)


@each_mode
def test_a_loss_with_a_graph_is_taken_without(mode: str) -> None:
    model, other = Net(), Net()

    def closure() -> Tensor:
        with torch.enable_grad():
            loss = model()
        assert loss.requires_grad
        return loss

    a, b = optimizer_of(model, mode), optimizer_of(other, mode)
    for _ in range(3):
        assert a.step(closure) == b.step(other)
    assert not a.projected_gradient.requires_grad
    assert all(p.grad is None for p in model.parameters())


# ---- what a closure does -----------------------------------------------------------------------------------------------------------


@each_mode
@pytest.mark.parametrize("grad", [False, True])
@later
def test_backward_in_the_closure(mode: str, grad: bool, later: bool) -> None:
    """Under no_grad, as a step is, it fails; under enable_grad the gradients are the perturbed weights' in place, and refused in scratch."""
    model = Net()
    step = optimizer_of(model, mode)
    if later:
        step.step(model)

    def closure() -> Tensor:
        with torch.set_grad_enabled(grad):
            loss = model()
            loss.backward()
        return loss

    if grad and mode not in EXACT:
        step.step(closure)
        assert all(p.grad is not None for p in model.parameters())
    else:
        refused(model, step, mode, closure, RuntimeError, r"the closure calls backward\(\).*nothing was updated. Leave it out")


@each_mode
def test_errors_beside_backward_are_passed_on(mode: str) -> None:
    model = Net()

    def closure() -> Tensor:
        with torch.enable_grad():
            w = torch.ones(1, requires_grad=True)
            w.square().sum().backward()  # of the user's own, and allowed
        raise RuntimeError("mine")

    refused(model, optimizer_of(model, mode), mode, closure, RuntimeError, "^mine$")


def add_in_place(model: Any) -> None:
    model.hidden.bias.add_(1.0)


def add_to_the_parameter(model: Any) -> None:
    for p in model.parameters():
        p.add_(1e-3)


def copy_into(model: Any) -> None:
    model.hidden.weight[0] = 1.0


def load(model: Any) -> None:
    model.load_state_dict({n: t + 1 for n, t in model.state_dict().items()})


def sgd(model: Any) -> None:
    with torch.enable_grad():
        weights = list(model.hidden.parameters())
        for p in weights:
            p.grad = torch.ones(p.shape)
        torch.optim.SGD(weights, lr=1e-3).step()


def another_mezo(model: Any) -> None:
    zk.MeZOStep(model, lr=1e-3, seed=8, perturbation="inplace").step(lambda: torch.rand(()))


def another_scratch(model: Any) -> None:
    zk.MeZOStep(model, lr=0.0, seed=8, perturbation="scratch").step(model)


def max_norm(model: Any) -> None:
    nn.functional.embedding(model.ids, model.embedding.weight, max_norm=0.1)


WRITES = [add_in_place, add_to_the_parameter, copy_into, load, sgd, another_mezo, max_norm]


@pytest.mark.parametrize(
    ("mode", "write"),
    [
        *((m, w) for m in MODES for w in WRITES),
        *((m, another_scratch) for m in EXACT),
    ],  # in place, that step at lr = 0 writes nothing
    ids=lambda v: v if isinstance(v, str) else v.__name__,
)
@later
@pytest.mark.parametrize("at", [0, 1])
def test_a_closure_that_writes_to_the_weights_is_refused(mode: str, later: bool, write: Callable[[Any], None], at: int) -> None:
    """No perturbation is left behind: the weights are as before, or as before with the closure's own write."""
    model, calls = Net(), 0
    step = optimizer_of(model, mode, lr=0.0)
    if later:
        step.step(model)
        step.flush()
    before, steps = values(model), step.steps

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = model()
        if calls - 1 == at:
            write(model)
        return loss

    with pytest.raises(
        RuntimeError, match=r"parameter [a-z.]+ was (written to|perturbed by another step).* inside a step: nothing was updated"
    ):
        step.step(closure)
    after = values(model)
    assert step.steps == steps
    model.load_state_dict({n: t for n, t in before.items()}, strict=False)
    assert is_at(model, before, mode)
    if write is add_to_the_parameter:  # relative: kept or not, and nothing else
        moved = torch.cat([(after[n] - before[n]).flatten() for n in before])
        assert ((moved.abs() < 2e-6) | ((moved - 1e-3).abs() < 2e-6)).all()
    step.step(model)


@pytest.mark.parametrize("mode", EXACT)
def test_writes_through_data_in_scratch_mode(mode: str) -> None:
    """The first step, which is watched, refuses them. Later, what a closure writes to `module.weight.data` is written to a copy."""
    model = Net()
    step = optimizer_of(model, mode)

    def closure() -> float:
        next(model.hidden.parameters()).data.add_(1.0)
        return 0.0

    refused(model, step, mode, closure, RuntimeError, r"hidden\.weight was written to")

    def lost() -> float:
        model.hidden.weight.data.add_(1.0)
        return 0.0

    before = values(model)
    step.step(lost)
    assert is_at(model, before, mode)


@each_mode
def test_writes_through_data(mode: str) -> None:
    """`.data` keeps no count. In place, what is written to `p.data` of a parameter stays, and the step's update is added to it. In scratch mode it is
    refused, in whichever step."""
    model, calls = Net(), 0
    step = optimizer_of(model, mode)
    step.step(model)
    step.flush()
    before = values(model)

    def closure() -> float:
        nonlocal calls
        calls += 1
        if calls == 1:
            next(model.hidden.parameters()).data.add_(1.0)
        return 0.0

    if mode in EXACT:
        refused(model, step, mode, closure, RuntimeError, r"hidden\.weight was written to")
        return
    step.step(closure)
    step.flush()
    moved = values(model)["hidden.weight"] - before["hidden.weight"]
    assert ((moved - 1).abs() < 1e-5).all()


def to_half(model: Any) -> None:
    model.half()


def to_double(model: Any) -> None:
    model.double()


def to_meta(model: Any) -> None:
    model.to("meta")


def swap_data(model: Any) -> None:
    p = next(model.hidden.parameters())
    p.data = p.data.clone()


def replace(model: Any) -> None:
    model.hidden.weight = nn.Parameter(torch.zeros(6, 6))


def delete(model: Any) -> None:
    del model._parameters["gain"]


def assign(model: Any) -> None:
    model.load_state_dict({n: torch.zeros_like(t) for n, t in model.state_dict().items()}, assign=True)


@each_mode
@later
@pytest.mark.parametrize("move", [to_half, to_double, to_meta, swap_data, replace, delete, assign], ids=lambda f: f.__name__)
@pytest.mark.parametrize("at", [0, 1])
def test_a_closure_that_moves_converts_or_replaces_weights_is_refused_and_undone(
    mode: str, later: bool, move: Callable[[Any], None], at: int
) -> None:
    model, calls = Net(), 0
    model.gain = nn.Parameter(torch.ones(3))
    step = optimizer_of(model, mode)
    if later:
        step.step(model)
        step.flush()
    tensors = dict(model.named_parameters())

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = model()
        if calls - 1 == at:
            move(model)
        return loss

    refused(model, step, mode, closure, RuntimeError, "parameter [a-z.]+ was (moved or converted|replaced) inside a step")
    assert all(p is tensors[n] for n, p in model.named_parameters())


@each_mode
def test_freezing_and_adding_inside_a_closure_take_effect_at_the_next_step(mode: str) -> None:
    model = Net()
    step = optimizer_of(model, mode)
    step.step(model)
    step.flush()

    def closure() -> Tensor:
        next(model.hidden.parameters()).requires_grad_(False)
        model.hidden.extra = nn.Parameter(torch.zeros(2))
        return model()

    before = values(model)
    step.step(closure)
    step.flush()
    after = values(model)
    assert not torch.equal(after["hidden.weight"], before["hidden.weight"])
    assert torch.equal(after.pop("hidden.extra"), torch.zeros(2))
    assert "extra" in model.hidden._parameters
    assert type(model.hidden._parameters) is dict
    step.step(model)
    assert torch.equal(model.hidden.weight, after["hidden.weight"])


@pytest.mark.parametrize("mode", EXACT)
def test_a_shadow_is_not_set(mode: str) -> None:
    model = Net()
    step = optimizer_of(model, mode)

    def closure() -> Tensor:
        model.hidden.weight.requires_grad = False
        return model()

    refused(model, step, mode, closure, RuntimeError, "hidden.weight was changed inside a step")


@pytest.mark.parametrize("mode", EXACT)
@later
def test_memory_that_a_shadow_is_given_is_refused(mode: str, later: bool) -> None:
    """Nothing would write theta + c z there: all later forwards would read what it holds."""
    model = Net()
    step = optimizer_of(model, mode)
    if later:
        step.step(model)

    def closure() -> Tensor:
        model.hidden.weight.data = torch.zeros(6, 6)
        return model()

    refused(model, step, mode, closure, RuntimeError, "hidden.weight was (changed|moved or converted) inside a step")


@each_mode
@pytest.mark.parametrize("caught", [False, True])
def test_a_step_inside_a_step_is_refused(mode: str, caught: bool) -> None:
    model, other = Net(), Net()
    step, plain = optimizer_of(model, mode), optimizer_of(other, mode)
    state = step.state_dict()

    def closure() -> Tensor:
        for call in (
            lambda: step.step(model),
            lambda: step.add_param_group({"params": [("x", nn.Parameter(torch.zeros(1)))]}),
            lambda: step.load_state_dict(state),
            lambda: copy.deepcopy(step),
        ):
            with pytest.raises(RuntimeError, match="whose step is under way"):
                call()
        if not caught:
            step.step(model)
        return model()

    if caught:
        step.step(closure)
        plain.step(other)
        assert all(same_bits(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    else:
        refused(model, step, mode, closure, RuntimeError, r"step\(\) of an optimizer whose step is under way")


@pytest.mark.parametrize("mode", EXACT)
@later
@pytest.mark.parametrize(
    "call", [copy.deepcopy, pickle.dumps, lambda m: torch.save(m, io.BytesIO())], ids=["deepcopy", "pickle", "save"]
)
def test_copies_of_a_module_inside_a_scratch_step_are_refused(mode: str, later: bool, call: Any) -> None:
    model = Net()
    step = optimizer_of(model, mode)
    if later:
        step.step(model)

    def closure() -> Tensor:
        loss = model()
        call(model)
        return loss

    refused(
        model, step, mode, closure, RuntimeError, r"copied or pickled inside a scratch step.*state_dict\(\) has the clean weights"
    )


@pytest.mark.parametrize("mode", ["inplace", "lazy"])
def test_copies_of_a_module_inside_a_step_in_place_are_perturbed(mode: str) -> None:
    model = Net()
    before = values(model)
    step = optimizer_of(model, mode, lr=0.0)
    seen: list[tuple[float, float]] = []

    def closure() -> Tensor:
        loss = model()
        seen.append((loss.item(), copy.deepcopy(model)().item()))
        assert torch.equal(model.state_dict()["hidden.weight"], model.hidden.weight)
        assert not torch.equal(model.hidden.weight, before["hidden.weight"])
        return loss

    step.step(closure)
    assert all(a == b for a, b in seen)
    assert seen[0] != seen[1]


class Boom(Exception):
    pass


@each_mode
def test_threads(mode: str) -> None:
    """In place the weights are perturbed for every thread. The scratch buffer serves one: another is refused, in the first step at the latest."""
    model = Net()
    step = optimizer_of(model, mode, lr=0.0)
    with ThreadPoolExecutor(2) as pool:

        def closure() -> Tensor:
            return torch.stack([f.result().detach() for f in [pool.submit(model) for _ in range(2)]]).mean()

        if mode in EXACT:
            refused_step = optimizer_of(model, mode)
            refused(model, refused_step, mode, closure, RuntimeError, "runs in another thread.*perturbation='inplace'")
        else:
            seen: list[float] = []
            step.step(lambda: seen.append(closure().item()) or seen[-1])
            other: list[float] = []
            fresh = Net()
            optimizer_of(fresh, mode, lr=0.0).step(lambda: other.append(fresh().item()) or other[-1])
            assert seen == other


@each_mode
def test_a_second_thread_cannot_step(mode: str) -> None:
    model = Net()
    step = optimizer_of(model, mode)
    errors: list[BaseException] = []

    def closure() -> Tensor:
        def run() -> None:
            try:
                step.step(model)
            except RuntimeError as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return model()

    step.step(closure)
    assert len(errors) == 2
    assert "in another thread" in str(errors[0])


@pytest.mark.parametrize("mode", EXACT)
def test_a_weight_kept_from_a_step_is_refused_after_it(mode: str) -> None:
    model = Net()
    step = optimizer_of(model, "scratch")
    kept: list[Tensor] = []
    step.step(lambda: kept.append(model.hidden.weight) or model())
    with pytest.raises(RuntimeError, match=r"hidden\.weight of a scratch step is used after the step"):
        kept[0].sum()


# ---- what happens between two steps ------------------------------------------------------------------------------------------------


@each_mode
@pytest.mark.parametrize("change", ["untied", "replaced", "assign", "double"])
def test_parameters_replaced_between_steps_are_refused(mode: str, change: str) -> None:
    """The optimizer would train tensors that no forward reads."""
    model = Net(tied=change == "untied")
    step = optimizer_of(model, mode)
    step.step(model)
    step.flush()
    match = "parameters are no longer in the model.*load_state_dict"
    if change == "untied":
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        before = values(model)
        step.step(model)  # the shared one is still in the model; the new one is nobody's
        assert torch.equal(model.head.weight, before["head.weight"])
        assert not torch.equal(model.embedding.weight, before["embedding.weight"])
        return
    if change == "replaced":
        model.hidden.weight = nn.Parameter(torch.zeros(6, 6))
    elif change == "assign":
        model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
    else:
        model.double()
        match = "dtype torch.float64"
    before = values(model)
    for _ in range(2):
        with pytest.raises((RuntimeError, TypeError), match=match):
            step.step(model)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    if change == "assign":
        new = optimizer_of(model, mode)
        new.load_state_dict(step.state_dict())
        assert new.step(model).isfinite()


@each_mode
def test_the_model_can_be_put_into_another_module_reparametrized_and_deleted(mode: str) -> None:
    model = Net()
    step = optimizer_of(model, mode)
    step.step(model)
    step.flush()
    wrapper = nn.Sequential()
    wrapper.module = model  # as DistributedDataParallel names it
    before = values(model)
    step.step(model)
    step.flush()
    assert not is_at(model, before, mode)
    nn.utils.parametrizations.orthogonal(model.hidden)  # moves the parameter to another module
    assert step.step(model).isfinite()
    forward = model.forward
    del model, wrapper
    gc.collect()
    assert step.step(forward).isfinite()


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.bfloat16().float(), lambda m: m.to(torch.float16)])
def test_a_lazy_model_converted_between_steps_is_brought_back(convert: Any) -> None:
    """The converted memory stands at theta + eps z, as the old one did."""
    model = Net()
    step = optimizer_of(model, "lazy", lr=0.0, eps=0.25)
    before = values(model)
    step.step(model)
    convert(model)
    step.flush()
    # one rounding of |theta| + |eps z| <= 3 to bf16, and those of the passes
    assert all((p.float() - before[n]).abs().max() <= 4 * 3 * 2.0**-8 for n, p in model.named_parameters())
    assert max((p.float() - before[n]).abs().max() for n, p in model.named_parameters()) < 0.05 < 0.25
    step.step(lambda: 0.0)


@each_mode
def test_loading_freezing_unfreezing_and_modes_between_steps(mode: str) -> None:
    model = Net()
    step = optimizer_of(model, mode)
    saved = {n: t.clone() for n, t in model.state_dict().items()}
    for change in (
        lambda: model.load_state_dict(saved),
        lambda: model.hidden.requires_grad_(False),
        lambda: model.hidden.requires_grad_(True),
        model.train,
        model.eval,
        model.cpu,
    ):
        step.step(model)
        change()
        step.flush()
    model.load_state_dict(saved)
    assert is_at(model, {n: saved[n] for n, _ in model.named_parameters()}, mode, 0)
    model.requires_grad_(False)  # nothing is left to train: forwards, and no update
    step.step(model)
    assert all(same_bits(p, saved[n]) for n, p in model.named_parameters())


EDITS: list[tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = [
    (lambda g: g.update(eps=0), ValueError, r"param_groups\[0\]: eps=0 "),
    (lambda g: g.update(eps=float("nan")), ValueError, "eps=nan"),
    (lambda g: g.update(lr=-1.0), ValueError, "lr=-1.0"),
    (lambda g: g.update(lr="0.1"), ValueError, "lr='0.1'"),
    (lambda g: g.update(lr=torch.tensor([0.1, 0.2])), ValueError, r"lr is a tensor of shape \(2,\)"),
    (lambda g: g.update(weight_decay=float("inf")), ValueError, "weight_decay=inf"),
    (lambda g: g.pop("eps"), ValueError, r"param_groups\[0\]: the group has no 'eps'"),
    (lambda g: g["params"].append(nn.Parameter(torch.zeros(2))), ValueError, "7 parameters and 6 names"),
]


@each_mode
@pytest.mark.parametrize(("edit", "error", "match"), EDITS, ids=[m for _, _, m in EDITS])
def test_bad_edits_of_param_groups_are_refused_before_anything_changes(
    mode: str, edit: Any, error: type[Exception], match: str
) -> None:
    model = Net()
    step = optimizer_of(model, mode)
    step.step(model)
    before = values(model)
    edit(step.param_groups[0])
    with pytest.raises(error, match=match):
        step.step(model)
    step.flush()
    assert mode == "lazy" or all(same_bits(p, before[n]) for n, p in model.named_parameters())


@each_mode
def test_good_edits_of_param_groups(mode: str) -> None:
    """A rate as a tensor, and keys of somebody else's."""
    model, other = Net(), Net()
    step, plain = optimizer_of(model, mode), optimizer_of(other, mode)
    for k in range(3):
        step.param_groups[0]["lr"] = torch.tensor(1e-2 / (k + 1), dtype=torch.float64)
        step.param_groups[0]["note"] = "mine"
        plain.param_groups[0]["lr"] = 1e-2 / (k + 1)
        assert step.step(model) == plain.step(other)
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# ---- copies of the optimizer ---------------------------------------------------------------------------------------------------------


def through_torch(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": through_torch,
}


@each_mode
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_copies_of_model_and_optimizer_go_on_bit_for_bit(mode: str, how: str, first: str) -> None:
    """A lazy run too, whose weights are copied where they stand, without a pass more."""
    model = Net()
    step = optimizer_of(model, mode, weight_decay=0.1, clip=40.0)
    schedule = torch.optim.lr_scheduler.LinearLR(step, 1.0, 0.5, total_iters=8)
    for _ in range(3):
        step.step(model)
        schedule.step()
    if first == "model":
        other, twin = COPIES[how]((model, step))
    else:
        twin, other = COPIES[how]((step, model))
    assert type(twin) is zk.MeZOStep
    assert {id(p) for g in twin.param_groups for p in g["params"]} == {id(p) for p in other.parameters()}
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    for _ in range(3):
        assert step.step(model) == twin.step(other)
        assert step.projected_gradient == twin.projected_gradient
    a, b = step.state_dict(), twin.state_dict()
    assert a == b
    assert all(same_bits(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@each_mode
def test_a_copy_of_the_optimizer_alone_has_a_module_of_its_own(mode: str) -> None:
    model = Net()
    step = optimizer_of(model, mode)
    step.step(model)
    twin = copy.deepcopy(step)
    before = values(model)
    losses = iter([1.0, 0.0])
    twin.step(lambda: next(losses))
    assert all(same_bits(p, before[n]) for n, p in model.named_parameters())
    assert all(not torch.equal(p, before[n]) for n, p in zip(before, twin.param_groups[0]["params"], strict=True))


def test_a_copy_of_a_lazy_run_guards_its_own_model() -> None:
    model = Net()
    step = optimizer_of(model, "lazy", lr=0.0, eps=0.25)
    clean = model().item()
    step.step(model)
    other, twin = copy.deepcopy((model, step))
    stood = values(model)
    assert other().item() == pytest.approx(clean, abs=1e-5), "a forward of the copy makes it clean"
    assert all(same_bits(p, stood[n]) for n, p in model.named_parameters()), "and leaves the original where it stood"
    assert model().item() == pytest.approx(clean, abs=1e-5)
    twin.step(other)
    del twin
    gc.collect()
    assert other().item() == pytest.approx(clean, abs=1e-5)


def test_a_lazy_model_can_be_pickled_alone() -> None:
    """With its hooks, which do nothing in the copy; after flush() the weights are clean."""
    model = Net()
    step = optimizer_of(model, "lazy")
    step.step(model)
    step.flush()
    other = pickle.loads(pickle.dumps(model))
    assert other() == model()


def test_a_shallow_copy_is_refused() -> None:
    with pytest.raises(TypeError, match=r"copy\.deepcopy\(\(model, optimizer\)\)"):
        copy.copy(optimizer_of(Net(), "scratch"))


FORK = """
import os, sys, torch, zo_kernels as zk
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from tests.optim.test_faults import MODES, Net, optimizer_of, values
from tests.kernels.cases import same_bits
for mode, share in {cases!r}:
    model = Net()
    if share: model.share_memory()
    step = optimizer_of(model, mode)
    for _ in range(2): step.step(model)
    stood = values(model)
    child = os.fork()
    if child == 0:
        if not share:
            for _ in range(3): step.step(model)
            assert not same_bits(model.hidden.weight, stood["hidden.weight"])
        sys.exit(0)  # with Python's exit handlers
    assert os.waitpid(child, 0)[1] == 0, (mode, share)
    assert all(same_bits(p, stood[n]) for n, p in model.named_parameters()), (mode, share)
    other = Net()
    twin = optimizer_of(other, mode)
    for _ in range(2): twin.step(other)
    assert step.step(model) == twin.step(other), (mode, share)
"""


def test_a_forked_child_works_on_its_own_memory() -> None:
    """And where weights are shared, its exit leaves them as the parent needs them. One process for all: torch takes seconds to import."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    script = FORK.format(root=root, cases=[(mode, share) for mode in ("lazy", "resident") for share in (False, True)])
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=root)


# ---- the surroundings of a step --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def flush_denormal() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default device meta": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "flush denormal": flush_denormal,
    "two threads": lambda: threads(2),
    "detect anomaly": lambda: torch.autograd.detect_anomaly(check_nan=False),
}


@each_mode
@pytest.mark.parametrize(
    ("surroundings", "where"),
    [
        (s, w)
        for s in SURROUNDINGS
        for w in ("step", "closure", "construction")
        if (s, w) != ("default device meta", "closure")  # the model's own new tensors would have no values
    ],
)
def test_surroundings_change_no_bit(mode: str, where: str, surroundings: str) -> None:
    """Around some of the steps, around the forwards alone, or around the making of the optimizer."""
    model, other = Net(), Net()
    inside = SURROUNDINGS[surroundings]
    with inside() if where == "construction" else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = optimizer_of(model, mode)
    plain = optimizer_of(other, mode)

    def closure() -> Tensor:
        with inside() if where == "closure" else contextlib.nullcontext():
            return model()

    for k in range(5):
        with inside() if where == "step" and k in (0, 3) else contextlib.nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = step.step(closure)
        assert loss == plain.step(other)
        assert all(same_bits(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    step.flush()
    plain.flush()
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_view_of_a_weight_in_any_mode_of_the_closure(mode: Callable[[], Any]) -> None:
    """What shares the memory of a perturbed weight is right, and a write to it told, where torch counts no writes to what a mode makes."""
    model, other = nn.Linear(64, 64), nn.Linear(64, 64)
    other.load_state_dict(model.state_dict())
    step, plain = (zk.MeZOStep(m, lr=1e-2, scratch_bytes=1 << 14) for m in (model, other))

    def closure() -> Tensor:
        with mode():
            return (model.weight[:2] * model.bias.view(1, 64)).sum()

    for _ in range(3):
        assert step.step(closure) == plain.step(lambda: (other.weight[:2] * other.bias.view(1, 64)).sum())
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))

    def write() -> Tensor:
        with mode():
            return model.weight.add_(1).sum()

    with pytest.raises(RuntimeError, match="written to"):
        step.step(write)


@each_mode
def test_parameters_made_in_inference_mode(mode: str) -> None:
    with torch.inference_mode():
        model = Net()
    other = Net()
    step, plain = optimizer_of(model, mode), optimizer_of(other, mode)
    for k in range(4):
        with torch.inference_mode(k % 2 == 1):
            assert step.step(model) == plain.step(other)
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["lazy", "resident"])
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_workers(mode: str, context: str) -> None:
    def run(workers: int) -> list[Tensor]:
        model = Net()
        step = optimizer_of(model, mode)
        numbers: Any = [torch.full((4,), k) for k in range(6)]  # of which a spawned worker imports no test
        loader = DataLoader(numbers, batch_size=2, num_workers=workers, multiprocessing_context=context if workers else None)
        torch.manual_seed(0)
        for _ in range(2 if context == "fork" else 1):
            for batch in loader:
                model.ids = batch
                step.step(model)
        return [p.detach() for p in model.parameters()]

    assert all(same_bits(a, b) for a, b in zip(run(1), run(0), strict=True))


# ---- models ------------------------------------------------------------------------------------------------------------------------------


def weight_norm(model: Net) -> None:
    nn.utils.parametrizations.weight_norm(model.hidden)


def old_weight_norm(model: Net) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model.hidden)


def spectral_norm(model: Net) -> None:
    torch.manual_seed(0)
    nn.utils.parametrizations.spectral_norm(model.hidden)
    model.eval()


def reading_hook(model: Net) -> None:
    model.hidden.register_forward_hook(lambda module, inputs, output: output * module.weight.norm() + module.bias.data.sum())


def direct(model: Net) -> None:
    model.hidden.register_forward_hook(lambda m, inputs, output: nn.functional.linear(inputs[0], m._parameters["weight"], m.bias))


def through_data(model: Net) -> None:
    model.hidden.register_forward_hook(lambda m, inputs, output: nn.functional.linear(inputs[0], m.weight.data, m.bias.data))


def checkpointed(model: Net) -> None:
    hidden = model.hidden.forward
    model.hidden.forward = lambda x: checkpoint(hidden, x, use_reentrant=False)


def scripted(model: Net) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.hidden = torch.jit.script(model.hidden)


def replicated(model: Net) -> None:
    """What nn.DataParallel makes of a module, on one device."""

    def forward(x: Tensor) -> Tensor:
        replica = model.head._replicate_for_data_parallel()
        replica.weight = torch.ops.aten.clone(model.head._parameters["weight"])
        replica.bias = None
        return nn.Linear.forward(replica, x)

    model.head.forward = forward


def functional(model: Net) -> None:
    """Values of the caller's own, instead of the parameter's."""
    own = torch.full((6, 6), 0.25)
    hidden = model.hidden
    norm = model.norm
    norm.forward = lambda x: torch.func.functional_call(hidden, {"weight": own}, (x,))


def functional_all(model: Net) -> None:
    hidden = model.hidden
    model.norm.forward = lambda x: torch.func.functional_call(hidden, dict(hidden.named_parameters()), (x,))


MODELS = [
    weight_norm,
    old_weight_norm,
    spectral_norm,
    reading_hook,
    direct,
    through_data,
    checkpointed,
    scripted,
    replicated,
    functional,
    functional_all,
]


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", MODELS, ids=lambda f: f.__name__)
def test_models_that_read_weights_in_ways_of_their_own(mode: str, grad: bool, kind: Callable[[Net], None]) -> None:
    """Scratch mode sees what in place would: the same first loss, and every later step has two different ones."""
    found: dict[str, list[float]] = {}
    for m in (mode, "inplace"):
        model = Net()
        kind(model)
        before = values(model)
        seen = found[m] = []

        def closure(model: Net = model, seen: list[float] = seen) -> Tensor:
            with torch.set_grad_enabled(grad):
                seen.append(model().item())
            return torch.tensor(seen[-1])

        step = optimizer_of(model, m, lr=0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(3):
                step.step(closure)
        if m == mode:
            assert all(same_bits(p, before[n]) for n, p in model.named_parameters())
    assert found[mode][0] == found["inplace"][0]
    assert found[mode] == pytest.approx(found["inplace"], abs=2e-5)
    assert len(set(found[mode])) == 6


@each_mode
def test_a_compiled_call_of_a_plain_module_inside_the_closure(mode: str) -> None:
    """The optimizer cannot know of it; torch's guards see that the module's attributes are others."""
    torch._dynamo.reset()
    model, other = Net(), Net()
    compiled = torch.compile(model, backend="eager")
    step, plain = optimizer_of(model, mode, lr=0.0), optimizer_of(other, "inplace", lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            step.step(compiled)
            plain.step(other)
            assert step.projected_gradient.item() == pytest.approx(plain.projected_gradient.item(), abs=2e-6 / 2e-2)
            assert step.projected_gradient.item() != 0


# ---- interrupts -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["inplace", "lazy"])
def test_interrupts_in_place_leave_weights_clean(mode: str) -> None:
    """Real SIGINTs at random moments, in passes, between them and in forwards."""
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 1))  # passes take a while
    before = values(model)
    x = torch.randn(2, 300)
    step = optimizer_of(model, mode, lr=0.0)
    passes = 0

    def forward() -> Tensor:
        nonlocal passes
        passes += 3  # a step has two forwards and three passes
        return model(x).square().mean()

    for _ in interrupted(lambda: step.step(forward)):
        step.flush()
        passes += 4
        assert is_at(model, before, mode, passes)


def test_a_handler_of_the_closure_stays() -> None:
    """A step holds SIGINT back but for its forwards, and has the handler that stands there put back."""
    model = Net()
    step = optimizer_of(model, "inplace")
    heard: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def closure() -> Tensor:
        signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
        signal.raise_signal(signal.SIGINT)
        return model()

    try:
        step.step(closure)
        signal.raise_signal(signal.SIGINT)
        assert len(heard) == 3
    finally:
        signal.signal(signal.SIGINT, before)


class TimeLimit(Exception):
    pass


@each_mode
@pytest.mark.parametrize(
    "kind", [signal.SIGALRM, signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1, signal.SIGINT], ids=lambda s: s.name
)
def test_a_handler_that_raises_in_any_pass(mode: str, kind: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises when the step is done: weights, modules, modes of torch and handlers are as after a step, and the next one goes on."""
    model = Net()
    before = values(model)
    step = optimizer_of(model, mode, lr=0.0)
    real, left = cpu.perturb, 0

    def stop(number: int, frame: Any) -> None:
        raise TimeLimit

    def perturb_and_signal(plan: Any, p: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            signal.raise_signal(kind)
        real(plan, p)

    monkeypatch.setattr(cpu, "perturb", perturb_and_signal)
    old = signal.signal(kind, stop)
    try:
        done = 0
        for at in range(1, 4):
            left = at
            with pytest.raises(TimeLimit):
                step.step(model)
            done += step.steps - done
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            assert signal.getsignal(kind) is stop
            step.flush()
            assert is_at(model, before, mode, 8 * at)
        assert step.steps == done
        step.step(model)
        assert step.steps == done + 1
    finally:
        signal.signal(kind, old)


@each_mode
def test_time_limits_at_random_moments(mode: str) -> None:
    model = Net()
    before = values(model)
    step = optimizer_of(model, mode, lr=0.0)
    over = False

    def stop(number: int, frame: Any) -> None:
        nonlocal over
        over = True
        raise TimeLimit

    old, passes = signal.signal(signal.SIGALRM, stop), 0
    try:
        for trial in range(40):
            with contextlib.suppress(TimeLimit):
                over = False
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + 1.3e-4 * trial)
                while not over:  # what is raised in a callback of the garbage collector or a finalizer, Python lets go
                    step.step(model)
            step.flush()
            passes = 5 * step.steps + 10 * (trial + 1)
            assert is_at(model, before, mode, passes)
            assert signal.getsignal(signal.SIGALRM) is stop and torch.is_grad_enabled()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize("mode", EXACT)
def test_a_time_limit_while_torch_has_the_look_at_a_first_step_off(mode: str) -> None:
    """Torch takes a mode off while it serves a function, and puts it on again when the function's frame is freed, which is after the step here."""
    model, other = Net(), Net()
    other.load_state_dict(model.state_dict())
    before, aliases = values(model), [p.detach().view(-1) for p in model.parameters()]
    step, undisturbed = optimizer_of(model, mode), optimizer_of(other, mode)

    def interrupt(frame: Any, event: str, argument: Any) -> None:
        generator = getattr(frame.f_locals.get("self"), "gen", None) if frame.f_code.co_name == "__exit__" else None
        if getattr(generator, "__name__", "") == "_pop_mode_temporarily":
            sys.settrace(None)
            raise TimeLimit

    def traced() -> None:
        sys.settrace(interrupt)
        step.step(model)

    old = sys.gettrace()
    try:
        with pytest.raises(TimeLimit):
            traced()
        gc.collect()
        assert is_at(model, before, mode)
        for _ in range(2):
            assert all(t.sum().isfinite() for t in aliases)  # reads that the look would take for a forward's
            assert step.step(model) == undisturbed.step(other)
        assert is_at(model, values(other), mode)
    finally:
        sys.settrace(old)
        while overrides._get_current_function_mode_stack():
            overrides._pop_mode()


# ---- random numbers, autocast, memory ----------------------------------------------------------------------------------------------------------


class NoMemory(MemoryError):
    pass


DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(()).item(),
    "numpy": lambda: np.random.random(),
    "numpy, a normal number that waits": lambda: np.random.randn(),
    "random": lambda: random.random(),
    "random, a normal number that waits": lambda: random.gauss(0, 1),
}


@each_mode
@pytest.mark.parametrize("draw", DRAWS)
def test_global_generators_are_the_same_at_every_forward(mode: str, draw: str) -> None:
    """And afterwards as after one call; if the step fails, as before it. From the first draw, in whichever step it comes."""
    model, seen = Net(), []
    step = optimizer_of(model, mode)
    step.step(model)

    def closure() -> Tensor:
        seen.append(DRAWS[draw]())
        return model() * (1 + seen[-1] ** 2)

    def failing() -> Tensor:
        DRAWS[draw]()
        raise NoMemory

    expected = []
    for _ in range(5):
        np_state, py_state, torch_state = np.random.get_state(), random.getstate(), torch.get_rng_state()
        expected.append(DRAWS[draw]())
        np.random.set_state(np_state)
        random.setstate(py_state)
        torch.set_rng_state(torch_state)
        with pytest.raises(NoMemory):
            step.step(failing)
        step.step(closure)
    assert seen == [x for x in expected for _ in range(2)]
    assert len(set(seen)) == 5


@each_mode
def test_a_weights_cached_16_bit_copy_is_of_one_perturbation(mode: str) -> None:
    """Autocast keeps one where gradients are asked for: neither the other forward nor an evaluation behind the step may find it."""
    torch.manual_seed(0)
    model, seen = nn.Linear(64, 64), []
    x = torch.randn(8, 64)
    step = optimizer_of(model, mode, eps=0.1, lr=0.1)

    def closure() -> Tensor:
        with torch.enable_grad():
            loss = model(x).float().square().mean()
        seen.append(loss.item())
        return loss

    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            model(x)  # with a copy of the clean weights
            step.step(closure)
        step.flush()
        inside = model(x)
    assert len(set(seen)) == 4
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(inside, model(x))


@each_mode
def test_a_state_that_does_not_fit_leaves_the_step_undone(mode: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is asked for before the record is written."""
    if mode == "lazy":
        return  # a rule with a state takes no lazy passes
    model = Net()
    before = values(model)
    step = zk.ZOMomentum(model, 1e-2, journal=tmp_path / "run.zoj", **MODES[mode])
    real = torch.zeros

    def full(*size: Any, **options: Any) -> Tensor:
        raise NoMemory

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(NoMemory):
        step.step(model)
    monkeypatch.setattr(torch, "zeros", real)
    assert step.steps == 0 and is_at(model, before, mode)
    if mode in EXACT:
        assert len(journal.read(tmp_path / "run.zoj")) == 0
        step.step(model)
        assert step.steps == len(journal.read(tmp_path / "run.zoj")) == 1


@pytest.mark.parametrize("mode", EXACT)
def test_an_update_that_fails_behind_its_record_is_said(mode: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    step = optimizer_of(model, mode, journal=tmp_path / "run.zoj")
    step.step(model)

    def failing(*_: Any, **__: Any) -> None:
        raise NoMemory

    with monkeypatch.context() as patch:
        patch.setattr(views.View, "execute", failing)
        with pytest.raises(NoMemory):
            step.step(model)
    with pytest.raises(RuntimeError, match=r"failed in its update, after its record was written.*Load the base weights and resume"):
        step.step(model)


def test_what_a_forward_took_is_learned_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: how often the size of a weight is looked at."""

    class Many(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.p = nn.ParameterList([torch.ones(2) for _ in range(n)])

        def forward(self) -> Tensor:
            return sum((getattr(self.p, str(k)).sum() for k in range(len(self.p))), torch.zeros(()))

    looked = 0

    def count(weight: Any) -> int:
        nonlocal looked
        looked += 1
        return 256

    monkeypatch.setattr(PerturbedWeight, "room", property(count, lambda weight, value: None), raising=False)
    counts = []
    for n in (100, 400):
        model = Many(n)
        step = zk.MeZOStep(model, lr=0.0, perturbation="scratch", scratch_bytes=256 * n - 1)
        looked = 0
        step.step(model)
        counts.append(looked)
    assert counts[1] <= 4 * counts[0] + 8
