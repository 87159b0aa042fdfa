"""Factors from inputs: against their definition in numpy, which matrices, and what is refused by name.

Belongs here: `input_factors`. Does not belong here: steps along them (test_input_subspace.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zo_kernels as zk
from tests.optim import models


class Side(nn.Module):
    """Two layers of the same inputs, one of theirs, one that nobody runs, a table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.c, self.idle = nn.Linear(6, 5), nn.Linear(6, 4), nn.Linear(5, 3), nn.Linear(2, 2)
        self.table = nn.Embedding(4, 6)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.c(self.a(x).tanh()).sum() + self.b(x).sum()


BATCHES = [torch.randn(n, 3, 6, generator=torch.Generator().manual_seed(n)) * torch.arange(1.0, 7) for n in (2, 5)]
RUN = ["a.weight", "b.weight", "c.weight"]


def of(**more: Any) -> tuple[Side, zk.InputFactors]:
    model = Side()
    return model, zk.input_factors(model, model, BATCHES, **{"only": ["^[abc]"], "rank": 3, **more})


@pytest.mark.parametrize(("power", "ridge"), [(-0.5, 0.1), (0.0, 0.1), (0.5, 0.0), (-1.0, 0.0)])
def test_factors_are_the_leading_components_with_their_power(power: float, ridge: float) -> None:
    """To within 2^-12, at which factors are rounded."""
    _, found = of(power=power, ridge=ridge)
    x = torch.cat([b.reshape(-1, 6) for b in BATCHES]).double().numpy()
    _, s, vt = np.linalg.svd(x, full_matrices=False)
    values = s**2 / len(x)
    mean = values.sum() / 6
    wanted = vt[:3].T * (values[:3] + ridge * mean) ** power
    wanted *= np.sign(wanted[np.abs(wanted).argmax(0), range(3)])
    wanted *= np.sqrt(mean / np.square(x @ wanted).mean())
    side, v = found.matrices["a.weight"]
    assert side == "right"
    np.testing.assert_allclose(v.double().numpy(), wanted, rtol=2**-12, atol=1e-9)
    assert v.equal(found.matrices["b.weight"][1]) and found.rank == 3
    along = np.square(x @ v.double().numpy()).mean(0)
    if power == -0.5:
        assert along.max() / along.min() < 2, "whitened"
    if power == 0:
        norms = v.double().square().sum(0)
        assert float(norms.max() / norms.min()) < 1.01


def test_the_same_call_gives_the_same_digest_and_leaves_no_hook() -> None:
    (model, first), (_, second) = of(), of()
    assert first == second and first != of(power=0.0)[1]
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_without_names_it_takes_what_is_trained() -> None:
    model = Side()
    for p in model.parameters():
        p.requires_grad_(False)
    model.b.weight.requires_grad_(True)
    assert list(zk.input_factors(model, model, BATCHES, rank=2).matrices) == ["b.weight"]


def test_a_weight_of_two_layers_has_the_inputs_of_both() -> None:
    model = Side()
    model.b = nn.Linear(6, 5)
    model.b.weight = model.a.weight
    found = zk.input_factors(model, model, BATCHES, rank=2, only=["^a"])
    assert found.matrices["a.weight"][1].equal(of(rank=2)[1].matrices["a.weight"][1])  # twice the same inputs: the same mean
    tied = Side()
    tied.head = nn.Linear(6, 4, bias=False)
    tied.head.weight = tied.table.weight
    found = zk.input_factors(tied, lambda x: tied.head(x), BATCHES, rank=2, only=["table"])
    assert list(found.matrices) == ["table.weight"]


def test_a_transposed_weight_has_a_left_factor_and_trains() -> None:
    """GPT-2's Conv1D: [inputs, outputs]. The two attention matrices' updates lie in their inputs' space."""
    pytest.importorskip("transformers")
    model = models.make("gpt2")
    ids = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    found = zk.input_factors(model, lambda b: models.loss_of(model, b), [ids], rank=2, only=[r"attn\.c_", r"mlp\.c_"])
    assert {side for side, _ in found.matrices.values()} == {"left"} and len(found.matrices) >= 4
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step = zk.MeZOStep(model, 1e-2, 1e-2, queries=2, direction=zk.InputSubspace(found, "still"))
    step.step(lambda: models.loss_of(model, ids))
    for name, p in model.named_parameters():
        moved = (p.detach() - before[name]).double()
        if name not in found.matrices:
            assert not moved.any(), name
            continue
        v = found.matrices[name][1].double()
        assert moved.any() and float((moved - v @ torch.linalg.pinv(v) @ moved).abs().max()) < 1e-6, name


class Conv1D(nn.Module):
    """As transformers' one, with the weight of a Linear."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.nf, self.weight = weight.shape[1], weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def shared() -> zk.InputFactors:
    model = nn.ModuleDict({"a": nn.Linear(3, 3)})
    model["b"] = Conv1D(model["a"].weight)
    return zk.input_factors(model, model["a"], [torch.ones(2, 3)], rank=1)


def on_zeros() -> zk.InputFactors:
    model = nn.Linear(3, 3)
    return zk.input_factors(model, model, [torch.zeros(2, 3)], rank=1)


REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: of(rank=0), ValueError, "rank=0"),
    (lambda: of(rank=6), ValueError, "rank=6: parameter 'c.weight' has 5 inputs"),
    (lambda: of(power=2.0), ValueError, "power=2.0"),
    (lambda: of(ridge=-0.1), ValueError, "ridge=-0.1"),
    (lambda: of(limit=5), ValueError, "'a.weight' has 6 inputs.*leave it out with only=, or raise limit=5"),
    (lambda: of(only=["idle"]), ValueError, "'idle.weight': no forward ran its layer"),
    (lambda: of(only=["none"]), ValueError, "has such a name; they are a.weight"),
    (lambda: of(only=["("]), ValueError, "no regular expression"),
    (lambda: zk.input_factors(m := Side(), m, [BATCHES[0] * torch.nan], only=["^a"], rank=1), ValueError, "NaN or an infinity"),
    (on_zeros, ValueError, "all of its inputs are 0"),
    (shared, ValueError, "as it is and transposed"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "match"), REFUSED, ids=range(len(REFUSED)))
def test_what_makes_no_factors_is_refused_by_name(make: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()
