"""A pull back to the start: what it reads, when it is, and what it leaves alone.

Belongs here: the base, its checks, the bits of one pull. Does not belong here: steps against float64 (test_methods.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zo_kernels as zk
from tests.kernels.cases import same_bits
from tests.optim.methods import EPS, SEED, Tiny, values
from zo_kernels.optim import evaluate
from zo_kernels.views import work


class File(Mapping[str, Tensor]):
    """A state dict whose tensors are made when they are asked for; `read`: the names of those, in order."""

    def __init__(self, model: nn.Module) -> None:
        self.content = values(model)
        self.read: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return self.content[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)

    def __contains__(self, name: object) -> bool:
        return name in self.content


def anchored(model: nn.Module, lam: float = 0.25, every: int = 1, base: Any = None, **more: Any) -> zk.ZOStep:
    return zk.MeZOStep(model, 2e-3, EPS, seed=SEED, anchor=zk.Anchor(lam, every, values(model) if base is None else base), **more)


def bits(model: nn.Module) -> list[Tensor]:
    return list(values(model).values())


@pytest.mark.parametrize("on_host", [True, False], ids=["numbers", "tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["scratch", "inplace"])
def test_a_pull_is_three_roundings_of_its_formula(
    mode: str, dtype: torch.dtype, on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a run without, from the weights that this has before the pull; a piece of a weight at a time. Momentum, which in place has its way back to the
    clean weights as a pass of its own, with and without."""
    monkeypatch.setattr(evaluate, "on_host", lambda device: on_host)
    monkeypatch.setattr(work, "PIECE", 5)
    lam = 0.3
    model, plain = Tiny(dtype), Tiny(dtype)
    start = values(model)
    step = anchored(model, lam, perturbation=mode, rule=zk.Momentum())
    other = zk.MeZOStep(plain, 2e-3, EPS, seed=SEED, perturbation=mode, rule=zk.Momentum())
    step.step(model)
    other.step(plain)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        now = q.detach().float()
        wanted = (start[name].float() - now) * torch.tensor(lam) + now
        assert same_bits(p.detach(), wanted.to(dtype)), name


def test_it_is_due_every_so_many_steps_and_not_where_one_is_skipped() -> None:
    model = Tiny()
    base = File(model)
    step = anchored(model, every=3, base=base)
    counts = []
    for k in range(9):
        base.read.clear()
        step.step(lambda k=k: model() * (math.nan if k == 5 else 1.0))
        counts.append(len(base.read))
    # Before the first step all are compared with the weights; then one look at each, and none in the sixth, which is skipped.
    n = len(base)
    assert counts == [n, 0, n, 0, 0, 0, 0, 0, n] and step.skipped == 1


def test_a_skipped_step_on_a_device_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "on_host", lambda device: False)
    model = Tiny()
    step = anchored(model)
    step.step(model)
    with torch.no_grad():
        model.norm.bias[0] = -0.0
    before = bits(model)
    step.step(lambda: model() * math.nan)
    assert all(same_bits(a, b) for a, b in zip(before, bits(model), strict=True))


def test_with_lam_1_a_run_is_where_it_began() -> None:
    model = Tiny()
    before = bits(model)
    step = anchored(model, 1.0, every=2)
    for _ in range(2):
        step.step(model)
    assert all(torch.allclose(a, b, rtol=0, atol=2**-24) for a, b in zip(before, bits(model), strict=True))


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = Tiny()

    def forward(self) -> Tensor:
        found: Tensor = self.module()
        return found


def test_names_are_those_of_the_bare_model() -> None:
    """A wrapper's prefix in the model, or in the base."""
    plain, wrapped = Tiny(), Wrapped()
    step, other = anchored(plain), anchored(wrapped, base=values(plain))
    third = Tiny()
    last = anchored(third, base={f"module.{n}": t for n, t in values(third).items()})
    for _ in range(3):
        step.step(plain)
        other.step(wrapped)
        last.step(third)
    assert all(same_bits(a, b) and same_bits(a, c) for a, b, c in zip(bits(plain), bits(wrapped), bits(third), strict=True))


def test_a_file_is_a_base(tmp_path: Path) -> None:
    """Of bytes that stay in the file; in another type, as a model that is loaded in 16 bits has it."""
    model = Tiny(torch.bfloat16)
    torch.save({n: t.float() for n, t in values(model).items()}, tmp_path / "base.pt")
    other = copy.deepcopy(model)
    one, two = anchored(model, base=torch.load(tmp_path / "base.pt", mmap=True)), anchored(other)
    for _ in range(3):
        one.step(model)
        two.step(other)
    assert all(same_bits(a, b) for a, b in zip(bits(model), bits(other), strict=True))


def test_a_copied_and_a_loaded_run_go_on(tmp_path: Path) -> None:
    model = Tiny()
    start = values(model)
    step = anchored(model, every=2)
    for _ in range(3):
        step.step(model)
    second, copied = copy.deepcopy((model, step))
    third = Tiny()
    third.load_state_dict(model.state_dict())
    loaded = anchored(third, every=2, base=start)
    loaded.load_state_dict(step.state_dict())
    for m, s in ((model, step), (second, copied), (third, loaded)):
        for _ in range(3):
            s.step(m)
    assert all(same_bits(a, b) and same_bits(a, c) for a, b, c in zip(bits(model), bits(second), bits(third), strict=True))
    moved = Tiny()
    moved.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"pulled toward another base than this optimizer's Anchor has"):
        anchored(moved, every=2).load_state_dict(step.state_dict())  # its base is where the run stands
    with pytest.raises(ValueError, match=r"belongs to another method: its anchor is"):
        anchored(Tiny(), 0.5).load_state_dict(step.state_dict())
    with pytest.raises(ValueError, match=r"belongs to another method: its anchor is"):
        zk.MeZOStep(Tiny(), 2e-3, EPS).load_state_dict(step.state_dict())


def test_a_journal_says_when_and_a_replay_needs_no_base(tmp_path: Path) -> None:
    model = Tiny(torch.bfloat16)
    step = anchored(model, every=2, journal=tmp_path / "run.zoj")
    for _ in range(5):
        step.step(model)
    step.close_journal()
    past = zk.journal.read(tmp_path / "run.zoj")
    assert (past.header.method or {})["anchor"] == {"name": "anchor", "lam": 0.25, "every": 2}
    again = Tiny(torch.bfloat16)
    zk.replay(again, tmp_path / "run.zoj")
    assert all(same_bits(a, b) for a, b in zip(bits(model), bits(again), strict=True))
    with pytest.raises(ValueError, match="take 'sequential'"):
        zk.replay(Tiny(torch.bfloat16), tmp_path / "run.zoj", mode="fused")


NO_BASE: Any = [1]


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda m: zk.Anchor(0.0), ValueError, "lam=0.0 must be in"),
        (lambda m: zk.Anchor(1.5), ValueError, "lam=1.5 must be in"),
        (lambda m: zk.Anchor(1e-50), ValueError, "lam=1e-50 must be in .* and not 0 in fp32"),
        (lambda m: zk.Anchor(0.5, 0), ValueError, "every=0"),
        (lambda m: zk.Anchor(0.5, 1, NO_BASE), TypeError, "base is a list"),
        (lambda m: zk.MeZOStep(m, 1e-3, anchor=zk.Anchor(0.5)), ValueError, "anchor without a base"),
        (lambda m: zk.MeZOStep(m, 1e-3, anchor=0.5), TypeError, "anchor=0.5 must be an Anchor"),
        (
            lambda m: anchored(m, base={"norm.weight": m.norm.weight.detach().clone()}),
            ValueError,
            "the base has no 'layers.0.weight'",
        ),
        (lambda m: anchored(m, base={n: t.flatten() for n, t in values(m).items()}), ValueError, "of another model"),
        (lambda m: anchored(m, base=m.state_dict()), ValueError, "is the weight itself"),
        (lambda m: anchored(m, base={n: t + 1 for n, t in values(m).items()}).step(m), ValueError, "is not what the base has"),
        (lambda m: anchored(m, lazy=True, perturbation="inplace"), ValueError, "lazy=True"),
        (lambda m: anchored(m, cuda_graph=True), ValueError, "cuda_graph=True"),
        (lambda m: anchored(m, blocks=zk.Blocks()), ValueError, "anchor with blocks"),
        (lambda m: zk.DiZO(m, 1e-3, layers=["weight"], anchor=zk.Anchor(0.5, 1, values(m))), ValueError, "anchor with projection"),
    ],
)
def test_what_is_refused(make: Callable[[Tiny], Any], error: type[Exception], said: str) -> None:
    model = Tiny()
    before = bits(model)
    with pytest.raises(error, match=said):
        make(model)
    assert all(same_bits(a, b) for a, b in zip(before, bits(model), strict=True))


@pytest.mark.parametrize("resumed", [False, True], ids=["live", "resumed"])
def test_weights_that_join_a_run_begin_at_the_base(resumed: bool) -> None:
    """A group that is added later, and a parameter that is frozen no longer, are compared when they join; those that were there have moved."""
    model, more = Tiny(), Tiny()
    base = {**values(model), **{f"more.{name}": t for name, t in values(more).items()}}
    late = model.layers[1].weight
    optimizer = anchored(model, base=base)
    if not resumed:  # what a saved run had is taken to have been compared
        late.requires_grad_(False)
    optimizer.step(model)
    if resumed:
        state, optimizer = copy.deepcopy(optimizer.state_dict()), anchored(model, base=base)
        optimizer.load_state_dict(state)
    group = {"params": [(f"more.{name}", p) for name, p in more.named_parameters()]}
    if not resumed:
        late.data += 1
        late.requires_grad_(True)
        before = bits(model)
        with pytest.raises(ValueError, match=r"anchor: 'layers\.1\.weight' is not what the base has"):
            optimizer.step(model)
        assert all(same_bits(a, b) for a, b in zip(before, bits(model), strict=True))
        late.data.copy_(base["layers.1.weight"])
    more.norm.weight.data += 1
    optimizer.step(model)
    optimizer.add_param_group(group)
    with pytest.raises(ValueError, match=r"anchor: 'more\.norm\.weight' is not what the base has"):
        optimizer.step(model)
    more.norm.weight.data.copy_(base["more.norm.weight"])
    optimizer.step(model)
