"""Where losses are on a device, a step's numbers stay tensors and nobody waits for them: the same bits, for every method.

`evaluate.on_host` decides; here it is told that the CPU is such a device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zo_kernels as zk
from tests.kernels.cases import same_bits
from zo_kernels.optim import evaluate

GIVEN = zk.InputFactors({"0.weight": torch.eye(9, 2)}, {"1.weight": torch.eye(5, 2) - 0.25})
METHODS: dict[str, Callable[..., zk.ZOStep]] = {
    "mezo": lambda m, **k: zk.MeZOStep(m, 1e-3, clip=0.5, weight_decay=0.1, **k),
    "queries": lambda m, **k: zk.MeZOStep(m, 1e-3, queries=3, **k),
    "one-sided": lambda m, **k: zk.MeZOStep(m, 1e-3, queries=2, one_sided=True, **k),
    "sign": lambda m, **k: zk.ZOSignSGD(m, 1e-4, **k),
    "ranked": lambda m, **k: zk.ZOStep(m, 1e-4, estimator=zk.Shaped(3), **k),
    "z-scored": lambda m, **k: zk.ZOStep(m, 1e-4, estimator=zk.Shaped(2, "z-scored", True), **k),
    "fzoo": lambda m, **k: zk.FZOO(m, 1e-4, queries=3, **k),
    "conservative": lambda m, **k: zk.ZOConservative(m, 1e-3, weight_decay=0.1, **k),
    "momentum": lambda m, **k: zk.ZOMomentum(m, 1e-3, weight_decay=0.1, **k),
    "momentum-recomputed": lambda m, **k: zk.ZOMomentum(m, 1e-3, state="recomputed", history=3, **k),
    "adam": lambda m, **k: zk.ZOAdam(m, 1e-3, queries=2, **k),
    "adam-recomputed": lambda m, **k: zk.ZOAdam(m, 1e-3, state="recomputed", history=3, **k),
    "blocks": lambda m, **k: zk.BlockwiseZO(m, 1e-3, by=["0", "1"], **k),
    "sparse": lambda m, **k: zk.SparseMeZO(m, 1e-3, **k),
    "random-sparse": lambda m, **k: zk.ZOStep(m, 1e-3, direction=zk.RandomSparse(0.3, 2), **k),
    "layer-scale": lambda m, **k: zk.ZOStep(m, 1e-3, direction=zk.LayerScale("gradient", every=2), **k),
    "hizoo": lambda m, **k: zk.HiZOO(m, 1e-3, alpha=1e-3, **k),
    "dizo": lambda m, **k: zk.DiZO(m, 1e-3, every=2, inner=2, layers=["0"], **k),
    "lozo": lambda m, **k: zk.LOZO(m, 1e-3, every=2, **k),
    "lozo-queries": lambda m, **k: zk.LOZO(m, 1e-3, every=2, estimator=zk.OneSided(3), **k),
    "input-subspace": lambda m, **k: zk.FZOO(m, 1e-4, queries=3, direction=zk.InputSubspace(GIVEN), **k),
    "quantile": lambda m, **k: zk.ZOStep(m, 1e-3, clip=zk.QuantileClip(0.5, 4, 2), **k),
    "anchored": lambda m, **k: zk.MeZOStep(
        m, 1e-3, anchor=zk.Anchor(0.25, 2, {n: p.detach().clone() for n, p in m.named_parameters()}), **k
    ),
    "scale-free": lambda m, **k: zk.MeZOStep(m, 1e-3, scale_free=zk.ScaleFree(0.9), clip=0.5, weight_decay=0.1, **k),
    "scale-free-queries": lambda m, **k: zk.MeZOStep(m, 1e-3, queries=9, one_sided=True, scale_free=zk.ScaleFree(0.9), **k),
    "scale-free-conservative": lambda m, **k: zk.ZOConservative(m, 1e-3, scale_free=zk.ScaleFree(0.9), **k),
    "scale-free-dizo": lambda m, **k: zk.DiZO(m, 1e-3, every=2, inner=2, layers=["0"], scale_free=zk.ScaleFree(0.9), **k),
    "forward-gradient": lambda m, **k: zk.ForwardGrad(m, 1e-3, **k),
}


def run(make: Callable[..., zk.ZOStep], bad: int | None, dtype: torch.dtype) -> tuple[list[Tensor], int]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(9, 13), nn.Linear(13, 5)).to(dtype)
    x, calls = torch.randn(4, 9).to(dtype), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss: Tensor = model(x).float().square().mean()
        return loss * torch.nan if calls == bad else loss

    optimizer: Any = make(model, seed=5, perturbation="scratch")
    for _ in range(5):
        optimizer.step(closure)
    return [p.detach() for p in model.parameters()], optimizer.skipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [None, 1, 6])
@pytest.mark.parametrize("name", METHODS)
def test_tensors_give_the_bits_of_numbers(name: str, bad: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """`bad`: that forward gives NaN, and its step is skipped, on a device without anybody knowing."""
    numbers, skipped = run(METHODS[name], bad, dtype)
    monkeypatch.setattr(evaluate, "on_host", lambda device: False)
    tensors, skipped_there = run(METHODS[name], bad, dtype)
    assert skipped == skipped_there
    for a, b in zip(numbers, tensors, strict=True):
        assert same_bits(a, b)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("there", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize(
    ("past", "limit"),
    [
        ([], None),
        ([4.0], None),
        ([1.0, 2.0, 3.0], 2.0),
        ([1.0, NAN, 2.0, INF, 3.0], 2.0),
        ([NAN, INF, 1.0, 3.0], 2.0),
        ([NAN, INF, 4.0], None),
        ([INF, INF, INF], None),
        ([NAN, NAN, NAN], None),
    ],
    ids=str,
)
def test_a_quantile_is_of_the_gradients_that_are_numbers(past: list[float], limit: float | None, there: bool) -> None:
    """Two are needed, of which on a device nobody knows whether there are as many: infinity limits nothing."""
    given: list[Any] = [torch.tensor(g, dtype=torch.float64) for g in past] if there else past
    found = zk.QuantileClip(0.5, 8, 2).limit(given)
    if limit is None and len(past) >= 2:
        limit = INF
    assert found is None if limit is None else found is not None and float(found) == limit


@pytest.mark.parametrize("on_host", [True, False])
def test_a_gradient_that_is_no_number_clips_no_later_step(on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step is skipped; the steps behind it go on with the quantile of the others, from the second of those on."""
    monkeypatch.setattr(evaluate, "on_host", lambda device: on_host)
    model = nn.Linear(3, 1)
    optimizer = zk.ZOStep(model, 1.0, 0.5, clip=zk.QuantileClip(1.0, 4, 2), kind="rademacher")
    moved = []
    for g in (INF, 1.0, NAN, 2.0, 8.0, 16.0):
        before = model.bias.detach().clone()
        optimizer.step(iter([torch.tensor(g, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)]).__next__)
        moved.append(float((model.bias.detach() - before).abs()))
    assert moved == pytest.approx([0.0, 1.0, 0.0, 2.0, 2.0, 8.0], rel=1e-5)
    assert optimizer.skipped == 2
