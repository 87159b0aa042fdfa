"""Steps as CUDA graphs: the same bits as without, every number that may change is read anew, and a fallback that says why.

On the CPU, with the recording of `emulated_graph`; test_gpu.py captures real ones.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import UserDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

import zo_kernels as zk
from tests.kernels.cases import same_bits
from tests.optim import emulated_graph
from tests.optim.emulated_graph import Emulated
from tests.optim.models import loss_of, make, tokens
from zo_kernels._backends import cpu


@pytest.fixture(autouse=True)
def emulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    emulated_graph.install(monkeypatch)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="cuda_graph")  # no silent fallback
        yield


def batches(n: int, sizes: tuple[tuple[int, int], ...] = ((2, 6),)) -> list[Tensor]:
    return [tokens(*sizes[k % len(sizes)], seed=k) for k in range(n)]


def run(model: nn.Module, data: list[Tensor], graph: bool, **options: Any) -> tuple[list[float], list[float], zk.MeZOStep]:
    """Losses and projected gradients of a run with a schedule."""
    options = {"lr": 1e-3, "eps": 1e-2, "seed": 5, "weight_decay": 0.1, "clip": 50.0, **options}
    step = zk.MeZOStep(model, cuda_graph=graph, **options)
    schedule = torch.optim.lr_scheduler.LinearLR(step, 1.0, 0.1, total_iters=len(data))
    losses, gradients = [], []
    for batch in data:
        losses.append(step.step(lambda b: loss_of(model, b), [batch]).item())
        gradients.append(step.projected_gradient.item())
        schedule.step()
    return losses, gradients, step


@pytest.mark.parametrize("options", [{"perturbation": "inplace"}, {}, {"scratch_bytes": 9000}, {"scratch_bytes": 1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["opt", "gpt2", "llama-tied", "lora"])
def test_the_same_bits_as_without(family: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = make(family, dtype)
    other = copy.deepcopy(model)
    data = batches(10, ((2, 6), (3, 5)))
    losses, gradients, step = run(model, data, True, **options)
    assert (losses, gradients) == run(other, data, False, **options)[:2]
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert [g.replays for g in Emulated.made] == [5] * 2, "one graph a shape"
    assert step.skipped == 0


@pytest.mark.parametrize("options", [{"queries": 3}, {"queries": 2, "one_sided": True, "kind": "rademacher"}], ids=str)
@pytest.mark.parametrize("mode", ["inplace", "scratch"])
def test_queries_are_one_graph(mode: str, options: dict[str, Any]) -> None:
    model = make("opt", torch.float16)
    other = copy.deepcopy(model)
    data = batches(6, ((2, 6),))
    losses, gradients, step = run(model, data, True, perturbation=mode, **options)
    assert (losses, gradients) == run(other, data, False, perturbation=mode, **options)[:2]
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert step.steps == 6 and len(Emulated.made) == 1


def test_a_non_finite_loss_is_skipped_on_the_device() -> None:
    model = make("llama")
    data = [torch.tensor(v) for v in (0.1, 0.2, 0.3, float("nan"), 0.4, float("inf"), 0.5)]

    def closure(x: Tensor) -> Tensor:
        return loss_of(model, tokens()) + x

    step = zk.MeZOStep(model, lr=1e-2, cuda_graph=True, weight_decay=0.5)
    for x in data:
        before = [p.detach().clone() for p in model.parameters()]
        loss = step.step(closure, [x])
        same = all(same_bits(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same == (not loss.isfinite())
    assert step.skipped == 2
    assert [g.replays for g in Emulated.made] == [7]


def test_accumulation_is_one_graph() -> None:
    model = make("llama")
    other = copy.deepcopy(model)
    found = []
    for m, graph in ((model, True), (other, False)):
        step = zk.MeZOStep(m, lr=1e-3, cuda_graph=graph)
        for k in range(4):
            found.append((graph, k, step.step(lambda b, m=m: loss_of(m, b), batches(3, ((2, 6), (1, 4)))).item()))
    assert [loss for graph, _, loss in found if graph] == [loss for graph, _, loss in found if not graph]
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert len(Emulated.made) == 1


@dataclass(frozen=True)
class Pair:
    ids: Tensor
    weight: float


class Row(NamedTuple):
    ids: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        lambda d: UserDict(d),
        lambda d: [d["ids"]],
        lambda d: Pair(d["ids"], 2.0),
        lambda d: Row(d["ids"]),
        lambda d: (d, None),
    ],
)
def test_batches_of_every_form(wrap: Any) -> None:
    model = make("llama")
    other = copy.deepcopy(model)

    def ids_of(b: Any) -> Tensor:
        b = b[0] if isinstance(b, tuple) and not isinstance(b, Row) else b
        return b.ids if isinstance(b, (Pair, Row)) else b[0] if isinstance(b, list) else b["ids"]

    found = []
    for m, graph in ((model, True), (other, False)):
        step = zk.MeZOStep(m, lr=1e-3, cuda_graph=graph)
        found.append([step.step(lambda b, m=m: loss_of(m, ids_of(b)), [wrap({"ids": ids})]).item() for ids in batches(4)])
    assert found[0] == found[1]
    assert [g.replays for g in Emulated.made] == [4]


def test_a_batch_in_a_cell_of_the_closure_is_never_replayed_stale() -> None:
    """`lambda _: model(batch)` with a new batch each time: other objects, other steps."""
    model = make("llama")
    other = copy.deepcopy(model)

    def losses(m: nn.Module, graph: bool) -> list[float]:
        step = zk.MeZOStep(m, lr=1e-3, cuda_graph=graph)
        found = []
        for batch in batches(6):
            extra = {"ids": batch}
            found.append(step.step(lambda _, extra=extra: loss_of(m, extra["ids"]), [torch.zeros(1)]).item())
            del extra
        return found

    assert losses(model, True) == losses(other, False)
    assert all(g.replays == 1 for g in Emulated.made)


def test_new_weights_need_new_graphs() -> None:
    model = make("llama")
    step = zk.MeZOStep(model, lr=1e-3, cuda_graph=True)

    def closure(batch: Tensor) -> Tensor:
        return loss_of(model, batch)

    for _ in range(3):
        step.step(closure, batches(1))
    model.half()
    other, eager_state = copy.deepcopy(model), step.state_dict()
    losses = [step.step(closure, batches(1)).item() for _ in range(3)]
    eager = zk.MeZOStep(other, lr=1e-3)
    eager.load_state_dict(eager_state)
    assert losses == [eager.step(lambda b: loss_of(other, b), batches(1)).item() for _ in range(3)]
    assert [g.replays for g in Emulated.made] == [3, 3]


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.linear(x), training=self.training).square().mean()


def run_three(step: zk.MeZOStep, closure: Any, data: Any, match: str) -> None:
    """Three steps, of which one warns."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            step.step(closure, data)
    assert [bool(re.search(match, str(w.message))) for w in caught] == [True], [str(w.message) for w in caught]


def test_what_cannot_be_captured_runs_without_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(match: str, closure: Any, model: nn.Module, data: Any) -> None:
        before = [p.detach().clone() for p in model.parameters()]
        step = zk.MeZOStep(model, lr=1e-3, seed=1, cuda_graph=True)
        torch.manual_seed(0)
        run_three(step, closure, data, match)
        after = [p.detach().clone() for p in model.parameters()]
        for p, b in zip(model.parameters(), before, strict=True):
            p.data.copy_(b)
        torch.manual_seed(0)
        eager = zk.MeZOStep(model, lr=1e-3, seed=1)
        for _ in range(3):
            eager.step(closure, data)
        assert all(same_bits(a, b) for a, b in zip(after, model.parameters(), strict=True))

    x = [torch.ones(2, 4)]
    check("draw random numbers", (m := Dropped()).train().forward, m, x)
    check(r"cannot be captured \(RuntimeError: operation not permitted", lambda b: m(b) if m(b) > -1 else m(b) * 0, m.eval(), x)
    check("cannot be captured .*not permitted", lambda b: m(b).item(), m, x)
    check("needs step.closure, batches", lambda: m(x[0]), m, None)
    check("holds a set, which cannot be compared", lambda b: m(x[0]), m, [{1}])
    for perturbation in ("inplace", "scratch"):
        before = [p.detach().clone() for p in m.parameters()]
        step = zk.MeZOStep(m, lr=0.0, cuda_graph=True, perturbation=perturbation)
        run_three(step, lambda b: m(b).item(), x, "cannot be captured")
        tolerance = 0 if perturbation == "scratch" else 2.0**-20
        assert all((a - b).abs().max() <= tolerance for a, b in zip(before, m.parameters(), strict=True))
    monkeypatch.undo()
    check("the weights are on cpu, and only CUDA has graphs", lambda b: m(b), m, x)


def test_many_shapes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zo_kernels.optim.graph.MOST_GRAPHS", 3)
    model = make("llama")
    step = zk.MeZOStep(model, lr=1e-3, cuda_graph=True)
    for n in range(2, 5):
        step.step(lambda b: loss_of(model, b), [tokens(1, n)])
    assert len(Emulated.made) == 3
    with pytest.warns(UserWarning, match=r"3 different steps have been seen.*pad the batches"):
        step.step(lambda b: loss_of(model, b), [tokens(1, 5)])
    step.step(lambda b: loss_of(model, b), [tokens(1, 6)])


def test_bad_arguments() -> None:
    model = make("llama")
    with pytest.raises(ValueError, match="lazy=True and cuda_graph=True"):
        zk.MeZOStep(model, lr=1e-3, cuda_graph=True, lazy=True, perturbation="inplace")


def test_a_first_read_past_the_attributes_while_recording_refuses_the_graph() -> None:
    model, x = nn.Linear(6, 3), torch.ones(2, 6)
    before = [p.detach().clone() for p in model.parameters()]

    def closure(x: Tensor) -> Tensor:
        extra = next(iter(model.parameters())).sum() if Emulated.recording is not None else 0.0
        return model(x).square().mean() + extra

    step = zk.MeZOStep(model, lr=0.0, eps=1e-2, cuda_graph=True)
    with pytest.warns(UserWarning, match="cannot be captured .*weight is read past its module's attribute.*without graphs"):
        step.step(closure, [x])
    assert all(type(p) is nn.Parameter and same_bits(p.detach(), b) for p, b in zip(model.parameters(), before, strict=True))
    step.step(closure, [x])
    assert step.steps == 2


def test_batches_lie_where_the_graph_reads_them() -> None:
    """A graph reads host memory when it runs, and by then the host has written the next batch there."""
    model = nn.Linear(4, 4)
    step = zk.MeZOStep(model, lr=1e-3, cuda_graph=True)
    run_three(
        step,
        lambda b: model(b["x"]).square().mean(),
        [{"x": torch.ones(2, 4), "lengths": torch.ones(2, device="meta")}],
        "a batch has a tensor on meta: move it to cpu before the step",
    )
    assert not Emulated.made


@pytest.mark.parametrize("mode", ["inplace", "scratch"])
def test_rehearsals_leave_no_trace(mode: str) -> None:
    """Kernels are loaded by rehearsals, on the graph's own inputs; a step that cannot be captured then is as if there had been none."""
    model = nn.Linear(4, 4).half()
    before = [p.detach().clone() for p in model.parameters()]
    calls: list[Tensor] = []

    def closure(x: Tensor) -> Tensor:
        calls.append(x)
        if Emulated.recording is not None:
            raise ValueError("not here")
        if mode == "inplace" and len(calls) <= 2:
            assert all(same_bits(p, b) for p, b in zip(model.parameters(), before, strict=True))
        return model(x).float().square().mean()

    step = zk.MeZOStep(model, lr=0.0, weight_decay=0.5, cuda_graph=True, perturbation=mode, rounding="stochastic")
    with pytest.warns(UserWarning, match="cannot be captured .ValueError: not here"):
        step.step(closure, [torch.ones(2, 4).half()])
    assert (step.steps, step.skipped) == (1, 0)


def test_held_parameters_are_refused_by_their_names() -> None:
    """Each forward has a plan of its own for them, which no graph has seen."""
    model = nn.Linear(6, 3)
    weights = list(model.parameters())

    def closure(x: Tensor) -> Tensor:
        return nn.functional.linear(x, weights[0], model.bias).square().mean()

    step = zk.MeZOStep(model, lr=1e-3, cuda_graph=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step.step(closure, [torch.ones(2, 6)])
    assert any(
        re.search("cuda_graph=True: weight: read in ways that modules' attributes do not show", str(w.message)) for w in caught
    )
    assert not Emulated.made


def test_a_rehearsal_that_fails_has_no_record(tmp_path: Path) -> None:
    """Its passes in place have rounded nothing: a replay that made them would."""
    base = make("llama", torch.float16)
    model, path, fails = copy.deepcopy(base), tmp_path / "run.zoj", [True]

    def closure(x: Tensor) -> Tensor:
        if fails:
            fails.pop()
            raise ValueError("in a rehearsal")
        return loss_of(model, x)

    step = zk.MeZOStep(model, lr=1e-2, eps=1e-2, cuda_graph=True, perturbation="inplace", journal=path)
    with pytest.raises(ValueError, match="in a rehearsal"):
        step.step(closure, batches(1))
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))
    for _ in range(3):
        step.step(closure, batches(1))
    step.close_journal()
    assert len(zk.journal.read(path)) == 3
    zk.replay(base, path)
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))


# ---- rules that keep a state, and directions that are prepared -----------------------------------------------------------

METHODS: dict[str, Any] = {
    "momentum": lambda m, **k: zk.ZOMomentum(m, 1e-3, **k),
    "momentum-bf16": lambda m, **k: zk.ZOStep(m, 1e-3, rule=zk.Momentum(dtype="bfloat16"), **k),
    "adam": lambda m, **k: zk.ZOAdam(m, 1e-3, **k),
    "adam-queries": lambda m, **k: zk.ZOStep(m, 1e-3, rule=zk.Adam(dtype="bfloat16"), estimator=zk.TwoSided(2), **k),
    "hizoo": lambda m, **k: zk.HiZOO(m, 1e-3, alpha=1e-3, **k),
    "sparse": lambda m, **k: zk.SparseMeZO(m, 1e-2, quantile=0.5, **k),
    "sparse-adam": lambda m, **k: zk.ZOAdam(m, 1e-3, direction=zk.MagnitudeSparse(0.5), **k),
    "conservative": lambda m, **k: zk.ZOConservative(m, 1e-3, **k),
}


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(9, 13), nn.Linear(13, 5)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.second(self.first(x)).float().square().mean()
        return loss


def inputs(n: int, dtype: torch.dtype, bad: int | None = 5) -> list[Tensor]:
    """Batches of two shapes; of `bad` the loss is no number, and its step is skipped."""
    found = [torch.randn(4 + k % 2, 9, generator=torch.Generator().manual_seed(k)).to(dtype) for k in range(n)]
    if bad is not None:
        found[bad][0, 0] = float("nan")
    return found


def grouped(model: Small) -> list[dict[str, Any]]:
    """Groups that cut across the layers, one of which has no decay."""
    one = [(n, p) for n, p in model.named_parameters() if n.startswith("first")]
    two = [(n, p) for n, p in model.named_parameters() if n.startswith("second")]
    return [{"params": one, "weight_decay": 0.1}, {"params": two, "lr": 2e-3, "maximize": False}]


def steps_of(step: Any, model: nn.Module, data: list[Tensor]) -> list[float]:
    found = []
    for x in data:
        found.append(step.step(model, [x]).item())
        for group in step.param_groups:
            group["lr"] *= 0.9
    return found


@pytest.mark.parametrize("mode", ["inplace", "scratch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_states_are_those_without_a_graph(name: str, dtype: torch.dtype, mode: str, tmp_path: Path) -> None:
    """Weights, state and record, with two shapes of batch, a schedule, a decay and a step that is skipped; and the record's replay."""
    found, models = [], []
    for graph in (True, False):
        model, path = Small(dtype), tmp_path / f"{graph}.zoj"
        step = METHODS[name](model, seed=5, weight_decay=0.1, perturbation=mode, journal=path, cuda_graph=graph)
        losses = steps_of(step, model, inputs(9, dtype))
        step.close_journal()
        records = journal_of(path)
        found.append((str(losses), step.skipped, step.steps, records, readable(step.state_dict())))
        models.append(model)
    assert found[0] == found[1]
    assert found[0][1] == 1
    models.append(Small(dtype))
    zk.replay(models[2], tmp_path / "True.zoj")
    for a, b, c in zip(*(m.parameters() for m in models), strict=True):
        assert same_bits(a, b) and same_bits(a, c)
    assert [g.replays for g in Emulated.made] == [5, 4], "one graph a shape"


def journal_of(path: Path) -> list[Any]:
    past = zk.journal.read(path)
    return [repr(row[:-1]) for row in past.records.tolist()]  # without the checksum, which begins with the run


def readable(node: Any) -> Any:
    """A state as something that can be compared: tensors by their bytes."""
    if isinstance(node, Tensor):
        return str(node.dtype), node.contiguous().view(torch.uint8).tolist() if node.ndim else node.item()
    if isinstance(node, dict):
        return {str(k): readable(v) for k, v in node.items() if k not in ("lr", "initial_lr")}
    if isinstance(node, (list, tuple)):
        return [readable(v) for v in node]
    return node if isinstance(node, (int, str, bool, type(None))) else str(node)


@pytest.mark.parametrize("name", ["adam", "hizoo", "momentum"])
def test_a_state_goes_on_in_another_optimizer_and_in_a_copy(name: str) -> None:
    """Whether the steps before were launched as graphs, or are behind: counts of updates lie on the device, and are those of the host."""
    data = inputs(8, torch.float32)
    wanted = Small(torch.float32)
    one = METHODS[name](wanted, seed=5)
    steps_of(one, wanted, data)
    for first, second in ((True, False), (False, True), (True, True)):
        model = Small(torch.float32)
        step = METHODS[name](model, seed=5, cuda_graph=first)
        steps_of(step, model, data[:4])
        other = METHODS[name](model, seed=5, cuda_graph=second)
        other.load_state_dict(step.state_dict())
        copied, copy_of_model = copy.deepcopy((other, model))
        for a, m in ((other, model), (copied, copy_of_model)):
            steps_of(a, m, data[4:])
            assert all(same_bits(p, q) for p, q in zip(m.parameters(), wanted.parameters(), strict=True)), (first, second)


@pytest.mark.parametrize("name", ["adam", "hizoo", "sparse-adam"])
def test_a_resumed_record_goes_on_as_graphs(name: str, tmp_path: Path) -> None:
    data, wanted = inputs(8, torch.bfloat16), Small(torch.bfloat16)
    whole = METHODS[name](wanted, seed=5, journal=tmp_path / "whole.zoj")
    for x in data:
        whole.step(wanted, [x])
    whole.close_journal()
    for first in (0, 4):
        model = Small(torch.bfloat16)
        step = METHODS[name](model, seed=5, cuda_graph=True, journal=tmp_path / "parts.zoj", resume=first > 0)
        for x in data[first : first + 4]:
            step.step(model, [x])
        step.close_journal()
    assert all(same_bits(p, q) for p, q in zip(model.parameters(), wanted.parameters(), strict=True))
    assert step.movement() == whole.movement()
    assert journal_of(tmp_path / "parts.zoj") == journal_of(tmp_path / "whole.zoj")


def test_counts_are_of_each_parameters_own_updates() -> None:
    """A layer that is frozen, and groups of a state that was saved with one."""
    finals = []
    for graph in (True, False):
        model = Small(torch.float32)
        step = zk.ZOAdam(model, 1e-3, seed=5, cuda_graph=graph)
        data = inputs(10, torch.float32, bad=None)
        steps_of(step, model, data[:3])
        model.first.requires_grad_(False)
        steps_of(step, model, data[3:6])
        model.first.requires_grad_(True)
        steps_of(step, model, data[6:8])
        parted = zk.ZOAdam(grouped(model), 1e-3, seed=5, cuda_graph=graph)
        state = step.state_dict()
        parted.load_state_dict({**state, "param_groups": parted.state_dict()["param_groups"]})
        steps_of(parted, model, data[8:])
        finals.append([p.detach().clone() for p in model.parameters()])
    assert all(same_bits(a, b) for a, b in zip(*finals, strict=True))


def test_eager_steps_after_a_refused_graph_count_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host counts again, and a step that fails takes its count back."""
    models = [Small(torch.float32) for _ in range(2)]
    data = inputs(6, torch.float32)
    steps = [zk.ZOAdam(m, 1e-3, seed=5, cuda_graph=k == 0) for k, m in enumerate(models)]
    for step, model in zip(steps, models, strict=True):
        steps_of(step, model, data[:3])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step.step(lambda m=model: m(data[3]))
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "update", Mock(side_effect=MemoryError))
            with pytest.raises(MemoryError):
                step.step(model, [data[4]])
        steps_of(step, model, data[4:])
    assert all(same_bits(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    assert readable(steps[0].state_dict()["state"]) == readable(steps[1].state_dict()["state"])


@pytest.mark.parametrize(
    "options",
    [
        {"rule": zk.Momentum(state="recomputed")}, {"rule": zk.Adam(state="recomputed")}, {"direction": zk.RandomSparse(0.5)},
        {"direction": zk.LowRank(2)}, {"direction": zk.LayerScale()}, {"clip": zk.QuantileClip(0.5, 4, 2)}, {"scale_free": zk.ScaleFree(0.9)},
        {"estimator": zk.ForwardGradient()}, {"blocks": ["first", "second"]},
    ],
    ids=lambda o: next(iter(o.values())).__class__.__name__,
)  # fmt: skip
def test_methods_whose_steps_differ_are_refused(options: dict[str, Any]) -> None:
    if "blocks" in options:
        options = {"blocks": zk.Blocks(options["blocks"])}
    with pytest.raises(ValueError, match="cuda_graph=True with a method whose steps differ: a graph repeats one step"):
        zk.ZOStep(Small(torch.float32), 1e-3, cuda_graph=True, **options)
