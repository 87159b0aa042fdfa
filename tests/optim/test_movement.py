"""How far a step moved a weight, as it says, beside what the weights' differences are.

Belongs here: the root mean square of a step. Does not belong here: the updates themselves (test_methods.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zo_kernels as zk
from tests.optim import emulated_graph
from zo_kernels.optim import evaluate

ROWS, COLUMNS = 160, 200
EPS = 0.05


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.layers = nn.ModuleList([nn.Linear(COLUMNS, ROWS), nn.Linear(ROWS, 3)])
        for p in self.parameters():
            p.data = 0.1 * torch.randn(p.shape, generator=g)
        self.x, self.y = torch.randn(9, COLUMNS, generator=g), torch.randn(9, 3, generator=g)

    def forward(self, rows: Tensor | None = None) -> Tensor:
        x, y = (self.x, self.y) if rows is None else (self.x[rows], self.y[rows])
        return (self.layers[1](self.layers[0](x).tanh()) - y).square().mean()


def inputs(model: nn.Module) -> zk.InputFactors:
    g = torch.Generator().manual_seed(4)
    return zk.InputFactors({"layers.0.weight": torch.randn(COLUMNS, 4, generator=g)})


DENSE = 2.5 * math.sqrt(2 / (ROWS * COLUMNS))  # five deviations of a mean of squares over the weights, halved by the root
# Of |U V^T|^2, U and V Gaussian of rank r: relative variance (2 / rows + 2 / columns) / r, and terms in 1 / (rows columns); here r = 2.
FACTORED = 2.5 * math.sqrt((2 / ROWS + 2 / COLUMNS) / 2 + 3 / (ROWS * COLUMNS))
# V is given: U alone varies, with as many degrees of freedom as (tr S)^2 / tr S^2 over S = V^T V, of nearly equal eigenvalues here: ROWS times 3 at least.
GIVEN = 2.5 * math.sqrt(2 / (ROWS * 3))

METHODS: dict[str, tuple[Callable[..., zk.ZOStep], float]] = {
    "sgd": (lambda m, **k: zk.MeZOStep(m, 1e-3, EPS, **k), DENSE),
    "sgd-4": (lambda m, **k: zk.MeZOStep(m, 1e-3, EPS, queries=4, **k), DENSE),
    "two-groups": (lambda m, **k: zk.MeZOStep(m, 1e-3, EPS, weight_decay=1e-9, **k), DENSE),
    "rademacher": (lambda m, **k: zk.MeZOStep(m, 1e-3, EPS, kind="rademacher", **k), 1e-4),
    "scale-free": (lambda m, **k: zk.MeZOStep(m, 1e-3, EPS, scale_free=zk.ScaleFree(), **k), DENSE),
    "sign": (lambda m, **k: zk.ZOSignSGD(m, 1e-3, EPS, queries=2, **k), DENSE),
    "fzoo": (lambda m, **k: zk.FZOO(m, 1e-4, EPS, queries=4, **k), DENSE),
    "ranked": (lambda m, **k: zk.ZOStep(m, 1e-3, EPS, estimator=zk.Shaped(4), **k), DENSE),
    "conservative": (lambda m, **k: zk.ZOConservative(m, 1e-3, EPS, **k), DENSE),
    "momentum": (lambda m, **k: zk.ZOMomentum(m, 1e-4, EPS, beta=0.8, **k), 1e-3),
    "momentum-recomputed": (lambda m, **k: zk.ZOMomentum(m, 1e-4, EPS, beta=0.8, state="recomputed", history=6, **k), DENSE),
    "momentum-blocks": (lambda m, **k: zk.ZOMomentum(m, 1e-4, EPS, blocks=zk.Blocks(), **k), 1e-3),
    "random-sparse": (lambda m, **k: zk.ZOStep(m, 1e-3, EPS, direction=zk.RandomSparse(0.25), **k), 2 * DENSE),
    "layer-scale": (lambda m, **k: zk.ZOStep(m, 1e-3, EPS, direction=zk.LayerScale(), **k), DENSE),
    # H has seen the z of its own step: E z^2 / H is about 1 - 2 alpha kappa, with kappa below 200 here.
    "hizoo": (lambda m, **k: zk.HiZOO(m, 1e-3, EPS, alpha=2e-5, **k), DENSE + 4e-3),
    "lozo": (lambda m, **k: zk.LOZO(m, 1e-3, EPS, rank=2, every=2, **k), FACTORED),
    "lozo-3": (lambda m, **k: zk.LOZO(m, 1e-3, EPS, rank=2, every=2, estimator=zk.TwoSided(3), **k), FACTORED),
    "lozo-m": (lambda m, **k: zk.LOZO(m, 1e-2, EPS, rank=2, every=9, momentum=0.8, **k), FACTORED),
    "input-subspace": (lambda m, **k: zk.MeZOStep(m, 1e-3, EPS, direction=zk.InputSubspace(inputs(m)), **k), GIVEN),
    "input-subspace-still": (
        lambda m, **k: zk.MeZOStep(m, 1e-3, EPS, queries=2, direction=zk.InputSubspace(inputs(m), "still"), **k),
        GIVEN,
    ),
}


def moved(model: nn.Module, before: nn.Module) -> float:
    """Root mean square over the weights that changed, each to within half a unit in its last place: 2^-27 below 0.25 in magnitude."""
    change = torch.cat([(p - q).detach().double().flatten() for p, q in zip(model.parameters(), before.parameters(), strict=True)])
    change = change[change != 0]
    return float(change.square().mean().sqrt()) if change.numel() else 0.0


@pytest.mark.parametrize("on_host", [True, False], ids=["numbers", "tensors"])
@pytest.mark.parametrize("name", METHODS)
def test_it_is_what_the_weights_moved(name: str, on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "on_host", lambda device: on_host)
    make, within = METHODS[name]
    model = Model()
    step = make(model, seed=7)
    assert math.isnan(step.movement())
    for _ in range(5):
        before = copy.deepcopy(model)
        step.step(model)
        assert step.movement() == pytest.approx(moved(model, before), rel=within), name


def test_adam_goes_about_its_rate() -> None:
    """lr in the first step; later about what |g| of one size would give: within a third here, where |g| differs from step to step."""
    model = Model()
    step = zk.ZOAdam(model, 1e-3, EPS, betas=(0.8, 0.99), seed=7)
    before = copy.deepcopy(model)
    step.step(model)
    assert step.movement() == pytest.approx(1e-3) == pytest.approx(moved(model, before), rel=1e-3)
    shares = []
    for _ in range(30):
        before = copy.deepcopy(model)
        step.step(model)
        shares.append(step.movement() / moved(model, before))
    assert step.movement() == pytest.approx(1e-3 * math.sqrt(0.2 / 1.8), rel=2e-3)
    assert 2 / 3 < sum(shares[-20:]) / 20 < 3 / 2


@pytest.mark.parametrize("on_host", [True, False], ids=["numbers", "tensors"])
@pytest.mark.parametrize("name", ["sgd", "sign", "momentum", "momentum-recomputed", "hizoo", "lozo-m"])
def test_a_step_that_is_skipped_moves_nothing(name: str, on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "on_host", lambda device: on_host)
    model = Model()
    step = METHODS[name][0](model, seed=7)
    step.step(model)
    step.step(lambda: model() * math.nan)
    assert step.skipped == 1 and step.movement() == 0.0


@pytest.mark.parametrize("name", ["sgd-4", "momentum", "momentum-recomputed", "lozo-m", "conservative", "scale-free"])
def test_a_resumed_run_knows_it(name: str, tmp_path: Path) -> None:
    model, other = Model(), Model()
    step = METHODS[name][0](model, seed=7, journal=tmp_path / "run.zoj")
    for _ in range(4):
        step.step(model)
    step.close_journal()
    assert METHODS[name][0](other, seed=7, journal=tmp_path / "run.zoj", resume=True).movement() == step.movement() > 0


def test_of_a_step_as_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated_graph.install(monkeypatch)
    model = Model()
    step: Any = zk.MeZOStep(model, 1e-3, EPS, seed=7, cuda_graph=True)
    for k in range(4):
        before = copy.deepcopy(model)
        step.step(model, [torch.arange(k, k + 4)])
        assert step.movement() == pytest.approx(moved(model, before), rel=DENSE)
    assert copy.deepcopy((model, step))[1].movement() == step.movement()
