"""The state of an optimizer: what each parameter remembers, and what is saved, loaded and refused.

Belongs here: states of parameters that see different steps, the contract of torch.optim.Optimizer about state. Does not belong here: what each method
computes (test_methods.py), that every method goes on to the bit (test_method_journal.py).
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import zo_kernels as zk
from tests.kernels.cases import same_bits
from tests.optim.methods import CASES, EPS, SEED, Tiny, values
from tests.optim.test_method_journal import closure_of, go_on, same, saved
from zo_kernels import journal
from zo_kernels.optim import saved as form

SIZE = 512


def param() -> nn.Parameter:
    return nn.Parameter(torch.zeros(SIZE))


def z(name: str, tag: int) -> Tensor:
    return zk.normal(SIZE, seed=SEED, stream=zk.stream_of(name), tag=tag).double()


class Twin:
    """One parameter under torch's own optimizer in float64, fed with g z in the steps that it takes part in."""

    def __init__(self, name: str, make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
        self.name, self.p = name, nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
        self.optimizer = make([self.p])

    def step(self, g: float, tag: int) -> None:
        self.p.grad = g * z(self.name, tag)
        self.optimizer.step()


ADAM: dict[str, Any] = {"lr": 1e-3, "betas": (0.8, 0.9)}
RULES: dict[str, tuple[Any, Callable[[list[Tensor]], torch.optim.Optimizer]]] = {
    "adam": (zk.Adam(0.8, 0.9), lambda ps: torch.optim.Adam(ps, **ADAM)),
    "adam recomputed": (zk.Adam(0.8, 0.9, state="recomputed", history=64), lambda ps: torch.optim.Adam(ps, **ADAM)),
    "momentum": (zk.Momentum(0.8), lambda ps: torch.optim.SGD(ps, lr=1e-3, momentum=0.8)),
    "momentum recomputed": (zk.Momentum(0.8, "recomputed", 64), lambda ps: torch.optim.SGD(ps, lr=1e-3, momentum=0.8)),
}
each_rule = pytest.mark.parametrize("rule", RULES)


def run(step: zk.ZOStep, twins: dict[str, Twin], count: int, part: Callable[[int], set[str]] | None = None) -> None:
    """Steps with losses of their own choice, and the twins of those that take part (None: of all)."""
    for _ in range(count):
        k = step.steps
        losses = itertools.cycle([math.sin(k + 1.0), -math.cos(2.0 * k)])
        step.step(lambda losses=losses: next(losses))  # type: ignore[misc]
        assert step.projected_gradient is not None
        for name in twins.keys() if part is None else part(k):
            twins[name].step(float(step.projected_gradient), step.tags_of(k)[0])


def check(step: zk.ZOStep, twins: dict[str, Twin]) -> None:
    params = {n: p for g in step.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}
    for name, twin in twins.items():
        size = float(twin.p.detach().abs().max())
        assert size > 1e-3, "a parameter that does not move shows nothing"
        assert float((params[name].detach().double() - twin.p.detach()).abs().max()) < 1e-3 * size, name


@each_rule
@pytest.mark.parametrize("order", ["cyclic", "random"])
def test_a_block_remembers_its_own_steps(rule: str, order: str) -> None:
    blocks = zk.Blocks(["^a$", "^b$"], order, every=2)
    step = zk.ZOStep([("a", param()), ("b", param())], 1e-3, EPS, rule=RULES[rule][0], blocks=blocks, seed=SEED)
    twins = {n: Twin(n, RULES[rule][1]) for n in "ab"}
    run(step, twins, 14, lambda k: {"ab"[blocks.at(k, 2, SEED)]})
    check(step, twins)


@each_rule
def test_what_is_added_frozen_or_unfrozen_remembers_its_own_steps(rule: str) -> None:
    a, b, c = param(), param(), param()
    step = zk.ZOStep([("a", a), ("b", b)], 1e-3, EPS, rule=RULES[rule][0], seed=SEED)
    twins = {n: Twin(n, RULES[rule][1]) for n in "abc"}
    both = {n: twins[n] for n in "ab"}
    run(step, both, 5)
    b.requires_grad_(False)
    run(step, {"a": twins["a"]}, 3)
    b.requires_grad_(True)
    run(step, both, 4)
    step.add_param_group({"params": [("c", c)]})
    run(step, twins, 6)
    check(step, twins)


@each_rule
def test_a_skipped_step_is_none(rule: str) -> None:
    """It ages nothing and counts nothing."""
    step = zk.ZOStep([("a", param())], 1e-3, EPS, rule=RULES[rule][0], seed=SEED)
    twins = {"a": Twin("a", RULES[rule][1])}
    for _ in range(3):
        run(step, twins, 3)
        step.step(lambda: math.nan)
    run(step, twins, 2)
    assert step.skipped == 3
    check(step, twins)


@each_rule
def test_what_moves_to_another_group_takes_its_past_along(rule: str) -> None:
    """Its gradients were those of the group that it was in, with that group's eps."""
    a, b = param(), param()
    make = RULES[rule][1]
    step = zk.ZOStep([{"params": [("a", a)]}, {"params": [("b", b)], "eps": 2 * EPS}], 1e-3, EPS, rule=RULES[rule][0], seed=SEED)
    twins = {n: Twin(n, make) for n in "ab"}

    def steps(count: int, halved: set[str]) -> None:
        for _ in range(count):
            k, losses = step.steps, itertools.cycle([math.sin(step.steps + 1.0), 0.3])
            step.step(lambda losses=losses: next(losses))  # type: ignore[misc]
            for n, twin in twins.items():
                twin.step(float(step.projected_gradient or 0) / (2 if n in halved else 1), step.tags_of(k)[0])

    steps(5, {"b"})
    first, second = step.param_groups
    for key in ("params", "param_names"):
        second[key].insert(0, first[key].pop())
    run_rest = step.projected_gradient
    assert run_rest is not None
    for _ in range(5):  # the first group is empty; its g is that of its own eps
        k, losses = step.steps, itertools.cycle([math.sin(step.steps + 1.0), 0.3])
        step.step(lambda losses=losses: next(losses))  # type: ignore[misc]
        for twin in twins.values():
            twin.step(float(step.projected_gradient or 0) / 2, step.tags_of(k)[0])
    check(step, twins)
    assert len(step._run.rule.cohorts) == (2 if "recomputed" in rule else 1), "one launch for what has seen as many steps"


def test_a_parameter_added_late_moves_by_lr_in_its_first_step() -> None:
    a, b = param(), param()
    step = zk.ZOAdam([("a", a)], lr=1e-3, perturbation="inplace")
    for _ in range(200):
        step.step(lambda: a.sum())
    step.add_param_group({"params": [("b", b)]})
    step.step(lambda: a.sum() + b.sum())
    assert 0.98 < float(b.detach().abs().mean()) / 1e-3 < 1.02


@pytest.mark.parametrize("rule", ["adam recomputed", "momentum recomputed"])
def test_after_a_whole_history_two_cohorts_are_one(rule: str) -> None:
    made = type(RULES[rule][0])
    step = zk.ZOStep([("a", param())], 1e-3, EPS, rule=made(state="recomputed", history=4), seed=SEED)
    run(step, {}, 3, lambda k: set())
    step.add_param_group({"params": [("b", param())]})
    run(step, {}, 3, lambda k: set())
    assert len(step._run.rule.cohorts) == 2  # of other groups
    step.param_groups[0]["params"].append(step.param_groups[1]["params"].pop())
    step.param_groups[0]["param_names"].append(step.param_groups[1]["param_names"].pop())
    run(step, {}, 5, lambda k: set())
    assert len(step._run.rule.cohorts) == 1


@pytest.mark.parametrize("mode", ["scratch", "inplace"])
@each_rule
def test_a_run_with_a_past_of_many_kinds_is_saved_and_copied_to_the_bit(rule: str, mode: str) -> None:
    def prepared(m: Tiny) -> zk.ZOStep:
        pairs = dict(m.named_parameters())
        groups = [{"params": [("layers.0.weight", pairs["layers.0.weight"]), ("norm.bias", pairs["norm.bias"])]}]
        step = zk.ZOStep(groups, 1e-3, EPS, rule=RULES[rule][0], seed=SEED, model=m, perturbation=mode)
        go_on(m, step, 5)  # the fourth is skipped
        step.add_param_group({"params": [("layers.1.weight", pairs["layers.1.weight"])], "lr": 5e-4})
        pairs["norm.bias"].requires_grad_(False)
        go_on(m, step, 7)
        pairs["norm.bias"].requires_grad_(True)
        go_on(m, step, 9)
        return step

    model, other = Tiny(torch.bfloat16), Tiny(torch.bfloat16)
    step, used = prepared(model), prepared(other)
    go_on(other, used, 11)
    twin, copied = copy.deepcopy((model, step))
    weights, state = saved(model.state_dict()), saved(step.state_dict())
    other.load_state_dict(weights)
    used.load_state_dict(state)
    go_on(model, step, 20)
    go_on(twin, copied, 20)
    go_on(other, used, 20)
    assert same(model, twin) and same(model, other)


def test_a_journal_of_blocks_of_an_earlier_version_replays_as_it_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then all blocks counted all steps, and the header had no word about it. A replay does as that run did; a resume would mix both, and is refused."""
    make = CASES["adam-blocks"].make
    live, base = Tiny(), Tiny()
    step = make(live)
    step._run.rule.together = True
    step.open_journal(tmp_path / "old.zoj")
    go_on(live, step, 9)
    step.close_journal()
    assert "counts" not in (journal.read(tmp_path / "old.zoj").header.method or {})["rule"]
    zk.replay(base, tmp_path / "old.zoj")
    assert same(live, base)
    with pytest.raises(ValueError, match="its method is"):
        make(Tiny(), journal=tmp_path / "old.zoj", resume=True)
    new, again = Tiny(), Tiny()
    step = make(new, journal=tmp_path / "new.zoj")
    go_on(new, step, 9)
    step.close_journal()
    zk.replay(again, tmp_path / "new.zoj")
    assert same(new, again) and not same(new, live)


# ---- maximize -----------------------------------------------------------------------------------------------------------


def test_maximize_is_a_number_of_each_group() -> None:
    a, b = param(), param()
    step = zk.MeZOStep([{"params": [("a", a)]}, {"params": [("b", b)], "maximize": True}], lr=0.1, eps=EPS, perturbation="inplace")
    assert [g["maximize"] for g in step.param_groups] == [False, True] and step.defaults["maximize"] is False
    for _ in range(300):
        step.step(lambda: (a - 1).square().mean() + (b - 1).square().mean())
    assert float((a - 1).detach().square().mean()) < 0.9 and float((b - 1).detach().square().mean()) > 1.1
    before = b.detach().clone()
    step.param_groups[1]["maximize"] = False
    for _ in range(300):
        step.step(lambda: (a - 1).square().mean() + (b - 1).square().mean())
    assert float((b - 1).detach().square().mean()) < float((before - 1).square().mean())


def test_a_journal_of_groups_that_go_apart_replays(tmp_path: Path) -> None:
    def groups(m: Tiny) -> list[dict[str, Any]]:
        pairs = list(m.named_parameters())
        return [{"params": pairs[:3]}, {"params": pairs[3:], "maximize": True}]

    live, base = Tiny(), Tiny()
    step = zk.MeZOStep(groups(live), 1e-3, EPS, model=live, journal=tmp_path / "run.zoj")
    go_on(live, step, 6)
    step.close_journal()
    past = zk.replay(base, tmp_path / "run.zoj")
    assert same(live, base) and past.header.hyperparameters["maximize"] == [False, True]


@pytest.mark.parametrize("name", ["dizo", "conservative", "hybrid"])
def test_what_goes_one_way_for_all_refuses_groups_that_do_not(name: str) -> None:
    model = Tiny()
    groups = [{"params": [("layers.0.weight", model.layers[0].weight)]}, {"params": [("layers.1.weight", model.layers[1].weight)]}]
    step = CASES[name].make(groups, model=model) if name != "hybrid" else CASES[name].make(model)
    if name == "hybrid":
        step.param_groups[0]["maximize"] = True
    else:
        with pytest.raises(ValueError, match="maximize"):
            CASES[name].make([groups[0], {**groups[1], "maximize": True}], model=model)
        step.param_groups[1]["maximize"] = True
    with pytest.raises(ValueError, match="maximize"):
        step.step(model)


def test_a_state_goes_on_in_its_direction() -> None:
    up, other = Tiny(), Tiny()
    step = zk.MeZOStep(up, 1e-3, EPS, maximize=True)
    go_on(up, step, 2)
    other.load_state_dict(up.state_dict())
    loaded = zk.MeZOStep(other, 1e-3, EPS)
    loaded.load_state_dict(step.state_dict())
    go_on(up, step, 4)
    go_on(other, loaded, 4)
    assert same(up, other)


@pytest.mark.parametrize(
    ("mine", "differs"),
    [
        ({"lr": 2e-3}, r"lr 0.001 \(made with 0.002\)\. "),
        ({"eps": 0.3}, rf"eps {EPS:g} \(made with 0.3\)\. "),
        ({"seed": 7}, r"seed 3 \(made with 7\)\. "),
        ({"maximize": True, "seed": 7}, r"seed 3 \(made with 7\), maximize of group 0 False, maximize of group 1 False\. "),
        ({"weight_decay": 0.2}, r"weight_decay of group 0 0.1 \(made with 0.2\)\. "),
    ],
    ids=str,
)
def test_a_state_of_other_numbers_counts_and_is_told(mine: dict[str, Any], differs: str) -> None:
    """As torch's optimizers take them."""
    decay = 0.1 if {"weight_decay", "maximize"} & set(mine) else 0.0
    made = {"lr": 1e-3, "eps": EPS, "seed": 3, "weight_decay": decay}
    model, other = Tiny(), Tiny()
    step, loading = zk.MeZOStep(model, **made), zk.MeZOStep(other, **{**made, **mine})
    with pytest.warns(zk.ZOWarning, match=differs) as told:
        loading.load_state_dict(saved(step.state_dict()))
    assert told[0].filename == __file__
    go_on(model, step, 3)
    go_on(other, loading, 3)
    assert same(model, other)


def test_a_state_of_the_same_numbers_and_a_scheduler_is_no_news() -> None:
    model, other = Tiny(), Tiny()
    step, loading = zk.MeZOStep(model, 1e-3, EPS), zk.MeZOStep(other, 1e-3, EPS)
    scheduler = torch.optim.lr_scheduler.StepLR(step, 1)
    go_on(model, step, 2)
    scheduler.step()
    assert step.param_groups[0]["lr"] < 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error", zk.ZOWarning)
        loading.load_state_dict(saved(step.state_dict()))
    assert loading.param_groups[0]["lr"] == step.param_groups[0]["lr"]


# ---- states that do not fit ---------------------------------------------------------------------------------------------

OTHERS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"rule": zk.Momentum()}, {"rule": zk.Adam()}, "its rule is .*momentum.*adam"),
    ({"rule": zk.Momentum(0.9)}, {"rule": zk.Momentum(0.8)}, "its rule is .*0.9.*0.8"),
    ({"rule": zk.Momentum()}, {"rule": zk.Momentum(state="recomputed")}, "its rule is"),
    ({"rule": zk.Momentum()}, {"rule": zk.Momentum(dtype="bfloat16")}, "its rule is"),
    ({}, {"rule": zk.Sign()}, "its rule is .*sgd.*sign"),
    ({}, {"estimator": zk.OneSided()}, "its estimator is .*two-sided.*one-sided"),
    ({}, {"estimator": zk.TwoSided(4)}, "its estimator is .*1.*4"),
    ({}, {"direction": zk.RandomSparse()}, "its direction is .*dense.*random-sparse"),
    ({"direction": zk.LowRank(2)}, {"direction": zk.LowRank(4)}, "its direction is"),
    ({}, {"blocks": zk.Blocks()}, "its blocks is None"),
    ({"blocks": zk.Blocks()}, {}, "its blocks is .*None"),
    ({"blocks": zk.Blocks()}, {"blocks": zk.Blocks(every=2)}, "its blocks is"),
    ({}, {"projection": zk.Projection(layers=["layers"])}, "its projection is None"),
    ({"projection": zk.Projection(layers=["layers"])}, {}, "its projection is .*None"),
    ({}, {"kind": "rademacher"}, "its kind is 'gaussian'"),
]  # fmt: skip


def unchanged(step: zk.ZOStep, model: nn.Module) -> Callable[[], bool]:
    groups, state, before = (
        copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in step.param_groups]),
        step.state_dict(),
        values(model),
    )
    inside = (step._run.rule, step._run.direction, step._run.projector, step._run.past, dict(step._run.streams), step.state)

    def check() -> bool:
        now = step.state_dict()
        return (
            groups == [{k: v for k, v in g.items() if k != "params"} for g in step.param_groups]
            and (step._run.rule, step._run.direction, step._run.projector, step._run.past, dict(step._run.streams), step.state)
            == inside
            and str(now) == str(state)
            and all(same_bits(p.detach(), before[n]) for n, p in model.named_parameters())
        )

    return check


@pytest.mark.parametrize(("theirs", "mine", "match"), OTHERS, ids=range(len(OTHERS)))
@pytest.mark.parametrize("steps", [0, 3])
def test_a_state_of_another_method_is_refused_before_anything_changes(theirs: Any, mine: Any, match: str, steps: int) -> None:
    model, other = Tiny(), Tiny()
    step, loading = zk.ZOStep(model, 1e-3, EPS, **theirs), zk.ZOStep(other, 0.5, EPS, seed=5, **mine)
    go_on(model, step, steps)
    go_on(other, loading, steps)
    same_as_before = unchanged(loading, other)
    with pytest.raises(ValueError, match=f"belongs to another method: {match}"):
        loading.load_state_dict(saved(step.state_dict()))
    assert same_as_before()


def zo(state: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = state["param_groups"][0]["zo"]
    return found


def edit(state: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> None:
    parts = json.loads(zo(state)["parts"])
    change(parts)
    zo(state)["parts"] = json.dumps(parts)


DAMAGE: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda s: zo(s).update(seed=-1), "seed=-1"),
    (lambda s: zo(s).update(seed="7"), "seed='7'"),
    (lambda s: zo(s).update(tag=1 << 40), "tag="),
    (lambda s: zo(s).update(tag=True), "tag=True"),
    (lambda s: zo(s).update(tag=0), "no steps|without|after|damaged"),
    (lambda s: zo(s).update(first_tag=99), "tags 99"),
    (lambda s: zo(s).update(skipped=50), "skipped"),
    (lambda s: zo(s).pop("streams"), "no streams"),
    (lambda s: zo(s)["streams"].pop("norm.bias"), "no stream for parameter 'norm.bias'"),
    (lambda s: zo(s)["streams"].update({"norm.bias": 1 << 32}), "stream 4294967296"),
    (lambda s: zo(s)["streams"].update({"norm.bias": zo(s)["streams"]["norm.weight"]}), "one stream for two"),
    (lambda s: edit(s, lambda parts: parts.pop("rule")), "damaged|has no"),
    (lambda s: edit(s, lambda parts: parts["rule"].pop("cohorts")), "cohorts|has no"),
    (lambda s: edit(s, lambda parts: parts["rule"].update(cohorts=5)), "damaged"),
    (lambda s: edit(s, lambda parts: parts["rule"].update(past=[(1, 2)])), "damaged"),
    (lambda s: edit(s, lambda parts: parts.update(past="abc")), "damaged"),
    (lambda s: edit(s, lambda parts: parts.pop("past")), "damaged"),
    (lambda s: zo(s).update(parts="{"), "damaged"),
    (lambda s: zo(s).update(parts="5"), "damaged"),
    (lambda s: zo(s).update(parts=5), "damaged"),
    (lambda s: zo(s).update(tensors=5), "damaged"),
    (lambda s: zo(s).update(method=5), "method=5"),
    (lambda s: s["param_groups"][0].pop("zo"), "no entry 'zo'"),
    (lambda s: s["param_groups"][0].update(zo=5), "no entry 'zo'"),
    (lambda s: s["param_groups"][0].pop("lr"), r"param_groups'\]\[0\]: the group has no 'lr'"),
    (lambda s: s["param_groups"][0].update(eps=math.nan), "eps=nan"),
    (lambda s: s["param_groups"][0].update(maximize="yes"), "maximize='yes'"),
    (lambda s: s["param_groups"][0].update(params=[0, 1]), "2 parameters in group 0"),
    (lambda s: s["param_groups"][0]["param_names"].reverse(), ""),
    (lambda s: s["param_groups"][0]["param_names"].__setitem__(0, "norm.bias"), "in only one of the two"),
    (lambda s: s["param_groups"].append(s["param_groups"][0]), "2 parameter groups"),
    (lambda s: s.pop("param_groups"), "not what an optimizer's"),
    (lambda s: s.update(param_groups=[5]), "must be a list of groups"),
    (lambda s: s.update(state=5), "a dict"),
    (lambda s: s.update(state={}), "has no 'm' of parameter .* after"),
    (lambda s: s["state"].pop(3), "has no 'm' of parameter"),
    (lambda s: s["state"][3].pop("v"), "has no 'v' of parameter"),
    (lambda s: s["state"].update({77: {"m": torch.zeros(1)}}), "a state for 77"),
    (lambda s: s["state"][0].update(m=torch.zeros(3)), "'m' of parameter 'layers.0.weight' as torch.float32 .3,."),
    (lambda s: s["state"][0].update(m=s["state"][0]["m"].double()), "float64"),
    (lambda s: s["state"][0].update(v=s["state"][0]["v"].to("meta")), "without values"),
    (lambda s: s["state"][0].update(v=[1.0]), "as a list without values"),
    (lambda s: s["state"].update({0: 5}), "a state for 0"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "match"), DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_state_is_refused_whole(damage: Callable[[dict[str, Any]], Any], match: str) -> None:
    model, other = Tiny(), Tiny()
    step, loading = CASES["adam"].make(model), CASES["adam"].make(other, seed=5)
    go_on(model, step, 6)
    go_on(other, loading, 2)
    state = saved(step.state_dict())
    damage(state)
    if not match:  # no damage: names in another order are the numbers' own
        names = state["param_groups"][0]["param_names"]
        state["param_groups"][0]["params"] = state["param_groups"][0]["params"][::-1]
        loading.load_state_dict(state)
        other.load_state_dict(model.state_dict())
        go_on(model, step, 9)
        go_on(other, loading, 9)
        assert same(model, other) and loading.param_groups[0]["param_names"] == names[::-1]
        return
    same_as_before = unchanged(loading, other)
    with pytest.raises((ValueError, TypeError), match=match):
        loading.load_state_dict(state)
    assert same_as_before()
    loading.load_state_dict(saved(step.state_dict()))


def test_what_is_no_state_is_refused() -> None:
    step = zk.MeZOStep(Tiny(), 1e-3)
    for wrong in (None, 5, [], {}, {"state": {}}):
        with pytest.raises(TypeError, match="not what an optimizer's state_dict"):
            step.load_state_dict(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no entry 'zo'"):
        step.load_state_dict(torch.optim.SGD(Tiny().parameters(), 0.1).state_dict())


def test_clips_learning_rates_modes_and_rounding_may_differ() -> None:
    model, other = Tiny(), Tiny()
    step = zk.MeZOStep(model, 1e-3, EPS, clip=zk.QuantileClip(0.6, 8, 3))
    go_on(model, step, 5)
    loading = zk.MeZOStep(other, 0.5, EPS, clip=2.0, perturbation="inplace", rounding="stochastic")
    loading.load_state_dict(step.state_dict())
    assert loading.steps == 5 and loading.param_groups[0]["lr"] == 1e-3
    loading.step(other)


# ---- states of earlier versions -----------------------------------------------------------------------------------------


def as_before(step: zk.ZOStep) -> dict[str, Any]:
    """The state as the versions wrote it that kept it beside torch's: tensors by name, histories by group, and no word about the method."""
    new = saved(step.state_dict())
    names = [n for g in new["param_groups"] for n in g["param_names"]]
    content = zo(new)
    tensors: dict[str, dict[str, Tensor]] = {}
    parts = json.loads(content["parts"])
    past_gradients = parts.pop("past")
    for k, own in new["state"].items():
        for what, t in own.items():
            if content["tensors"][what] == "rule":
                tensors.setdefault(names[k], {})[what] = t
            else:
                parts[content["tensors"][what]].setdefault(what, {})[names[k]] = t
    history = {}
    if isinstance(step._run.method.rule, (zk.Momentum, zk.Adam)) and step._run.method.rule.state == "recomputed":
        past, counts = parts["rule"]["past"], itertools.accumulate(p[2] for p in parts["rule"]["past"])
        history = {0: [(tags, coefs, float(c), float(live)) for (tags, coefs, live), c in zip(past, counts, strict=True)]}
    old = {k: content[k] for k in ("seed", "tag", "first_tag", "skipped", "streams")}
    old |= {
        "kind": step._run.method.kind,
        "parts": {**parts, "rule": {"tensors": tensors, "history": history}, "past": past_gradients},
    }
    groups = [{k: v for k, v in g.items() if k not in ("zo", "maximize")} for g in new["param_groups"]]
    return {"state": {}, "param_groups": groups, "zo": old}


OLD = (
    "mezo", "sign", "momentum", "momentum-recomputed", "adam", "adam-recomputed", "hizoo", "dizo", "blockwise",
    "sparse-mezo", "layer-scale-gradient", "lozo", "quantile-clip",
)  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_a_state_of_an_earlier_version_goes_on_to_the_bit(name: str) -> None:
    model, other = Tiny(), Tiny()
    step, loading = CASES[name].make(model), CASES[name].make(other, seed=5)
    go_on(model, step, 6)
    other.load_state_dict(model.state_dict())
    loading.load_state_dict(as_before(step))
    go_on(model, step, 13)
    go_on(other, loading, 13)
    assert same(model, other)


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("into", ["adam", "dizo", "layer-scale-gradient", "adam-blocks"])
def test_a_state_of_an_earlier_version_that_does_not_fit_is_refused(name: str, into: str) -> None:
    if name == into or (name == "momentum-recomputed" and into == "adam-recomputed"):  # whose records look alike
        return
    model, other = Tiny(), Tiny()
    step, loading = CASES[name].make(model), CASES[into].make(other, seed=5)
    go_on(model, step, 6)
    same_as_before = unchanged(loading, other)
    with pytest.raises(ValueError, match=r"belongs to another method|counted the steps of all blocks"):
        loading.load_state_dict(as_before(step))
    assert same_as_before()


# ---- torch's contract ---------------------------------------------------------------------------------------------------


def test_hooks_see_the_whole_state_at_the_right_time() -> None:
    model, other = Tiny(), Tiny()
    step, loading = CASES["adam"].make(model), CASES["adam"].make(other, seed=5)
    order: list[str] = []
    step.register_step_pre_hook(lambda o, args, kwargs: order.append(f"before {o.steps}"))
    step.register_step_post_hook(lambda o, args, kwargs: order.append(f"after {o.steps}"))
    step.step(model)
    assert order == ["before 0", "after 1"]
    step.register_state_dict_pre_hook(lambda o: order.append("pre"))
    step.register_state_dict_post_hook(lambda o, s: order.append(f"post {len(s['state'])} {zo(s)['tag']}"))
    step.register_state_dict_post_hook(lambda o, s: {"wrapped": s})
    state = step.state_dict()
    assert list(state) == ["wrapped"] and order[2:] == ["pre", "post 6 2"]
    seen: list[int] = []
    loading.register_load_state_dict_pre_hook(lambda o, s: (seen.append(o.steps), s["wrapped"])[1])
    loading.register_load_state_dict_pre_hook(lambda o, s: s["param_groups"][0].update(lr=0.125))
    loading.register_load_state_dict_post_hook(lambda o: seen.append(o.steps))
    loading.load_state_dict(copy.deepcopy(state))
    assert seen == [0, 1] and loading.param_groups[0]["lr"] == 0.125
    with pytest.raises(KeyError, match="wrapped"):
        loading.load_state_dict(state["wrapped"])
    assert seen == [0, 1, 1], "a hook that fails changes nothing, and no later one runs"


DISTRIBUTED = (
    "mezo", "momentum", "adam", "adam-recomputed-blocks", "momentum-recomputed", "hizoo", "dizo", "sparse-mezo", "layer-scale-gradient", "lozo",
)  # fmt: skip


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_distributed_checkpoint_takes_and_gives_the_state(name: str) -> None:
    """Its dummy step (lr 0, gradients of zero, no closure) changes nothing, and what it keeps of a state is all of it, for a fresh optimizer too."""
    model, calm, other = Tiny(), Tiny(), Tiny()
    step, undisturbed, fresh = (CASES[name].make(m) for m in (model, calm, other))
    assert get_optimizer_state_dict(model, step)["param_groups"]
    assert all(p.grad is None for p in model.parameters()) and step.steps == 0
    go_on(model, step, 6)
    go_on(calm, undisturbed, 6)
    state = get_optimizer_state_dict(model, step)
    assert step.steps == 6 and step.param_groups[0]["lr"] == CASES[name].lr
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, fresh, saved(state))
    for m, o in ((model, step), (calm, undisturbed), (other, fresh)):
        go_on(m, o, 13)
    assert same(model, calm) and same(model, other)


@pytest.mark.parametrize("name", ["mezo", "adam", "adam-blocks", "momentum-recomputed", "hizoo", "dizo"])
def test_a_distributed_checkpoint_on_disk_goes_on(name: str, tmp_path: Path) -> None:
    """With the weights in it; what is loaded goes into the memory that a fresh optimizer's state offers: it has a place for every tensor."""
    import torch.distributed.checkpoint as dcp

    model, other = Tiny(), Tiny()
    step, fresh = CASES[name].make(model), CASES[name].make(other)
    go_on(model, step, 6)
    weights, state = get_state_dict(model, step)
    dcp.save({"model": weights, "step": state}, checkpoint_id=tmp_path / "c", no_dist=True)
    weights, state = get_state_dict(other, fresh)
    dcp.load({"model": weights, "step": state}, checkpoint_id=tmp_path / "c", no_dist=True)
    set_state_dict(other, fresh, model_state_dict=weights, optim_state_dict=state)
    assert same(model, other) and fresh.steps == 6
    go_on(model, step, 13)
    go_on(other, fresh, 13)
    assert same(model, other)


@pytest.mark.parametrize("steps", [0, 9])
def test_a_full_distributed_state_is_not_laid_over_the_one_that_is_there(steps: int) -> None:
    """torch lays such a state over the optimizer's own, list by list: of a longer past nothing may stay."""
    for name in ("adam", "momentum-blocks", "hizoo"):
        model, other = Tiny(), Tiny()
        step, loading = CASES[name].make(model), CASES[name].make(other, seed=5)
        go_on(model, step, 6)
        go_on(other, loading, steps)
        state = get_optimizer_state_dict(model, step, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        other.load_state_dict(model.state_dict())
        set_optimizer_state_dict(other, loading, state, options=StateDictOptions(full_state_dict=True))
        go_on(model, step, 13)
        go_on(other, loading, 13)
        assert same(model, other), name


def test_a_flattened_distributed_state_is_refused_and_not_half_loaded() -> None:
    model, other = Tiny(), Tiny()
    step, fresh = CASES["adam"].make(model), CASES["adam"].make(other)
    go_on(model, step, 3)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, step, options=options)
    with pytest.raises(ValueError, match="flatten_optimizer_state_dict"):
        set_optimizer_state_dict(other, fresh, state, options=options)
    assert fresh.steps == 0


def test_a_step_without_a_closure_is_a_mistake_but_for_the_dummy() -> None:
    model = Tiny()
    step = zk.MeZOStep(model, 0.0, EPS)
    with pytest.raises(TypeError, match="closure=None"):
        step.step()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match="closure=None"):
        step.step()
    step.zero_grad(set_to_none=False)
    assert step.step().isnan() and step.steps == 0
    step.param_groups[0]["lr"] = 0.1
    with pytest.raises(TypeError, match="closure=None"):
        step.step()
    step.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("make_scheduler", [
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=12, cycle_momentum=False),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
    lambda o: torch.optim.swa_utils.SWALR(o, 1e-4, anneal_epochs=4),
    lambda o: torch.optim.lr_scheduler.SequentialLR(o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.LinearLR(o)], [3]),
])  # fmt: skip
def test_schedulers_drive_a_run_that_is_saved_with_them(make_scheduler: Callable[[Any], Any]) -> None:
    def advance(m: Tiny, o: zk.ZOStep, scheduler: Any, until: int) -> None:
        while o.steps < until:
            value = o.step(closure_of(m, o))
            scheduler.step(*([value] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))

    model, other = Tiny(), Tiny()
    step, fresh = CASES["adam"].make(model), CASES["adam"].make(other)
    scheduler, again = make_scheduler(step), make_scheduler(fresh)
    advance(model, step, scheduler, 5)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(saved(scheduler.state_dict()))
    fresh.load_state_dict(saved(step.state_dict()))
    advance(model, step, scheduler, 10)
    advance(other, fresh, again, 10)
    assert same(model, other) and step.param_groups[0]["lr"] == fresh.param_groups[0]["lr"]


def test_a_state_of_a_wrapped_model_loads_into_the_bare_one() -> None:
    """Names of wrappers do not count, in states as in journals."""
    model, other = Tiny(), Tiny()
    step = CASES["adam"].make([("module." + n, p) for n, p in model.named_parameters()], perturbation="inplace")
    bare = CASES["adam"].make(list(other.named_parameters()), perturbation="inplace")
    go_on(model, step, 4)
    other.load_state_dict(model.state_dict())
    bare.load_state_dict(saved(step.state_dict()))
    assert bare.param_groups[0]["param_names"] == [n for n, _ in other.named_parameters()]
    go_on(model, step, 9)
    go_on(other, bare, 9)
    assert same(model, other)


def test_what_others_keep_in_the_state_is_kept() -> None:
    model, other = Tiny(), Tiny()
    step, loading = zk.MeZOStep(model, 1e-3, EPS), zk.MeZOStep(other, 1e-3, EPS)
    step.state[model.norm.weight]["ema"] = torch.ones(5)
    loading.load_state_dict(saved(step.state_dict()))
    assert torch.equal(loading.state[other.norm.weight]["ema"], torch.ones(5))
    assert list(loading.state_dict()["state"]) == list(step.state_dict()["state"])


def test_the_key_of_a_state_is_not_among_the_live_groups() -> None:
    step = zk.MeZOStep(Tiny(), 1e-3)
    assert form.KEY in step.state_dict()["param_groups"][0] and form.KEY not in step.param_groups[0]
    step.load_state_dict(step.state_dict())
    assert form.KEY not in step.param_groups[0]


def test_bytes_of_state_are_those_that_are_held() -> None:
    """None before the first step of a rule that keeps a moment; then what each method's numbers a weight come to."""
    n = sum(p.numel() for p in Tiny().parameters())
    matrices = [p for p in Tiny().parameters() if p.ndim == 2]

    def held(make: Callable[..., zk.ZOStep], steps: int = 2, **more: Any) -> int:
        model = Tiny()
        step = make(model, 1e-3, EPS, **more)
        go_on(model, step, steps)
        return step.state_bytes()

    assert held(zk.ZOAdam, steps=0) == held(zk.MeZOStep) == held(zk.ZOMomentum, state="recomputed") == 0
    assert held(zk.ZOMomentum) == held(zk.HiZOO) == 4 * n
    assert held(zk.ZOMomentum, state_dtype="bfloat16") == 2 * n
    assert held(zk.ZOAdam) == 8 * n
    assert held(zk.SparseMeZO) == sum((p.numel() + 7) // 8 for p in Tiny().parameters())
    assert held(zk.DiZO, layers=["layers.*weight"], every=1) == sum(4 * p.numel() for p in matrices)
    assert held(zk.LOZO, rank=1) == 2 * 2 * 4 * 64  # a side of a matrix takes a multiple of 64 floats

    model = Tiny()
    theirs = torch.optim.AdamW([model.norm.weight, model.norm.bias])
    step = zk.HybridZO(model, 1e-3, EPS, first_order=theirs)
    go_on(model, step, 1)
    assert step.state_bytes() == 2 * 4 * (model.norm.weight.numel() + model.norm.bias.numel())


def test_a_lost_factor_of_lozos_momentum_is_refused() -> None:
    model = Tiny()
    step = zk.LOZO(model, 1e-3, EPS, momentum=0.9)
    go_on(model, step, 2)
    state = step.state_dict()
    for own in state["state"].values():
        own.pop("factor", None)
    other = zk.LOZO(Tiny(), 1e-3, EPS, momentum=0.9)
    with pytest.raises(ValueError, match=r"'factor' of parameter .* was lost"):
        other.load_state_dict(state)
    assert other.steps == 0
