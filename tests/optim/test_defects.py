"""Defects that public zeroth-order code has, each as a test that the defective behaviour fails; the first line of each test says which it was.

Belongs here: behaviour that somebody got wrong. Does not belong here: the formulas (test_methods.py), memory (test_memory.py).
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zo_kernels as zk
from tests.kernels.cases import same_bits
from tests.optim.methods import CASES, EPS, EVERY, SEED, Tiny, noise, values
from zo_kernels import _backends as backends
from zo_kernels import journal, ops
from zo_kernels.optim import evaluate

MODES = ("scratch", "inplace")
each_mode = pytest.mark.parametrize("mode", MODES)


def is_at(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(same_bits(p, before[n]) for n, p in model.named_parameters())


def moves(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: p.detach().double() - before[n].double() for n, p in model.named_parameters()}


# ---- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mezo", "one-sided", "hizoo", "fzoo", "sign"])
def test_losses_are_not_quantised(name: str) -> None:
    """Would catch: losses or their difference in fp16, where g at L = 0.7 and eps = 1e-3 comes in steps of 0.24, or in fp32 (3e-5)."""
    model = Tiny()
    step = CASES[name].make(model, eps=1e-3, lr=0.0)
    losses = iter([0.7, 0.7 + 3e-9, 0.7, 0.7 + 1e-9, 0.7 + 2e-9])
    first, second = (0.7, 0.7 + 3e-9)
    step.step(lambda: next(losses))
    wanted = {
        "mezo": (first - second) / 2e-3, "sign": (first - second) / 2e-3, "one-sided": (second - first) / 1e-3, "hizoo": (second - first) / 2e-3,
    }  # fmt: skip
    assert step.projected_gradient is not None
    if name == "fzoo":
        shifted = torch.tensor([0.7 + 3e-9, 0.7, 0.7 + 1e-9, 0.7 + 2e-9], dtype=torch.float64)
        wanted["fzoo"] = (second - first) / 1e-3 / float(shifted.std())
    assert step.projected_gradient.item() == pytest.approx(wanted[name], rel=1e-4)
    assert step.skipped == 0


@each_mode
@pytest.mark.parametrize("value", [0.7, 0.0])
def test_equal_losses_are_no_division_by_zero(mode: str, value: float) -> None:
    """Would catch: FZOO's standard deviation of equal losses as a divisor: NaN or infinite weights. The step is skipped, and counted."""
    model = Tiny()
    before, step = values(model), CASES["fzoo"].make(model, perturbation=mode)
    step.step(lambda: value)
    assert step.skipped == 1 and step.steps == 1
    assert is_at(model, before) if mode == "scratch" else all(m.abs().max() < 1e-4 for m in moves(model, before).values())
    step.step(model)
    assert step.skipped == 1 and not is_at(model, before)


@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize("one_sided", [False, True])
def test_the_number_of_queries_counts(queries: int, one_sided: bool) -> None:
    """Would catch: a sample count that is read and not used; a .grad buffer of the model's size that collects the queries."""
    model, calls = Tiny(), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        assert all(p.grad is None for p in model.parameters())
        return model()

    before = values(model)
    step = zk.MeZOStep(model, 1e-3, EPS, queries=queries, one_sided=one_sided, seed=SEED)
    step.step(closure)
    assert calls == (1 + queries if one_sided else 2 * queries)
    assert all(p.grad is None for p in model.parameters())
    # The move lies in the span of the queries' directions, and of no fewer.
    move = torch.cat([m.flatten() for m in moves(model, before).values()])
    zs = torch.stack([torch.cat([noise(n, tuple(t.shape), tag).flatten() for n, t in before.items()]) for tag in step.tags_of(0)])
    shares = torch.linalg.lstsq(zs.T, move[:, None]).solution
    assert float((zs.T @ shares - move[:, None]).abs().max()) < 1e-6 and float(shares.abs().min()) > 1e-6


@pytest.mark.parametrize(
    "name", ["mezo", "mezo-3", "one-sided", "conservative", "sparse-mezo", "lozo", "fzoo", "forward", "hybrid", "dizo"]
)
def test_accumulation_that_fails_leaves_the_weights(name: str) -> None:
    """Would catch: accumulation refused (or failing) only after the weights were perturbed."""
    model = Tiny()
    before, step = values(model), CASES[name].make(model)

    def closure(rows: slice) -> Tensor:
        if rows.start == 6:
            raise RuntimeError("a bad batch")
        return model(rows)

    with pytest.raises(RuntimeError, match="a bad batch"):
        step.step(closure, [slice(0, 3), slice(3, 6), slice(6, 9)])
    with pytest.raises(ValueError, match="batches is empty"):
        step.step(model, [])
    assert is_at(model, before) and step.steps == 0


# ---- estimators ---------------------------------------------------------------------------------------------------------


CANDIDATES = [
    ((1.0, 2.0, 3.0), 0), ((1.0, 1.0, 1.0), 0), ((2.0, 1.0, 3.0), -1), ((3.0, 2.0, 1.0), 1), ((2.0, math.nan, 1.0), 1),
    ((1.0, -math.inf, math.nan), 0),
]  # fmt: skip


@each_mode
@pytest.mark.parametrize(("losses", "takes"), CANDIDATES)
def test_rejected_candidates_leave_no_trace(mode: str, losses: tuple[float, float, float], takes: int) -> None:
    """Would catch: the conservative method through a stateful optimizer, whose inverse step is no inverse; a tie that moves; NaN that wins."""
    model = Tiny()
    before, step = values(model), CASES["conservative"].make(model, perturbation=mode)
    told = iter([1.5, 1.0, *losses])
    step.step(lambda: next(told))
    if mode == "scratch" and not takes:
        assert is_at(model, before)
    g = 0.5 / (2 * EPS)
    for n, m in moves(model, before).items():
        want = takes * step.defaults["lr"] * g * noise(n, tuple(m.shape), 0)
        # 2^-17 of the coefficients (in place: of eps), and a rounding of a weight below 2 for each pass
        bound = 2**-17 * float(want.abs().max()) + 2**-24 if mode == "scratch" else 2**-17 * 4.5 * EPS + 6 * 2**-24
        assert float((m - want).abs().max()) <= bound, n


class Alive(TorchDispatchMode):
    """The most tensors of `size` elements that operations made and that were alive at once."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.made, self.most = size, weakref.WeakSet[Tensor](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.numel() == self.size and t._base is None:
                self.made.add(t)
        self.most = max(self.most, len({t.untyped_storage().data_ptr() for t in self.made}))
        return result


def test_tangents_are_made_layer_by_layer() -> None:
    """Would catch: a forward gradient that holds the tangents of all weights at once, as much again as the model."""
    torch.manual_seed(0)
    layers = 8
    model = nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(layers)))
    x = torch.randn(5, 24)
    step = zk.ForwardGrad(model, 1e-3, seed=SEED)
    step.step(lambda: model(x).square().mean())  # the first step watches
    with Alive(24 * 24) as alive:
        step.step(lambda: model(x).square().mean())
    assert 1 <= alive.most <= 3, "a tangent, and what the product of its layer may copy"


def test_blocks_of_one_shape_get_their_own_noise() -> None:
    """Would catch: one seed for every block, so that blocks of one shape are perturbed along the same z."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(9, 9) for _ in range(3)))
    x, before = torch.randn(5, 9), values(model)
    step = zk.BlockwiseZO(model, 1e-2, EPS, seed=SEED)
    for block in range(3):
        step.step(lambda: model(x).square().mean())
        assert [n for n, m in moves(model, before).items() if m.abs().max() > 0] == [
            f"{b}.{what}" for b in range(block + 1) for what in ("weight", "bias")
        ]
    made = [m.flatten() for n, m in moves(model, before).items() if n.endswith("weight")]
    for i in range(3):
        for j in range(i):
            assert abs(float(torch.cosine_similarity(made[i], made[j], dim=0))) < 5 / 9  # 5 sigma of 81 normal numbers
            assert not torch.equal(noise(f"{i}.weight", (9, 9), 0), noise(f"{j}.weight", (9, 9), 0))


def test_every_block_gets_its_turn() -> None:
    """Would catch: a random order that leaves blocks out, or favours one: 3000 draws of 5, each within 5 sigma of a fifth."""
    blocks = zk.Blocks(order="random")
    turns = torch.bincount(torch.tensor([blocks.at(k, 5, SEED) for k in range(3000)]), minlength=5)
    assert ((turns - 600).abs() < 5 * math.sqrt(3000 * 0.2 * 0.8)).all()


# ---- rules --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen", "gpt2", "opt"])
def test_biases_and_norms_of_any_name_do_not_decay(family: str) -> None:
    """Would catch: lists of names, which miss the `norm` of Llama and Qwen and the `ln_1` of GPT-2."""
    from tests.optim.models import make

    model = make(family)
    before = values(model)
    step = zk.MeZOStep(model, 0.5, 1e-3, weight_decay=0.5)
    step.step(lambda: 1.0)  # g = 0: nothing but the decay is left
    for n, p in model.named_parameters():
        kept = n.endswith("bias") or any(part in n for part in ("norm", "ln_"))
        assert same_bits(p, before[n]) if kept else torch.allclose(p, 0.75 * before[n], rtol=1e-6, atol=0), n
    assert any("norm" in n or "ln_" in n for n in before)


@each_mode
def test_a_sign_step_has_the_length_of_lr(mode: str) -> None:
    """Would catch: a sign method that runs another optimizer: a loss a thousand times larger must not change a bit."""
    models = [Tiny(), Tiny()]
    for model, scale in zip(models, (1.0, 1024.0), strict=True):
        step = zk.ZOSignSGD(model, 2e-3, EPS, seed=SEED, perturbation=mode)
        before = values(model)
        step.step(lambda model=model, scale=scale: model() * scale)
        for n, m in moves(model, before).items():
            assert float((m.abs() - 2e-3 * noise(n, tuple(m.shape), 0).abs()).abs().max()) < 1e-5, n
        for _ in range(5):
            step.step(lambda model=model, scale=scale: model() * scale)
    assert all(same_bits(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))


@pytest.mark.parametrize("mode", ["scratch"])
def test_momentum_needs_no_buffer(mode: str) -> None:
    """Would catch: momentum that exists as a buffer alone. From the records, it is the buffer's, up to rounding and beta^history."""
    stored, recomputed = Tiny(), Tiny()
    a = zk.ZOMomentum(stored, 5e-4, EPS, beta=0.5, seed=SEED, perturbation=mode)
    b = zk.ZOMomentum(recomputed, 5e-4, EPS, beta=0.5, state="recomputed", history=24, seed=SEED, perturbation=mode)
    before = values(stored)
    for _ in range(30):
        a.step(stored)
        b.step(recomputed)
    moved = moves(stored, before)
    for n, m in moves(recomputed, before).items():
        assert float((m - moved[n]).abs().max()) < 3e-5
    assert max(float(m.abs().max()) for m in moved.values()) > 3e-3
    state = b.state_dict()
    assert not state["state"] and len(json.loads(state["param_groups"][0]["zo"]["parts"])["rule"]["past"]) == 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", ["stored", "recomputed"])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_adam_neither_underflows_nor_divides_by_zero(state: str, scale: float, dtype: torch.dtype) -> None:
    """Would catch: v in fp16, which is 0 for g z of 1e-6, and an eps of 1e-8, which is 0 in fp16."""
    model = Tiny(dtype)
    before = values(model)
    step = zk.ZOAdam(model, 1e-2, EPS, betas=(0.9, 0.99), adam_eps=1e-16, state=state, seed=SEED)
    step.step(lambda: model() * scale)
    assert step.skipped == 0
    ulp = torch.finfo(dtype).eps  # of weights below 2, at most
    for n, m in moves(model, before).items():  # the first step is lr sign(g z) everywhere, whatever the scale
        z = noise(n, tuple(m.shape), 0)
        assert float((m.abs() - 1e-2)[z.abs() > 1e-2].abs().max()) <= 2 * ulp + 1e-5, n
    for _ in range(5):
        step.step(lambda: model() * scale)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["mezo", "mezo-3", "one-sided", "momentum", "hizoo", "lozo", "forward"])
def test_g_is_clipped_and_the_clip_is_told(name: str) -> None:
    """Would catch: clipping after the update, of the losses, or of the mean of the queries alone."""
    free, bound = Tiny(), Tiny()
    a, b = CASES[name].make(free), CASES[name].make(bound, clip=1e-3)
    before = values(free)
    a.step(lambda: free() * 100)
    b.step(lambda: bound() * 100)
    assert a.projected_gradient == b.projected_gradient, "the attribute is the estimate before clipping"
    for n, m in moves(bound, before).items():
        assert float(m.abs().max()) <= 1.01 * b.defaults["lr"] * 1e-3 * 8.3 * (4 if name == "lozo" else 1) + 2**-24, n
    assert max(float(m.abs().max()) for m in moves(free, before).values()) > 1e-3


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("clipped", [(False, False), (True, False), (False, True)], ids=str)
def test_a_clip_in_any_group_is_recorded(
    clipped: tuple[bool, bool], queries: int, on_host: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch: a flag that tells of the first group, or the first query, alone. A group's g is the difference over its own eps."""
    monkeypatch.setattr(evaluate, "on_host", lambda device: on_host)
    model = Tiny()
    groups = [
        {"params": list(getattr(model, name).named_parameters(prefix=name)), "eps": 0.1 if small else 1.0}
        for name, small in zip(("layers", "norm"), clipped, strict=True)
    ]
    step = zk.MeZOStep(groups, 1e-3, clip=5.0, queries=queries, model=model, journal=tmp_path / "run.zoj")
    losses = iter([torch.tensor(x, dtype=torch.float64) for x in (0.0, 0.0, 1.5, 0.0)[-2 * queries :]])
    step.step(lambda: next(losses))
    step.close_journal()
    assert journal.read(tmp_path / "run.zoj").flag("clipped").tolist() == [any(clipped)]  # 1.5 / 0.2 is 7.5, 1.5 / 2 below 5


def recorded_state(step: zk.ZOStep) -> Any:
    """What later steps depend on: of a history, what has a share."""
    state = step.state_dict()
    parts = json.loads(state["param_groups"][0]["zo"]["parts"])
    del parts["past"]
    past, cohorts = parts["rule"].pop("past"), parts["rule"].pop("cohorts")
    shared = [(names, count, [past[k] for k in places if past[k][2]]) for names, count, places in cohorts]
    shared = [c for c in shared if c[1] or c[2]]  # whose first step was skipped has none
    return {**parts, "tensors": state["state"], "cohorts": shared}


def equal(a: Any, b: Any) -> bool:
    left, right = tree_leaves(a), tree_leaves(b)
    return len(left) == len(right) and all(
        same_bits(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(left, right, strict=True)
    )


BAD = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_a_loss_that_is_no_number_leaves_weights_and_state(name: str, mode: str, value: float) -> None:
    """Would catch: a NaN update that destroys the weights, or a state that carries the NaN into every later step."""
    model = Tiny()
    step = CASES[name].make(model, perturbation=mode, weight_decay=0.1)
    for _ in range(5):  # the next is the sixth: DiZO projects, LOZO makes a new V
        step.step(model)
    before, state = values(model), copy.deepcopy(recorded_state(step))
    step.step(lambda: model() * 0 + value)
    assert step.skipped == 1 and step.steps == 6
    if mode == "scratch":
        assert is_at(model, before)
    else:
        passes = CASES[name].forwards + 1
        assert all(float(m.abs().max()) <= passes * 2**-23 + 2**-17 * EPS * 4.5 for m in moves(model, before).values())
    after = recorded_state(step)
    for what in after:
        assert what == "direction" or equal(after[what], state[what]), what
    step.step(model)
    assert step.skipped == 1 and all(p.isfinite().all() for p in model.parameters()) and not is_at(model, before)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", CASES)
def test_one_loss_that_is_no_number_is_enough(name: str, value: float) -> None:
    """Would catch: a guard that looks at one of the losses only. A step that is skipped changes no bit; what is not skipped stays finite."""
    case = CASES[name]
    for which in range(case.forwards):
        model, calls = Tiny(), 0
        step = case.make(model)
        for _ in range(5):
            step.step(model)
        before = values(model)

        def closure(which: int = which, model: Tiny = model) -> Tensor:
            nonlocal calls
            calls += 1
            loss = model()
            return loss * 0 + value if calls == which + 1 else loss

        step.step(closure)
        assert all(p.isfinite().all() for p in model.parameters()), which
        assert is_at(model, before) if step.skipped else name in ("conservative", "dizo", "dizo-fo", "layer-scale-gradient"), which
        assert step.skipped == 1 or calls == case.forwards


# ---- directions ---------------------------------------------------------------------------------------------------------


class Flat(nn.Module):
    """One parameter and a smooth loss; `seen` collects what the forwards saw."""

    def __init__(self, n: int = 4000, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(2)).to(dtype))
        self.seen: list[Tensor] = []

    def forward(self) -> Tensor:
        self.seen.append((self.weight + 0.0).detach().clone())
        return (self.weight.double() + 1).square().mean()


@each_mode
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_a_sparse_mask_keeps_the_share_it_names(mode: str, keep: float) -> None:
    """Would catch: a normal draw compared with the sparsity, where "10 %" removes 54 %. Within 5 sigma of a binomial."""
    n = 20000
    model = Flat(n)
    before = model.weight.detach().clone()
    step = zk.ZOStep(model, 0.5, 1e-2, direction=zk.RandomSparse(keep), seed=SEED, perturbation=mode)
    step.step(model)
    touched = model.seen[0] != before
    assert abs(int(touched.sum()) - keep * n) < 5 * math.sqrt(n * keep * (1 - keep)) + 10  # and some z that are too small to count
    assert torch.equal(touched, model.seen[1] != before)


@each_mode
@pytest.mark.parametrize("direction", [zk.RandomSparse(0.3, 2), zk.MagnitudeSparse(0.3)], ids=lambda d: d.name)
@pytest.mark.parametrize("rule", [zk.SGD(), zk.Sign(), zk.Momentum(), zk.Adam()], ids=lambda r: r.name)
def test_what_is_masked_out_is_not_updated(mode: str, direction: Any, rule: Any) -> None:
    """Would catch: a mask on the perturbation that the update ignores; a state that moves what was never perturbed."""
    model = Flat()
    before = model.weight.detach().clone()
    step = zk.ZOStep(model, 1e-2, 1e-2, direction=direction, rule=rule, seed=SEED, perturbation=mode)
    step.step(model)
    untouched = model.seen[0] == before
    assert 0.6 < float(untouched.double().mean()) < 0.8
    assert torch.equal(model.weight[untouched], before[untouched])
    moved = model.weight != before
    assert float(moved[~untouched].double().mean()) > 0.95  # in fp32 a small z may move nothing


@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_membership_does_not_flip_between_the_passes(mode: str, dtype: torch.dtype) -> None:
    """Would catch: Sparse-MeZO's mask made anew from perturbed weights: with this eps a third of the members would leave it."""
    model = Flat(dtype=dtype)
    step = zk.SparseMeZO(model, 1e-1, 0.3, quantile=0.5, seed=SEED, perturbation=mode)
    threshold = model.weight.detach().abs().sort().values[1999]
    for _ in range(4):
        before = model.weight.detach().clone()
        member = before.abs() <= threshold
        model.seen.clear()
        step.step(model)
        for seen in model.seen:
            assert torch.equal(seen[~member], before[~member])
            assert float((seen != before)[member].double().mean()) > 0.95
            assert (seen[member].abs() > threshold).any()  # it would flip
        assert torch.equal(model.weight[~member], before[~member])


def test_a_magnitude_mask_is_of_the_weights_that_are_there() -> None:
    """Would catch: a mask of memory that a parameter has left, of a threshold that a loaded state replaces, of a copy's original."""
    first = torch.linspace(-1, 1, 37)
    state: Any = zk.MagnitudeSparse(0.5).of(SEED)
    state.limits("w", first, 1)

    def check(state: Any, p: Tensor) -> Tensor:
        state.prepare(0, 0, {"w": p})
        mask: Tensor = state.made["w"].mask
        assert torch.equal(mask, zk.pack_mask(p.abs() <= state.thresholds["w"]))
        return mask.clone()

    masks = [check(state, first), check(state, second := first.sort(descending=True).values * 1.5)]
    masks.append(check(state, second.mul_(0.5)))
    state.load({"thresholds": {"w": 0.1}})
    masks.append(check(state, second))
    assert all((a != b).any() for a, b in itertools.pairwise(masks))
    other = copy.deepcopy(state)
    check(other, torch.full((37,), 0.05))
    assert torch.equal(state.made["w"].mask, masks[-1])


def test_thresholds_are_of_fp32_whatever_torchs_default_is() -> None:
    before = torch.get_default_dtype()
    p = torch.linspace(-1, 1, 37, dtype=torch.bfloat16)
    try:
        torch.set_default_dtype(torch.bfloat16)
        state: Any = zk.MagnitudeSparse(0.5).of(SEED)
        state.limits("w", p, 1)
        state.prepare(0, 0, {"w": p})
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(state.made["w"].mask, zk.pack_mask(p.float().abs() <= state.thresholds["w"]))


class Sized(nn.Module):
    """Parameters of several sizes and root mean squares."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)
        rms = {"small": (50, 0.1), "large": (5000, 0.1), "four": (500, 0.4)}
        for n, (size, d) in rms.items():
            x = torch.randn(size, generator=g)
            self.register_parameter(n, nn.Parameter(x * (d / x.square().mean().sqrt())))
        self.seen: dict[str, Tensor] = {}

    def forward(self) -> Tensor:
        parts = {n: getattr(self, n) + 0.0 for n in ("small", "large", "four")}
        self.seen = self.seen or {n: p.detach().clone() for n, p in parts.items()}
        return torch.stack([p.double().square().mean() for p in parts.values()]).sum()


def test_layer_scales_are_roots_of_means() -> None:
    """Would catch: sqrt(value) where sqrt(count) is meant, or a norm: scales that depend on the tensor's size, or on the root of its values."""
    model = Sized()
    before = values(model)
    step = zk.ZOStep(model, 1e-3, 1e-3, direction=zk.LayerScale(), seed=SEED)
    step.step(model)
    scale = {}
    for n, t in before.items():
        z = noise(n, tuple(t.shape), 0)
        scale[n] = float(((model.seen[n].double() - t.double()) * z).sum() / (1e-3 * z.square().sum()))
    assert scale["small"] == pytest.approx(scale["large"], rel=1e-3)
    assert scale["small"] == pytest.approx(4 * scale["four"], rel=1e-3)


@pytest.mark.parametrize("by", ["rms", "gradient"])
@pytest.mark.parametrize("what", ["step", "check"])
def test_scales_measured_for_a_step_that_fails_are_taken_back(by: str, what: str) -> None:
    """Would catch: a state_dict() after a failed step, or a check, with the scales of a step that did not take place."""
    model = Sized()
    step = zk.ZOStep(model, 1e-1, 1e-3, direction=zk.LayerScale(by, every=2), seed=SEED)
    for _ in range(2):
        step.step(model)

    def closure() -> Tensor:
        raise KeyError

    before = step.state_dict()
    with pytest.raises(KeyError):
        step.step(closure) if what == "step" else zk.check(step, closure)
    assert step.state_dict() == before
    step.step(model)
    assert step.state_dict() != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_diagonal_of_hizoo_moves_at_the_papers_alpha(dtype: torch.dtype) -> None:
    """Would catch: H in fp16, where alpha = 1e-6 is below half a unit of 1: H never moves, and the method is MeZO."""
    model = Tiny(dtype)
    step = zk.HiZOO(model, 1e-4, EPS, alpha=1e-6, seed=SEED)
    losses: list[Tensor] = []

    def closure() -> Tensor:
        losses.append(model().detach())
        return losses[-1]

    step.step(closure)
    clean, plus, minus = losses
    kappa = float((plus + minus - 2 * clean).abs()) / (2 * EPS**2)
    state = step.state_dict()["state"]
    for k, n in enumerate(step.param_groups[0]["param_names"]):
        h = state[k]["diagonal"]
        assert h.dtype == torch.float32
        want = 1e-6 * (kappa * noise(n, (h.numel(),), 0).square() - 1)
        assert float(((h.double() - 1) - want).abs().max()) <= 2**-23, n  # the roundings near 1
    assert any(float((h - 1).abs().max()) > 2**-22 for own in state.values() for h in own.values())


@each_mode
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_gradient_scales_are_measured_along_the_runs_directions(
    mode: str, kind: str, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch: directions of another kind, or made by another backend than the run's, and weights perturbed that the run's mask leaves out."""
    made: list[tuple[str, str | None]] = []
    real = ops.run

    def run(plans: Any, p: Any, backend: str | None = None) -> None:
        made.append((p.kind, backend))
        real(plans, p, backend)

    model = Tiny()
    mask = zk.pack_mask(torch.arange(35) < 30)
    names = {"mask": {"layers.0.weight": mask}, "params": list(model.named_parameters())}
    seen: list[Tensor] = []

    def closure() -> Tensor:
        seen.append((model.layers[0].weight + 0.0).detach().flatten().clone())
        return model()

    before = model.layers[0].weight.detach().flatten().clone()
    step = zk.ZOStep(
        [names],
        1e-3,
        EPS,
        model=model,
        direction=zk.LayerScale("gradient"),
        kind=kind,
        backend=backend,
        perturbation=mode,
        seed=SEED,
    )
    turn = sorted(n for n, _ in model.named_parameters()).index("layers.0.weight")
    for _ in range(turn):
        step.step(model)
    before = model.layers[0].weight.detach().flatten().clone()
    monkeypatch.setattr(ops, "run", run)
    step.step(closure)
    assert {k for k, _ in made} == {kind} and {b for _, b in made} == {backend}
    z = zk.normal((35,), seed=SEED, stream=zk.stream_of("layers.0.weight"), tag=step.tags_of(turn)[0] + 1, kind=kind)
    measured = (seen[0] - before) / EPS  # the first forward of the step
    assert torch.equal(measured[30:], torch.zeros(5)) and torch.allclose(measured[:30], z[:30], atol=1e-4)


@pytest.mark.parametrize("direction", [zk.LowRank(2, 2), zk.Dense()], ids=lambda d: d.name)
def test_factors_and_projections_take_the_runs_backend(direction: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: factors, or DiZO's scalars, made by the best backend there is where the run asked for another."""
    asked: list[str | None] = []
    real = backends.pick

    def pick(device: torch.device, backend: str | None) -> Any:
        asked.append(backend)
        return real(device, backend)

    monkeypatch.setattr(backends, "pick", pick)
    model = Tiny()
    step = zk.DiZO(model, 1e-3, EPS, every=2, inner=2, layers=["weight"], direction=direction, backend="reference", seed=SEED)
    for _ in range(4):
        step.step(model)
    assert set(asked) == {"reference"}


def test_hizoo_with_alpha_0_is_mezo() -> None:
    """Would catch: a diagonal that moves by something else than alpha: H stays 1, to the bit. Coefficients have 17 bits, in two kinds of pass."""
    plain, model = Tiny(), Tiny()
    before = values(model)
    step, other = zk.HiZOO(model, 1e-3, EPS, alpha=0.0, seed=SEED), zk.MeZOStep(plain, 1e-3, EPS, seed=SEED)
    step.step(model)
    other.step(plain)  # later steps have other tags: HiZOO records two numbers a step
    moved = max(float(m.abs().max()) for m in moves(model, before).values())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert float((p - q).detach().abs().max()) <= 2**-16 * moved + 2**-23
    for _ in range(5):
        step.step(model)
    diagonals = [kept["diagonal"] for kept in step.state_dict()["state"].values()]
    assert len(diagonals) == len(list(model.parameters())) and all((h == 1).all() for h in diagonals)


class Padded(nn.Module):
    """A table with a row of padding, which a mean over all tokens reads; tied, it is also the row of an output word."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.table, self.tied = nn.Embedding(9, 8, padding_idx=3), tied
        self.head = nn.Linear(8, 9)
        self.tokens = torch.tensor([[1, 2, 3, 3], [4, 5, 6, 3]])

    def forward(self) -> Tensor:
        x = self.table(self.tokens).mean(1)
        logits = nn.functional.linear(x, self.table.weight) if self.tied else self.head(x)
        return nn.functional.cross_entropy(logits, torch.tensor([0, 7]))


@pytest.mark.parametrize("tied", [False, True])
def test_the_row_at_padding_idx_is_trained_like_all_others_or_masked(tied: bool) -> None:
    """Would catch: a row that one mode perturbs and another does not, or that is perturbed and not updated. A mask holds it still, to the bit."""
    keep = torch.ones(9, 8, dtype=torch.bool)
    keep[3] = False
    for mask in (None, zk.pack_mask(keep)):
        moved = {}
        for mode in ("scratch", "inplace"):
            model = Padded(tied)
            before = values(model)
            group = {"params": list(model.named_parameters()), "mask": {"table.weight": mask}}
            step = zk.MeZOStep([group], 1e-1, EPS, model=model, perturbation=mode, seed=SEED)
            step.step(model)
            assert step.projected_gradient is not None
            moved[mode] = moves(model, before)["table.weight"]
            z = noise("table.weight", (9, 8), 0) * (keep if mask is not None else 1)
            assert float((moved[mode] + 1e-1 * step.projected_gradient * z).abs().max()) < 1e-4
        assert float((moved["scratch"] - moved["inplace"]).abs().max()) < 1e-4
        assert bool((moved["scratch"][3] == 0).all()) == (mask is not None) and bool((moved["scratch"][2] != 0).all())


@each_mode
def test_a_projection_of_weights_that_did_not_move(mode: str) -> None:
    """Would catch: DiZO's gamma / t with t = 0: NaN in every projected layer."""
    model = Tiny()
    before = values(model)
    step = zk.DiZO(model, 0.0, EPS, every=2, inner=3, layers=["layers"], seed=SEED, perturbation=mode)
    for _ in range(7):
        step.step(model)
    assert step.skipped == 0
    if mode == "scratch":
        assert is_at(model, before)
    assert all(float(m.abs().max()) < 1e-4 for m in moves(model, before).values())


class Failed(Exception):
    pass


LEARNED = pytest.mark.parametrize("learn", ["forward", "backpropagation"])
RULES = pytest.mark.parametrize("rule", [zk.SGD(), zk.Adam(), zk.Momentum(state="recomputed")], ids=lambda r: r.name)


@LEARNED
@RULES
@each_mode
def test_a_projection_that_fails_takes_its_step_back(mode: str, rule: Any, learn: str) -> None:
    """Would catch: DiZO's projection taken back by dividing through it; an update that stays where the projection behind it fails, or a state."""
    model, steady = Tiny(torch.bfloat16), Tiny(torch.bfloat16)
    step, calm = (
        zk.DiZO(
            m, 5e-2, EPS, every=3, inner=3, inner_lr=1.0, layers=["layers"], seed=SEED, rule=rule, learn=learn, perturbation=mode
        )
        for m in (model, steady)
    )
    for _ in range(2):
        step.step(model)
        calm.step(steady)
    for failing in range(2, 5 if learn == "backpropagation" else 8):
        before, state, calls = values(model), copy.deepcopy(recorded_state(step)), 0

        def closure(failing: int = failing) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == failing + 1:
                raise Failed
            return model()

        with pytest.raises(Failed):
            step.step(closure)
        assert equal(recorded_state(step), state) and step.steps == 2 and step.skipped == 0
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        if mode == "scratch":
            assert is_at(model, before)
        else:
            assert all(float(m.abs().max()) <= 4 * 2**-8 * 2 for m in moves(model, before).values())  # four roundings below 2
    step.step(model)
    calm.step(steady)
    if mode == "scratch":
        assert all(same_bits(p, q) for p, q in zip(model.parameters(), steady.parameters(), strict=True))


@LEARNED
@each_mode
def test_a_projection_sees_its_own_steps_batch_behind_the_update(mode: str, learn: str) -> None:
    """Would catch: a projection before the step, on the batch of the next one."""
    model = Tiny()
    step = zk.DiZO(model, 1e-2, EPS, every=2, inner=2, layers=["layers"], seed=SEED, learn=learn, perturbation=mode)
    for k in range(4):
        seen: list[tuple[Tensor, bool]] = []

        def closure(k: int = k, seen: list[tuple[Tensor, bool]] = seen) -> Tensor:
            seen.append(((model.norm.bias + 0.0).detach().clone(), torch.is_grad_enabled()))  # which is not projected
            return model(slice(k, k + 6))

        step.step(closure)
        forwards, projecting = seen[:2], seen[2:]
        assert len(projecting) == (0 if k % 2 == 0 else 4 if learn == "forward" else 2)
        assert not any(torch.equal(bias, model.norm.bias) or graph for bias, graph in forwards)
        assert all(torch.equal(bias, model.norm.bias) and graph == (learn == "backpropagation") for bias, graph in projecting)


@each_mode
def test_a_low_rank_step_updates_along_what_it_perturbed(mode: str) -> None:
    """Would catch: LOZO's factors drawn again between perturbation and update on the steps that renew V."""
    model = Tiny()
    step = zk.LOZO(model, 1e-2, EPS, rank=2, every=2, seed=SEED, perturbation=mode)
    earlier: Tensor | None = None
    for k in range(6):
        before, seen = values(model), []

        def closure(seen: list[Tensor] = seen) -> Tensor:
            seen.append((model.layers[0].weight + 0.0).detach().clone())
            return model()

        step.step(closure)
        assert step.projected_gradient is not None
        z = (seen[0] - before["layers.0.weight"]).double() / EPS
        update = moves(model, before)["layers.0.weight"] / (-1e-2 * step.projected_gradient.item() / 2)
        bound = 1e-4 if mode == "scratch" else 4 * 2**-17 * EPS * 4.5**2 / (1e-2 * abs(step.projected_gradient.item()) / 2)
        assert float((z - update).abs().max()) < bound, k
        singular = torch.linalg.svdvals(z)
        assert float(singular[1]) > 1e-2 and float(singular[2]) < 1e-4, "rank 2"
        rows = torch.linalg.svd(z).Vh[:2]
        if earlier is not None:  # the row space is V's: kept for two steps, and then another
            overlap = float(torch.linalg.svdvals(rows @ earlier.T).min())
            assert (overlap > 0.999) == (k % 2 == 1), k
        earlier = rows


def test_directions_of_the_two_passes_are_generators_of_nothing() -> None:
    """Would catch: a global random state that every z is drawn from: another draw between the passes changes the direction."""
    models = [Tiny(), Tiny()]
    for model, draws in zip(models, (False, True), strict=True):
        step = zk.MeZOStep(model, 1e-3, EPS, seed=SEED)

        def closure(model: Tiny = model, draws: bool = draws) -> Tensor:
            if draws:
                torch.randn(3)
            return model()

        for _ in range(3):
            step.step(closure)
    assert all(same_bits(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
