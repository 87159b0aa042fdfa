"""Workers that share the steps of an offloaded model, as real processes with gloo: the bits of one resident process, one visit a block for all points of a
micro-batch of a worker's share, and what is left where a forward fails."""

from __future__ import annotations

import functools
import hashlib
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import zo_kernels as zk
from tests.cluster import End, cluster
from tests.test_offload import LAYERS, closure_of, model_of, write
from zo_kernels.optim.workers import cut, visits

BATCHES = 3
QUERIES = functools.partial(zk.MeZOStep, lr=1e-2, seed=9, queries=2)  # four points


def shared(**more: Any) -> dict[str, Any]:
    return {"process_group": dist.group.WORLD, "timeout": 20, **more}


def step(optimizer: zk.ZOStep, model: nn.Module) -> Tensor:
    first = optimizer.steps
    return optimizer.step(lambda k: closure_of(model, k)(), [first + k for k in range(BATCHES)])


def digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for _, p in model.named_parameters():
        found.update(p.detach().clone().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def resident(make: Callable[..., zk.ZOStep] = QUERIES, steps: int = 4) -> str:
    model = model_of()
    optimizer = make(model)
    for _ in range(steps):
        step(optimizer, model)
    return digest(model)


def results(ends: list[End]) -> list[Any]:
    assert all(not end.error and not end.killed for end in ends), ends
    return [end.result for end in ends]


# How often each block comes in a step of four points and three micro-batches, on each worker.
VISITS = {
    ("auto", 2): (2, 2),
    ("directions", 2): (3, 3),
    ("data", 2): (1, 2),
    ("both", 2): (2, 2),
    ("auto", 3): (1, 1, 1),
    ("directions", 3): (3, 3, 3),
    ("data", 3): (1, 1, 1),
    ("both", 3): (1, 1, 1),
}


@pytest.mark.parametrize("size", [2, 3])
def test_a_block_comes_once_for_each_micro_batch_of_a_share(size: int, tmp_path: Path) -> None:
    file = write(model_of(), tmp_path / "model.safetensors")
    cuts = [parallel for parallel, workers in VISITS if workers == size]

    def work(rank: int) -> list[Any]:
        found = []
        for parallel in cuts:
            model = model_of()
            source = {"source": file} if parallel == "data" else {"write_back": 2}
            offloaded = zk.offload(model, small=0, together=True, **source)
            optimizer = QUERIES(model, **shared(parallel=parallel))
            seen = []
            for _ in range(4):
                before = offloaded.traffic.visits
                step(optimizer, model)
                seen.append((offloaded.traffic.visits - before) / len(offloaded.blocks))
            found.append((digest(model), seen[1:]))  # the first one is looked at, forward by forward
        return found

    want = resident()
    for rank, found in enumerate(results(cluster(size, work, tmp_path / "cluster"))):
        assert found == [(want, [VISITS[parallel, size][rank]] * 3) for parallel in cuts], (rank, found)


def test_candidates_and_a_worker_without_blocks(tmp_path: Path) -> None:
    """A rule's second table; one worker holds its weights, and knows from the others how the table is cut."""
    methods = {
        "conservative": functools.partial(zk.ZOConservative, lr=1e-2, seed=9),
        "fzoo": functools.partial(zk.FZOO, lr=1e-2, seed=9, queries=3),
        "adapter": lambda m, **k: zk.ZOAdam([p for n, p in m.named_parameters() if "norm" in n], 1e-2, seed=9, model=m, **k),
    }

    def work(rank: int) -> list[str]:
        found = []
        for make in methods.values():
            model = model_of()
            if rank:
                zk.offload(model, blocks=[f"layers.{k}.up" for k in range(LAYERS)], together=True)
            optimizer = make(model, **shared())
            assert optimizer.workers is not None and optimizer.workers.visited
            for _ in range(4):
                step(optimizer, model)
            found.append(digest(model))
        return found

    assert results(cluster(2, work, tmp_path)) == [[resident(make) for make in methods.values()]] * 2


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 12, 100])
@pytest.mark.parametrize(("points", "batches"), [(2, 1), (4, 3), (16, 8)])
def test_a_cut_for_blocks_that_visit(points: int, batches: int, workers: int) -> None:
    """Every cell, as evenly, and never with more visits."""
    for parallel in ("directions", "data", "both", "auto"):
        plain, visited = (cut(parallel, points, batches, workers, v) for v in (False, True))
        assert {c for share in visited for c in share} == set(range(points * batches))
        assert max(map(len, visited)) == max(map(len, plain))
        most = [max(visits(share, batches) for share in shares) for shares in (visited, plain)]
        assert most[0] <= most[1] and (parallel != "data" or most[0] == -(-batches // min(workers, batches)))


def test_forwards_that_draw_random_numbers(tmp_path: Path) -> None:
    """They begin to in the second step, whose forwards take turns: who divides micro-batches begins again with points."""

    def run(away: bool, **more: Any) -> tuple[str, float]:
        model = model_of().train()
        torch.manual_seed(5)
        if away:
            zk.offload(model, small=0, together=True)
        optimizer = QUERIES(model, **more)
        for layer in model.layers:
            layer.register_forward_hook(lambda module, _, x: functional.dropout(x, 0.3) if optimizer.steps else x)
        for _ in range(4):
            step(optimizer, model)
        return digest(model), float(torch.rand(()))

    def work(rank: int) -> list[Any]:
        found: list[Any] = [run(True, **shared(parallel=parallel)) for parallel in ("directions", "auto")]
        with pytest.raises(RuntimeError, match="take parallel='directions'"):
            run(True, **shared(parallel="data"))
        return found

    assert results(cluster(2, work, tmp_path)) == [[run(False)] * 2] * 2


class Stop(Exception):
    pass


def test_a_forward_that_fails_on_one_worker(tmp_path: Path) -> None:
    """In whichever of its threads: those beside it end, the step is undone everywhere, and the next one may follow."""

    def work(rank: int) -> list[Any]:
        model = model_of()
        offloaded = zk.offload(model, write_back=1, small=0, together=True)
        optimizer, said = QUERIES(model, **shared(parallel="data")), []
        calls, fault = 0, ("", 0)

        def fail(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if rank == 1 and fault == ("raises", calls):
                raise Stop("no such word")
            if rank == 1 and fault == ("signal", calls):
                signal.raise_signal(signal.SIGINT)

        for layer in model.layers:
            layer.register_forward_hook(fail)
        step(optimizer, model)
        for fault in (("raises", 1), ("raises", 7), ("signal", 3), ("signal", 4 * LAYERS), ("raises", 8 * LAYERS)):
            calls, steps, threads = 0, optimizer.steps, threading.active_count()
            try:
                step(optimizer, model)
            except BaseException as error:
                said.append(f"{type(error).__name__}: {error}")
            fault = ("", 0)
            assert optimizer.steps == steps and threading.active_count() <= threads and offloaded._away.gate is None
            step(optimizer, model)
        return [said, optimizer.steps, digest(model)]

    there, here = results(cluster(2, work, tmp_path))
    assert there[1:] == here[1:] == [6, resident(steps=6)]
    assert [text.split(":")[0] for text in here[0]] == ["Stop", "Stop", "KeyboardInterrupt", "KeyboardInterrupt", "Stop"]
    assert [text.split(":")[0] for text in there[0]] == [
        *["WorkerError"] * 2, *["KeyboardInterrupt"] * 2, "WorkerError"
    ]  # fmt: skip
    assert all("worker 1 of 2 failed in the losses of a step (Stop: no such word)" in there[0][k] for k in (0, 1, 4))


def test_a_loss_that_is_not_finite_on_one_worker(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[str, int]:
        model = model_of()
        zk.offload(model, write_back=2, small=0, together=True)
        optimizer = QUERIES(model, **shared())
        step(optimizer, model)
        before = digest(model)
        optimizer.step(lambda k: closure_of(model, k)() * (float("nan") if rank == 1 and k == 2 else 1.0), list(range(BATCHES)))
        assert digest(model) == before
        step(optimizer, model)
        return digest(model), optimizer.skipped

    (a, n), (b, m) = results(cluster(2, work, tmp_path))
    assert a == b and n == m == 1


def test_a_worker_is_killed_and_another_number_goes_on(tmp_path: Path) -> None:
    """From the journal and the file, whatever was written back."""
    file, journal = write(model_of(), tmp_path / "model.safetensors"), tmp_path / "run.zoj"

    def work(rank: int, killed: int | None, every: int) -> str:
        model = model_of()
        zk.offload(model, file, write_back=every, folder=tmp_path, small=0, together=True)
        optimizer = QUERIES(model, journal=journal, resume=True, **shared())

        def die(*_: Any) -> None:
            if rank == killed and optimizer.steps == 3 and threading.current_thread() is not threading.main_thread():
                os.kill(os.getpid(), signal.SIGKILL)

        model.layers[2].register_forward_hook(die)
        while optimizer.steps < 6:
            step(optimizer, model)
        optimizer.close_journal()
        return digest(model)

    ends = cluster(3, functools.partial(work, killed=1, every=2), tmp_path / "a")
    assert ends[1].killed
    assert all(ends[k].error == "WorkerError" and "worker 1 of 3 is gone" in ends[k].text for k in (0, 2)), ends
    assert results(cluster(2, functools.partial(work, killed=None, every=0), tmp_path / "b")) == [resident(steps=6)] * 2
