"""What a rule makes of projected gradients, and what blocks there are, as plain numbers.

Belongs here: `decide`, `choose`, histories, turns. Does not belong here: whole steps against float64 (test_methods.py).
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zo_kernels as zk
from zo_kernels.optim.projection import Projector

NAN, INF = math.nan, math.inf


def float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_sign_of_equal_losses_is_no_step() -> None:
    found = zk.Sign().decide(float64([[3.0, -2.0, 0.0, -0.0]]), float64([[0.5]]), None)
    assert torch.cat(found, 1).tolist() == [[0.125, -0.125, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("stay", "ahead", "back", "factor"),
    [
        (2.0, 1.0, 3.0, 1),
        (2.0, 3.0, 1.0, -1),
        (1.0, 2.0, 3.0, 0),
        (2.0, 2.0, 3.0, 0),
        (2.0, 3.0, 2.0, 0),
        (2.0, 1.0, 1.0, 1),
        (2.0, NAN, 1.0, -1),
        (2.0, 1.0, NAN, 1),
        (2.0, NAN, -INF, 0),
        (NAN, 5.0, 4.0, -1),
        (NAN, NAN, NAN, 0),
    ],
)
def test_a_conservative_step_is_the_best_of_three(stay: float, ahead: float, back: float, factor: int) -> None:
    """At equal losses theta stays; of two that are better by the same, the one downhill is taken; what is no number never wins."""
    found = zk.Conservative().choose(float64([stay, ahead, back]), float64([[0.0, 0.25], [0.0, -3.0]]))
    assert found.tolist() == [[factor * t, t] for t in (0.25, -3.0)]


def test_a_skipped_step_has_no_share_in_a_recomputed_adam() -> None:
    """Behind a step, a skipped one and a step, both averages are of two: their weights sum to one without the skipped."""
    beta1, beta2, lr = 0.75, 0.5, 0.125
    model = nn.Linear(5, 1, bias=False)
    step = zk.ZOAdam(model, lr, 0.5, betas=(beta1, beta2), state="recomputed", history=8, seed=3)
    for g in (2.0, NAN, -1.0):
        before = model.weight.detach().double()
        step.step(iter([g, 0.0]).__next__)  # over 2 eps = 1: g itself
    assert step.skipped == 1
    z = [zk.normal((1, 5), seed=3, stream=zk.stream_of("weight"), tag=step.tags_of(k)[0]).double() for k in range(3)]
    first, last = 2.0 * z[0], -1.0 * z[2]
    m = (last + beta1 * first) / (1 + beta1)
    v = (last.square() + beta2 * first.square()) / (1 + beta2)
    assert torch.allclose(model.weight.detach().double() - before, -lr * m / v.sqrt(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 7])
def test_the_turns_of_random_blocks(seed: int) -> None:
    """Frozen: a journal has no block numbers, and a replay draws them again."""
    for step in range(12):
        drawn = hashlib.sha256(f"block {seed} {step // 3}".encode()).digest()[:8]
        assert zk.Blocks(order="random", every=3).at(step, 5, seed) == int.from_bytes(drawn, "little") % 5


def test_a_projection_is_clipped_on_both_sides() -> None:
    projector = Projector(zk.Projection(tau=0.25, layers=["w"]), 0, 1)
    assert [projector._clip(r) for r in (-3.0, 0.75, 0.9, 1.25, 7.0)] == [0.75, 0.75, 0.9, 1.25, 1.25]
