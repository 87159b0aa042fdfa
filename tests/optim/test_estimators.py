"""The estimators' bias and variance on a quadratic of known spectrum, where both have closed forms.

L = 1/2 theta^T A theta + b^T theta, gradient G = A theta + b. Differences of L are exact: two-sided g = z^T G for any eps, one-sided
g = z^T G + (eps / 2) z^T A z. So a step's estimate is known to the roundings from its direction: the steps of a hundred tags are held to that,
element by element, and the moments are those of the formula over the directions of thousands. Only where a direction depends on
the losses of earlier steps are the moments of steps.

Belongs here: means and second moments. Does not belong here: single steps (test_methods.py), a loss that is no quadratic (test_spsa.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zo_kernels as zk
from tests.optim.methods import SEED, kept, noise, to_12_bits

D = 48
SPECTRUM = torch.logspace(-1, 1, D, dtype=torch.float64)
EPS = 0.05
STEPS = 100


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


def directions(n: int, shape: tuple[int, ...] = (D,), name: str = "weight", **more: Any) -> Tensor:
    """Of a parameter [n, *shape]: z of the tags 0 .. STEPS - 1, which steps take, and for moments more of the same noise, further elements of
    one tag in one call. By the kernels, which tests/kernels holds to the reference."""
    of = partial(zk.normal, seed=SEED, stream=zk.stream_of(name), **more)
    return torch.cat([*(of((1, *shape), tag=tag) for tag in range(STEPS)), of((n - STEPS, *shape), tag=STEPS)]).double()


def products(g: Tensor, z: Tensor) -> Tensor:
    """The estimates (1/q) sum g z of g [n, q] and z [n, q, D]."""
    return (g[..., None] * z).mean(1)


def check_each(found: Tensor, terms: list[Tensor], z: Tensor, gradient: Tensor, eps: float = EPS, most: float = 4) -> None:
    """That step n's estimate is (1/q) sum g z, where g [n, q] is the sum of `terms`, to the roundings: 2^-17 of eps and of the coefficient;
    the mix's sums, which are below 8 and rounded in each of four stages; theta + eps z in fp32, of values up to `most`, whose errors are
    independent (|grad| most / 2^25 is six of their deviations), which moves g by that over eps; the rounded weight."""
    n = len(found)
    terms, z = [term[:n] for term in terms], z[:n]
    want = products(sum(terms, torch.zeros(())), z)
    size = (sum((term.abs() for term in terms), torch.zeros(())) + 2**-10 * most * gradient.norm() / eps)[..., None]
    assert ((found - want).abs() <= (size * (2**-15 * z.abs() + 2**-19)).mean(1) + 2**-23 * (most + want.abs())).all()


def check_mean(found: Tensor, want: Tensor, sigmas: float = 5.0) -> None:
    """Each element within so many standard errors, the fp32 weights' rounding (2^-23, of values below 4; update: 17 bits) aside."""
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - want).abs() <= sigmas * error + 1e-4).all()
    assert (error < 0.6 * want.abs().max()).all(), "a band that everything is in"


ESTIMATORS: list[tuple[dict[str, Any], list[float], float, float]] = [  # options, losses, the step's loss, the first g at eps = 0.5
    ({"estimator": zk.TwoSided(1)}, [1.0, 4.0], 2.5, -3.0),
    ({"estimator": zk.TwoSided(3)}, [1.0, 4.0, 2.0, 8.0, 16.0, 32.0], 10.5, -3.0),
    ({"estimator": zk.OneSided(3)}, [1.0, 4.0, 2.0, 8.0], 1.0, 6.0),
    ({"estimator": zk.Shaped(4)}, [1.0, 4.0, 2.0, 9.0], 4.0, -1.0),
    ({"estimator": zk.Shaped(3)}, [2.0, 2.0, 5.0], 3.0, -0.5),
    ({"estimator": zk.Shaped(2, mirrored=True)}, [1.0, 4.0, 2.0, 9.0], 4.0, -2 / 3),
    ({"estimator": zk.Shaped(3, "z-scored")}, [1.0, 2.0, 3.0], 2.0, -2.0),
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
    found, gradient = estimates(STEPS, lambda m: zk.MeZOStep(m, 1.0, EPS, seed=SEED, kind=kind))
    z = directions(4000, kind=kind)[:, None]
    check_each(found, [z @ gradient], z, gradient)
    every = products(z @ gradient, z)
    check_mean(every, gradient)
    squares = every.square().sum(1) / gradient.square().sum()
    error = float(squares.std()) / math.sqrt(len(squares))
    assert abs(float(squares.mean()) - factor) <= 4 * error + 0.05
    assert error < 0.08 * factor


@pytest.mark.parametrize("queries", [2, 4, 8])
def test_the_variance_falls_as_one_over_q(queries: int) -> None:
    """Tr cov = (d + 1) |G|^2 / q. The relative error of a sample's total variance is about sqrt(2 (1 + 2 c) / (n q)) with c <= 2 for these shapes of
    g z: below 6 % here, of which the band has four."""
    found, gradient = estimates(STEPS // queries, lambda m: zk.MeZOStep(m, 1.0, EPS, queries=queries, seed=SEED))
    z = directions(4000).view(-1, queries, D)
    check_each(found, [z @ gradient], z, gradient)
    every = products(z @ gradient, z)
    check_mean(every, gradient)
    total = float(every.var(0).sum() / gradient.square().sum())
    assert total == pytest.approx((D + 1) / queries, rel=0.24)


def test_one_sided_has_the_bias_term_and_no_other() -> None:
    """Each estimate is z^T G z + (eps / 2) (z^T A z) z, exactly; the second has mean 0 for a symmetric z, and adds to the variance."""
    eps = 0.5
    found, gradient = estimates(STEPS, lambda m: zk.MeZOStep(m, 1.0, eps, one_sided=True, seed=SEED))
    z = directions(4000)[:, None]
    slope, bend = z @ gradient, eps / 2 * (z.square() @ SPECTRUM)
    check_each(found, [slope, bend], z, gradient, eps)
    check_mean(products(slope + bend, z), gradient)
    assert float(bend.mean()) > 5 * float(slope.std()) / math.sqrt(len(slope)), "the term is there to be seen"
    two_sided, _ = estimates(STEPS, lambda m: zk.MeZOStep(m, 1.0, eps, seed=SEED))
    check_each(two_sided, [slope], z, gradient, eps)  # and two-sided has none, at any eps


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
    found, gradient = estimates(STEPS, lambda m: zk.ZOStep(m, 1.0, EPS, direction=zk.RandomSparse(keep, 1 << 20), seed=SEED))
    mask = kept("weight", (D,), keep, 0)
    assert 8 < int(mask.sum()) < 32
    assert (found[:, ~mask] == 0).all()
    z = directions(4000)[:, None]
    check_each(found, [(z * mask) @ gradient], z * mask, gradient)
    check_mean(products((z * mask) @ gradient, z * mask)[:, mask], gradient[mask])

    found, gradient = estimates(STEPS, lambda m: zk.ZOStep(m, 1.0, EPS, direction=zk.RandomSparse(keep, 1), seed=SEED))
    each = [kept("weight", (1, D), keep, tag) for tag in range(STEPS)]
    masks = torch.cat([*each, kept("weight", (len(z) - STEPS, D), keep, STEPS)])[:, None]
    assert (found[~masks[:STEPS, 0]] == 0).all()
    check_each(found, [(z * masks) @ gradient], z * masks, gradient)
    changing = products((z * masks) @ gradient, z * masks)
    check_mean(changing, keep * gradient)
    assert 0.5 < float((changing == 0).double().mean()) < 0.7


def test_magnitude_masks_are_unbiased_on_their_support_and_zero_outside() -> None:
    found, gradient = estimates(STEPS, lambda m: zk.SparseMeZO(m, 1.0, EPS, quantile=0.5, seed=SEED))
    order = Quadratic().weight.detach().abs().argsort()
    inside, outside = order[: D // 2], order[D // 2 :]
    assert (found[:, outside] == 0).all()
    z = directions(4000)[:, None, inside]
    check_each(found[:, inside], [z @ gradient[inside]], z, gradient)
    check_mean(products(z @ gradient[inside], z), gradient[inside])


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
    for k in range(STEPS):
        step.step(model)
        moved, still = (model.first, model.second)[k % 2], (model.second, model.first)[k % 2]
        assert torch.equal(still, start[1 - k % 2])
        found[k % 2].append(start[k % 2].double() - moved.detach().double())
        with torch.no_grad():
            moved.copy_(start[k % 2])
    for k, (name, want) in enumerate(zip(("first", "second"), gradient, strict=True)):
        z = directions(3000, (D // 2,), name)[k::2, None]
        check_each(torch.stack(found[k]), [z @ want], z, want)
        check_mean(products(z @ want, z), want)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("every", [1, 4])
def test_low_rank_directions_have_the_gradient_as_mean(rank: int, every: int) -> None:
    """E z z^T = rank I for z = U V^T, which the update's 1 / rank undoes. While V stays, the estimates share it: means over such runs are
    independent. The expectation is over normal numbers rounded to 12 bits, which changes E u^2 by less than 2^-24."""
    runs = 3000 // every if every > 1 else 1200
    found, gradient = estimates(STEPS, lambda m: zk.LOZO(m, 1.0, EPS, rank=rank, every=every, seed=SEED), (8, 6))
    u = torch.from_numpy(to_12_bits(directions(runs * every, (8, rank)).numpy()))
    v = torch.from_numpy(to_12_bits(directions(runs, (rank, 6), offset=1 << 55).numpy())).repeat_interleave(every, 0)
    z = (u @ v).view(-1, 1, D)
    check_each(rank * found, [z @ gradient], z, gradient)
    check_mean(products(z @ gradient, z / rank).view(runs, every, D).mean(1), gradient)


@pytest.mark.parametrize(("by", "estimate"), [("rms", "variance"), ("rms", "expectation"), ("gradient", "variance")])
def test_layer_scales_variance_form_is_unbiased_and_the_other_is_divided(by: str, estimate: str) -> None:
    """Perturbed by z / d: with d in the update the mean is the gradient, whatever d; without, the gradient over d."""
    model = Blocks()
    with torch.no_grad():
        model.second.mul_(3.0)
    start = [p.detach().clone() for p in model.parameters()]
    gradient = (SPECTRUM * torch.cat(start).double() + model.linear).split(D // 2)
    direction: Any = zk.LayerScale(by, estimate, every=1 << 20 if by == "rms" else 1)
    step = zk.ZOStep(model, 1.0, EPS, direction=direction, seed=SEED)
    found: list[list[Tensor]] = [[], []]
    for _ in range(STEPS if by == "rms" else 800):
        step.step(model)
        for k, p in enumerate(model.parameters()):
            found[k].append(start[k].double() - p.detach().double())
            p.data.copy_(start[k])
    if by == "gradient":
        for k in range(2):
            check_mean(torch.stack(found[k]), gradient[k])
        return
    roots = [p.double().square().mean().sqrt() for p in start]
    middle = math.exp(sum(math.log(r) for r in roots) / 2)
    d = [float(to_12_bits(float(r) / middle)) for r in roots]
    z = [directions(4000, (D // 2,), name)[:, None] for name in ("first", "second")]
    terms = [x @ (y / r) for x, y, r in zip(z, gradient, d, strict=True)]
    whole = torch.cat([x / y for x, y in zip(gradient, d, strict=True)])
    for k in range(2):
        moved, rest = (z[k] * d[k], 1.0) if estimate == "variance" else (z[k], d[k])
        check_each(torch.stack(found[k]), terms, moved, whole, most=16)
        check_mean(products(sum(terms, torch.zeros(())), moved), gradient[k] / rest)


def test_fzoo_divides_by_the_spread_of_its_losses() -> None:
    """E is along the gradient: the mean over many steps, of unit length, within the standard errors."""
    eps, queries = 1e-3, 8
    steps, gradient = estimates(STEPS // queries, lambda m: zk.FZOO(m, 1.0, eps, queries=queries, seed=SEED))
    z = directions(4000 * queries, kind="rademacher").view(-1, queries, D)
    rise = eps * (z @ gradient) + eps**2 / 2 * (z.square() @ SPECTRUM)
    found = products(rise / eps / rise.std(1, keepdim=True), z)
    # theta + eps z in fp32 moves a loss by up to 2^-23 |grad|, where the losses' deviation is about eps |grad|.
    assert ((steps - found[: len(steps)]).abs() <= 2**-22 / eps**2).all()
    mean, error = found.mean(0), found.std(0) / math.sqrt(len(found))
    length = float(mean @ gradient / gradient.square().sum())
    # Along ±1 directions at a small eps the losses differ by eps z^T G: their standard deviation is about eps |G|.
    assert ((mean - length * gradient).abs() <= 5 * error).all()
    assert length == pytest.approx(1 / (1e-3 * float(gradient.norm())), rel=0.15)


@pytest.mark.parametrize("mirrored", [False, True])
def test_ranks_see_the_order_of_rewards_alone(mirrored: bool) -> None:
    """A reward and what grows with it, as a loss turned round or ascended: the same bits. And they lead uphill."""

    def run(closure: Callable[[Quadratic], float], **more: Any) -> tuple[Tensor, list[float]]:
        model = Quadratic()
        step = zk.ZOStep(model, 2e-4, EPS, seed=SEED, estimator=zk.Shaped(4, mirrored=mirrored), **more)
        return model.weight.detach(), [float(step.step(lambda: closure(model))) for _ in range(STEPS)]

    turned, losses = run(lambda model: float(model()))
    assert sum(losses[-10:]) < sum(losses[:10])
    for closure, more in (
        (lambda model: math.exp(float(model()) / 50), {}),
        (lambda model: 1e9 - 1e3 * float(model()), {"maximize": True}),
    ):
        assert torch.equal(run(closure, **more)[0], turned)


def test_z_scores_of_a_reward_have_no_scale() -> None:
    """A power of two times it gives the same bits. The coefficients of a step have the root mean square that is worked out in docs/learning.md."""
    found = []
    for factor in (1.0, 2.0**20):
        model = Quadratic()
        step = zk.ZOStep(model, 1e-4, EPS, seed=SEED, estimator=zk.Shaped(5, "z-scored"))
        for _ in range(9):
            step.step(lambda model=model, factor=factor: factor * model())
            assert step.movement() == pytest.approx(1e-4 / EPS * math.sqrt(4 / 5) / math.sqrt(5), rel=1e-6)
        found.append(model.weight.detach())
    assert torch.equal(*found)
