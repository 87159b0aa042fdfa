"""Every method's steps equal an independent, obvious float64 implementation (tests/optim/methods.py)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import zo_kernels as zk
from tests.optim.methods import CASES, DIZO, EPS, EVERY, Case, Reference, Tiny, Weights, in_turn, loss, noise, values


def tolerance(r: Reference, case: Case, mode: str) -> float:
    """What fp32 weights and 17-bit coefficients may differ by from float64, as derived in test_mezo.py.

    A coefficient has 17 significant bits: an update is off by 2^-17 of each of its terms and, through eps, by as much again. theta ± eps z are
    fp32, which moves g by about |grad| sqrt(69) 2^-25 / eps = 2^-18 |grad|: less than the 2^-17. `path` is the sum of the terms' sizes. Every pass
    rounds a weight below 2 by up to 2^-24: in place there is one for every forward, and one for the update. Curvature and the rule may amplify
    what is there: a factor 4 over the whole path. In place, restoring and updating is one coefficient of the size of eps, whose 17 bits are off by
    2^-17 eps |z|, |z| < 4.5.
    """
    restored = r.step * 2**-17 * EPS * 4.5 if mode == "inplace" else 0.0
    return 4 * case.sharp * (2**-16 * r.path + r.step * (case.forwards + 1) * 2**-24) + restored


@pytest.mark.parametrize("order", ["cyclic", "random"])
def test_an_optimizer_names_the_block_of_its_next_step(order: str) -> None:
    """Those parameters change, and no others; frozen ones are not among them."""
    model = Tiny()
    next(model.parameters()).requires_grad_(False)
    step = zk.BlockwiseZO(model, 1e-2, EPS, order=order, every=2, seed=1)
    for _ in range(8):
        before, block = values(model), step.block()
        step.step(lambda block=block: model() if step.block() == block else math.nan)
        after = values(model)
        assert block is not None
        assert {n for n in before if not torch.equal(before[n], after[n])} == set(block)
    assert zk.MeZOStep(model, 1e-2).block() is None


def test_every_constructor_has_a_case() -> None:
    used = {type(case.make(Tiny())) for case in CASES.values()}
    assert used >= set(zk.optim.METHODS)


@pytest.mark.parametrize(("name", "mode", "weight_decay"), in_turn(EVERY, [0.0, 0.3]))
def test_steps_equal_the_float64_reference(name: str, mode: str, weight_decay: float) -> None:
    """One step and fifty, at each step. Biases and the norm do not decay, by class."""
    case, model = CASES[name], Tiny()
    before = values(model)
    r = Reference.of(model, case.lr, weight_decay=weight_decay, kind=case.kind)
    step = case.make(model, perturbation=mode, weight_decay=weight_decay)
    for k in range(50):
        case.reference(r, step.tags_of(k))
        r.step += 1
        step.step(model)
        if k == 0 and r.g:
            assert step.projected_gradient is not None
            assert step.projected_gradient.item() == pytest.approx(r.g, rel=1e-4, abs=1e-5)
        bound = tolerance(r, case, mode)
        for n, p in model.named_parameters():
            assert float((p.detach().double() - r.theta[n]).abs().max()) <= bound, (k, n)
    assert step.steps == 50 and step.skipped == 0
    moved = max(float((p.detach().double() - before[n]).abs().max()) for n, p in model.named_parameters())
    assert moved > 100 * bound, "a tolerance of the size of the run would accept anything"


GROUPED = (
    "mezo", "mezo-3", "one-sided-3", "sign", "momentum", "adam", "conservative", "blockwise", "sparse-mezo", "layer-scale", "hizoo", "lozo", "fzoo",
    "lozo-3", "input-subspace",
)  # fmt: skip


# type, eps, sizes, whether in groups, and how much larger the learning rate is: an update must be larger than the spacing of the weights
FORMS: dict[str, tuple[torch.dtype, float, tuple[int, int, int], bool, float]] = {
    "fp16": (torch.float16, EPS, (7, 5, 4), False, 8.0),
    "bf16": (torch.bfloat16, EPS, (7, 5, 4), False, 32.0),
    "bf16 groups": (torch.bfloat16, 1e-3, (19, 13, 6), True, 32.0),
    "fp32 groups": (torch.float32, 1e-3, (19, 13, 6), True, 1.0),
}


def groups_of(model: Tiny, r: Reference, lr: float, eps: float) -> list[dict[str, Any]]:
    """Parameter groups that differ in everything, for `r` too."""
    pairs = dict(model.named_parameters())
    own: dict[str, tuple[float, float, float]] = {  # lr, eps, weight decay
        "layers.0.weight": (lr, eps, 0.5), "layers.0.bias": (0.0, eps, 0.0), "layers.1.weight": (lr / 2, eps / 2, 0.0),
        "layers.1.bias": (lr / 2, eps / 2, 0.0), "norm.weight": (lr, 2 * eps, 0.2), "norm.bias": (lr, 2 * eps, 0.2),
    }  # fmt: skip
    for n in own:
        r.lr[n], r.eps[n], r.decay[n] = own[n]
    settings = sorted(set(own.values()), key=list(own.values()).index)
    return [
        {"params": [(n, pairs[n]) for n in own if own[n] == s], "lr": s[0], "eps": s[1], "weight_decay": s[2]} for s in settings
    ]


# In place and at lr = 0, the weight that defines Sparse-MeZO's threshold is moved by rounding alone, and leaves the mask or not.
@pytest.mark.parametrize(("name", "mode"), [c for c in EVERY if c[0] in GROUPED and c != ("sparse-mezo", "inplace")])
def test_groups_have_their_own_lr_eps_and_decay(name: str, mode: str) -> None:
    """g of a group is the loss difference over its own eps."""
    case, model = CASES[name], Tiny()
    r = Reference.of(model, case.lr, kind=case.kind)
    pairs = dict(model.named_parameters())
    step = case.make(groups_of(model, r, case.lr, EPS), model=model, perturbation=mode)
    before = values(model)
    for k in range(12):
        case.reference(r, step.tags_of(k))
        r.step += 1
        step.step(model)
        bound = 2 * tolerance(r, case, mode)  # eps / 2: twice the sharpness
        for n, p in model.named_parameters():
            assert float((p.detach().double() - r.theta[n]).abs().max()) <= bound, (k, n)
    assert (pairs["layers.0.bias"] - before["layers.0.bias"]).abs().max() <= bound
    assert (pairs["layers.0.weight"] - before["layers.0.weight"]).abs().max() > 30 * bound


@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_accumulation_is_the_mean_of_the_micro_batches(name: str, mode: str) -> None:
    """One direction over all of them, losses averaged, one update; it was asserted away elsewhere, with the weights already perturbed."""
    case, model = CASES[name], Tiny()
    parts = [slice(0, 3), slice(3, 6), slice(6, 9)]  # of equal size: the mean of means is the mean
    r = Reference.of(model, case.lr, kind=case.kind)
    r.loss = lambda w: loss(w, model.x[:9], model.y[:9])
    step = case.make(model, perturbation=mode)
    for k in range(7):
        case.reference(r, step.tags_of(k))
        r.step += 1
        step.step(model, parts)
    for n, p in model.named_parameters():
        assert float((p.detach().double() - r.theta[n]).abs().max()) <= tolerance(r, case, mode), n


def spacing(dtype: torch.dtype, x: Tensor) -> Tensor:
    """From a number of that size, or a little larger, to the next of its type."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** (1.01 * x.abs()).clamp(min=info.smallest_normal).log2().floor()


@pytest.mark.parametrize(("name", "mode", "form"), in_turn(EVERY, list(FORMS)))
def test_each_step_is_the_formula_of_the_losses_it_saw(name: str, mode: str, form: str) -> None:
    """In other types, at another eps, of another model, with groups: each step by itself, from the weights as they are, so that 16 bits add up no errors.

    The forwards tell the weights that they saw, and their losses. Wherever the formula wants a loss, a forward must have been, to within the
    rounding of the passes that led there: half a unit in the last place each, one in scratch mode. What the formula makes of these losses is what
    the step has done, to within the roundings on the way back and of the update (stochastic in scratch mode: a whole unit).
    """
    dtype, eps, sizes, grouped, factor = FORMS[form]
    if mode == "inplace" and dtype != torch.float32:
        eps = max(eps, 2.0**-5)  # what is below the spacing, the passes' rounding is larger than
    case, model = CASES[name], Tiny(dtype, sizes)
    r = Reference.of(model, case.lr * factor, eps, kind=case.kind)
    step = case.make(model, perturbation=mode, lr=case.lr * factor, **({} if name == "forward" else {"eps": eps}))
    if grouped and name in GROUPED:
        groups = groups_of(model, r, case.lr * factor, eps)
        step = case.make(groups, model=model, perturbation=mode)
    smooth, rounds, best = r.loss, 1 if mode == "scratch" else case.forwards, 0.0

    def told(w: Weights) -> Tensor:
        """The loss of the forward that was nearest."""
        if any(t.requires_grad for t in w.values()):
            return smooth(w)
        assert model.told is not None
        seen, found = min(model.told, key=lambda one: sum(float((one[0][n] - t).square().sum()) for n, t in w.items()))
        for n, t in w.items():
            shift = (t - start[n]).abs()
            bound = (0.51 * rounds + behind) * spacing(dtype, reach[n]) + 2**-15 * shift + 2**-18 * shift.max()
            assert ((seen[n] - t).abs() <= bound).all(), (k, n)
        return found

    r.loss = told
    for k in range(7):
        start = {n: t.double() for n, t in values(model).items()}
        model.told = []
        assert step.step(model).isfinite()
        reach = {n: t.abs() + max(float((seen[n] - t).abs().max()) for seen, _ in model.told) for n, t in start.items()}
        # A projection sees the rounding of the update behind which it stands, times r + eps z below 1.65, and rounds once itself.
        projects = name.startswith("dizo") and (k + 1) % DIZO["every"] == 0
        behind = 0.51 + 1.65 * (1.01 if mode == "scratch" else 0.51 * (rounds + 1)) if projects else 0.0
        # Which rounds once, behind an update that may have ended in the binade above.
        pulled = 0.51 + 1.01 if name.startswith("anchored") and (k + 1) % 2 == 0 else 0.0
        path, r.theta = r.path, dict(start)
        case.reference(r, step.tags_of(k))
        r.step += 1
        slack = 4 * case.sharp * 2**-16 * (r.path - path)
        if name == "forward":  # the tangents have the weights' type
            slopes = sum(float((z.abs() * noise(n, z.shape, step.tags_of(k)[0]).abs()).sum()) for n, z in r.gradient().items())
            slack += case.lr * factor * torch.finfo(dtype).eps * slopes * 4.5
        for n, p in model.named_parameters():
            went, wanted = p.detach().double() - start[n], r.theta[n] - start[n]
            bound = (pulled + (1.01 if mode == "scratch" else 0.51 * (rounds + 1))) * spacing(dtype, reach[n] + wanted.abs())
            bound = bound + behind * spacing(dtype, reach[n]) + slack + 2**-15 * (reach[n] - start[n].abs())
            assert ((went - wanted).abs() <= bound).all(), (k, n)
            best = max(best, float((wanted.abs() / bound).max()))
    assert step.skipped == 0
    assert best > 8, "a bound that any step would meet"


@pytest.mark.parametrize(
    ("name", "mode"), [c for c in EVERY if c[0] != "hybrid"]
)  # whose other optimizer has a maximize of its own
def test_to_maximize_is_to_minimize_the_negative(name: str, mode: str) -> None:
    """On every bit; also where a rule chooses by the loss."""
    down, up = Tiny(), Tiny()
    descent = CASES[name].make(down, perturbation=mode)
    ascent = CASES[name].make(up, perturbation=mode, maximize=True)
    for _ in range(7):
        assert descent.step(down) == -ascent.step(lambda: -up())
    assert all(torch.equal(p, q) for p, q in zip(down.parameters(), up.parameters(), strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(down.parameters(), Tiny().parameters(), strict=True))
