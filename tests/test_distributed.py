"""Steps that workers share: the bits of one process, and what is said when a worker fails, is missing, or is another. Real processes, with gloo.

`make cluster-test RUNS=50` and `python -m tests.cluster --matrix` are the long forms of what is here.
"""

from __future__ import annotations

import copy
import errno
import math
import os
import re
import signal
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import zo_kernels as zk
from tests.cluster import Death, End, Form, Model, batches_of, bits_of, cluster, deaths, matrix, survived
from zo_kernels.optim import record
from zo_kernels.optim import workers as sharing
from zo_kernels.optim.workers import FRAME, GRACE, HEAD, cut, parts_batches

F32, B16 = torch.float32, torch.bfloat16
BASE = bits_of(Model())


def shared(model: nn.Module, **more: Any) -> zk.MeZOStep:
    return zk.MeZOStep(model, **{"lr": 1e-3, "queries": 4, "process_group": dist.group.WORLD, "timeout": 20, **more})


def raised(function: Callable[[], Any]) -> tuple[str, str]:
    """What it raises: the class's name and the text."""
    try:
        function()
    except BaseException as error:
        return type(error).__name__, str(error)
    return "", ""


def results(ends: list[End]) -> list[Any]:
    assert all(not end.error and not end.killed for end in ends), ends
    return [end.result for end in ends]


# ---- the cut -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", ["auto", "directions", "data", "both"])
@pytest.mark.parametrize(("points", "batches"), [(2, 1), (1, 4), (8, 4), (3, 5)])
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7, 64])
def test_every_cell_is_made_and_shares_are_even(parallel: str, points: int, batches: int, workers: int) -> None:
    shares = cut(parallel, points, batches, workers)
    assert len(shares) == workers and min(map(len, shares)) > 0
    assert {c for share in shares for c in share} == set(range(points * batches))
    parts = {"directions": points, "data": batches}.get(parallel, points * batches)
    used = shares[: min(workers, parts)]
    if parallel != "auto":
        assert sum(map(len, used)) == points * batches  # none twice but by those who would wait
        size = points * batches // parts
        assert max(map(len, used)) - min(map(len, used)) <= size
        assert parts_batches(shares, batches) <= (parallel != "directions")
    else:
        assert max(map(len, shares)) == min(
            max(map(len, cut(kind, points, batches, workers))) for kind in ("directions", "data", "both")
        )


# ---- the bits --------------------------------------------------------------------------------------------------------------


def test_bits_are_those_of_one_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    two = [Form("MeZO", F32, "directions"), Form("FZOO", B16, "data"), Form("Adam", F32, "both"), Form("LOZO", B16, "both")]
    two += [Form("DiZO", F32, "data"), Form("MeZO", B16, "auto", "inplace"), Form("Adam", F32, "data", "inplace")]
    four = [Form("LOZO", F32, "data"), Form("DiZO", B16, "directions"), Form("FZOO", F32, "both")]
    assert matrix(tmp_path, (2,), two, steps=11) == matrix(tmp_path, (1, 4), four, steps=11) == 0, capfd.readouterr().out


def test_a_worker_that_dies_and_another_number_that_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert deaths(tmp_path, 2, seed=7) == 0, capfd.readouterr().out


class Dropped(Model):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.2))


def test_forwards_that_draw_random_numbers(tmp_path: Path) -> None:
    def steps(**more: Any) -> tuple[str, float]:
        torch.manual_seed(3)
        model = Dropped()
        optimizer = zk.MeZOStep(model, lr=1e-3, queries=4, **more)
        for k in range(3):
            optimizer.step(model, batches_of(k, F32))
        return bits_of(model), float(torch.rand(()))

    def work(rank: int) -> list[Any]:
        group = {"process_group": dist.group.WORLD, "timeout": 20}
        found: list[Any] = [steps(**group, parallel=parallel) for parallel in ("directions", "auto")]
        found += [raised(lambda: steps(**group, parallel="data"))]
        draw = torch.manual_seed
        if rank == 1:
            torch.manual_seed = lambda seed: draw(seed + 1)  # type: ignore[method-assign,assignment]
        return [*found, raised(lambda: steps(**group))]

    for directions, auto, data, seeds in results(cluster(3, work, tmp_path)):
        assert directions == auto == steps()
        assert data[0] == "RuntimeError" and "take parallel='directions'" in data[1]
        assert seeds[0] == "WorkerError" and "the forwards of worker 1 drew other random numbers" in seeds[1]


def test_workers_that_bring_nothing_are_told(tmp_path: Path) -> None:
    def work(rank: int) -> list[list[str]]:
        found = []
        for queries, batches, parallel in ((1, 1, "data"), (1, 1, "directions"), (2, 1, "both"), (2, 2, "auto")):
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                model = Model()
                optimizer = shared(model, parallel=parallel, queries=queries)
                for k in range(2):
                    optimizer.step(model, batches_of(k, F32)[:batches])
            found.append([str(w.message) for w in heard if "bring nothing" in str(w.message)])
        return found

    for data, directions, both, auto in results(cluster(3, work, tmp_path)):
        assert len(data) == len(directions) == 1 and not both and not auto
        assert "2 of 3 workers make forwards of others again, and bring nothing: a table of 2 points x 1 micro-batches" in data[0]
        assert "1 of 3 workers" in directions[0] and "(parallel='directions')" in directions[0]


# ---- what travels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parallel", "most"), [("directions", 16), ("data", 16), ("both", 11)])
def test_bytes_on_the_wire(tmp_path: Path, parallel: str, most: int) -> None:
    """To each other worker 8 for each loss of the largest share, and 32: of two rounds the first has room for twelve."""
    size = 2 if parallel != "both" else 3

    def work(rank: int) -> list[int]:
        model = Model()
        optimizer = shared(model, parallel=parallel)
        sent = []
        for k in range(3):
            optimizer.step(model, batches_of(k, F32))
            assert optimizer.workers is not None
            sent.append(optimizer.workers.sent)
        return sent

    a_step = 8 * (HEAD + max(most, FRAME - HEAD))
    for sent in results(cluster(size, work, tmp_path)):
        assert sent == [(size - 1) * (8 * FRAME + (k + 1) * a_step) for k in range(3)]  # the first round compares the workers


NUMBERS = [
    0.0,
    -0.0,
    math.inf,
    -math.inf,
    5e-324,
    1 / 3,
    *struct.unpack("<3d", struct.pack("<3Q", 0x7FF8 << 48, 0xFFF8 << 48 | 7, 0x7FF9 << 48 | 5)),
]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_worker_has_the_same_table_to_the_bit(tmp_path: Path, size: int) -> None:
    """In the order of their ranks, whatever the numbers are and however many; and objects of any length."""
    counts = [k % 2 + 11 * (k % 3) for k in range(size)]

    def of(rank: int) -> list[float]:
        return [NUMBERS[(rank + k) % len(NUMBERS)] for k in range(counts[rank])]

    def work(rank: int) -> tuple[list[bytes], list[Any]]:
        team = zk.Workers(dist.group.WORLD, timeout=20)
        found, _ = team.round("a table", values=of(rank), counts=counts)
        return [struct.pack(f"<{len(row)}d", *row) for row in found], team.tell(None if rank == 1 else "x" * 1000 * rank)

    want = [struct.pack(f"<{n}d", *of(rank)) for rank, n in enumerate(counts)]
    objects = [None if rank == 1 else "x" * 1000 * rank for rank in range(size)]
    assert results(cluster(size, work, tmp_path)) == [(want, objects)] * size


# ---- a worker that fails -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["scratch", "inplace"])
def test_what_one_closure_raises_fails_on_all(tmp_path: Path, mode: str) -> None:
    def work(rank: int) -> list[Any]:
        model = Model()
        optimizer = shared(model, perturbation=mode)
        calls = 0

        def closure(x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if rank == 1 and calls == 3:
                raise ValueError("no such batch")
            if rank == 2 and calls == 103:
                raise KeyboardInterrupt
            return model(x)

        found: list[Any] = []
        for start in (0, 100, 200):
            calls, before = start, (bits_of(model), optimizer.steps)
            found.append(raised(lambda: optimizer.step(closure, batches_of(0, F32))))
            found.append((bits_of(model), optimizer.steps) == before)
        return [*found, optimizer.steps, bits_of(model)]

    first, second, third = results(cluster(3, work, tmp_path))
    assert second[0] == ("ValueError", "no such batch")
    for other in (first, third):
        assert (
            other[0][0] == "WorkerError"
            and "worker 1 of 3 failed in the losses of a step (ValueError: no such batch)" in other[0][1]
        )
    for one in (first, second, third):
        assert one[2][0] == "KeyboardInterrupt" and one[4] == ("", "") and not one[5] and one[6] == 1
        if mode == "scratch":
            assert one[1] and one[3]
    model = Model()
    zk.MeZOStep(model, lr=1e-3, queries=4).step(model, batches_of(0, F32))
    assert first[7] == second[7] == third[7]
    if mode == "scratch":
        assert first[7] == bits_of(model)


def test_what_is_not_finite_on_one_is_skipped_by_all(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[bool, int, int]:
        model = Model()
        optimizer = shared(model)
        optimizer.step(lambda x: model(x) * (float("nan") if rank == 1 else 1.0), batches_of(0, F32))
        return bits_of(model) == BASE, optimizer.skipped, optimizer.steps

    assert results(cluster(2, work, tmp_path)) == [(True, 1, 1)] * 2


@pytest.mark.parametrize("place", ["closure", "before"])
def test_a_worker_that_is_killed_is_named(tmp_path: Path, place: str) -> None:
    death = Death(2, place, 5)

    def work(rank: int) -> str:
        if rank == death.rank:
            death.install()
        model = Model()
        optimizer = shared(model)
        for k in range(20):
            optimizer.step(model, batches_of(k, F32))
        return bits_of(model)

    ends = cluster(4, work, tmp_path)
    assert ends[2].killed and survived(ends, death) == ""


@pytest.mark.parametrize("place", ["before", "tell"])
def test_all_others_learn_at_once_of_one_that_is_killed(tmp_path: Path, place: str) -> None:
    """Each waits for it itself; in a ring its neighbours alone do, then theirs: the last of eight is the fourth."""

    def work(rank: int) -> tuple[float, str, str]:
        team = zk.Workers(dist.group.WORLD, timeout=20)
        team.round("the first")
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        begin = time.monotonic()
        name, text = raised(lambda: team.round("the second") if place == "before" else team.tell("the second"))
        return time.monotonic() - begin, name, text

    ends = cluster(8, work, tmp_path)
    assert ends[2].killed
    for seconds, name, text in results([end for end in ends if not end.killed]):
        assert name == "WorkerError" and "worker 2 of 8 is gone" in text, text
        assert seconds < 3 * GRACE / 5, seconds


def test_a_closure_that_raises_where_nobody_hears_of_it(tmp_path: Path) -> None:
    """Another worker hangs, as in a collective of a forward that this one left: what was raised here is told, with a note."""

    def work(rank: int) -> Any:
        model = Model()
        optimizer = shared(model, timeout=2)
        optimizer.step(model, batches_of(0, F32))
        if rank == 1:
            time.sleep(6)
            return None

        def closure() -> Tensor:
            raise ValueError("mine")

        try:
            optimizer.step(closure)
        except ValueError as error:
            return str(error), error.__notes__, raised(lambda: optimizer.step(closure))
        return None

    told = results(cluster(2, work, tmp_path))[0]
    assert told is not None and told[0] == "mine"
    assert "not heard of it: worker 1 of 2 did not come within 2 s" in told[1][0]
    assert told[2][0] == "WorkerError" and "make a new one" in told[2][1]


def test_who_comes_late_to_those_that_gave_up_names_whom_they_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "GRACE", 2.0)

    def work(rank: int) -> tuple[str, str]:
        team = zk.Workers(dist.group.WORLD, timeout=2)
        team.round("the first")
        time.sleep({1: 6.0, 2: 3.0}.get(rank, 0.0))
        return ("", "") if rank == 1 else raised(lambda: team.round("the second"))

    for rank, found in enumerate(results(cluster(4, work, tmp_path))):
        if rank != 1:
            assert found[0] == "WorkerError" and re.search(r"worker 1(, 2)? of 4 did not come within 2 s", found[1]), (rank, found)


def test_a_worker_that_does_not_come_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "GRACE", 2.0)

    def work(rank: int) -> tuple[str, str, bool, str]:
        model = Model()
        optimizer = shared(model, timeout=3)
        optimizer.step(model, batches_of(0, F32))
        before = bits_of(model)
        if rank == 1:
            time.sleep(9)
            return "", "", True, raised(lambda: shared(model))[1]
        found = raised(lambda: optimizer.step(model, batches_of(1, F32)))
        again = raised(lambda: optimizer.step(model, batches_of(1, F32)))
        same = bits_of(model) == before
        return *found, same, again[1] + raised(lambda: shared(model, timeout=1))[1]

    for rank, (name, text, same, again) in enumerate(results(cluster(3, work, tmp_path))):
        if rank == 1:
            assert "worker 1 of 3 did not come" in again
        else:
            assert name == "WorkerError" and same and re.search(r"worker 1 of 3 (did not come within 3 s|is gone)", text), text
            assert re.search(
                r"make a new one.*worker 1 of 3 did not come within 1 s to make optimizer number 2 of",
                again,
            ), again


# ---- a worker that has another run ------------------------------------------------------------------------------------------------


def changed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    return model


def frozen(model: Any) -> nn.Module:
    model.norm.weight.requires_grad_(False)
    return model  # type: ignore[no-any-return]


LIES: dict[str, tuple[str, dict[str, Any], Callable[[nn.Module], nn.Module]]] = {
    "seed": ("seed: 5 there, 0 on", {"seed": 5}, lambda m: m),
    "base": ("parameter a.weight: ", {}, changed),
    "method": ("estimator: {'name': 'two-sided', 'queries': 2} there, ", {"queries": 2}, lambda m: m),
    "rule": ("rule: {'name': 'sign'", {"rule": zk.Sign()}, lambda m: m),
    "mode": ("perturbation: inplace there, scratch on", {"perturbation": "inplace"}, lambda m: m),
    "cut": ("parallel: data there, auto on", {"parallel": "data"}, lambda m: m),
    "decay": ("number 2 of 1, 2: weight_decay=0.0 there, nothing on worker 0", {"weight_decay": 0.1}, lambda m: m),
    "names": ("parameters, number 3 of 6, 5: norm.bias torch.float32 (37,) there, norm.weight", {}, frozen),
    "kind": ("kind: 'rademacher' there", {"kind": "rademacher"}, lambda m: m),
    "rounding": ("rounding: 'nearest' there", {"rounding": "nearest"}, lambda m: m),
    "lr": ("lr: [0.002] there, [0.001] on worker 0", {"lr": 2e-3}, lambda m: m),
}


def test_a_worker_with_another_run_is_named_before_the_first_step(tmp_path: Path) -> None:
    def work(rank: int) -> list[Any]:
        found: list[Any] = []
        for _, more, change in LIES.values():
            model: nn.Module = Model()
            model, more = (change(model), more) if rank == 1 else (model, {})
            before = bits_of(model)
            found.append(
                (*raised(lambda m=model, more=more: shared(m, **more).step(m, batches_of(0, F32))), bits_of(model) == before)
            )
        version = record.journal.header.__version__
        record.journal.header.__version__ = "0.0.1" if rank == 1 else version  # type: ignore[attr-defined]
        model = Model()
        found.append((*raised(lambda: shared(model).step(model, batches_of(0, F32))), bits_of(model) == BASE))
        record.journal.header.__version__ = version  # type: ignore[attr-defined]
        # And later: other batches, another number of them, in objects, other parameters, another schedule, a call that the others do not make.
        optimizer = shared(model)
        optimizer.step(model, batches_of(0, F32))
        before = bits_of(model)
        found.append((*raised(lambda: optimizer.step(model, batches_of(rank, F32))), bits_of(model) == before))
        found.append((*raised(lambda: optimizer.step(model, batches_of(0, F32)[rank:])), bits_of(model) == before))
        held = [SimpleNamespace(x=x) for x in batches_of(rank, F32)]
        found.append((*raised(lambda: optimizer.step(lambda held: model(held.x), held)), bits_of(model) == before))
        optimizer.step(model, batches_of(0, F32))
        before = bits_of(model)
        model.norm.weight.requires_grad_(rank == 0)
        found.append((*raised(lambda: optimizer.step(model, batches_of(0, F32))), bits_of(model) == before))
        model.norm.weight.requires_grad_()
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 + rank)
        found.append((*raised(lambda: optimizer.step(model, batches_of(0, F32))), bits_of(model) == before))
        optimizer.param_groups[0]["lr"] = 1e-3
        if rank:
            odd = raised(lambda: optimizer.open_journal(tmp_path / "other.zoj"))
        else:
            odd = raised(lambda: optimizer.step(model, batches_of(0, F32)))
        found.append((*odd, bits_of(model) == before))
        if rank:
            dist.new_group([1], use_local_synchronization=True)
        return [*found, (*raised(lambda: shared(model)), bits_of(model) == before)]

    wanted = [text for text, *_ in LIES.values()]
    wanted += [
        "zo_kernels: '0.0.1' there",
        "micro-batches: ",
        "micro-batches: ",
        "micro-batches: ",
        "what is trained: '5 parameters",
        "lr: [0.002] there, [0.001] on",
        "what it is at: opening the journal there",
        "process groups (which name torch's new ones",
    ]
    for found in results(cluster(2, work, tmp_path)):
        for (name, text, same), want in zip(found, wanted, strict=True):
            assert name == "WorkerError" and same and text.startswith("worker 1 differs from worker 0 in ") and want in text, (
                want,
                text,
            )


class Words(nn.Module):
    """Of integers, as a language model's."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.model = nn.Embedding(11, 13), Model()
        nn.init.ones_(self.words.weight)

    def forward(self, ids: Tensor, scale: Tensor | None = None) -> Tensor:
        loss: Tensor = self.model(self.words(ids) if scale is None else self.words(ids) * scale)
        return loss


@pytest.mark.parametrize("mode", ["scratch", "inplace"])
def test_a_closure_that_gives_the_model_another_batch_is_named(tmp_path: Path, mode: str) -> None:
    """A loader of each worker's own, read past `batches`: by position, by keyword, in a mapping, behind `batches` that are the same; not numbers that a part of
    a larger model is given, nor where each worker begins with a micro-batch of its own."""

    def work(rank: int) -> list[Any]:
        model, found = Words(), list[Any]()
        optimizer = shared(model, perturbation=mode)
        ours, mine = torch.arange(6).reshape(2, 3), torch.arange(6).reshape(2, 3) + rank
        calls: list[tuple[Callable[..., Any], Any]] = [
            (lambda: model(mine), None),
            (lambda: model(ids=mine), None),
            (lambda: model(**{"ids": torch.zeros(2, 3 + rank, dtype=torch.long)}), None),
            (lambda batch: model(mine), [ours]),
            (lambda: model(ours) if rank == 0 else model.model(torch.ones(2, 13)), None),
        ]
        for closure, batches in calls:
            before = bits_of(model)
            found.append(
                (*raised(lambda c=closure, b=batches: optimizer.step(c, b)), bits_of(model) == before or mode == "inplace")
            )
        hooks = len(model._forward_pre_hooks)
        optimizer.step(lambda: model(ours, torch.tensor(1.0 + 1e-3 * rank)))  # as hidden states that come from elsewhere
        optimizer.step(lambda: model(ours))
        data = shared(model, perturbation=mode, parallel="data")
        data.step(lambda batch: model(batch), [ours, ours + 1])
        return [found, hooks, optimizer.steps, bits_of(model)]

    both = results(cluster(2, work, tmp_path))
    assert both[0][3] == both[1][3]
    for found, hooks, steps, _ in both:
        assert hooks == 0 and steps == 2
        for name, text, same in found:
            assert name == "WorkerError" and same and "in what the closure gives the model: " in text, text
            assert "no DistributedSampler" in text


def test_a_store_that_is_gone_is_said() -> None:
    workers = object.__new__(sharing.Workers)
    workers.rank = 1

    def gone(*_: Any) -> int:
        raise dist.DistNetworkError("Connection reset by peer")

    with pytest.raises(zk.WorkerError, match="the first one, has ended, or raised"):
        workers._introduce(SimpleNamespace(add=gone), {})


def test_weights_that_are_written_to_between_steps(tmp_path: Path) -> None:
    """On one worker: told before its step. On all: they compare the weights, once, and go on where these are the same."""

    def write(model: Any) -> None:
        with torch.no_grad():
            model.a.weight.add_(1)

    def move(model: Any) -> None:
        model.b.bias.data = model.b.bias.data + 1

    def write_frozen(model: Any) -> None:
        with torch.no_grad():
            model.norm.weight.mul_(2)

    def replace(model: Any) -> None:
        model.norm.weight = nn.Parameter(torch.ones(37), requires_grad=False)

    def lose(model: Any) -> None:
        model.b.bias = nn.Parameter(torch.ones(5))

    def work(rank: int) -> list[Any]:
        found: list[Any] = []
        model: Any = Model()
        model.norm.weight.requires_grad_(False)
        optimizer = shared(model)

        def step() -> tuple[str, str]:
            return raised(lambda: optimizer.step(model, batches_of(optimizer.steps, F32)))

        def put_back() -> None:
            model.load_state_dict(before)

        for change in (write, move, write_frozen, replace):
            found.append(step())
            before = {n: t.clone() for n, t in model.state_dict().items()}
            if rank == 1:
                change(model)
            now = bits_of(model)
            found.append((*step(), bits_of(model) == now))
            put_back()
            found.append(step())
            change(model)
            assert optimizer.workers is not None
            sent = optimizer.workers.sent
            found.append((*step(), optimizer.workers.sent - sent))
            change(model)
            if change is not replace:
                for _ in range(rank):
                    change(model)
                found.append(step())
                put_back()
            found.append(step())
            sent = optimizer.workers.sent
            found.append((*step(), optimizer.workers.sent - sent))
            found.append(bits_of(model))
        found.append(raised(lambda: optimizer.step(model, batches_of(0, F32)[: 4 * rank])))
        if rank == 1:
            lose(model)
        return [*found, step()]

    first, second = results(cluster(2, work, tmp_path))
    a_step, compared = 8 * (HEAD + 16), 8 * FRAME
    at = "what it is at: the comparison of weights that were written to between steps ("
    for name, *options in (("a.weight", 1), ("b.bias", 1), ("norm.weight", 1), ("norm.weight",)):
        for found in (first, second):
            assert found.pop(0) == ("", "")
            kind, text, same = found.pop(0)
            assert kind == "WorkerError" and same and text.startswith("worker 1 differs from worker 0 in " + at + name), text
            assert found.pop(0) == ("", "")  # all is compared after a failed step
            assert found.pop(0) == ("", "", a_step + compared)
            if options:
                kind, text = found.pop(0)
                assert kind == "WorkerError" and f"parameter {name}: " in text, text
            assert found.pop(0) == ("", "")
            assert found.pop(0) == ("", "", a_step)
        assert first.pop(0) == second.pop(0)
    assert (
        first[0][0] == "ValueError" and "worker 0 of 2 failed in the losses of a step (ValueError: batches is empty" in second[0][1]
    )
    assert second[1][0] == "RuntimeError" and "b.bias" in second[1][1]
    assert first[1][0] == "WorkerError" and "worker 1 of 2 failed in the comparison" in first[1][1]


def test_looks_of_one_worker_between_steps_are_no_writes(tmp_path: Path) -> None:
    """`zk.perturbed` and `zk.check` in place put the weights back to the bit. What is written beside them is told."""

    def run(looks: bool, **more: Any) -> tuple[Any, zk.ZOStep, str]:
        model: Any = Model()
        model.norm.weight.requires_grad_(False)
        optimizer = zk.MeZOStep(model, lr=1e-3, queries=4, perturbation="inplace", **more)
        for k in range(4):
            optimizer.step(model, batches_of(k, F32))
            if looks and k:
                with zk.perturbed(optimizer, 7):
                    model(batches_of(0, F32)[0])
                zk.check(optimizer, model, batches_of(0, F32))
        return model, optimizer, bits_of(model)

    def work(rank: int) -> list[Any]:
        model, optimizer, found = run(rank == 0, process_group=dist.group.WORLD, timeout=20)
        said: list[Any] = [found]
        for outside in (True, False):
            before = {n: t.clone() for n, t in model.state_dict().items()}
            if rank == 0:
                with torch.no_grad():
                    (model.a.weight if outside else torch.ones(1)).add_(1)
                    with zk.perturbed(optimizer, 7):
                        (torch.ones(1) if outside else model.norm.weight).add_(1)
            said.append(raised(lambda: optimizer.step(model, batches_of(4, F32))))
            model.load_state_dict(before)
            optimizer.step(model, batches_of(4, F32))
        return said

    for found, *said in results(cluster(2, work, tmp_path)):
        assert found == run(False)[2]
        assert [kind for kind, _ in said] == ["WorkerError"] * 2
        assert all(
            f"written to between steps ({name}" in text for (_, text), name in zip(said, ("a.weight", "norm.weight"), strict=True)
        )


# ---- the journal -----------------------------------------------------------------------------------------------------------------


def test_the_first_worker_writes_and_a_record_that_fails_is_nobodys_step(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[Any, ...]:
        model = Model()
        path = tmp_path / f"{rank}.zoj"  # of which the first one's alone comes to be
        optimizer = shared(model, journal=path)
        optimizer.step(model, batches_of(0, F32))
        before, write = bits_of(model), os.write

        def full(fd: int, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "no space")

        if rank == 0:
            os.write = full
        found = raised(lambda: optimizer.step(model, batches_of(1, F32)))
        os.write = write
        kept = bits_of(model) == before, optimizer.steps
        optimizer.reopen_journal()
        optimizer.step(model, batches_of(1, F32))
        optimizer.close_journal()
        return found, kept, path.exists(), bits_of(model)

    first, second = results(cluster(2, work, tmp_path / "cluster"))
    assert (
        first[0][0] == "OSError"
        and second[0][0] == "WorkerError"
        and "worker 0 of 2 failed in the record of a step" in second[0][1]
    )
    assert first[1] == second[1] == (True, 1)
    assert first[2] and not second[2]
    model = Model()
    zk.replay(model, tmp_path / "0.zoj")
    assert bits_of(model) == first[3] == second[3]


def test_a_run_that_cannot_go_on_for_one_goes_on_for_none(tmp_path: Path) -> None:
    Form("MeZO", F32).run(shared=False, journal=tmp_path / "run.zoj", steps=3)

    def work(rank: int) -> tuple[str, str, bool]:
        model = Model()
        if rank == 1:
            changed(model)
        before = bits_of(model)
        optimizer = Form("MeZO", F32).optimizer(model, process_group=dist.group.WORLD)
        found = raised(lambda: optimizer.open_journal(tmp_path / "run.zoj", resume=True))
        return *found, rank == 1 or bits_of(model) == before

    first, second = results(cluster(2, work, tmp_path / "cluster"))
    assert first[0] == "WorkerError" and "worker 1 of 2 failed in beginning, or going on with, the journal's run" in first[1]
    assert second[0] == "ValueError" and "a.weight" in second[1]


# ---- what is refused, and said -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    def work(rank: int) -> list[tuple[str, str]]:
        model = Model()
        sgd = torch.optim.SGD(model.norm.parameters(), 0.1)
        refused = [
            raised(lambda: shared(model, cuda_graph=True)),
            raised(lambda: shared(model, first_order=sgd)),
            raised(lambda: zk.DiZO(model, 1e-3, layers=["weight$"], learn="backpropagation", process_group=dist.group.WORLD)),
            raised(lambda: shared(model, parallel="columns")),
            raised(lambda: shared(model, timeout=0)),
            raised(lambda: shared(model, process_group="world")),
            raised(lambda: shared(nn.parallel.DistributedDataParallel(model))),
        ]
        with pytest.warns(zk.ZOWarning, match="torch.distributed has 2 processes"):
            zk.MeZOStep(model, lr=1e-3)
        return refused

    texts = [
        "which no graph does",
        "no gradients",
        "no gradients",
        "parallel='columns'",
        "timeout=0",
        "must be a process group",
        "process_group=",
    ]
    for found in results(cluster(2, work, tmp_path)):
        for (name, text), want in zip(found, texts, strict=True):
            assert name in ("ValueError", "TypeError") and want in text, (want, text)


def test_forwards_of_ddp_change_no_bit(tmp_path: Path) -> None:
    """Of a module that an optimizer does not see: without gradients DDP hands out its buffers once, before the first forward, which every worker makes, and
    then runs the module, on some workers more often than on others."""

    def of(model: nn.Module) -> nn.Module:
        model.register_buffer("count", torch.arange(3.0))
        return model

    def run(model: nn.Module, optimizer: zk.ZOStep) -> str:
        for k in range(3):
            optimizer.step(model, batches_of(k, F32)[:1])
            model(batches_of(k, F32)[0]).backward()  # after which DDP hands them out again
        return bits_of(model)

    options: dict[str, Any] = {"queries": 2, "one_sided": True}  # three forwards

    def work(rank: int) -> list[Any]:
        found = []
        for inside in (False, True):
            module = of(Model())
            ddp = nn.parallel.DistributedDataParallel(module)
            given: Any = module if inside else ddp.named_parameters()
            found.append(run(ddp, shared(given, perturbation="scratch" if inside else "inplace", **options)))
        return found

    want = []
    for mode in ("inplace", "scratch"):
        model = of(Model())
        want.append(run(model, zk.MeZOStep(model, lr=1e-3, perturbation=mode, **options)))
    assert results(cluster(2, work, tmp_path)) == [want] * 2


def test_a_copy_steps_alone(tmp_path: Path) -> None:
    def work(rank: int) -> bool:
        model = Model()
        optimizer = shared(model)
        optimizer.step(model, batches_of(0, F32))
        theirs, alone = copy.deepcopy((model, optimizer))
        if rank == 0:
            alone.step(theirs, batches_of(1, F32))
        return alone.workers is None and optimizer.workers is not None

    assert all(results(cluster(2, work, tmp_path)))
