"""A run is its journal: what is recorded, replayed and resumed has the bits of the run."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import math
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zo_kernels as zk
from tests.kernels import interpreter
from tests.kernels.cases import same_bits
from tests.optim import emulated_graph
from tests.optim.models import loss_of, make, tokens
from zo_kernels import journal
from zo_kernels.optim import record
from zo_kernels.optim.decision import Decision
from zo_kernels.views import queued

MODES: dict[str, dict[str, Any]] = {
    "scratch": {"perturbation": "scratch"},
    "inplace": {"perturbation": "inplace"},
    "lazy": {"perturbation": "inplace", "lazy": True},
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMS = [(mode, dtype, rounding) for mode in MODES for dtype in DTYPES for rounding in ("nearest", "stochastic")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Small(nn.Module):
    """Odd sizes, a bias and a norm; a smooth loss of the step's data."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.a, self.norm, self.b = nn.Linear(7, 19), nn.LayerNorm(19), nn.Linear(19, 3)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g).to(dtype)

    def forward(self, step: int) -> Tensor:
        x = torch.randn(5, 7, generator=torch.Generator().manual_seed(step))
        h = nn.functional.layer_norm(
            nn.functional.linear(x, self.a.weight.float(), self.a.bias.float()),
            (19,),
            self.norm.weight.float(),
            self.norm.bias.float(),
        )
        return nn.functional.linear(h.tanh(), self.b.weight.float(), self.b.bias.float()).square().mean()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(same_bits(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def optimizer_of(params: Any, mode: str, rounding: str = "nearest", **options: Any) -> zk.MeZOStep:
    settings = {"lr": 3e-3, "eps": 1e-2, "seed": 11, "weight_decay": 0.1, "rounding": rounding, **MODES[mode], **options}
    return zk.MeZOStep(params, **settings)


def go_on(optimizer: zk.MeZOStep, model: nn.Module, until: int, look_every: int = 4) -> None:
    """Steps with a learning rate that falls and an eps that changes once; now and then somebody looks at the weights."""
    while (k := optimizer.steps) < until:
        if k % look_every == 0:
            with torch.no_grad():
                model(0)
        for group in optimizer.param_groups:
            group["lr"], group["eps"] = 3e-3 * (1 - k / 100), 1e-2 if k < 6 else 2e-2
        optimizer.step(lambda k=k: model(k) if k != 5 else model(k) * math.nan)


@pytest.mark.parametrize(("mode", "dtype", "rounding"), FORMS, ids=str)
def test_replay_and_resume_give_the_bits_of_the_run(tmp_path: Path, mode: str, dtype: torch.dtype, rounding: str) -> None:
    base, path = Small(dtype), tmp_path / "run.zoj"
    live = copy.deepcopy(base)
    optimizer = optimizer_of(live, mode, rounding, journal=path, clip=2.0)
    states: list[list[Tensor]] = []
    for k in range(14):
        go_on(optimizer, live, k + 1)
        if k in (3, 8):  # in place this changes a lazy run's bits, and the record of the next step tells
            optimizer.flush()
        if mode != "lazy" or k in (3, 8):
            states.append([p.detach().clone() for p in live.parameters()])
    optimizer.close_journal()
    optimizer.flush()

    past = journal.read(path)
    assert len(past) == 14 and past.flag("skipped").tolist() == [k == 5 for k in range(14)]
    assert past.flag("clipped").any() and not past.flag("clipped").all()
    assert past.flag("stochastic").all() == (rounding == "stochastic")
    again = copy.deepcopy(base)
    assert zk.replay(again, path).header == past.header
    assert same(again, live)
    for n, state in zip((4, 9) if mode == "lazy" else range(1, 15), states, strict=True):
        earlier = copy.deepcopy(base)
        zk.replay(earlier, past, upto=n, backend="reference" if n == 4 else None)
        assert all(same_bits(p, q) for p, q in zip(earlier.parameters(), state, strict=True)), n

    # killed after any number of records, or inside one, and gone on
    whole = path.read_bytes()
    for records in (0, 1, 5, 9, 14):
        cut = tmp_path / f"{records}.zoj"
        cut.write_bytes(whole[: past.start + records * past.header.record.itemsize + (7 if records < 14 else 0)])
        other = copy.deepcopy(base)
        resumed = optimizer_of(other, mode, rounding, journal=cut, resume=True, clip=2.0)
        assert resumed.steps == records and resumed.skipped == (records > 5)
        for k in range(records, 14):
            if mode == "lazy" and k in (4, 9) and k == records:
                resumed.flush()
            go_on(resumed, other, k + 1)
            if k in (3, 8):
                resumed.flush()
        resumed.close_journal()
        resumed.flush()
        assert same(other, live), records
        assert cut.read_bytes() == whole


@pytest.mark.parametrize(
    ("mode", "dtype"), [("scratch", torch.bfloat16), ("inplace", torch.float16), ("lazy", torch.bfloat16)], ids=str
)
def test_hundreds_of_steps_of_16_bit_weights(
    tmp_path: Path, mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many that a replay cannot gather the passes of all of them."""
    monkeypatch.setattr(queued, "MOST", 1024)
    base, path = Small(dtype), tmp_path / "run.zoj"
    live = copy.deepcopy(base)
    optimizer = optimizer_of(live, mode, "stochastic" if dtype == torch.bfloat16 else "nearest", journal=path)
    for k in range(500):
        optimizer.step(lambda k=k: live(k))
        if k + 1 == 100:
            optimizer.flush()
            early = copy.deepcopy(live)
    optimizer.close_journal()
    optimizer.flush()
    assert not same(base, live) and not same(early, live)
    # The reference, a second for 50 steps, shows that nothing of the CPU's is in it: a replay makes one record's passes after another's.
    upto = {"cpu": 500, "reference": 100} if "cpu" in zk.backends() else {"reference": 500}
    for backend, steps in upto.items():
        again = copy.deepcopy(base)
        zk.replay(again, path, upto=steps, backend=backend)
        assert same(again, live if steps == 500 else early), backend


def test_a_fused_replay_is_closer_to_fp32_than_the_run(tmp_path: Path) -> None:
    """Against the same sum, same noise and recorded coefficients, in float64: the run rounds at every step, a fused replay once."""
    for dtype in (torch.float16, torch.bfloat16):
        base, path = Small(dtype), tmp_path / f"{dtype}.zoj"
        live = copy.deepcopy(base)
        optimizer = optimizer_of(live, "scratch", "nearest", journal=path)
        for k in range(750):
            optimizer.step(lambda k=k, live=live: live(k))
        optimizer.close_journal()
        past = journal.read(path)
        exact = {n: p.detach().double() for n, p in base.named_parameters()}
        table = {p.name: p for p in past.header.parameters}
        for r in past.records:
            for n in exact:
                entry, numbers = table[n], r["groups"][table[n].group]
                z = zk.normal(exact[n].shape, seed=11, stream=entry.stream, tag=int(r["tag"])).double()
                exact[n] = float(numbers["decay"]) * exact[n] + float(numbers["coef"][0]) * z
        fused = copy.deepcopy(base)
        zk.replay(fused, past, mode="fused")
        ulp = torch.finfo(dtype).eps

        def distance(model: nn.Module, exact: dict[str, Tensor] = exact) -> float:
            return math.sqrt(sum(float((p.double() - exact[n]).square().sum()) for n, p in model.named_parameters()))

        assert distance(fused) < 0.1 * distance(live)
        for n, p in fused.named_parameters():  # half a unit in the last place, and the 17 bits of the coefficients
            assert ((p.double() - exact[n]).abs() <= 0.5 * ulp * exact[n].abs() + 1e-4).all(), n


def test_masks_scales_groups_and_kinds(tmp_path: Path) -> None:
    for mode in MODES:
        for kind in ("gaussian", "rademacher"):
            base, path = Small(torch.float16), tmp_path / f"{mode}.{kind}.zoj"
            live = copy.deepcopy(base)
            stored = torch.rand(19, 7, generator=torch.Generator().manual_seed(1)) < 0.5
            rows = torch.rand(19, generator=torch.Generator().manual_seed(2))
            pairs = list(live.named_parameters())
            groups = [
                {
                    "params": pairs[:3],
                    "mask": {"a.weight": stored, "a.bias": zk.RandomMask(0.4, 7)},
                    "lr": 0.02,
                    "weight_decay": 0.5,
                },
                {"params": pairs[3:], "scale": {"b.weight": 0.5, "norm.bias": rows}, "eps": 2e-2},
            ]
            optimizer = optimizer_of(groups, mode, "nearest", model=live, kind=kind, journal=path)
            for k in range(9):
                optimizer.step(lambda k=k, live=live: live(k))  # type: ignore[misc]
            optimizer.close_journal()
            optimizer.flush()
            given: dict[str, Any] = {"masks": {"a.weight": stored}, "scales": {"norm.bias": rows}}
            again = copy.deepcopy(base)
            zk.replay(again, path, **given)
            assert same(again, live)
            for missing, what in (("masks", "mask"), ("scales", "scale")):
                wrong = {**given, missing: {}}
                with pytest.raises(ValueError, match=rf"the run's {what} is .*sha256.*given is None.*give it as {what}s="):
                    zk.replay(again, path, check=False, **wrong)
            with pytest.raises(ValueError, match="the run's mask is"):
                zk.replay(again, path, check=False, masks={"a.weight": ~stored}, scales=given["scales"])


@pytest.mark.parametrize("family", ["lora", "prompt", "llama-tied"])
def test_real_architectures(tmp_path: Path, family: str) -> None:
    base, path = make(family), tmp_path / "run.zoj"
    live = copy.deepcopy(base)
    optimizer = zk.MeZOStep(live, lr=1e-2, eps=1e-2, seed=5, journal=path)
    for k in range(5):
        optimizer.step(lambda k=k: loss_of(live, tokens(seed=k)))
    optimizer.close_journal()
    past = journal.read(path)
    assert {p.name for p in past.header.frozen} == {n for n, p in base.named_parameters() if not p.requires_grad}
    again = copy.deepcopy(base)
    zk.replay(again, path)
    assert same(again, live)
    if past.header.frozen:  # an adapter belongs to its base model
        with torch.no_grad():
            next(p for p in base.parameters() if not p.requires_grad).view(-1)[0] += 1
        before = copy.deepcopy(base)
        with pytest.raises(ValueError, match=r"not the one that this run started from.*has other values"):
            zk.replay(base, path)
        assert same(before, base)


class Buffered(nn.Module):
    """Packed weights, running statistics, and a table that each forward makes again."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.register_buffer("qweight", torch.randint(-127, 127, (8, 8), dtype=torch.int8, generator=g))
        self.register_buffer("nothing", None)
        self.register_buffer("cache", torch.zeros(1), persistent=False)
        self.norm = nn.BatchNorm1d(8)
        self.a, self.b = nn.Parameter(torch.zeros(8, 2)), nn.Parameter(torch.ones(2, 8))
        self.cache: Tensor
        self.qweight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.cache = torch.cat([self.cache, x.detach().sum()[None]])
        return self.norm(x @ (self.qweight / 127) + x @ self.a @ self.b)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [False, True])
def test_a_base_is_its_persistent_buffers_too(tmp_path: Path, mode: str, training: bool) -> None:
    """As they were at the start: the run's own forwards move running statistics. What the model makes again by itself does not count."""
    path, x = tmp_path / "run.zoj", torch.randn(4, 8)

    def run(model: nn.Module, steps: int) -> nn.Module:
        optimizer = zk.MeZOStep(model, lr=1e-2, seed=2, journal=path, resume=True, **MODES[mode])
        for _ in range(optimizer.steps, steps):
            optimizer.step(lambda: model(x).pow(2).mean())
        optimizer.close_journal()
        optimizer.flush()
        return model

    live = run(Buffered().train(training), 2)
    names = {b.name for b in journal.read(path).header.buffers}
    assert names == {"qweight", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    evaluated = Buffered().eval()
    evaluated(x)
    zk.replay(evaluated, path)
    assert same(evaluated, live)
    wrapped = nn.ModuleDict({"module": Buffered()})
    zk.replay(wrapped, path)
    assert all(map(torch.equal, wrapped.parameters(), live.parameters()))
    zk.replay(((n, p) for n, p in Buffered().named_parameters()), path)  # buffers are not there to be looked at
    run(Buffered().train(training), 3)
    for other, name in ((Buffered(1), "qweight"), (Buffered(), "norm.running_mean"), (Buffered(), "norm.num_batches_tracked")):
        if name == "norm.running_mean":
            other.norm.running_mean += 1
        elif name != "qweight":
            other.norm.num_batches_tracked += 1
        before = copy.deepcopy(other)
        for go in (partial(zk.replay, other, path), partial(run, other, 4)):
            with pytest.raises(ValueError, match=rf"buffer '{name}' has other values .* as it was before training"):
                go()
            assert same(before, other)
    pruned = Buffered()
    del pruned.qweight
    with pytest.raises(ValueError, match="buffer 'qweight' is missing"):
        zk.replay(pruned, path)
    zk.replay(Buffered(1), path, check=False)


def test_another_base_or_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    base, path = Small(), tmp_path / "run.zoj"
    live = copy.deepcopy(base)
    optimizer = optimizer_of(live, "scratch", journal=path)
    go_on(optimizer, live, 3)
    optimizer.close_journal()
    before, file = copy.deepcopy(live), path.read_bytes()
    with pytest.raises(ValueError, match="not the one that this run started from"):
        zk.replay(live, path)
    with pytest.raises(ValueError, match="not the one that this run started from"):
        optimizer_of(live, "scratch", journal=path, resume=True)
    for changes, message in [
        ({"seed": 12}, "its seed is 11, this optimizer's 12"),
        ({"kind": "rademacher"}, "its kind"),
        ({"perturbation": "inplace"}, "its perturbation"),
        ({"weight_decay": 0.0}, "its groups"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer_of(copy.deepcopy(base), "scratch", journal=path, resume=True, **changes)
    fewer = copy.deepcopy(base)
    fewer.b.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'b.bias' is trained in only one of the two"):
        optimizer_of(fewer, "scratch", journal=path, resume=True)
    with pytest.raises(FileExistsError, match="a journal is there"):
        optimizer_of(base, "scratch", journal=path)
    with pytest.raises(ValueError, match=r"upto=4 must be a number of steps, 0 .. 3"):
        zk.replay(base, path, upto=4)
    with pytest.raises(ValueError, match="mode='exact'"):
        zk.replay(base, path, mode="exact")
    with pytest.raises(ValueError, match="resume=True needs journal"):
        optimizer_of(base, "scratch", resume=True)
    assert same(before, live) and path.read_bytes() == file
    with optimizer_lock(path), pytest.raises(journal.LockedError, match="is in use by process"):
        optimizer_of(copy.deepcopy(base), "scratch", journal=path, resume=True)


def optimizer_lock(path: Path) -> journal.Writer:
    return journal.reopen(path)[0]


class Oops(Exception):
    pass


@pytest.mark.parametrize("error", [Oops, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_failed_steps_are_part_of_the_record(tmp_path: Path, mode: str, dtype: torch.dtype, error: type[BaseException]) -> None:
    """A closure that raises in the first or the second forward, is caught, and the step tried again: in place the weights' bits have
    changed by then."""
    base, path = Small(dtype), tmp_path / "run.zoj"
    live = copy.deepcopy(base)
    optimizer = optimizer_of(live, mode, journal=path)
    calls = 0

    def failing(which: int) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            if calls == which:
                raise error
            return live(optimizer.steps)

        return closure

    for which in (0, 1, 2, 0, 2, 1, 0, 0):
        calls = 0
        if which:
            with pytest.raises(error):
                optimizer.step(failing(which))
        else:
            optimizer.step(failing(which))
    optimizer.close_journal()
    optimizer.flush()
    past = journal.read(path)
    assert len(past.steps) == 4 and len(past) == (4 if mode == "scratch" else 8)
    again = copy.deepcopy(base)
    zk.replay(again, path)
    assert same(again, live)
    resumed = optimizer_of(copy.deepcopy(base), mode, journal=path, resume=True)
    assert resumed.steps == 4


def test_an_append_that_fails_undoes_the_step_and_can_be_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in MODES:
        base, path = Small(torch.bfloat16), tmp_path / f"{mode}.zoj"
        live = copy.deepcopy(base)
        optimizer = optimizer_of(live, mode, journal=path)
        go_on(optimizer, live, 3)
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", lambda fd, data: 0)
            with pytest.raises(OSError, match="could not be written"):
                go_on(optimizer, live, 4)
        assert optimizer.steps == 3
        before = copy.deepcopy(live)
        with pytest.raises(RuntimeError, match=r"no step can be recorded. Mend the cause, then call reopen_journal"):
            optimizer.step(lambda live=live: live(0))
        if mode != "lazy":
            assert same(before, live)
        optimizer.reopen_journal()
        go_on(optimizer, live, 8)
        optimizer.close_journal()
        optimizer.flush()
        again = copy.deepcopy(base)
        zk.replay(again, path)
        assert same(again, live), mode


def test_a_pass_that_is_cut_short_ends_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = Small()
    optimizer = optimizer_of(live, "inplace", journal=tmp_path / "run.zoj")
    go_on(optimizer, live, 2)
    with monkeypatch.context() as patched:
        patched.setattr(zk.ops, "run", lambda *_: (_ for _ in ()).throw(Oops))
        with pytest.raises(Oops):
            optimizer.step(lambda: live(0))
    with pytest.raises(RuntimeError, match=r"a pass over the weights was cut short: no step can be recorded. Load the base"):
        optimizer.step(lambda: live(0))
    optimizer.close_journal()
    assert len(journal.read(tmp_path / "run.zoj")) == 2


def test_the_record_comes_before_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = Small()
    optimizer = optimizer_of(live, "scratch", journal=tmp_path / "run.zoj")
    events: list[str] = []
    append, run = journal.Writer.append, zk.ops.run
    monkeypatch.setattr(journal.Writer, "append", lambda *a, **k: (events.append("record"), append(*a, **k))[1])
    monkeypatch.setattr(zk.ops, "run", lambda *a: (events.append("pass"), run(*a))[1])
    optimizer.step(lambda: live(0))
    assert events == ["record", "pass", "pass"]  # an update of two groups


def test_graphs_record_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps whose numbers the host never reads, on an emulated graph: the same file but for its name, one record a step behind."""
    emulated_graph.install(monkeypatch)
    files = []
    for graph in (False, True):
        for mode in ("scratch", "inplace"):
            model, ids = make("llama", torch.float16), tokens()
            base = copy.deepcopy(model)

            def closure(x: Tensor, model: nn.Module = model, ids: Tensor = ids) -> Tensor:
                return loss_of(model, ids) + x

            path = tmp_path / f"{mode}{graph}.zoj"
            options = {**MODES[mode], "cuda_graph": graph, "weight_decay": 0.5, "clip": 0.5, "journal": path}
            step = zk.MeZOStep(model, lr=1e-2, eps=1e-2, **options)
            for x in (0.1, 0.2, math.nan, 0.3, 0.4):
                step.step(closure, [torch.tensor(x)])
            step.state_dict()
            past = journal.read(path)
            assert len(past) == 5 and past.flag("skipped").tolist() == [False, False, True, False, False]
            step.close_journal()
            files.append(past.records.copy())
            zk.replay(base, path)
            assert same(base, model)
    for a, b in zip(files[:2], files[2:], strict=True):
        assert a.tobytes()[:-4] != b.tobytes()[:-4]  # checksums: each file has its own
        for name in ("tag", "flags", "loss", "gradient", "groups"):
            assert a[name].tobytes() == b[name].tobytes() or (
                np.array_equal(a[name], b[name], equal_nan=True) and name in ("loss", "gradient")
            )


class LateEvent:
    """A GPU that is three steps behind."""

    now = 0

    def __init__(self) -> None:
        self.due = LateEvent.now + 3

    def query(self) -> bool:
        return LateEvent.now >= self.due

    def synchronize(self) -> None:
        pass


def test_records_wait_for_the_device_and_the_host_does_not(tmp_path: Path) -> None:
    path, w = tmp_path / "run.zoj", torch.ones(3)
    header = journal.Header(1, (journal.Parameter.of("w", w, 5),))
    queue = record.Recorder(journal.create(path, header))
    for k in range(5):
        LateEvent.now = k
        queue.check()
        assert len(journal.read(path)) == max(0, k - 2)
        queue.put(Decision(k, [0.5]), torch.tensor([1.0, 2.0, k != 1, k == 2, 0.25 * (k != 1)], dtype=torch.float64))
        entry, summary, _ = queue._queue.pop()
        queue._queue.append((entry, summary, LateEvent()))
    queue.drain(wait=True)
    past = journal.read(path)
    assert past.records["tag"].tolist() == [0, 1, 2, 3, 4]
    assert past.flag("skipped").tolist() == [k == 1 for k in range(5)] and past.flag("clipped").tolist() == [
        k == 2 for k in range(5)
    ]
    assert past.records["groups"]["decay"].ravel().tolist() == [0.5, 1.0, 0.5, 0.5, 0.5]
    queue.close()
    assert queue.writer.closed


def test_an_optimizer_that_goes_away_closes_its_journal(tmp_path: Path) -> None:
    live, path = Small(), tmp_path / "run.zoj"
    optimizer = optimizer_of(live, "scratch", journal=path)
    go_on(optimizer, live, 2)
    del optimizer
    journal.reopen(path)[0].close()


def test_what_does_not_fit_a_journal_is_refused(tmp_path: Path) -> None:
    live = Small()
    optimizer = optimizer_of(live, "scratch", journal=tmp_path / "run.zoj")
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)  # of where the run is
    go_on(optimizer, live, 1)
    with pytest.raises(RuntimeError, match="load first, then open_journal"):
        optimizer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="are recorded already"):
        optimizer.open_journal(tmp_path / "other.zoj")
    go_on(optimizer, live, 2)
    live.b.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"'b.bias' was frozen, unfrozen, added"):
        optimizer.step(lambda: live(0))
    copied, _ = copy.deepcopy((optimizer, live))
    copied.close_journal()  # a copy has no journal
    optimizer.close_journal()
    optimizer.step(lambda: live(0))
    assert len(journal.read(tmp_path / "run.zoj")) == 2


def test_a_coefficient_beyond_fp32_is_skipped(tmp_path: Path) -> None:
    live = Small()
    before = copy.deepcopy(live)
    optimizer = optimizer_of(live, "scratch", journal=tmp_path / "run.zoj", lr=1e38)
    values = iter((1e6, -1e6))
    optimizer.step(lambda: next(values))
    assert optimizer.skipped == 1 and same(before, live)
    assert journal.read(tmp_path / "run.zoj").flag("skipped").all()


def test_a_torn_journal_is_replayed_up_to_there(tmp_path: Path) -> None:
    base, path = Small(), tmp_path / "run.zoj"
    live = copy.deepcopy(base)
    optimizer = optimizer_of(live, "scratch", journal=path)
    go_on(optimizer, live, 4)
    optimizer.close_journal()
    path.write_bytes(path.read_bytes() + b"torn")
    with pytest.warns(UserWarning, match="torn behind its 4 whole records"):
        zk.replay(base, path)
    assert same(base, live)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer_of(copy.deepcopy(Small()), "scratch", journal=path, resume=True).steps == 4


REPLAY = """
import copy, sys
import torch
from torch import nn
import zo_kernels as zk
from tests.kernels import interpreter  # which makes it quick
from tests.kernels.cases import same_bits

torch.set_num_threads(1)
for mode, dtype, rounding in (("scratch", torch.float16, "stochastic"), ("inplace", torch.bfloat16, "nearest")):
    base, path = nn.Linear(7, 5).to(dtype), f"{sys.argv[1]}/{mode}.zoj"
    live = copy.deepcopy(base)
    options = {"lr": 3e-3, "eps": 1e-2, "seed": 11, "weight_decay": 0.1, "journal": path, "backend": "reference"}
    optimizer = zk.MeZOStep(live, perturbation=mode, rounding=rounding, **options)
    for k in range(10):
        optimizer.step(lambda: live(torch.full((3, 7), k / 10, dtype=dtype)).float().square().mean())
    optimizer.close_journal()
    zk.replay(base, path, backend="triton")
    assert all(map(same_bits, base.parameters(), live.parameters())), mode
print("same")
"""


@pytest.mark.slow
def test_the_triton_interpreter_replays_the_same_bits(tmp_path: Path) -> None:
    assert interpreter.run("-c", REPLAY, str(tmp_path)).split()[-1] == "same"


# ---- interrupts ---------------------------------------------------------------------------------------------------------------


PACKAGE = str(Path(zk.__file__).parent)


class InterruptAt:
    """A signal inside the block, where this library enters a function or comes back from one of C for the so-manyth time: that is where CPython
    looks for signals (and where loops begin again)."""

    def __init__(self, place: int, number: int = signal.SIGINT) -> None:
        self.left, self.where, self.number = place, "", number

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if self.where or event not in ("call", "c_return") or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        self.left -= 1
        if self.left < 0:
            self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}, {event} in {frame.f_code.co_name}"
            signal.raise_signal(self.number)

    def __enter__(self) -> InterruptAt:
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


@pytest.mark.parametrize("mode", MODES)
def test_an_interrupt_anywhere_in_a_recorded_step(tmp_path: Path, mode: str) -> None:
    """In passes, between them, around forwards, while the journal is written: weights, tag and journal agree, and the run goes on. Every other
    interrupted step follows a flush, every other one a step: a lazy run is met at its weights and ahead of them, at each place."""
    base, path = Small(torch.bfloat16), tmp_path / "run.zoj"
    places: set[str] = set()
    times = 2 if mode == "lazy" else 1
    for k in itertools.count():
        if k % 6 == 0:  # a run of its own, so that replays stay short
            path.unlink(missing_ok=True)
            live = copy.deepcopy(base)
            optimizer = optimizer_of(live, mode, journal=path)
        for _ in range(k % 2):
            optimizer.step(partial(live, 1))
        steps = optimizer.steps
        try:
            with InterruptAt(k // times) as at:
                optimizer.step(partial(live, 0))
        except KeyboardInterrupt:
            places.add(at.where)
        if not at.where:
            break
        assert at.where in places
        assert optimizer.steps - steps in (0, 1)
        optimizer.step(partial(live, 2))
        optimizer.flush()
        again = copy.deepcopy(base)
        zk.replay(again, path)
        assert len(journal.read(path).steps) == optimizer.steps, at.where
        assert same(again, live), at.where
    assert len(places) > 60
    handler = signal.getsignal(signal.SIGINT)
    gc.collect()
    assert signal.getsignal(signal.SIGINT) is handler is signal.default_int_handler


@pytest.mark.parametrize("begun", [False, True])
def test_a_time_limit_anywhere_while_a_journal_is_opened_or_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """It comes through as what it is, though a TimeoutError is an OSError; no descriptor is closed twice or left open, and the run is taken up in
    the same process, where the first optimizer may still be there."""
    base, path, written = Small(torch.float32), tmp_path / "run.zoj", b""
    twice: list[int] = []
    close = os.close

    def watched(fd: int) -> None:
        try:
            close(fd)
        except OSError:
            twice.append(fd)
            raise

    def expired(*_: object) -> None:
        raise TimeoutError

    if begun:
        live = copy.deepcopy(base)
        first = optimizer_of(live, "scratch", journal=path)
        first.step(partial(live, 0))
        first.close_journal()
        written = path.read_bytes() + b"torn"
    monkeypatch.setattr(os, "close", watched)
    monkeypatch.setattr(journal.Writer.__del__, "__defaults__", (watched,))
    before = signal.signal(signal.SIGALRM, expired)
    try:
        for k in itertools.count(begun, 3):  # every third place is enough, and quicker
            path.unlink(missing_ok=True)
            if begun:
                path.write_bytes(written)
            optimizer = optimizer_of(copy.deepcopy(base), "scratch")
            descriptors = len(os.listdir("/proc/self/fd"))
            at = InterruptAt(k, signal.SIGALRM)
            with contextlib.suppress(TimeoutError), at:
                optimizer.open_journal(path, resume=True)
                optimizer.close_journal()
            if not at.where:
                break
            optimizer.close_journal()
            assert len(os.listdir("/proc/self/fd")) == descriptors and not twice, at.where
            again = optimizer_of(copy.deepcopy(base), "scratch", journal=path, resume=True)
            again.close_journal()
            assert again.steps == begun, at.where
    finally:
        signal.signal(signal.SIGALRM, before)
    assert k > 100


def interrupt_of(place: str, model: nn.Module, monkeypatch: pytest.MonkeyPatch, visit: int) -> Callable[[], Tensor]:
    """A closure of step 3 in whose forward, or around which in a pass or in the writing of the record, a SIGINT arrives: at the so-manyth."""
    left = visit

    def here() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            signal.raise_signal(signal.SIGINT)

    def closure() -> Tensor:
        if place == "forward":
            here()
        return model(3)

    run, write = zk.ops.run, os.write

    def half_a_pass(plans: Any, *rest: Any) -> None:
        for plan in plans:
            middle = len(plan.entries) // 2
            run([zk.plan.Plan(plan.entries[:middle], plan.device, plan.dtype)], *rest)
            here()
            run([zk.plan.Plan(plan.entries[middle:], plan.device, plan.dtype)], *rest)

    def half_a_record(fd: int, data: bytes) -> int:
        written = write(fd, data[:9])
        here()
        return written + write(fd, data[9:])

    if place == "pass":
        monkeypatch.setattr(zk.ops, "run", half_a_pass)
    elif place == "journal":
        monkeypatch.setattr(os, "write", half_a_record)
    return closure


@pytest.mark.parametrize(("place", "visit"), [("forward", 1), ("forward", 2), ("pass", 1), ("pass", 2), ("journal", 1)])
@pytest.mark.parametrize("mode", MODES)
def test_an_interrupted_run_goes_on_or_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, place: str, visit: int
) -> None:
    """Resumed from its journal it ends with the bits of a run that nobody disturbed; going on, with those too in scratch mode, and in place with
    those that its journal says (the failed attempt has rounded)."""
    base, path = Small(torch.bfloat16), tmp_path / "run.zoj"
    undisturbed, live = copy.deepcopy(base), copy.deepcopy(base)
    whole = optimizer_of(undisturbed, mode)
    go_on(whole, undisturbed, 9)
    whole.flush()
    optimizer = optimizer_of(live, mode, journal=path)
    go_on(optimizer, live, 3)
    for group in optimizer.param_groups:  # what step 3 has in the other run
        group["lr"] = 3e-3 * (1 - 3 / 100)
    with monkeypatch.context() as patched:
        closure = interrupt_of(place, live, patched, visit)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
    killed = tmp_path / "killed.zoj"
    killed.write_bytes(path.read_bytes())
    done = optimizer.steps == 4
    assert len(journal.read(path).steps) == optimizer.steps
    assert done == (place == "journal") or place == "pass"  # the update's pass ends, and the step with it

    go_on(optimizer, live, 9)
    optimizer.close_journal()
    optimizer.flush()
    again = copy.deepcopy(base)
    zk.replay(again, path)
    assert same(again, live)
    assert mode != "scratch" or same(live, undisturbed)

    other = copy.deepcopy(base)
    resumed = optimizer_of(other, mode, journal=killed, resume=True)
    assert resumed.steps == 3 + done
    go_on(resumed, other, 9)
    resumed.flush()
    resumed.close_journal()
    assert same(other, undisturbed)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("mode", MODES)
def test_a_copy_does_not_record(tmp_path: Path, mode: str, how: str) -> None:
    """One run has one journal, the original's: the copy goes on to the same bits, says that nobody records it, and may have a journal of its own."""
    base, path = Small(torch.bfloat16), tmp_path / "run.zoj"
    live = copy.deepcopy(base)
    optimizer = optimizer_of(live, mode, journal=path)
    go_on(optimizer, live, 3)
    copied = copy.deepcopy if how == "deepcopy" else lambda pair: pickle.loads(pickle.dumps(pair))
    with pytest.warns(UserWarning, match=r"the copy of an optimizer with a journal .* does not record: open_journal\(\)"):
        other, twin = copied((live, optimizer))
    go_on(optimizer, live, 6)
    go_on(twin, other, 6)
    assert len(journal.read(path).steps) == 6
    optimizer.flush()
    twin.flush()
    assert same(live, other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.close_journal()
        copy.deepcopy((live, optimizer))
    again = copy.deepcopy(base)
    zk.replay(again, path)
    assert same(again, live)

    with pytest.raises(RuntimeError, match="resume=True after 6 steps"):
        twin.open_journal(path, resume=True)
    begun = copy.deepcopy(other)
    twin.open_journal(tmp_path / "twin.zoj")
    go_on(twin, other, 9)
    twin.close_journal()
    twin.flush()
    zk.replay(begun, tmp_path / "twin.zoj")
    assert same(begun, other)
