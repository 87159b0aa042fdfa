"""`update_`: the rules against an obvious float64 implementation, every backend against the reference on every bit, and what is refused.

Belongs here: update rules. Does not belong here: the cases (update_cases.py), noise and casts as such (test_cpu.py and its like).

Triton's interpreter needs a process of its own: `test_in_the_interpreter` runs `test_triton_case` in one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import zo_kernels as zk
from tests.kernels import cases, interpreter
from tests.kernels import test_cuda_host as cuda_host
from tests.kernels import update_cases as uc
from tests.kernels.cases import same_bits
from tests.vectors.make import check_rule, rule_vectors
from zo_kernels import _C, checks, reference, update
from zo_kernels._backends import cpu
from zo_kernels.plan import Entry, Plan, make_plans


@pytest.fixture
def run(request: pytest.FixtureRequest) -> uc.Run:
    """A backend's `update`; the CUDA kernel's body as host code, with tiles of 1 or 3 spans."""
    if isinstance(request.param, int):
        return functools.partial(cuda_host.update, request.getfixturevalue("library"), spans=request.param)
    return request.param  # type: ignore[no-any-return]


RUNS: list[Any] = [pytest.param(reference.update, id="reference")]
RUNS += [
    pytest.param(
        functools.partial(cpu.update, isa=k), id=name, marks=pytest.mark.skipif(k > _C.cpu_best_isa(), reason=f"no {name} here")
    )
    for k, name in enumerate(_C.ISA_NAMES)
    if k
]
RUNS += [pytest.param(spans, id=f"cuda-body-{spans}") for spans in (1, 3)]


# A tile of one span holds most cases; of three, it is met by those that fill one.
PAIRS = [
    pytest.param(r.values[0], some, id=f"{what}-{r.id}", marks=r.marks)
    for what, group in uc.GROUPS.items()
    for r in RUNS[1:]
    if (some := [c for c in group if r.values[0] != 3 or max(c.sizes) > 4000])
]


@pytest.mark.parametrize(("run", "some"), PAIRS, indirect=["run"])
def test_case(some: list[uc.Case], run: uc.Run) -> None:
    for case in some:
        uc.check(run, case)


@pytest.mark.parametrize("run", RUNS, indirect=True)
@pytest.mark.parametrize("v", rule_vectors())
def test_vectors(v: dict[str, Any], run: uc.Run) -> None:
    check_rule(v, run)


# ---- the reference against float64 --------------------------------------------------------------------------------------

U = 2.0**-24  # of a rounding to nearest in fp32, relative
TINY = 2.0**-149


class Bounded:
    """A float64 number and a bound of how far fp32 arithmetic, each operation rounded by itself, may be from it."""

    def __init__(self, value: Any, error: Any = 0.0) -> None:
        self.value, self.error = np.asarray(value, dtype=np.float64), np.asarray(error, dtype=np.float64)

    def rounded(self) -> Bounded:
        return Bounded(self.value, self.error + U * (np.abs(self.value) + self.error) + TINY)

    def __add__(self, other: Bounded) -> Bounded:
        return Bounded(self.value + other.value, self.error + other.error).rounded()

    def __sub__(self, other: Bounded) -> Bounded:
        return Bounded(self.value - other.value, self.error + other.error).rounded()

    def __mul__(self, other: Bounded) -> Bounded:
        error = np.abs(self.value) * other.error + np.abs(other.value) * self.error + self.error * other.error
        return Bounded(self.value * other.value, error).rounded()

    def __truediv__(self, other: Bounded) -> Bounded:
        value, least = self.value / other.value, np.abs(other.value) - other.error
        assert (least > 0).all()
        return Bounded(value, (self.error + np.abs(value) * other.error) / least).rounded()

    def sqrt(self) -> Bounded:
        low = np.sqrt(np.maximum(self.value - self.error, 0))
        high = np.sqrt(self.value + self.error)
        value = np.sqrt(self.value)
        return Bounded(value, np.maximum(high - value, value - low)).rounded()


def direction(n: int, case_pass: update.RulePass, tag: int, stream: int) -> np.ndarray:
    z = zk.normal(n, seed=case_pass.seed, stream=stream, tag=tag, kind=case_pass.kind, backend="reference")
    return z.double().numpy()


def estimate(n: int, p: update.RulePass, stream: int) -> Bounded:
    """u = sum_k c_k z_k. A coefficient has 17 significant bits and z's own the same, the mix of 16 numbers, none above 8.3 |c| with the
    sums on the way, makes four additions of each."""
    value, error = np.zeros(n), np.zeros(n)
    for tag, c in zip(p.tags, p.coefs, strict=True):
        z = direction(n, p, int(tag), stream)
        value += c * z
        gaussian = 2.0**-16 * np.abs(z) + (15 + len(p.tags)) * U * 8.3
        error += abs(c) * (gaussian if p.kind == "gaussian" else len(p.tags) * U)
    return Bounded(value, error)


def obvious(p: update.RulePass, theta: Tensor, states: list[Tensor], stream: int) -> list[Bounded]:
    """The rules as papers write them: [theta, *states]."""
    x = Bounded(theta.double().numpy())
    old = [Bounded(s.double().numpy()) for s in states]
    n = theta.numel()
    _, decay, *rest = [Bounded(np.float64(np.float32(v))) for v in p.numbers]
    d = decay * x
    if p.rule == "momentum":
        lr, beta = rest
        b = beta * old[0] + estimate(n, p, stream)
        return [d - lr * b, b]
    if p.rule == "adam":
        lr, beta1, rest1, beta2, rest2, factor, eps = rest
        u = estimate(n, p, stream)
        m, v = beta1 * old[0] + rest1 * u, beta2 * old[1] + rest2 * (u * u)
        return [d - lr * m / ((factor * v).sqrt() + eps), m, v]
    if p.rule == "hizoo":
        lrg, alpha, kappa, low, high = rest
        z = Bounded(direction(n, p, int(p.tags[0]), stream))
        h = old[0] + old[0] * (alpha * (kappa * (z * z) - Bounded(1.0)))
        h = Bounded(np.clip(h.value, low.value, high.value), h.error)
        return [d - lrg * z / h.sqrt(), h]
    lr, eps = rest
    v = Bounded(np.zeros(n))
    assert p.squares is not None
    for tag, q in zip(p.tags, p.squares, strict=True):
        z = Bounded(direction(n, p, int(tag), stream))
        v = v + Bounded(np.float64(np.float32(q))) * (z * z)
    return [d - lr * estimate(n, p, stream) / (v.sqrt() + eps)]


@pytest.mark.parametrize("kind", checks.KINDS)
@pytest.mark.parametrize("rule", update.RULES)
def test_reference_is_the_rule(rule: str, kind: str) -> None:
    n = 1500
    g = torch.Generator().manual_seed(3)
    theta = torch.randn(n, generator=g)
    states = [torch.rand(n, generator=g) + 0.5 for _ in update.RULES[rule].states]
    case = uc.Case(
        "", rule, torch.float32, torch.float32, terms=3, kind=kind, coefs={} if rule == "hizoo" else {0: 0.5, 1: -0.3, 2: 0.8}
    )
    p = case.rule_pass()
    want = obvious(p, theta, states, 5)
    (plan,) = make_plans([theta], [5])
    reference.update(plan, [states], p)
    for got, bounded in zip([theta, *states], want, strict=True):
        assert (np.abs(got.double().numpy() - bounded.value) <= bounded.error).all()
        assert (bounded.error < 1e-3 * np.abs(bounded.value).max()).all(), "a bound that any result would meet"


@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_clamp_of_hizoo(run: uc.Run) -> None:
    """Both ends are reached, and a NaN stays one."""
    h = torch.rand(4000, generator=torch.Generator().manual_seed(1)) * 2
    h[17] = float("nan")
    x = torch.zeros(4000)
    (plan,) = make_plans([x], [5])
    run(plan, [[h]], update.RulePass(1, [2], [1.0], "gaussian", "nearest", "hizoo", [1, 1, 0.1, 0.9, 1.3, 0.5, 1.5]))
    assert h[17].isnan()
    rest = h[~h.isnan()]
    assert (rest == 0.5).any() and (rest == 1.5).any() and ((rest >= 0.5) & (rest <= 1.5)).all()


# ---- masks, skips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS, indirect=True)
@pytest.mark.parametrize(("rule", "held"), uc.RULES, ids=str)
def test_what_is_masked_out_only_decays(rule: str, held: torch.dtype, run: uc.Run) -> None:
    for mask in (cases.random_bits, lambda j, p: zk.RandomMask(0.4, tag=3)):
        case = uc.Case("", rule, torch.bfloat16, held, sizes=(3000,), plan={"masks": mask})
        before, states, _ = case.make()
        after, new_states, _ = case.make()
        p = case.rule_pass()
        run(after, new_states, p)
        everywhere, all_states, _ = replace(case, plan={}).make()
        run(everywhere, all_states, p)
        old, new, full = (plan.entries[0].dst for plan in (before, after, everywhere))
        if callable(mask) and mask is cases.random_bits:
            keep = cases.random_bits(0, old)
        else:
            keep = reference.random_keep(torch.arange(3000), zk.RandomMask(0.4).threshold, 3, 7, cases.SEED)
        assert 1000 < keep.sum() < 1500
        decayed = (old.float() * torch.tensor(p.numbers[1])).bfloat16()
        assert same_bits(new, torch.where(keep, full, decayed))
        for a, b, c in zip(states[0], new_states[0], all_states[0], strict=True):
            assert same_bits(b, torch.where(keep, c, a))


def skips(rule: str) -> Iterator[tuple[str, Callable[[update.RulePass], update.RulePass]]]:
    """Ways in which a pass says that it is not to be made."""

    def with_number(k: int, x: float) -> Callable[[update.RulePass], update.RulePass]:
        return lambda p: replace(p, numbers=[x if j == k else y for j, y in enumerate(p.numbers)])

    for zero in (0.0, -0.0):
        yield f"go={zero}", with_number(0, zero)
    for k, name in enumerate(update.RULES[rule].numbers):
        for bad in (float("nan"), float("inf")):
            yield f"{name}={bad}", with_number(k, bad)
    yield "coefficient", lambda p: replace(p, coefs=[float("-inf"), *p.coefs[1:]])
    yield "last coefficient", lambda p: replace(p, coefs=[*p.coefs[:-1], float("nan")])
    if rule == "adam_history":
        yield "square", lambda p: replace(p, squares=[*(p.squares or [])[:-1], float("inf")])


def on_device(p: update.RulePass, device: str = "cpu") -> update.RulePass:
    """The same with tensors in the place of numbers."""
    tags, coefs, numbers, squares = p.tensors_on(torch.device(device))
    return replace(p, tags=tags, coefs=coefs, numbers=numbers, squares=None if p.squares is None else squares)


@pytest.mark.parametrize("run", RUNS, indirect=True)
@pytest.mark.parametrize(("rule", "held"), uc.RULES, ids=str)
def test_a_pass_that_is_not_to_be_made_leaves_every_bit(rule: str, held: torch.dtype, run: uc.Run) -> None:
    case = uc.Case("", rule, torch.float16, held, sizes=(700,), terms=11, rounding="stochastic")
    untouched = uc.result(lambda *args: None, case)
    for name, change in skips(rule):
        for p in (change(case.rule_pass()), on_device(change(case.rule_pass()))):
            for a, b in zip(uc.result(run, case, p), untouched, strict=True):
                assert torch.equal(cases.bits(a), cases.bits(b)), name


@pytest.mark.parametrize("run", RUNS, indirect=True)
@pytest.mark.parametrize(("rule", "held"), uc.RULES, ids=str)
@pytest.mark.parametrize("terms", [1, 11])
def test_numbers_in_tensors(rule: str, held: torch.dtype, terms: int, run: uc.Run) -> None:
    case = uc.Case("", rule, torch.float16, held, sizes=(700,), terms=terms, rounding="stochastic")
    for a, b in zip(uc.result(run, case, on_device(case.rule_pass())), uc.result(run, case), strict=True):
        assert torch.equal(cases.bits(a), cases.bits(b))


@functools.cache
def of_many_terms(rule: str, kind: str) -> tuple[uc.Case, list[Tensor]]:
    """More than the 1,024 of which shared memory holds the coefficients (STAGE of perturb.cuh)."""
    case = uc.Case("", rule, torch.float32, torch.float32, sizes=(17,), terms=1030, kind=kind)
    return case, uc.result(reference.update, case)


@pytest.mark.parametrize("run", RUNS[1:], indirect=True)
@pytest.mark.parametrize("kind", checks.KINDS)
@pytest.mark.parametrize("rule", ["momentum", "adam_history"])
def test_more_terms_than_shared_memory_holds(rule: str, kind: str, run: uc.Run) -> None:
    case, want = of_many_terms(rule, kind)
    assert all(same_bits(a, b) for a, b in zip(uc.result(run, case), want, strict=True))


# ---- 16-bit states ------------------------------------------------------------------------------------------------------


def test_state_takes_the_bits_of_purpose_4() -> None:
    """Its own counter, with the first tag; theta takes the value before that rounding."""
    n, shift = 999, 13
    i = torch.arange(n) + shift
    b, exact, x, y = (
        torch.linspace(-1, 1, n).bfloat16(),
        torch.linspace(-1, 1, n).bfloat16().float(),
        torch.zeros(n),
        torch.zeros(n),
    )
    p = update.RulePass(9, [77, 78], [0.3, 0.1], "gaussian", "nearest", "momentum", [1.0, 1.0, 0.1, 0.9])
    for t, s in ((x, b), (y, exact)):
        (plan,) = make_plans([t], [5], offsets=[shift])
        reference.update(plan, [[s]], p)
    assert torch.equal(x, y)
    w = reference.words(i >> 3, 4, 5, 77, 9)[torch.arange(n), (i & 7) >> 1]
    v = w >> (16 * (i & 1)) & 0xFFFF
    bits = reference.float_bits(exact)
    assert torch.equal(cases.bits(b).long() & 0xFFFF, (bits >> 31 << 15) | ((bits & 0x7FFFFFFF) + v) >> 16)


def test_bfloat16_state_is_unbiased() -> None:
    """The mean over many tags, for all elements and for each: a rounding is one of two neighbours at most one step apart, so that its
    standard deviation is at most half a step."""
    n, tags = 2000, 400
    start = (torch.rand(n, generator=torch.Generator().manual_seed(2)) + 1).bfloat16()  # steps of 2^-7; by beta, below 1: 2^-8
    beta = float(np.float32(0.4567))
    exact = start.float() * torch.tensor(beta)
    step = 2.0 ** (exact.log2().floor().double() - 7)
    total = torch.zeros(n, dtype=torch.float64)
    for tag in range(tags):
        b = start.clone()
        (plan,) = make_plans([torch.zeros(n)], [5])
        cpu.update(plan, [[b]], update.RulePass(3, [tag], [0.0], "gaussian", "nearest", "momentum", [1.0, 1.0, 0.0, beta]))
        total += (b.double() - exact.double()) / step
    assert abs(total.sum().item()) <= 5 * 0.5 * (n * tags) ** 0.5
    assert total.abs().max().item() <= 6 * 0.5 * tags**0.5
    assert (total != 0).float().mean() > 0.99, "nothing was rounded"


# ---- the public function ------------------------------------------------------------------------------------------------


def test_lists_of_everything() -> None:
    """Mixed types, empty tensors, a scalar, one call: what one call for each gives. The version counters move."""
    shapes, dtypes = (
        [(3, 50), (0,), (), (0, 4), (129,)],
        [torch.float16, torch.float32, torch.bfloat16, torch.float16, torch.float32],
    )
    g = torch.Generator().manual_seed(1)
    params = [torch.randn(s, generator=g).to(d) for s, d in zip(shapes, dtypes, strict=True)]
    states = [[torch.randn(s, generator=g), torch.rand(s, generator=g)] for s in shapes]
    args: dict[str, Any] = {"rule": "adam", "numbers": uc.NUMBERS["adam"], "seed": 8, "rounding": "stochastic"}
    single = [([p.clone()], [[s.clone() for s in own]]) for p, own in zip(params, states, strict=True)]
    versions = [t._version for t in (params[0], states[0][0], states[4][1])]
    zk.update_(params, [(4, 0.1)], states=states, streams=range(5), **args)
    assert [t._version for t in (params[0], states[0][0], states[4][1])] == [v + 1 for v in versions]
    for k, (one, own) in enumerate(single):
        zk.update_(one, [(4, 0.1)], states=own, streams=[k], backend="reference", **args)
        assert same_bits(one[0], params[k])
        assert all(same_bits(a, b) for a, b in zip(own[0], states[k], strict=True))
    zk.update_([], [(4, 0.1)], states=[], streams=[], **args)
    zk.update_([], [], streams=[], seed=0, rule="adam_history", numbers=[1, 1, 0.1, 1e-8], squares=[])


def test_threads_do_not_matter() -> None:
    sizes = (70_000, 0, 300_001, 5)
    case = uc.Case("", "adam", torch.bfloat16, torch.bfloat16, sizes=sizes, terms=2, rounding="stochastic")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = uc.result(cpu.update, case)
        torch.set_num_threads(3)
        got = uc.result(cpu.update, case)
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


GOOD: dict[str, Any] = {"rule": "momentum", "numbers": [1.0, 1.0, 0.1, 0.9], "seed": 1, "streams": [2]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "sgd"}, "rule='sgd' must be one of 'momentum'"),
        ({"numbers": [1.0, 1.0]}, r"must be 4 numbers or a tensor of them, of the rule 'momentum': \(go, decay, lr, beta\)"),
        ({"numbers": [1.0, 1.0, float("nan"), 0.9]}, r"numbers\[2\] \(lr\)=nan must be finite"),
        ({"numbers": [1.0, "x", 0.1, 0.9]}, r"numbers\[1\] \(decay\)='x' must be a number"),
        ({"numbers": torch.ones(4).double()}, "give float32"),
        ({"numbers": torch.ones(5)}, "give float32"),
        ({"states": None}, r"states\[0\] must be a list of the 1 states \(b\)"),
        ({"states": []}, "states has length 0"),
        ({"states": [torch.zeros(9)]}, r"states\[0\] must be a list of the 1 states"),
        ({"states": [[torch.zeros(8)]]}, r"states\[0\]\[0\] \(b\) is \(8,\)"),
        ({"states": [[torch.zeros(9).half()]]}, "give torch.float32 or torch.bfloat16"),
        ({"states": [[torch.zeros(9, 2)[:, 0]]]}, "not contiguous"),
        ({"states": [[3.0]]}, "not a tensor"),
        ({"states": [["x"]]}, "not a tensor"),
        ({"squares": [1.0]}, "squares is for the rule 'adam_history' only"),
        ({"kind": "uniform"}, "kind='uniform'"),
        ({"rounding": "up"}, "rounding='up'"),
        ({"seed": -1}, "seed=-1"),
        ({"streams": [1, 2]}, "streams has length 2"),
        ({"masks": [torch.ones(8, dtype=torch.bool)]}, r"masks\[0\] has shape"),
        ({"backend": "cuda"}, "backend='cuda' was asked for"),
    ],
    ids=str,
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    if change.get("backend") == "cuda" and torch.cuda.is_available():
        pytest.skip("it would serve")
    x, b = torch.ones(9), torch.ones(9)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        zk.update_([x], [(3, 1.0)], **({"states": [[b]]} | GOOD | change))
    assert (x == 1).all() and (b == 1).all()


def test_what_is_read_lies_apart_from_weights_and_states() -> None:
    x, b = torch.ones(64), torch.ones(64)
    numbers = torch.tensor([1.0, 1.0, 0.1, 0.9])
    for change, message in (
        ({"scales": [(b, 1)]}, r"scales\[0\] shares memory with states\[0\]\[0\]"),
        ({"scales": [(x, 1)]}, r"scales\[0\] shares memory with params\[0\]"),
        ({"masks": [b.view(torch.uint8)[:8]]}, r"masks\[0\] shares memory with states\[0\]\[0\]"),
        ({"numbers": b[:4]}, r"numbers shares memory with states\[0\]\[0\]"),
        ({"numbers": x[:4]}, r"numbers shares memory with params\[0\]"),
        ({"terms": (torch.tensor([3]), b[:1])}, r"the coefficients shares memory with states\[0\]\[0\]"),
    ):
        given: dict[str, Any] = {"terms": [(3, 1.0)], "states": [[b]], **GOOD, "numbers": numbers, **change}
        with pytest.raises(ValueError, match=message):
            zk.update_([x], **given)
        assert (x == 1).all() and (b == 1).all()
    history: dict[str, Any] = {"rule": "adam_history", "numbers": [1, 1, 0.1, 1e-8], "seed": 1, "streams": [2]}
    with pytest.raises(ValueError, match=r"squares shares memory with params\[0\]"):
        zk.update_([x], (torch.tensor([3]), torch.ones(1)), squares=x[:1], **history)


def test_more_refusals() -> None:
    x, y, b, c = (torch.ones(9) for _ in range(4))
    more: dict[str, Any] = GOOD | {"streams": [1, 2]}
    with pytest.raises(ValueError, match="share memory"):
        zk.update_([x, y], [(3, 1.0)], states=[[b], [b]], **more)
    with pytest.raises(ValueError, match="share memory"):
        zk.update_([x, y], [(3, 1.0)], states=[[b], [x]], **more)
    with pytest.raises(TypeError, match=r"states\[1\]\[0\] \(b\) has dtype torch.bfloat16 and states\[0\]\[0\] torch.float32"):
        zk.update_([x, y], [(3, 1.0)], states=[[b], [c.bfloat16()]], **more)
    history: dict[str, Any] = {"rule": "adam_history", "numbers": [1, 1, 0.1, 1e-8], "seed": 1, "streams": [2]}
    for squares in (None, [1.0, 2.0], torch.ones(1), "x"):
        with pytest.raises((TypeError, ValueError), match="squares="):
            zk.update_([x], [(3, 1.0)], squares=squares, **history)
    with pytest.raises(ValueError, match=r"squares\[0\]=inf must be finite"):
        zk.update_([x], [(3, 1.0)], squares=[float("inf")], **history)
    with pytest.raises(TypeError, match=r"squares is torch\.float32"):
        zk.update_([x], (torch.tensor([3]), torch.ones(1)), squares=torch.ones(2), **history)
    with pytest.raises(ValueError, match="the rule 'adam_history' keeps none"):
        zk.update_([x], [(3, 1.0)], squares=[1.0], states=[[b]], **history)
    hizoo: dict[str, Any] = {"rule": "hizoo", "numbers": [1, 1, 0.1, 1e-6, 1, 0.5, 2], "seed": 1, "streams": [2], "states": [[b]]}
    for terms in ([], [(3, 0.5)], [(3, 1.0), (4, 1.0)]):
        with pytest.raises(ValueError, match="takes one direction with coefficient 1"):
            zk.update_([x], terms, **hizoo)
    with pytest.raises(ValueError, match="scales"):
        zk.update_([x], [(3, 1.0)], scales=[2.0], **hizoo)
    with pytest.raises(ValueError, match=r"low=0.0 and high=2.0 must satisfy 0 < low <= high"):
        zk.update_([x], [(3, 1.0)], **(hizoo | {"numbers": [1, 1, 0.1, 1e-6, 1, 0, 2]}))
    assert all((t == 1).all() for t in (x, y, b, c))


def test_plans_that_no_rule_takes() -> None:
    x, y, b = torch.ones(9), torch.zeros(9), torch.ones(9)
    p = update.RulePass(1, [3], [1.0], "gaussian", "nearest", "momentum", [1, 1, 0.1, 0.9])
    rows = Plan((Entry(x, x, 1, rows=torch.tensor([0]), row_len=9),), x.device, x.dtype)
    for plan, states, message in (
        (make_plans([x], [1], out=[y])[0], [[b]], "works in place"),
        (rows, [[b]], "gathered rows"),
        (make_plans([x], [1], scales=[(torch.ones(9), 1, "rsqrt")])[0], [[b]], "factors or inverse-square-root scales"),
        (make_plans([x], [1], factors=[(torch.ones(9, 2), torch.ones(2, 1).t())])[0], [[b]], "factors or inverse-square-root"),
        (make_plans([x], [1])[0], [], "states has 0 entries"),
        (make_plans([x], [1])[0], [[]], "has 1 states"),
        (make_plans([x], [1])[0], [[b[:8]]], "8 elements"),
        (make_plans([x], [1])[0], [[b.half()]], "float16"),
    ):
        with pytest.raises(ValueError, match=message):
            update.run_rule([plan], [states], p)
    assert (x == 1).all() and (y == 0).all()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"rule": 4}, "out of its range"),
        ({"rule": -1}, "out of its range"),
        ({"state_dtype": 1}, "out of its range"),
        ({"rule": 2, "state_dtype": 2}, "out of its range"),
        ({"states": 0}, "out of its range"),
        ({"isa": 4}, "out of its range"),
        ({"numbers": [0.0] * 10}, "more than 9"),
        ({"squares": [0.0] * 9}, "more than INLINE_TERMS"),
        ({"tags": [1, 2], "coefs": [1.0, 1.0], "rule": 2}, "out of its range"),
    ],
    ids=str,
)
def test_binding_refuses(change: dict[str, Any], error: str) -> None:
    x, b = torch.ones(40), torch.ones(40)
    (plan,) = make_plans([x], [0])
    table = update.state_table(plan, [[b]])
    args = {"table": plan.table.ctypes.data, "states": table.ctypes.data, "n": 1, "seed": 0, "dtype": 0, "kind": 0, "rounding": 0}
    args |= {"rule": 0, "state_dtype": 0, "tags": [1], "coefs": [1.0], "n_terms": 0, "numbers": [1.0, 1.0, 0.1, 0.9]}
    args |= {"squares": None, "threads": 1, "isa": 0}
    with pytest.raises((RuntimeError, ValueError), match=error):
        _C.cpu_update(**(args | change))
    table[0, 0] = 0
    with pytest.raises(RuntimeError, match="out of its range"):
        _C.cpu_update(**args)
    assert (x == 1).all() and (b == 1).all()


# ---- Triton, and a GPU --------------------------------------------------------------------------------------------------


def interpreter_cases() -> list[uc.Case]:
    """Two for each rule and type of state, so that every rule meets shards, masks, scales and whole tiles, and every type of weights each
    of them: a program of the interpreter takes a tenth of a second."""
    names = itertools.cycle(("stochastic", "bit-mask", "random-mask", "far"))
    chosen = []
    for k, (rule, held) in enumerate(uc.RULES):
        wild = [("wild-scale-dead", torch.float16), ("scale-number-last", torch.float32)] if k in (0, 5) else []
        for name, dtype in (("shard", cases.DTYPES[k % 3]), (next(names), cases.DTYPES[(k + 1) % 3]), *wild):
            (case,) = [
                c for c in uc.CASES if (c.rule, c.state_dtype, c.dtype) == (rule, held, dtype) and c.name.endswith(f"-{name}")
            ]
            chosen.append(replace(case, sizes=tuple(min(n, 1100) for n in case.sizes[-2:])))
    return chosen


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    assert interpreter.run_tests("-k", "test_triton_case", __file__) == len(interpreter_cases())


if interpreter.INTERPRETED:

    @pytest.mark.parametrize("case", interpreter_cases(), ids=lambda c: c.name)
    def test_triton_case(case: uc.Case) -> None:
        """And no pass if the last coefficient says so."""
        from zo_kernels._backends import triton

        case = replace(case, name=f"{case.name}-small")
        uc.check(triton.update, case)
        p = case.rule_pass()
        untouched = uc.result(lambda *args: None, case)
        changes = [replace(p, coefs=[*p.coefs[:-1], float("nan")]), replace(p, numbers=[0.0, *p.numbers[1:]])]
        for changed in changes[: 2 if case.dtype == torch.float16 else 0]:
            for a, b in zip(uc.result(triton.update, case, changed), untouched, strict=True):
                assert torch.equal(cases.bits(a), cases.bits(b))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["cuda", "triton"])
class TestOnTheGPU:
    @staticmethod
    def run(name: str) -> uc.Run:
        from zo_kernels import _backends

        if reason := _backends.load(name).status():
            pytest.skip(reason)
        return _backends.load(name).update  # type: ignore[no-any-return]

    @pytest.mark.parametrize("case", uc.CASES, ids=lambda c: c.name)
    def test_case(self, name: str, case: uc.Case) -> None:
        uc.check(self.run(name), case, "cuda")

    @pytest.mark.parametrize(("rule", "held"), uc.RULES, ids=str)
    @pytest.mark.parametrize("terms", [1, 11])
    def test_numbers_on_the_device(self, name: str, rule: str, held: torch.dtype, terms: int) -> None:
        """Nothing waits for the device, whether the pass is made or not."""
        run = self.run(name)
        case = uc.Case("", rule, torch.float16, held, sizes=(700,), terms=terms, rounding="stochastic")
        p = case.rule_pass()
        want, untouched = uc.result(reference.update, case), uc.result(lambda *args: None, case)
        for changed, expected in ((p, want), (replace(p, numbers=[0.0, *p.numbers[1:]]), untouched)):
            plan, states, buffers = case.make("cuda")
            there = on_device(changed, "cuda")
            run(plan, states, replace(there, numbers=torch.zeros_like(there.numbers)))  # compiles and uploads; writes nothing
            torch.cuda.set_sync_debug_mode("error")
            try:
                run(plan, states, there)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert all(same_bits(a.cpu(), b) for a, b in zip(buffers, expected, strict=True))
