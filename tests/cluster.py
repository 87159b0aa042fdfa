"""Workers that share a run, as real processes with gloo: the bits of one process, whatever their number, and after deaths.

    python -m tests.cluster --matrix          methods x dtypes x cuts x numbers of workers; last line: '100 of 100 runs ...'
    python -m tests.cluster --runs 50         a worker dies at a random moment, another number goes on; last line: '50 of 50 runs, ...'

Every worker is a fork of this process. The one that dies does so by SIGKILL from inside: in a forward, before or behind a round of losses, in the middle of a
record, with half of the tensors of an update written. The others must end by themselves, with an error that names it. What goes on from the journal, with
another number of workers, must end on every worker with the weights of a single process without torch.distributed, to the bit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo  # once, and not in every fork: torch loads it for its first optimizer
import torch.distributed as dist
from torch import Tensor, nn

import zo_kernels as zk
from zo_kernels import ops, update
from zo_kernels.optim import workers as sharing
from zo_kernels.plan import Plan

STEPS = 40
BATCHES = 4
CUTS = ("directions", "data", "both")
DTYPES = (torch.float32, torch.bfloat16)
METHODS: dict[str, Callable[..., zk.ZOStep]] = {
    "MeZO": lambda m, **k: zk.MeZOStep(m, queries=4, **k),
    "FZOO": lambda m, **k: zk.FZOO(m, queries=4, **k),
    "Adam": lambda m, **k: zk.ZOAdam(m, queries=4, **k),
    "LOZO": lambda m, **k: zk.LOZO(m, every=5, estimator=zk.TwoSided(4), **k),
    "DiZO": lambda m, **k: zk.DiZO(m, every=5, inner=2, layers=["weight$"], estimator=zk.TwoSided(4), **k),
}
MOST = 60.0  # seconds of an attempt


class Model(nn.Module):
    """Two layers and a norm of odd sizes; the loss of a batch."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(13, 37), nn.LayerNorm(37), nn.Linear(37, 5)
        draw = torch.Generator().manual_seed(8)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=draw).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.b(self.norm(self.a(x)).tanh()).float().square().mean()
        return loss


def batches_of(step: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(step)
    return [torch.randn(4, 13, generator=draw).to(dtype) for _ in range(BATCHES)]


def bits_of(model: nn.Module) -> str:
    found = hashlib.sha256()
    for p in model.parameters():
        found.update(p.detach().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Form:
    method: str
    dtype: torch.dtype
    cut: str = "auto"
    mode: str = "scratch"

    def optimizer(self, model: nn.Module, **more: Any) -> zk.ZOStep:
        settings = {"lr": 1e-3, "eps": 1e-2, "weight_decay": 0.1, "seed": 4, "perturbation": self.mode, **more}
        return METHODS[self.method](model, **settings)

    def run(self, shared: bool, journal: Path | None = None, steps: int = STEPS) -> tuple[str, zk.ZOStep]:
        """The whole run, or what is left of it, and its optimizer."""
        model = Model(self.dtype)
        more: dict[str, Any] = {"process_group": dist.group.WORLD, "parallel": self.cut, "timeout": MOST / 2} if shared else {}
        optimizer = self.optimizer(model, journal=journal, resume=journal is not None, **more)
        while (k := optimizer.steps) < steps:
            optimizer.step(model, batches_of(k, self.dtype))
        optimizer.flush()
        optimizer.close_journal()
        return bits_of(model), optimizer


# ---- processes ------------------------------------------------------------------------------------------------------------


class End(NamedTuple):
    """How a worker ended: its result, or the exception that ended it in words; neither of one that was killed."""

    result: Any = None
    error: str = ""
    text: str = ""
    killed: bool = False


def cluster(size: int, function: Callable[[int], Any], folder: Path, limit: float = MOST) -> list[End]:
    """`function(rank)` in `size` processes of one process group, forks of this one. Who is not done after `limit` seconds is killed, and an error."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*"):
        old.unlink()
    pids = {}
    for rank in range(size):
        if not (pid := os.fork()):
            _worker(rank, size, function, folder)
        pids[pid] = rank
    ends, until = [End(killed=True)] * size, time.monotonic() + limit
    left = dict(pids)
    while left:
        for pid in list(left):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del left[pid]
        if time.monotonic() > until:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise TimeoutError(f"workers {sorted(left.values())} of {size} were not done after {limit:g} s")
        time.sleep(0.01)
    for rank in range(size):
        if (told := folder / f"{rank}.end").exists():
            ends[rank] = End(*pickle.loads(told.read_bytes()))
    return ends


def _worker(rank: int, size: int, function: Callable[[int], Any], folder: Path) -> None:
    end: tuple[Any, ...] = (None, "SystemExit", "")
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
        end = (function(rank), "", "")
    except BaseException as error:
        end = (None, type(error).__name__, str(error) + ("" if isinstance(error, zk.WorkerError) else traceback.format_exc()))
    part = folder / f"{rank}.part"
    part.write_bytes(pickle.dumps(end))
    part.replace(folder / f"{rank}.end")
    os._exit(0)  # as a process ends whose last line is done; nothing of the parent's runs again


# ---- one that dies ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Death:
    rank: int
    place: str  # closure, before, behind (a round), write (of rank 0), pass
    count: int

    @classmethod
    def drawn(cls, draw: random.Random, size: int) -> Death:
        place = draw.choice(("closure", "closure", "before", "behind", "write", "pass"))
        rank = 0 if place == "write" else draw.randrange(size)
        # What every attempt passes often enough, also with four workers.
        most = {"closure": 3 * STEPS, "before": 2 * STEPS, "behind": 2 * STEPS, "write": STEPS, "pass": STEPS}[place]
        return cls(rank, place, draw.randint(1, most))

    def install(self) -> None:
        """In the worker: die at the so-manyth visit of the place."""
        left = self.count

        def here() -> bool:
            nonlocal left
            left -= 1
            return left == 0

        def die() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def half(plans: Any) -> list[Plan]:
            return [Plan(plan.entries[::2], plan.device, plan.dtype) for plan in plans if plan.entries[::2]]

        if self.place == "closure":
            forward = Model.forward

            def counted(model: Model, x: Tensor) -> Tensor:
                if here():
                    die()
                return forward(model, x)

            Model.forward = counted  # type: ignore[method-assign]
        elif self.place in ("before", "behind"):
            gather = sharing.Workers._gather

            def gathered(workers: Any, *arguments: Any) -> Any:
                if (now := here()) and self.place == "before":
                    die()
                found = gather(workers, *arguments)
                if now:
                    die()
                return found

            sharing.Workers._gather = gathered  # type: ignore[method-assign]
        elif self.place == "write":
            write = os.write

            def torn(fd: int, data: bytes) -> int:
                if not here():
                    return write(fd, data)
                write(fd, data[: self.count * 7 % len(data)])
                die()
                return 0

            os.write = torn
        else:
            run, run_rule = ops.run, update.run_rule

            def passed(plans: Any, *rest: Any) -> None:
                if here():
                    run(half(plans), *rest)
                    die()
                run(plans, *rest)

            def ruled(plans: Any, *rest: Any) -> None:
                if here():
                    die()
                run_rule(plans, *rest)

            ops.run, update.run_rule = passed, ruled  # type: ignore[assignment]


def survived(ends: Sequence[End], death: Death) -> str:
    """What is wrong with how the others ended where one has died; "" if nothing is."""
    for rank, end in enumerate(ends):
        named = f"worker {death.rank} of {len(ends)} is gone" in end.text
        if rank == death.rank or (end.error == "WorkerError" and named):
            continue
        if end.result is not None and death.place in ("behind", "pass"):
            continue  # it was done when the other one died
        return f"worker {rank} ended with {end.result or end.error}: {end.text:.600}"
    return ""


# ---- many runs ----------------------------------------------------------------------------------------------------------------


def matrix(folder: Path, sizes: Sequence[int], forms: Sequence[Form], steps: int = STEPS) -> int:
    """How many of the runs end in other bits than that of a single process without torch.distributed."""
    wrong, count = 0, 0
    alone = {form: form.run(shared=False, steps=steps)[0] for form in {Form(f.method, f.dtype, mode=f.mode) for f in forms}}
    for size in sizes:

        def everything(rank: int) -> list[str]:
            return [form.run(shared=True, steps=steps)[0] for form in forms]

        ends = cluster(size, everything, folder / "matrix", limit=MOST * len(forms))
        for k, form in enumerate(forms):
            want = alone[Form(form.method, form.dtype, mode=form.mode)]
            bad = [rank for rank, end in enumerate(ends) if end.result is None or end.result[k] != want]
            count, wrong = count + 1, wrong + bool(bad)
            if bad:
                print(f"{form} on {size} workers: other bits on workers {bad}; {ends[bad[0]].text:.600}", flush=True)
    print(f"{count - wrong} of {count} runs on {', '.join(map(str, sizes))} workers have the bits of one process")
    return wrong


def deaths(folder: Path, runs: int, seed: int) -> int:
    """How many of the runs went wrong."""
    good, died, known = 0, Counter[str](), dict[Form, str]()
    for number in range(runs):
        draw = random.Random(f"{seed} {number}")
        form = Form(list(METHODS)[number % len(METHODS)], draw.choice(DTYPES), draw.choice((*CUTS, "auto")))
        plain = Form(form.method, form.dtype)
        if plain not in known:
            known[plain] = plain.run(shared=False)[0]
        journal, found, size = folder / f"{number}.zoj", "", 0
        more = 1 + (draw.random() < 0.3)
        while not found:
            size = draw.choice([n for n in (1, 2, 3, 4) if n != size and not (n == 1 and more)])
            death = Death.drawn(draw, size) if more else None

            def work(rank: int, form: Form = form, journal: Path = journal, death: Death | None = death) -> str:
                if death is not None and rank == death.rank:
                    death.install()
                return form.run(shared=True, journal=journal)[0]

            ends = cluster(size, work, folder / "attempt")
            if death is None:
                bad = [rank for rank, end in enumerate(ends) if end.result != known[plain]]
                found = f"other bits on workers {bad} of {size}: {ends[bad[0]].text:.600}" if bad else ""
                break
            if not any(end.killed for end in ends):  # it was done before it was to die
                journal.unlink()
                continue
            died[death.place] += 1
            more -= 1
            found = survived(ends, death)
        good += not found
        if found:
            print(f"run {number} of seed {seed}: {form}: {found}; kept in {folder}", flush=True)
        elif (number + 1) % 5 == 0:
            print(f"{good} of {number + 1}", flush=True)
    kinds = ", ".join(f"{place} {n}" for place, n in sorted(died.items()))
    print(f"{good} of {runs} runs, {died.total()} deaths ({kinds})")
    return runs - good


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--matrix", action="store_true")
    parser.add_argument("--runs", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="zo-cluster-"))
    forms = [Form(method, dtype, cut) for method in METHODS for dtype in DTYPES for cut in CUTS]
    wrong = matrix(folder, (1, 2, 4), forms) if options.matrix else 0
    wrong += deaths(folder, options.runs, options.seed) if options.runs else 0
    if not wrong:
        shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
