"""Runs that die at random moments and are resumed: each must end with the bits of a run that nothing disturbed.

    python -m tests.crash --runs 200          prints '200 of 200'

Every attempt is a fork of this process, which has torch loaded and no thread of its own. Half of the deaths come from inside: an exception or
an interrupt in a closure, before or after a pass over part of the weights, or in the middle of writing a record. Half are SIGKILL: at a
random time, or while the run is held at such a place. A resumed run may die again, in its replay too.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zo_kernels as zk
from zo_kernels import journal, ops

MODES: dict[str, dict[str, Any]] = {
    "scratch": {"perturbation": "scratch"},
    "inplace": {"perturbation": "inplace"},
    "lazy": {"perturbation": "inplace", "lazy": True},
}
STEPS = 24
MOST_DEATHS = 3


class Model(nn.Module):
    """Two layers and a norm of odd sizes; the loss of step k's data, one of which is not finite."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(8)
        self.a, self.norm, self.b = nn.Linear(13, 37), nn.LayerNorm(37), nn.Linear(37, 5)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g).to(dtype)

    def forward(self, k: int) -> Tensor:
        x = torch.randn(4, 13, generator=torch.Generator().manual_seed(k)).to(self.a.weight.dtype)
        loss = self.b(self.norm(self.a(x)).tanh()).float().square().mean()
        return loss * math.inf if k == 7 else loss


@dataclass(frozen=True)
class Form:
    mode: str
    dtype: torch.dtype
    rounding: str

    def optimizer(self, model: nn.Module, path: Path) -> zk.MeZOStep:
        settings = {"lr": 1e-3, "eps": 1e-2, "weight_decay": 0.1, "seed": 4, "rounding": self.rounding, **MODES[self.mode]}
        return zk.MeZOStep(model, journal=path, resume=True, **settings)

    def run(self, path: Path) -> list[Tensor]:
        """The whole run, or what is left of it."""
        model = Model(self.dtype)
        optimizer = self.optimizer(model, path)
        while (k := optimizer.steps) < STEPS:
            if k % 6 == 0:
                model(0)  # an evaluation: lazy weights are flushed for it
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 - k / STEPS)
            optimizer.step(lambda k=k: model(k))  # type: ignore[misc]
        optimizer.flush()
        optimizer.close_journal()
        return [p.detach() for p in model.parameters()]


class Died(BaseException):
    """Raised from within; no handler of ours catches it."""


@dataclass(frozen=True)
class Death:
    place: str  # closure, pass, write; time: wherever the run is after `count` milliseconds
    count: int
    how: str  # raise, interrupt, kill

    @classmethod
    def drawn(cls, draw: random.Random, inside: bool) -> Death:
        place = draw.choice(("closure", "pass", "write") if inside else ("closure", "pass", "write", "time", "time"))
        most = {"closure": 2 * STEPS, "pass": 2 * STEPS, "write": STEPS, "time": 150}[place]
        return cls(place, draw.randint(1, most), draw.choice(("raise", "interrupt")) if inside else "kill")

    def install(self, ready: int) -> None:
        """In the child: die at the so-manyth visit of the place. `ready`: where the parent waits to be told that it may kill."""
        left = self.count

        def here() -> bool:
            nonlocal left
            left -= 1
            return left == 0

        def die() -> None:
            if self.how == "kill":
                os.write(ready, b"x")
                time.sleep(60)
            if self.how == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
                return
            raise Died

        def around(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(plans: Any, *rest: Any) -> None:
                if here():  # half of the passes die with part of the tensors written
                    if self.count % 2:
                        for plan in plans:
                            function([ops.Plan(plan.entries[: len(plan.entries) // 2], plan.device, plan.dtype)], *rest)
                        die()
                        plans = [ops.Plan(plan.entries[len(plan.entries) // 2 :], plan.device, plan.dtype) for plan in plans]
                    else:
                        die()
                function(plans, *rest)

            return wrapped

        if self.place == "closure":
            forward = Model.forward

            def counted(model: Model, k: int) -> Tensor:
                if here():
                    die()
                return forward(model, k)

            Model.forward = counted  # type: ignore[method-assign]
        elif self.place == "pass":
            ops.run, ops.run_sequence = around(ops.run), around(ops.run_sequence)
        elif self.place == "write":
            write = os.write

            def torn(fd: int, data: bytes) -> int:
                if fd == ready or not here():
                    return write(fd, data)
                written = write(fd, data[: self.count * 7 % len(data)])
                die()
                return written + write(fd, data[written:])

            os.write = torn


def attempt(form: Form, path: Path, death: Death | None) -> bool:
    """One process of the run; whether it came to its end, with its weights beside the journal."""
    told, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(told)
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if death is not None:
                death.install(ready)
            weights = form.run(path)
            part = path.with_suffix(".part")
            torch.save(weights, part)
            part.replace(path.with_suffix(".pt"))
            code = 0
        finally:
            os._exit(code)
    os.close(ready)
    try:
        if death is not None and death.how == "kill":
            select.select([told], [], [], death.count / 1000 if death.place == "time" else 60)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    finally:
        os.close(told)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p.view(torch.uint8), q.view(torch.uint8)) for p, q in zip(a, b, strict=True))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a fork takes no threads along
    forms = [
        Form(mode, dtype, rounding)
        for mode in MODES
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for rounding in ops.ROUNDINGS
    ]
    undisturbed: dict[Form, list[Tensor]] = {}
    good, deaths = 0, 0
    folder = Path(tempfile.mkdtemp(prefix="crash."))
    for number in range(options.runs):
        draw = random.Random(options.seed * 1_000_003 + number)
        form = draw.choice(forms)
        if form not in undisturbed:
            undisturbed[form] = [p.clone() for p in form.run(folder / f"undisturbed.{len(undisturbed)}.zoj")]
        path = folder / f"{number}.zoj"
        story: list[Death] = []
        while True:
            death = (
                Death.drawn(draw, inside=number % 2 == 0)
                if len(story) < MOST_DEATHS and (not story or draw.random() < 0.5)
                else None
            )
            done = attempt(form, path, death)
            if death is None:
                break
            if not done:
                story.append(death)
            elif not story:  # it ended before it was to die: again from the start
                for left in folder.glob(f"{number}.*"):
                    left.unlink()
            else:
                break
        deaths += len(story)
        replayed = Model(form.dtype)
        fine = path.with_suffix(".pt").exists() and same(torch.load(path.with_suffix(".pt")), undisturbed[form])
        if fine:
            zk.replay(replayed, path)
            fine = same([p.detach() for p in replayed.parameters()], undisturbed[form]) and len(journal.read(path)) == STEPS
        good += fine
        if not fine:
            print(
                f"run {number} of seed {options.seed}: {form}, {story}: other bits than undisturbed, or no end; kept in {folder}",
                flush=True,
            )
        if (number + 1) % 20 == 0 or number + 1 == options.runs:
            print(f"{good} of {number + 1}, {deaths} deaths", flush=True)
    if good == options.runs:
        shutil.rmtree(folder)
    print(f"{good} of {options.runs}")
    return 0 if good == options.runs else 1


if __name__ == "__main__":
    sys.exit(main())
