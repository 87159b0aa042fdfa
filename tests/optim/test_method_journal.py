"""Every method's run can be recorded, replayed, resumed, saved, copied and interrupted, to the bit.

Belongs here: what the parts of a method add to that. Does not belong here: the file (tests/journal), plain MeZO's records (test_journal_run.py).
"""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zo_kernels as zk
from tests.kernels.cases import same_bits
from tests.optim.methods import CASES, EPS, EVERY, JOURNALED, SEED, Tiny, first_order_of, in_turn, values
from zo_kernels import journal

DTYPES = (torch.float32, torch.bfloat16)
each_run = pytest.mark.parametrize(("name", "mode"), JOURNALED)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Parts that no constructor combines, by what could go wrong: masks and scales made from weights that a projection moves, state of blocks that come and
# go, history over queries, limits that a rule's own passes must keep.
COMBINED: dict[str, Callable[..., zk.ZOStep]] = {
    "dizo with a magnitude mask": lambda m, **k: CASES["dizo"].make(m, direction=zk.MagnitudeSparse(0.6), **k),
    "dizo with scales": lambda m, **k: CASES["dizo"].make(m, direction=zk.LayerScale(every=2), **k),
    "dizo with momentum": lambda m, **k: CASES["dizo"].make(m, rule=zk.Momentum(0.8), **k),
    "dizo with quantiles": lambda m, **k: CASES["dizo"].make(m, clip=zk.QuantileClip(0.6, 4, 2), **k),
    "blocks with a magnitude mask": lambda m, **k: CASES["blockwise"].make(m, direction=zk.MagnitudeSparse(0.6), **k),
    "blocks with a random mask": lambda m, **k: CASES["blockwise"].make(m, direction=zk.RandomSparse(0.5, 2), **k),
    "scales by the gradient with momentum": lambda m, **k: CASES["momentum"].make(
        m, direction=zk.LayerScale("gradient", every=2), **k
    ),
    "dizo with scales by the gradient": lambda m, **k: CASES["dizo"].make(m, direction=zk.LayerScale("gradient", every=2), **k),
    "blocks with low-rank momentum": lambda m, **k: CASES["lozo-m"].make(m, every=2, blocks=zk.Blocks(), **k),
    "dizo with low-rank momentum": lambda m, **k: CASES["dizo"].make(
        m, direction=zk.LowRank(2, 2), rule=zk.LowRankMomentum(0.8), **k
    ),
    "dizo with Adam": lambda m, **k: CASES["dizo"].make(m, rule=zk.Adam(0.8, 0.95), lr=1e-3, **k),
    "dizo with HiZOO": lambda m, **k: CASES["hizoo"].make(m, projection=zk.Projection(3, 2, layers=["weight"]), **k),
    "dizo by backpropagation with recomputed momentum": lambda m, **k: CASES["dizo-fo"].make(
        m, rule=zk.Momentum(0.8, state="recomputed", history=4), **k
    ),
    "blocks with low rank": lambda m, **k: CASES["blockwise"].make(m, direction=zk.LowRank(2, 4), **k),
    "blocks with HiZOO": lambda m, **k: CASES["hizoo"].make(m, blocks=zk.Blocks(), **k),
    "masked momentum": lambda m, **k: CASES["momentum"].make(m, direction=zk.RandomSparse(0.5, 3), **k),
    "magnitude-masked Adam": lambda m, **k: CASES["adam"].make(m, direction=zk.MagnitudeSparse(0.5), **k),
    "scaled momentum": lambda m, **k: CASES["momentum"].make(m, direction=zk.LayerScale(every=3), **k),
    "bfloat16 momentum": lambda m, **k: CASES["momentum"].make(m, state_dtype="bfloat16", **k),
    "bfloat16 Adam": lambda m, **k: CASES["adam"].make(m, state_dtype="bfloat16", **k),
    "recomputed momentum of queries": lambda m, **k: CASES["momentum-recomputed"].make(m, queries=2, **k),
    "one-sided momentum": lambda m, **k: CASES["momentum"].make(m, one_sided=True, queries=2, **k),
    "conservative with a mask": lambda m, **k: CASES["conservative"].make(m, direction=zk.RandomSparse(0.5), **k),
    "scale-free momentum": lambda m, **k: CASES["momentum"].make(m, scale_free=zk.ScaleFree(0.9), **k),
    "scale-free Adam of queries": lambda m, **k: CASES["adam"].make(m, queries=2, scale_free=zk.ScaleFree(0.9), **k),
    "scale-free conservative": lambda m, **k: CASES["conservative"].make(m, scale_free=zk.ScaleFree(0.9), **k),
    "scale-free dizo with scales by the gradient": lambda m, **k: CASES["dizo"].make(
        m, direction=zk.LayerScale("gradient", every=2), scale_free=zk.ScaleFree(0.9), **k
    ),
    "scale-free blocks with quantiles": lambda m, **k: CASES["blockwise"].make(
        m, scale_free=zk.ScaleFree(0.9), clip=zk.QuantileClip(0.6, 4, 2), **k
    ),
    "low rank with quantiles": lambda m, **k: CASES["lozo"].make(m, clip=zk.QuantileClip(0.6, 4, 2), **k),
}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(same_bits(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def closure_of(model: nn.Module, step: zk.ZOStep) -> Callable[[], Tensor]:
    """Other data in each step; one step's loss is no number."""
    k = step.steps
    return lambda: model(slice(k % 4, k % 4 + 6)) * (math.nan if k == 3 else 1.0)


def go_on(model: nn.Module, step: zk.ZOStep, until: int) -> None:
    while step.steps < until:
        step.step(closure_of(model, step))


def check_run(make: Callable[..., zk.ZOStep], dtype: torch.dtype, path: Path, **options: Any) -> None:
    """13 steps with a journal, and the same weights from a replay, from a replay of a part, and from a run that was resumed halfway."""
    base, half = Tiny(dtype), path.with_suffix(".half")
    live = copy.deepcopy(base)
    step = make(live, journal=path, **options)
    go_on(live, step, 7)
    half.write_bytes(path.read_bytes())
    earlier = copy.deepcopy(live)
    go_on(live, step, 13)
    step.close_journal()
    assert step.skipped == 1 and not same(live, earlier) and not same(earlier, base)
    again = copy.deepcopy(base)
    zk.replay(again, path)
    assert same(again, live)
    part = copy.deepcopy(base)
    zk.replay(part, path, upto=7)
    assert same(part, earlier)
    resumed = copy.deepcopy(base)
    other = make(resumed, journal=half, resume=True, **options)
    assert other.steps == 7 and other.skipped == 1 and same(resumed, earlier)
    go_on(resumed, other, 13)
    other.close_journal()
    assert same(resumed, live)
    assert half.read_bytes() == path.read_bytes()


# test_net.py replays, resumes, loads and copies every method in both modes; these are the settings that it lacks.
BEYOND_THE_NET = ("one-sided", "momentum-2", "blockwise-patterns", "momentum-blocks")


@each_dtype
@pytest.mark.parametrize(("name", "mode"), [run for run in JOURNALED if run[0] in BEYOND_THE_NET])
def test_replay_and_resume_give_the_bits_of_the_run(tmp_path: Path, name: str, mode: str, dtype: torch.dtype) -> None:
    check_run(CASES[name].make, dtype, tmp_path / "run.zoj", perturbation=mode, weight_decay=0.1)


@pytest.mark.parametrize("mode", ["scratch", "inplace"])
@pytest.mark.parametrize("name", COMBINED)
def test_combined_parts_replay_and_resume(tmp_path: Path, name: str, mode: str) -> None:
    check_run(COMBINED[name], torch.bfloat16, tmp_path / "run.zoj", perturbation=mode)


class Wrapped(nn.Module):
    """As DistributedDataParallel and others hold a module: its parameters' names begin with `module.`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *rows: Any) -> Any:
        return self.module(*rows)


WRAPPED: dict[str, Callable[..., zk.ZOStep]] = {
    "dizo": CASES["dizo"].make,
    "dizo, a pattern of whole names": lambda m, **k: zk.DiZO(
        m, 2e-3, EPS, every=2, inner=2, layers=[r"^layers\.0\.weight$"], seed=SEED, **k
    ),
    "dizo by backpropagation": CASES["dizo-fo"].make,
    "scales by the gradient": CASES["layer-scale-gradient"].make,
    "blocks, patterns of whole names": lambda m, **k: zk.BlockwiseZO(m, 2e-3, EPS, by=["^layers", "^norm"], seed=SEED, **k),
    "low-rank momentum": CASES["lozo-m"].make,
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_run_of_a_wrapped_model_goes_on_without_the_wrapper(tmp_path: Path, name: str) -> None:
    """Streams, patterns, anchors and turns are of canonical names. Would catch: DiZO's scalars drawn from the name with the wrapper's prefix."""
    wrapped, bare, whole, path = Wrapped(Tiny()), Tiny(), Tiny(), tmp_path / "run.zoj"
    step = WRAPPED[name](wrapped, journal=path)
    go_on(wrapped, step, 7)
    step.close_journal()
    other = WRAPPED[name](bare, journal=path, resume=True)
    assert other.steps == 7 and same(wrapped, bare) and not same(bare, Tiny())
    go_on(bare, other, 13)
    other.close_journal()
    go_on(whole, WRAPPED[name](whole), 13)
    assert same(bare, whole)
    replayed = Wrapped(Tiny())
    zk.replay(replayed, path)
    assert same(replayed, bare)


@pytest.mark.parametrize("learn", ["forward", "backpropagation"])
@pytest.mark.parametrize("mode", ["scratch", "inplace"])
def test_a_skipped_step_is_not_projected(tmp_path: Path, mode: str, learn: str) -> None:
    """Nor is it in its replay, nor where the run goes on from right before, or behind, a projection."""
    options: dict[str, Any] = {"every": 2, "inner": 2, "layers": ["weight"], "seed": SEED, "learn": learn, "perturbation": mode}
    live, path = Tiny(torch.bfloat16), tmp_path / "run.zoj"
    step = zk.DiZO(live, 1e-2, EPS, journal=path, **options)
    lengths = [path.stat().st_size]
    while step.steps < 8:  # the fourth, which would end with a projection, is skipped
        step.step(closure_of(live, step))
        lengths.append(path.stat().st_size)
    step.close_journal()
    assert step.skipped == 1
    own = slice(1, 1 + (2 if learn == "forward" else 3))
    inner = journal.read(path).records["groups"]["coef"][:, 0, own]
    assert [bool(row.any()) for row in inner] == [False, True, False, False, False, True, False, True]
    again = Tiny(torch.bfloat16)
    zk.replay(again, path)
    assert same(again, live)
    for at in (3, 4, 5, 6):
        part = path.with_suffix(f".{at}")
        part.write_bytes(path.read_bytes()[: lengths[at]])
        resumed = Tiny(torch.bfloat16)
        other = zk.DiZO(resumed, 1e-2, EPS, journal=part, resume=True, **options)
        assert other.steps == at
        go_on(resumed, other, 8)
        other.close_journal()
        assert same(resumed, live) and part.read_bytes() == path.read_bytes()


def test_a_journal_that_projected_before_its_steps_is_refused_by_name(tmp_path: Path) -> None:
    """Its records mean other weights than those of this version's, which has `learn` in the description of a projection."""
    model, path = Tiny(), tmp_path / "run.zoj"
    step = CASES["dizo"].make(model, journal=path)
    go_on(model, step, 2)
    step.close_journal()
    header = journal.read(path).header
    assert header.method is not None
    old = {k: v for k, v in header.method["projection"].items() if k != "learn"}
    older = tmp_path / "older.zoj"
    journal.create(older, dataclasses.replace(header, method={**header.method, "projection": old})).close()
    before = older.read_bytes()
    with pytest.raises(ValueError, match=r"projected \(DiZO\) before every .* take the version that wrote it"):
        zk.replay(Tiny(), older)
    with pytest.raises(ValueError, match=r"projected \(DiZO\) before every .* take the version that wrote it"):
        CASES["dizo"].make(Tiny(), journal=older, resume=True)
    assert older.read_bytes() == before


def saved(x: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer)


ALL: dict[str, Callable[..., zk.ZOStep]] = {**{n: c.make for n, c in CASES.items()}, **COMBINED}
ALL_MODES = [*EVERY, *((n, m) for n in COMBINED for m in ("scratch", "inplace"))]


@pytest.mark.parametrize(("name", "mode"), ALL_MODES)
def test_a_saved_run_goes_on_bit_for_bit(name: str, mode: str) -> None:
    """Into an optimizer that was made with another seed, on weights that were loaded before (scratch) or after (in place) it was made; and into one
    that has run."""
    order = "model first" if mode == "scratch" else "optimizer first"
    model = Tiny(torch.bfloat16)
    step = ALL[name](model, perturbation=mode)
    used = Tiny(torch.bfloat16)
    stepped = ALL[name](used, perturbation=mode, seed=SEED + 2)
    go_on(model, step, 6)
    go_on(used, stepped, 3)
    weights, state = saved(model.state_dict()), saved(step.state_dict())
    if name == "hybrid":
        assert state["param_groups"][0]["zo"]["tag"] == 6
    fresh = Tiny(torch.bfloat16)
    if order == "model first":
        fresh.load_state_dict(weights)
    other = ALL[name](fresh, perturbation=mode, seed=SEED + 1)
    if order == "optimizer first":
        fresh.load_state_dict(weights)
    other.load_state_dict(state)
    used.load_state_dict(weights)
    stepped.load_state_dict(state)
    for o, m in ((step, model), (other, fresh), (stepped, used)):
        go_on(m, o, 13)
        assert o.skipped == step.skipped
    assert same(model, fresh) and same(model, used)


@pytest.mark.parametrize(("name", "mode"), [run for run in ALL_MODES if run[0] in COMBINED or run[0] in BEYOND_THE_NET])
def test_a_copied_run_goes_on_bit_for_bit(name: str, mode: str) -> None:
    model = Tiny(torch.bfloat16)
    step = ALL[name](model, perturbation=mode)
    go_on(model, step, 6)
    twin, copied = copy.deepcopy((model, step))
    before = copy.deepcopy(twin)
    go_on(model, step, 13)
    assert same(twin, before), "what the copy holds is its own"
    go_on(twin, copied, 13)
    assert same(model, twin) and not same(model, before)


class Boom(Exception):
    pass


@pytest.mark.parametrize(("name", "mode", "start"), in_turn(ALL_MODES, [0, 5]))
def test_a_closure_that_fails_in_any_forward_leaves_no_trace(name: str, mode: str, start: int) -> None:
    """In scratch mode to the bit, weights and what the method remembers; in place to within the rounding of the passes. The next step is that of a run
    without the failure."""
    model, steady = Tiny(), Tiny()
    step, calm = (ALL[name](m, perturbation=mode) for m in (model, steady))
    go_on(steady, calm, start + 1)
    forwards = 0

    def counted() -> Tensor:
        nonlocal forwards
        forwards += 1
        return steady()

    twin, copied = copy.deepcopy((steady, calm))  # steady's own closure is another model's: count on it
    copied.step(lambda: (counted(), twin())[1])
    assert forwards >= 1
    go_on(model, step, start)
    before, passes = values(model), 0
    for which in range(forwards):
        calls = 0

        def failing(which: int = which) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == which + 1:
                raise Boom
            return model(slice(start % 4, start % 4 + 6))

        state = torch.get_rng_state()
        with pytest.raises(Boom):
            step.step(failing)
        assert torch.equal(torch.get_rng_state(), state)
        passes += which + 1
        bound = 0.0 if mode == "scratch" else passes * (2**-24 * 2.2 + 2**-17 * EPS * 4.5)
        for n, p in model.named_parameters():
            assert float((p - before[n]).detach().abs().max()) <= bound, (n, which)
        assert step.steps == start and step.skipped == calm.skipped
    go_on(model, step, start + 1)
    if mode == "inplace" and "mag" in str(step.method()):
        return  # the weight that is the threshold has moved by a rounding, out of the mask or not
    for n, p in steady.named_parameters():
        difference = float((dict(model.named_parameters())[n] - p).detach().abs().max())
        assert difference == 0 if mode == "scratch" else difference < 2e-3, n


# ---- what is refused ----------------------------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {"lr": 1e-3, "seed": SEED}
LAZY: dict[str, Any] = {"perturbation": "inplace", "lazy": True}
HIZOO: dict[str, Any] = {"rule": zk.HessianDiagonal(), "direction": zk.InverseRoot(), "estimator": zk.ThreePoint()}
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"estimator": zk.SGD()}, TypeError, "estimator=SGD.* must be one of TwoSided"),
    ({"rule": zk.TwoSided()}, TypeError, "rule=TwoSided.* must be one of SGD"),
    ({"direction": zk.SGD()}, TypeError, "direction=SGD.* must be one of Dense"),
    ({"estimator": zk.TwoSided(2), **LAZY}, ValueError, "lazy=True .* one query, SGD or Sign, dense"),
    ({"estimator": zk.OneSided(), **LAZY}, ValueError, "lazy=True .* two-sided"),
    ({"rule": zk.Momentum(), **LAZY}, ValueError, "lazy=True"),
    ({"direction": zk.RandomSparse(), **LAZY}, ValueError, "lazy=True"),
    ({"blocks": zk.Blocks(), **LAZY}, ValueError, "lazy=True"),
    ({"clip": zk.QuantileClip(), **LAZY}, ValueError, "lazy=True"),
    ({"scale_free": zk.ScaleFree(), **LAZY}, ValueError, "lazy=True .* g as it is"),
    ({"scale_free": zk.ScaleFree(), "cuda_graph": True}, ValueError, "cuda_graph=True .* scale_free"),
    ({"scale_free": 0.9}, TypeError, "scale_free=0.9 must be a ScaleFree"),
    ({"scale_free": zk.ScaleFree(), "rule": zk.Sign()}, ValueError, "the sign of g alone"),
    ({"scale_free": zk.ScaleFree(), "estimator": zk.OneSided(4, normalize=True)}, ValueError, "FZOO has it"),
    ({"scale_free": zk.ScaleFree(), "estimator": zk.Shaped(4)}, ValueError, "free of the loss's scale already"),
    ({"scale_free": zk.ScaleFree(), **HIZOO}, ValueError, "its H grows with the loss's scale"),
    ({"rule": zk.Momentum(state="recomputed"), "cuda_graph": True}, ValueError, "cuda_graph=True .*a recomputed one differs"),
    ({"blocks": zk.Blocks(), "cuda_graph": True}, ValueError, "cuda_graph=True"),
    ({"estimator": zk.ForwardGradient(), "cuda_graph": True}, ValueError, "cuda_graph=True"),
    ({"rule": zk.HessianDiagonal()}, ValueError, "parts of one method, HiZOO: give all three"),
    ({"rule": zk.HessianDiagonal(), "estimator": zk.ThreePoint()}, ValueError, "HiZOO: give all three"),
    ({"direction": zk.InverseRoot()}, ValueError, "HiZOO: give all three"),
    ({"rule": zk.HessianDiagonal(), "direction": zk.InverseRoot()}, ValueError, "HiZOO: give all three"),
    ({**HIZOO, "kind": "rademacher"}, ValueError, "tells nothing about single weights"),
    ({"direction": zk.LowRank(), "kind": "rademacher"}, ValueError, "Gaussian factors, not rademacher ones"),
    ({"direction": zk.LowRank(), "rule": zk.Momentum()}, ValueError, r"of no low rank once V changes; take LowRankMomentum\(\)"),
    ({"rule": zk.LowRankMomentum()}, ValueError, r"with dense directions.*take Momentum\(\)"),
    ({"direction": zk.LowRank(), "rule": zk.Adam()}, ValueError, "LowRank.*take SGD"),
    ({"rule": zk.Conservative(), "estimator": zk.TwoSided(2)}, ValueError, "tries one direction; give queries=1"),
    ({"rule": zk.Conservative(), "direction": zk.LayerScale()}, ValueError, "the two have other scales"),
    ({"rule": zk.Conservative(), "direction": zk.LowRank()}, ValueError, "the two have other scales"),
    ({"rule": zk.Conservative(), "estimator": zk.ForwardGradient()}, ValueError, "its trials perturb weights"),
    ({"estimator": zk.ForwardGradient(), "perturbation": "inplace"}, ValueError, "differentiates the model: give a plain"),
    ({"rule": zk.Momentum(state="recomputed"), "direction": zk.RandomSparse()}, ValueError, "past masks and scales are gone"),
    ({"rule": zk.Adam(state="recomputed"), "direction": zk.LayerScale()}, ValueError, "past masks and scales are gone"),
    ({"rule": zk.Adam(state="recomputed"), "estimator": zk.TwoSided(2)}, ValueError, "no sum of squares"),
    ({"direction": zk.LayerScale(), "blocks": zk.Blocks()}, ValueError, "of which a block is a part"),
    ({"projection": zk.Projection(), "blocks": zk.Blocks()}, ValueError, "projection with blocks"),
    ({"projection": zk.Projection(), "rule": zk.Conservative()}, ValueError, "projection with blocks or Conservative"),
    ({"clip": 0.0}, ValueError, "clip=0.0 must be positive"),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "error", "match"), REFUSED, ids=range(len(REFUSED)))
def test_parts_that_make_no_sense_together_are_refused_with_the_reason(parts: dict[str, Any], error: Any, match: str) -> None:
    model = Tiny()
    before = copy.deepcopy(model)
    with pytest.raises(error, match=match):
        zk.ZOStep(model, **{**PLAIN, **parts})
    assert same(model, before)


VALUES: list[tuple[Callable[[], Any], str]] = [
    (lambda: zk.TwoSided(0), "queries=0"),
    (lambda: zk.OneSided(1, normalize=True), "needs at least 2 losses"),
    (lambda: zk.Momentum(beta=1.0), r"beta=1.0 must be in \[0, 1\)"),
    (lambda: zk.Momentum(state="kept"), "state='kept'"),
    (lambda: zk.Momentum(dtype="float16"), "dtype='float16'"),
    (lambda: zk.Momentum(history=0), "history=0"),
    (lambda: zk.Adam(beta2=-0.1), "beta2=-0.1"),
    (lambda: zk.Adam(eps=0.0), "eps=0.0 must be a positive normal number"),
    (lambda: zk.HessianDiagonal(alpha=1.0), "alpha=1.0"),
    (lambda: zk.HessianDiagonal(low=2.0), "low=2.0 .*must hold 1"),
    (lambda: zk.RandomSparse(keep=1.5), "1.5"),
    (lambda: zk.RandomSparse(every=0), "every=0"),
    (lambda: zk.MagnitudeSparse(0.0), "quantile=0.0"),
    (lambda: zk.LayerScale(estimate="mean"), "estimate='mean'"),
    (lambda: zk.LayerScale(least=0.0), "least=0.0"),
    (lambda: zk.LowRank(0), "rank=0"),
    (lambda: zk.LowRank(65), "rank=65"),
    (lambda: zk.Blocks("tensor"), "by='tensor'"),
    (lambda: zk.Blocks(["("]), "no regular expression"),
    (lambda: zk.Blocks(order="sorted"), "order='sorted'"),
    (lambda: zk.Projection(tau=1.0), "tau=1.0"),
    (lambda: zk.Projection(inner=0), "inner=0"),
    (lambda: zk.Projection(learn="backward"), "learn='backward' must be one of"),
    (lambda: zk.LowRankMomentum(1.0), r"beta=1.0 must be in \[0, 1\)"),
    (lambda: zk.LOZO(Tiny(), 1e-3, momentum=-0.5), r"beta=-0.5 must be in \[0, 1\)"),
    (
        lambda: zk.HybridZO(
            m := Tiny(), 1e-3, projection=zk.Projection(layers=["0.weight"]), first_order=torch.optim.SGD(m.norm.parameters(), 0.1)
        ),
        "projection with first_order",
    ),
    (lambda: zk.ScaleFree(1.0), r"beta=1.0 must be in \[0, 1\)"),
    (lambda: zk.ScaleFree(True), "beta=True"),
    (lambda: zk.QuantileClip(1.1), "q=1.1"),
    (lambda: zk.QuantileClip(window=5, least=6), "least=6"),
    (lambda: zk.BlockwiseZO(Tiny(), 1e-3, by=["weight$"]), "'layers.0.bias' matches none"),
    (lambda: zk.BlockwiseZO(Tiny(), 1e-3, by=["", "nothing"]), "'nothing' matches no parameter"),
    (lambda: zk.DiZO(Tiny(), 1e-3, layers=["nothing"]).step(lambda: 1.0), "no parameter matches"),
    (lambda: zk.HybridZO(m := Tiny(), 1e-3, first_order=torch.optim.SGD(m.parameters(), 0.1)), "has all of its trainable parameters"),
    (
        lambda: zk.HybridZO(m := Tiny(), 1e-3, maximize=True, first_order=torch.optim.SGD(m.norm.parameters(), 0.1)),
        "give both the same maximize",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "match"), VALUES, ids=range(len(VALUES)))
def test_values_out_of_range_are_named(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_a_hybrid_run_has_no_journal(tmp_path: Path) -> None:
    model = Tiny()
    with pytest.raises(ValueError, match="backpropagation are no record of scalars"):
        CASES["hybrid"].make(model, journal=tmp_path / "run.zoj")
    step = CASES["hybrid"].make(model)
    with pytest.raises(RuntimeError, match="backpropagation are no record of scalars"):
        step.open_journal(tmp_path / "run.zoj")
    assert not list(tmp_path.iterdir())


def test_a_hybrid_run_goes_on_with_both_state_dicts() -> None:
    model, fresh = Tiny(), Tiny()
    adam = torch.optim.Adam(model.norm.parameters(), lr=1e-2)
    step = zk.HybridZO(model, 2e-3, EPS, first_order=adam, seed=SEED)
    go_on(model, step, 6)
    fresh.load_state_dict(model.state_dict())
    other_adam = torch.optim.Adam(fresh.norm.parameters(), lr=1e-2)
    other = zk.HybridZO(fresh, 2e-3, EPS, first_order=other_adam)
    other.load_state_dict(saved(step.state_dict()))
    other_adam.load_state_dict(saved(adam.state_dict()))
    go_on(model, step, 12)
    go_on(fresh, other, 12)
    assert same(model, fresh)


@each_run
def test_a_journal_that_is_opened_in_mid_run_replays_or_is_refused(tmp_path: Path, name: str, mode: str) -> None:
    """A record of a method whose steps depend on their number, or on earlier ones, means nothing without those."""
    model, path = Tiny(), tmp_path / "run.zoj"
    step = CASES[name].make(model, perturbation=mode)
    go_on(model, step, 3)
    if step.method() is not None:
        with pytest.raises(RuntimeError, match=r"after 3 steps: .* before the first step"):
            step.open_journal(path)
        assert not path.exists()
        go_on(model, step, 5)
        return
    base = copy.deepcopy(model)
    step.open_journal(path)
    go_on(model, step, 9)
    step.close_journal()
    zk.replay(base, path)
    assert same(base, model)


@each_run
def test_a_run_of_another_method_is_not_resumed(tmp_path: Path, name: str, mode: str) -> None:
    model, path = Tiny(), tmp_path / "run.zoj"
    step = CASES[name].make(model, perturbation=mode, journal=path)
    go_on(model, step, 2)
    step.close_journal()
    other: dict[str, Any] = {"perturbation": mode, "journal": path, "resume": True}
    another = CASES["mezo" if name == "momentum" else "momentum"]
    with pytest.raises(ValueError, match=r"the journal belongs to another run: its (method|terms|kind) is"):
        another.make(Tiny(), **other)
    if step.method() is None:
        zk.replay(Tiny(), path, mode="fused")
    else:
        with pytest.raises(ValueError, match="'sequential'"):
            zk.replay(Tiny(), path, mode="fused")
    assert journal.read(path).header.method == step.method()


def test_the_optimizer_of_the_other_half_is_left_out() -> None:
    model = Tiny()
    step = zk.HybridZO(model, 1e-3, first_order=first_order_of(model))
    assert [n for g in step.param_groups for n in g["param_names"]] == [n for n in values(model) if not n.startswith("norm")]
