"""The lazy in-place schedule: two passes a step, and weights that are clean whenever somebody looks."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zo_kernels as zk
from tests.kernels.cases import same_bits
from tests.optim.models import loss_of, make, tokens
from zo_kernels._backends import cpu

LR, EPS, SEED = 1e-3, 1e-2, 3


def lazy(model: nn.Module, **options: Any) -> zk.MeZOStep:
    return zk.MeZOStep(model, **{"lr": LR, "eps": EPS, "seed": SEED, "perturbation": "inplace", "lazy": True, **options})


def closure_of(model: nn.Module) -> Any:
    return lambda: loss_of(model, tokens())


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def near(a: list[Tensor], b: list[Tensor], passes: int) -> bool:
    """Each pass rounds by at most 2^-24 of |theta| + |eps z|, with |theta| <= 4 and |eps z| <= 0.09 here."""
    return all((x - y).abs().max() <= passes * 4.1 * 2.0**-24 for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_passes_are_those_of_the_schedule(dtype: torch.dtype) -> None:
    """Bit for bit against the same passes written out with `perturb_`."""
    model = make("llama", dtype)
    other = copy.deepcopy(model)
    step = lazy(model, weight_decay=0.0)
    pairs = list(other.named_parameters())
    params, streams = [p.detach() for _, p in pairs], [zk.stream_of(n) for n, _ in pairs]

    def run(*terms: tuple[int, float]) -> None:
        zk.perturb_(params, list(terms), seed=SEED, streams=streams)

    run((0, EPS))
    for tag in range(5):
        plus = loss_of(other, tokens()).double()
        run((tag, -EPS - EPS))
        minus = loss_of(other, tokens()).double()
        g = float(plus - minus) / (2 * EPS)
        run((tag, -LR * g + EPS), (tag + 1, EPS))
        assert step.step(closure_of(model)) == ((plus + minus) / 2).float()
        assert all(same_bits(a, b) for a, b in zip(model.parameters(), params, strict=True))
    step.flush()
    run((5, -EPS))
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), params, strict=True))


def test_two_passes_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    passes = []
    real = cpu.perturb
    monkeypatch.setattr(cpu, "perturb", lambda plan, p: (passes.append(p), real(plan, p)))
    for options, expected in (({}, 2), ({"lazy": False}, 3)):
        step = lazy(model, **options)
        step.step(closure_of(model))
        passes.clear()
        for _ in range(4):
            step.step(closure_of(model))
        assert len(passes) == 4 * expected


def test_a_run_is_that_of_the_plain_schedule_up_to_rounding() -> None:
    model = make("llama")
    other = copy.deepcopy(model)
    step, plain = lazy(model, weight_decay=0.1), lazy(other, weight_decay=0.1, lazy=False)
    for k in range(10):
        for optimizer in (step, plain):
            optimizer.param_groups[0]["lr"] = LR / (k + 1)
            optimizer.param_groups[1]["eps"] = EPS / (1 + k % 3)  # the weights stand at the old eps, and go to the new one
        assert step.step(closure_of(model)).item() == pytest.approx(plain.step(closure_of(other)).item(), abs=1e-5)
    step.flush()
    # The losses differ by rounding, so g by about 1e-6 / eps, and each of ten updates by that times lr |z|.
    assert all(torch.allclose(a, b, atol=10 * LR * 1e-4 * 9) for a, b in zip(values(model), values(other), strict=True))


def test_between_steps_the_weights_stand_ahead_and_flush_brings_them_back() -> None:
    model = make("llama")
    before = values(model)
    step = lazy(model, lr=0.0)
    step.step(closure_of(model))
    assert not near(values(model), before, 100)
    step.flush()
    back = values(model)
    assert near(back, before, 3)
    step.flush()
    assert all(same_bits(a, b) for a, b in zip(back, model.parameters(), strict=True))
    step.step(closure_of(model))
    step.flush()
    assert near(values(model), before, 6)


def looks(model: nn.Module, step: zk.MeZOStep) -> dict[str, Any]:
    return {
        "forward": lambda: model(input_ids=tokens()),
        "generate": lambda: model.generate(tokens(1, 3), max_new_tokens=2, do_sample=False),
        "forward by name": lambda: model.forward(input_ids=tokens()),
        "inner module": lambda: model.model(input_ids=tokens()),
        "inner layer": lambda: model.model.layers[1].mlp(torch.zeros(1, 32)),
        "state_dict": model.state_dict,
        "state_dict of a part": model.model.layers[0].state_dict,
        "optimizer state": step.state_dict,
        "a new group": lambda: step.add_param_group({"params": [("extra", nn.Parameter(torch.zeros(3)))]}),
        "load optimizer": lambda: step.load_state_dict(saved),
    }


saved: dict[str, Any] = {}


@pytest.mark.parametrize(
    "look",
    [
        "forward",
        "generate",
        "forward by name",
        "inner module",
        "inner layer",
        "state_dict",
        "state_dict of a part",
        "optimizer state",
        "a new group",
        "load optimizer",
    ],
)
def test_whoever_looks_finds_clean_weights(look: str) -> None:
    model = make("llama")
    before = values(model)
    step = lazy(model, lr=0.0)
    saved.update(step.state_dict())
    step.step(closure_of(model))
    looks(model, step)[look]()
    assert near(values(model), before, 3)


def test_every_door_of_an_adapter_shows_clean_weights() -> None:
    """peft's `generate` and `get_base_model` pass the outer model's call by."""
    model = make("lora")
    step = lazy(model)
    doors = [
        lambda: model.get_base_model()(input_ids=tokens()).logits,
        lambda: model.base_model.model.model(input_ids=tokens()).last_hidden_state,
        lambda: model.forward(input_ids=tokens()).logits,
        lambda: model.generate(input_ids=tokens(1, 3), max_new_tokens=2, do_sample=False, output_scores=True, return_dict_in_generate=True).scores[0],
    ]  # fmt: skip
    with torch.no_grad():
        for door in doors:
            step.step(closure_of(model))
            seen = door()
            step.flush()
            assert same_bits(seen, door())


def test_loading_a_checkpoint_is_not_shifted() -> None:
    model = make("llama")
    checkpoint = {n: t.clone() for n, t in model.state_dict().items()}
    step = lazy(model)
    step.step(closure_of(model))
    model.load_state_dict(checkpoint)
    step.flush()
    assert all(same_bits(t, checkpoint[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("at", [0, 1])
def test_a_failing_forward_leaves_clean_weights(at: int) -> None:
    model = make("llama")
    before, calls = values(model), 0
    step = lazy(model, lr=0.0)
    step.step(closure_of(model))

    def failing() -> Tensor:
        nonlocal calls
        if calls == at:
            raise KeyboardInterrupt
        calls += 1
        return loss_of(model, tokens())

    with pytest.raises(KeyboardInterrupt):
        step.step(failing)
    assert near(values(model), before, 6)
    step.step(closure_of(model))
    step.flush()
    assert near(values(model), before, 9)


def test_a_skipped_step_goes_on_too() -> None:
    model = make("llama")
    before = values(model)
    step = lazy(model)
    step.step(lambda: float("nan"))
    assert step.skipped == 1
    step.flush()
    assert near(values(model), before, 3)


@pytest.mark.parametrize(("tag", "further"), [(2**32 - 2, True), (2**32 - 1, False)])
def test_the_last_step_of_all_does_not_go_ahead(tag: int, further: bool) -> None:
    """Behind it there is no direction: its weights stand at theta, and no step follows."""
    model = make("llama")
    before = values(model)
    step = lazy(model, lr=0.0)
    state = step.state_dict()
    state["param_groups"][0]["zo"]["tag"] = tag
    step.load_state_dict(state)
    step.step(closure_of(model))
    assert near(values(model), before, 3) != further
    if further:
        step.step(closure_of(model))
    with pytest.raises(RuntimeError, match=r"2\^32 directions are used up"):
        step.step(closure_of(model))
    assert near(values(model), before, 6)


def test_freezing_a_parameter_cleans_it_first() -> None:
    model = make("llama")
    before = values(model)
    step = lazy(model, lr=0.0)
    step.step(closure_of(model))
    model.lm_head.weight.requires_grad_(False)
    step.step(closure_of(model))
    assert near([model.lm_head.weight.detach()], [before[-1]], 3)
    step.flush()
    assert near(values(model), before, 6)


def test_the_optimizer_going_away_cleans() -> None:
    model = make("llama")
    before = values(model)
    step = lazy(model, lr=0.0)
    step.step(closure_of(model))
    del step
    gc.collect()
    assert near(values(model), before, 3)
    model(input_ids=tokens())  # the hooks that it left behind do nothing


def test_interpreter_exit_cleans(tmp_path: Path) -> None:
    """Weights in a file that outlives the process."""
    script = f"""
import torch, zo_kernels as zk
w = torch.nn.Parameter(torch.from_file({str(tmp_path / "w")!r}, shared=True, size=64))
w.data.fill_(1.0)
step = zk.MeZOStep([("w", w)], lr=0.0, eps=0.5, perturbation="inplace", lazy=True)
step.step(lambda: float(w.square().sum()))
assert (w != 1).all()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    w = torch.from_file(str(tmp_path / "w"), size=64)
    assert (w - 1).abs().max() <= 3 * 6 * 2.0**-24  # three passes over |theta| + eps |z| <= 6


def test_lazy_needs_in_place() -> None:
    model = make("llama")
    for perturbation in ("auto", "scratch"):
        with pytest.raises(ValueError, match=r"lazy=True with perturbation=.*'inplace'"):
            zk.MeZOStep(model, lr=LR, lazy=True, perturbation=perturbation)
    with pytest.raises(ValueError, match="'lazy' is 'inplace' with lazy=True"):
        zk.MeZOStep(model, lr=LR, perturbation="lazy")  # its name on the command line and in the Trainer


@pytest.mark.parametrize("inner", [False, True])
def test_lazy_needs_modules_that_take_hooks(inner: bool) -> None:
    """A scripted module cannot flush before it is read; what is not scripted keeps no hook of an optimizer that was refused."""
    scripted = torch.jit.script(nn.Linear(3, 2))
    model = nn.Sequential(nn.Linear(4, 3), scripted) if inner else scripted
    with pytest.raises(
        ValueError, match=f"lazy=True with the scripted module '{'1' if inner else 'RecursiveScriptModule'}'.*leave lazy out"
    ):
        lazy(model)
    if inner:
        assert not model._forward_pre_hooks and not model[0]._forward_pre_hooks
