"""Steps that do not depend on the loss's scale: the quotient g / s, what s goes on from, and what leaves it alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import zo_kernels as zk
from tests.kernels.cases import same_bits
from tests.optim.methods import SEED, Tiny
from zo_kernels import journal
from zo_kernels.optim import evaluate
from zo_kernels.optim.decision import Decision

NORMAL = st.floats(-1e6, 1e6, allow_subnormal=False).filter(lambda g: g == 0 or abs(g) > 1e-6)
RUNS = st.integers(1, 5).flatmap(lambda q: st.lists(st.lists(NORMAL, min_size=q, max_size=q), min_size=1, max_size=12))
BETAS = st.sampled_from([0.0, 0.5, 0.9, 0.999])


def quotients(beta: float, run: list[list[float]], there: bool = False, factor: float = 1.0) -> list[Any]:
    """g / s of each step of one group, [queries]; by tensors where `there`."""
    config = zk.ScaleFree(beta)
    state, found = config.of(), []
    for gs in run:
        g = np.array([gs]) * factor
        if there:
            made, s = config.divided(torch.from_numpy(g), state.on(1, torch.device("cpu")))
            number: Any = s.float().double()[0, 0]
            go: Any = torch.tensor(True)
        else:
            made, s = config.divided(g, state.here(1))
            number, go = float(np.float32(s[0, 0])), True
        state.learned(Decision(0, [1.0], [[0.0, number]], go=go), 1)
        found.append(np.asarray(made)[0])
    return found


@settings(max_examples=30, deadline=None)
@given(BETAS, RUNS, st.integers(-60, 60))
def test_a_loss_times_a_power_of_two_gives_the_same_bits(beta: float, run: list[list[float]], power: int) -> None:
    for a, b in zip(quotients(beta, run), quotients(beta, run, factor=2.0**power), strict=True):
        assert a.tolist() == b.tolist()


@settings(max_examples=30, deadline=None)
@given(BETAS, RUNS, st.floats(1e-6, 1e6))
def test_a_loss_times_anything_gives_the_same_steps(beta: float, run: list[list[float]], factor: float) -> None:
    """To within the fp32 roundings of s, of which a step has its own and, beta^age smaller each, those before: relative 2^-24 / (1 - beta) at most."""
    bound = 2 * min(len(run), 1 / (1 - beta)) * 2.0**-24 + 1e-12
    for a, b in zip(quotients(beta, run), quotients(beta, run, factor=factor), strict=True):
        assert np.allclose(a, b, rtol=bound, atol=0)


@settings(max_examples=30, deadline=None)
@given(BETAS, RUNS)
def test_a_quotient_is_bounded_and_tensors_have_the_bits_of_numbers(beta: float, run: list[list[float]]) -> None:
    there, weight = quotients(beta, run, there=True), 0.0
    for k, (q, t) in enumerate(zip(quotients(beta, run), there, strict=True)):
        weight = 1 + beta * weight
        assert q.tolist() == t.tolist()
        assert (abs(q) <= math.sqrt(len(q) * weight) * (1 + 1e-12)).all()
        if k == 0 and any(run[0]):
            assert np.mean(q**2) == pytest.approx(1, rel=1e-12)
        if not any(map(any, run[: k + 1])):
            assert not q.any(), "gradients that were all 0 move nothing"


def test_the_average_has_its_bias_taken_out() -> None:
    """Of g = 2 in every step each quotient is 1, from the first on."""
    assert np.concatenate(quotients(0.99, [[2.0]] * 50)) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("on_host", [True, False])
def test_a_step_that_is_skipped_leaves_the_average(on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No number, infinity, and what is beyond fp32 as a root mean square: each skipped, with the steps behind it as if it had not been."""
    monkeypatch.setattr(evaluate, "on_host", lambda device: on_host)

    def moved(gs: list[float]) -> tuple[list[float], int]:
        model = nn.Linear(3, 1)
        nn.init.zeros_(model.bias)
        step = zk.ZOStep(model, 1.0, 0.5, scale_free=zk.ScaleFree(0.5), kind="rademacher")
        found = []
        for g in gs:
            before = model.bias.detach().clone()
            step.step(iter([torch.tensor(g, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)]).__next__)
            found.append(float((model.bias.detach() - before).abs()))
        return found, step.skipped

    found, skipped = moved([1.0, math.nan, 3.0, math.inf, 1e60, 2.0])
    assert skipped == 3
    assert [found[k] for k in (1, 3, 4)] == [0.0, 0.0, 0.0]
    plain, none = moved([1.0, 3.0, 2.0])
    assert none == 0
    assert [found[k] for k in (0, 2, 5)] == pytest.approx(plain, rel=1e-6)
    s = math.sqrt((0.5 * 1 + 9) / 1.5)
    assert plain[:2] == pytest.approx([1.0, 3 / s], rel=1e-6)


def losses(model: Tiny, factor: float) -> Any:
    def closure() -> Tensor:
        return model() * factor

    return closure


@pytest.mark.parametrize("clip", [None, zk.QuantileClip(0.5, 4, 2)], ids=["free", "quantile"])
@pytest.mark.parametrize("rule", [zk.SGD(), zk.Momentum(), zk.Conservative()], ids=lambda r: r.name)
def test_a_run_is_the_same_whatever_the_unit_of_its_loss(rule: zk.optim.rules.Rule, clip: Any) -> None:
    found = []
    for factor in (1.0, 2.0**20, 2.0**-20):
        model = Tiny()
        step = zk.ZOStep(model, 1e-2, 0.1, rule=rule, clip=clip, seed=SEED, scale_free=zk.ScaleFree(0.9))
        for _ in range(8):
            step.step(losses(model, factor))
        found.append([p.detach().clone() for p in model.parameters()])
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_clipped_g_is_divided() -> None:
    """|g| above the clip counts as the clip, in s too: every quotient is 1."""
    model = Tiny()
    step = zk.ZOStep(model, 1e-3, 0.1, clip=1e-6, scale_free=zk.ScaleFree(0.9), kind="rademacher", seed=SEED)
    for _ in range(3):
        before = model.norm.bias.detach().clone()
        step.step(model)
        assert abs(float(step.projected_gradient or 0)) > 1e-6
        assert (model.norm.bias.detach() - before).abs().tolist() == pytest.approx([1e-3] * 5, rel=1e-3)


@pytest.mark.parametrize("rule", [zk.SGD(), zk.Conservative()], ids=lambda r: r.name)
def test_s_is_recorded_behind_the_rules_numbers(rule: zk.optim.rules.Rule, tmp_path: Path) -> None:
    model = Tiny()
    step = zk.ZOStep(model, 1e-3, 0.1, rule=rule, scale_free=zk.ScaleFree(0.9), seed=SEED, journal=tmp_path / "run.zoj")
    squares, weights, expected = 0.0, 0.0, []
    for _ in range(4):
        step.step(model)
        squares, weights = 0.9 * squares + float(step.projected_gradient or 0) ** 2, 0.9 * weights + 1
        expected.append(math.sqrt(squares / weights))
    step.close_journal()
    numbers = journal.read(tmp_path / "run.zoj").records["groups"]["coef"].reshape(4, -1)
    assert numbers.shape[1] == rule.size(1) + 1
    assert numbers[:, -1].tolist() == pytest.approx(expected, rel=1e-6)


def test_a_group_that_comes_later_begins_with_its_first_step() -> None:
    model = Tiny()
    named = dict(model.named_parameters())
    step = zk.ZOStep([("norm.weight", named.pop("norm.weight"))], 1e-3, 0.1, scale_free=zk.ScaleFree(0.9), seed=SEED)
    for _ in range(3):
        step.step(model)
    step.add_param_group({"params": [("norm.bias", named["norm.bias"])]})
    z = zk.normal((5,), seed=SEED, stream=step.stream_of("norm.bias"), tag=step.tags_of(3)[0])
    before = named["norm.bias"].detach().clone()
    step.step(model)
    assert (named["norm.bias"].detach() - before).abs().tolist() == pytest.approx((1e-3 * z.abs()).tolist(), rel=1e-3)


def test_a_state_with_and_one_without_are_of_two_methods() -> None:
    plain, free = zk.MeZOStep(Tiny(), 1e-3), zk.MeZOStep(Tiny(), 1e-3, scale_free=zk.ScaleFree())
    for mine, theirs in ((plain, free), (free, plain)):
        with pytest.raises(ValueError, match="belongs to another method: its scale_free is"):
            mine.load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match=r"its scale_free is .*0\.5"):
        free.load_state_dict(zk.MeZOStep(Tiny(), 1e-3, scale_free=zk.ScaleFree(0.5)).state_dict())
