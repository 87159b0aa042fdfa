"""Every method's steps equal an independent, obvious float64 implementation (tests/optim/methods.py)."""

from __future__ import annotations

import pytest
import torch

import zo_kernels as zk
from tests.optim.methods import CASES, EPS, EVERY, Case, Reference, Tiny, loss, values


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


def test_every_constructor_has_a_case() -> None:
    used = {type(case.make(Tiny())) for case in CASES.values()}
    assert used >= set(zk.optim.METHODS)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize(("name", "mode"), EVERY)
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
)  # fmt: skip


# In place and at lr = 0, the weight that defines Sparse-MeZO's threshold is moved by rounding alone, and leaves the mask or not.
@pytest.mark.parametrize(("name", "mode"), [c for c in EVERY if c[0] in GROUPED and c != ("sparse-mezo", "inplace")])
def test_groups_have_their_own_lr_eps_and_decay(name: str, mode: str) -> None:
    """g of a group is the loss difference over its own eps."""
    case, model = CASES[name], Tiny()
    r = Reference.of(model, case.lr, kind=case.kind)
    pairs = dict(model.named_parameters())
    own: dict[str, tuple[float, float, float]] = {  # lr, eps, weight decay
        "layers.0.weight": (case.lr, EPS, 0.5), "layers.0.bias": (0.0, EPS, 0.0), "layers.1.weight": (case.lr / 2, EPS / 2, 0.0),
        "layers.1.bias": (case.lr / 2, EPS / 2, 0.0), "norm.weight": (case.lr, 2 * EPS, 0.2), "norm.bias": (case.lr, 2 * EPS, 0.2),
    }  # fmt: skip
    for n in own:
        r.lr[n], r.eps[n], r.decay[n] = own[n]
    settings = sorted(set(own.values()), key=list(own.values()).index)
    groups = [
        {"params": [(n, pairs[n]) for n in own if own[n] == s], "lr": s[0], "eps": s[1], "weight_decay": s[2]} for s in settings
    ]
    step = case.make(groups, model=model, perturbation=mode)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_sixteen_bit_weights_follow_the_fp32_run(name: str, mode: str, dtype: torch.dtype) -> None:
    """Finite, moving, and near fp32: each of the passes rounds a weight below 2 by at most one unit in its last place (stochastic) or half of one,
    eps_dtype at most; and g, measured at rounded weights, is off: no more than the path itself, which a wrong sign everywhere would exceed."""
    case, steps = CASES[name], 10
    wide, narrow = Tiny(), Tiny(dtype)
    wide.load_state_dict(narrow.state_dict())
    r = Reference.of(wide, case.lr, kind=case.kind)
    step = case.make(narrow, perturbation=mode)
    before = values(narrow)
    for k in range(steps):
        case.reference(r, step.tags_of(k))
        r.step += 1
        assert step.step(narrow).isfinite()
    assert step.skipped == 0
    passes = 1 if mode == "scratch" else case.forwards + 1
    bound = r.path + steps * passes * torch.finfo(dtype).eps
    for n, p in narrow.named_parameters():
        assert p.dtype == dtype and p.isfinite().all()
        assert float((p.detach().double() - r.theta[n]).abs().max()) <= bound, n
    assert any(not torch.equal(p, before[n]) for n, p in narrow.named_parameters())


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
