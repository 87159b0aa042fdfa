"""The estimators' bias and variance on a quadratic of known spectrum, where both have closed forms.

L = 1/2 theta^T A theta + b^T theta, gradient G = A theta + b. Differences of L are exact: two-sided g = z^T G for any eps, one-sided
g = z^T G + (eps / 2) z^T A z.

Belongs here: means and second moments. Does not belong here: single steps (test_methods.py), a loss that is no quadratic (test_spsa.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zo_kernels as zk
from tests.optim.methods import SEED, kept, noise

D = 48
SPECTRUM = torch.logspace(-1, 1, D, dtype=torch.float64)
EPS = 0.05


class Quadratic(nn.Module):
    """Diagonal A, so that a mask's support is a sub-quadratic of known spectrum too."""

    def __init__(self, shape: tuple[int, ...] = (D,)) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(4)
        self.weight = nn.Parameter(torch.randn(shape, generator=g))
        self.linear = torch.randn(D, generator=g, dtype=torch.float64)

    def forward(self) -> Tensor:
        theta = self.weight.double().flatten()
        return (0.5 * SPECTRUM * theta.square() + self.linear * theta).sum()

    def gradient(self) -> Tensor:
        return SPECTRUM * self.weight.detach().double().flatten() + self.linear


def estimates(n: int, make: Callable[[nn.Module], zk.ZOStep], shape: tuple[int, ...] = (D,)) -> tuple[Tensor, Tensor]:
    """n estimates at one theta, as the optimizer's own update tells them [n, D]; and the gradient."""
    model = Quadratic(shape)
    start = model.weight.detach().clone()
    step = make(model)
    found = []
    for _ in range(n):
        step.step(model)
        found.append((start.double() - model.weight.detach().double()).flatten())
        with torch.no_grad():
            model.weight.copy_(start)
    assert step.skipped == 0
    return torch.stack(found), model.gradient()


def check_mean(found: Tensor, want: Tensor, sigmas: float = 5.0) -> None:
    """Each element within so many standard errors, the fp32 weights' rounding (2^-23, of values below 4; update: 17 bits) aside."""
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - want).abs() <= sigmas * error + 1e-4).all()
    assert (error < 0.6 * want.abs().max()).all(), "a band that everything is in"


ESTIMATORS: list[tuple[dict[str, Any], list[float], float, float]] = [  # options, losses, the step's loss, the first g at eps = 0.5
    ({"estimator": zk.TwoSided(1)}, [1.0, 4.0], 2.5, -3.0),
    ({"estimator": zk.TwoSided(3)}, [1.0, 4.0, 2.0, 8.0, 16.0, 32.0], 10.5, -3.0),
    ({"estimator": zk.OneSided(3)}, [1.0, 4.0, 2.0, 8.0], 1.0, 6.0),
    ({"estimator": zk.ThreePoint(), "rule": zk.HessianDiagonal(), "direction": zk.InverseRoot()}, [1.0, 4.0, 2.0], 1.0, 2.0),
]


@pytest.mark.parametrize(
    ("options", "losses", "loss", "g"), ESTIMATORS, ids=lambda x: repr(x.get("estimator")) if isinstance(x, dict) else ""
)
def test_the_loss_of_a_step_is_what_its_losses_tell(options: dict[str, Any], losses: list[float], loss: float, g: float) -> None:
    """Two-sided: the mean over all queries and both sides. Where theta itself is evaluated: the loss there."""
    given = iter(losses)
    step = zk.ZOStep(Quadratic(), 0.0, 0.5, **options)
    assert float(step.step(lambda: next(given))) == loss
    assert next(given, None) is None
    assert step.projected_gradient is not None and float(step.projected_gradient) == g


@pytest.mark.parametrize(("kind", "factor"), [("gaussian", D + 2), ("rademacher", D)])
def test_two_sided_is_unbiased_with_the_known_second_moment(kind: str, factor: float) -> None:
    """E g z = G; E |g z|^2 = (d + 2) |G|^2 for normal z, less 0.03 here (docs/numerics.md), d |G|^2 for ±1. The sample's own spread gives the band."""
    found, gradient = estimates(2000, lambda m: zk.MeZOStep(m, 1.0, EPS, seed=SEED, kind=kind))
    check_mean(found, gradient)
    squares = found.square().sum(1) / gradient.square().sum()
    error = float(squares.std()) / math.sqrt(len(squares))
    assert abs(float(squares.mean()) - factor) <= 4 * error + 0.05
    assert error < 0.08 * factor


@pytest.mark.parametrize("queries", [2, 4, 8])
def test_the_variance_falls_as_one_over_q(queries: int) -> None:
    """Tr cov = (d + 1) |G|^2 / q. The relative error of a sample's total variance is about sqrt(2 (1 + 2 c) / (n q)) with c <= 2 for these shapes of
    g z: below 6 % here, of which the band has four."""
    n = 4000 // queries
    found, gradient = estimates(n, lambda m: zk.MeZOStep(m, 1.0, EPS, queries=queries, seed=SEED))
    check_mean(found, gradient)
    total = float(found.var(0).sum() / gradient.square().sum())
    assert total == pytest.approx((D + 1) / queries, rel=0.24)


def test_one_sided_has_the_bias_term_and_no_other() -> None:
    """Each estimate is z^T G z + (eps / 2) (z^T A z) z, exactly; the second has mean 0 for a symmetric z, and adds to the variance."""
    eps = 0.5
    found, gradient = estimates(1500, lambda m: zk.MeZOStep(m, 1.0, eps, one_sided=True, seed=SEED))
    check_mean(found, gradient)
    z = torch.stack([noise("weight", (D,), tag) for tag in range(len(found))])
    slope, bend = z @ gradient, eps / 2 * (z.square() @ SPECTRUM)
    want = (slope + bend)[:, None] * z
    # 2^-17 of eps and of the coefficient; the mix's sums, which are below 8 and rounded in each of four stages; theta + eps z in fp32 moves L by
    # sqrt(d) |grad| 2^-24, g by that over eps; the rounded weight.
    size = (slope.abs() + bend + 2**-7 * gradient.norm())[:, None]
    bound = size * (2**-15 * z.abs() + 2**-19) + 2**-23 * (4 + want.abs())
    assert ((found - want).abs() <= bound).all()
    assert float(bend.mean()) > 5 * float(slope.std()) / math.sqrt(len(found)), "the term is there to be seen"
    two_sided, _ = estimates(300, lambda m: zk.MeZOStep(m, 1.0, eps, seed=SEED))
    assert ((two_sided - (slope[:, None] * z)[:300]).abs() <= bound[:300]).all(), "and two-sided has none, at any eps"


def test_a_forward_gradient_is_exact() -> None:
    """g = z^T G, to the roundings of a float64 sum of D products and of the fp32 coefficient."""
    found, gradient = estimates(200, lambda m: zk.ForwardGrad(m, 1.0, seed=SEED))
    z = torch.stack([noise("weight", (D,), tag) for tag in range(len(found))])
    want = (z @ gradient)[:, None] * z
    # The coefficient's 17 bits; the mix's sums, which are below 8 and rounded in each of four stages; the rounded weight.
    slope = (z @ gradient).abs()[:, None]
    assert ((found - want).abs() <= slope * (2**-16 * z.abs() + 2**-19) + 2**-23 * (4 + want.abs())).all()
    model = Quadratic()
    step = zk.ForwardGrad(model, 0.0, seed=SEED)
    step.step(model)
    assert step.projected_gradient is not None
    assert step.projected_gradient.item() == pytest.approx(float(z[0] @ gradient), rel=1e-12)


def test_random_masks_are_unbiased_on_their_support_and_zero_outside() -> None:
    """For a mask that stays: the mean is the masked gradient; over masks that change, keep times the gradient."""
    keep = 0.4
    found, gradient = estimates(1500, lambda m: zk.ZOStep(m, 1.0, EPS, direction=zk.RandomSparse(keep, 1 << 20), seed=SEED))
    mask = kept("weight", (D,), keep, 0)
    assert 8 < int(mask.sum()) < 32
    assert (found[:, ~mask] == 0).all()
    check_mean(found[:, mask], gradient[mask])
    changing, gradient = estimates(4000, lambda m: zk.ZOStep(m, 1.0, EPS, direction=zk.RandomSparse(keep, 1), seed=SEED))
    check_mean(changing, keep * gradient)
    assert 0.5 < float((changing == 0).double().mean()) < 0.7


def test_magnitude_masks_are_unbiased_on_their_support_and_zero_outside() -> None:
    found, gradient = estimates(1500, lambda m: zk.SparseMeZO(m, 1.0, EPS, quantile=0.5, seed=SEED))
    order = Quadratic().weight.detach().abs().argsort()
    inside, outside = order[: D // 2], order[D // 2 :]
    assert (found[:, outside] == 0).all()
    check_mean(found[:, inside], gradient[inside])


class Blocks(nn.Module):
    """The same quadratic in two parameters."""

    def __init__(self) -> None:
        super().__init__()
        whole = Quadratic()
        self.first, self.second = (nn.Parameter(w.clone()) for w in whole.weight.detach().split(D // 2))
        self.linear = whole.linear

    def forward(self) -> Tensor:
        theta = torch.cat([self.first, self.second]).double()
        return (0.5 * SPECTRUM * theta.square() + self.linear * theta).sum()


def test_blocks_are_unbiased_and_leave_the_others_alone() -> None:
    model, gradient = Blocks(), Quadratic().gradient().split(D // 2)
    start = [p.detach().clone() for p in model.parameters()]
    step = zk.BlockwiseZO(model, 1.0, EPS, by=["first", "second"], seed=SEED)
    found: list[list[Tensor]] = [[], []]
    for k in range(1600):
        step.step(model)
        moved, still = (model.first, model.second)[k % 2], (model.second, model.first)[k % 2]
        assert torch.equal(still, start[1 - k % 2])
        found[k % 2].append(start[k % 2].double() - moved.detach().double())
        with torch.no_grad():
            moved.copy_(start[k % 2])
    for block, want in zip(found, gradient, strict=True):
        check_mean(torch.stack(block), want)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("every", [1, 4])
def test_low_rank_directions_have_the_gradient_as_mean(rank: int, every: int) -> None:
    """E z z^T = rank I for z = U V^T, which the update's 1 / rank undoes. While V stays, the estimates share it: means over such runs are
    independent. The expectation is over normal numbers rounded to 12 bits, which changes E u^2 by less than 2^-24."""
    runs = 3000 // every if every > 1 else 1200
    found, gradient = estimates(runs * every, lambda m: zk.LOZO(m, 1.0, EPS, rank=rank, every=every, seed=SEED), (8, 6))
    check_mean(found.view(runs, every, D).mean(1), gradient)


@pytest.mark.parametrize("by", ["rms", "gradient"])
def test_layer_scales_variance_form_is_unbiased_and_the_other_is_divided(by: str) -> None:
    """Perturbed by z / d: with d in the update the mean is the gradient, whatever d; without, the gradient over d."""
    for estimate in ("variance", "expectation"):
        model = Blocks()
        with torch.no_grad():
            model.second.mul_(3.0)
        theta = torch.cat([model.first, model.second]).detach().double()
        gradient = (SPECTRUM * theta + model.linear).split(D // 2)
        start = [p.detach().clone() for p in model.parameters()]
        direction: Any = zk.LayerScale(by, estimate, every=1 << 20 if by == "rms" else 1)
        step = zk.ZOStep(model, 1.0, EPS, direction=direction, seed=SEED)
        roots = [p.double().square().mean().sqrt() for p in start]
        middle = math.exp(sum(math.log(r) for r in roots) / 2)
        found: list[list[Tensor]] = [[], []]
        for _ in range(800):
            step.step(model)
            for k, p in enumerate(model.parameters()):
                found[k].append(start[k].double() - p.detach().double())
                p.data.copy_(start[k])
        for k in range(2):
            if by == "rms" or estimate == "variance":
                d = float(roots[k]) / middle if estimate == "expectation" else 1.0
                check_mean(torch.stack(found[k]), gradient[k] / d)


def test_fzoo_divides_by_the_spread_of_its_losses() -> None:
    """E is along the gradient: the mean over many steps, of unit length, within the standard errors."""
    found, gradient = estimates(1500, lambda m: zk.FZOO(m, 1.0, 1e-3, queries=8, seed=SEED))
    mean, error = found.mean(0), found.std(0) / math.sqrt(len(found))
    length = float(mean @ gradient / gradient.square().sum())
    # Along ±1 directions at a small eps the losses differ by eps z^T G: their standard deviation is about eps |G|.
    assert ((mean - length * gradient).abs() <= 5 * error).all()
    assert length == pytest.approx(1 / (1e-3 * float(gradient.norm())), rel=0.15)
