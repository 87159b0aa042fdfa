"""Runs that die at random moments and are resumed: each must end with the bits of a run that nothing disturbed.

    python -m tests.crash --runs 200          last line: '200 of 200 runs, ... deaths (...), ... configurations'
    python -m tests.crash --runs 60 --mode offloaded --mode "from disk" --mode "from disk, never written"      runs of these modes alone

Every attempt is a fork of this process, which has torch loaded and no thread of its own. It dies from inside, at a closure, around half of a pass
over the weights or in the middle of writing a record, or wherever the clock finds it: by an exception, by a signal whose Python handler raises
(SIGINT, a time limit by SIGALRM, SIGTERM with sys.exit), or by SIGKILL. A resumed run may die again, in its replay too.

Behind an exception the process ends, or it goes on with the same optimizer. Then docs/faults.md and docs/journal.md say what must hold: in scratch
mode the bits of the undisturbed run; in place, plain MeZO has the bits that its journal says, with the roundings of the failed attempt, and any
other method refuses to go on without the base. In every case a copy of the journal as the death left it is resumed to the undisturbed bits.

The second command with --seed 5 said: 60 of 60 runs, 75 deaths (..., kill 27, ...), 41 configurations.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

import zo_kernels as zk
from zo_kernels import checks, journal, ops, update
from zo_kernels.plan import Plan
from zo_kernels.views.files import write_tensors

MODES: dict[str, dict[str, Any]] = {
    "scratch": {"perturbation": "scratch"},
    "inplace": {"perturbation": "inplace"},
    "lazy": {"perturbation": "inplace", "lazy": True},
    "offloaded": {"perturbation": "scratch"},
    "from disk": {"perturbation": "scratch"},
    "from disk, never written": {"perturbation": "scratch"},
}
VISITING: dict[str, dict[str, Any]] = {  # what zk.offload is given
    "offloaded": {"write_back": 2},
    "from disk": {"write_back": 2},
    "from disk, never written": {"write_back": 0},
}
STEPS = 24
MOST_DEATHS = 3
PLAIN = ("MeZO", "sign")  # whose failed attempts in place are records
HALVES = ["weight$", "bias$"]
DIZO: dict[str, Any] = {"every": 5, "inner": 2, "inner_lr": 0.1, "layers": HALVES[:1]}


def given_of(model: nn.Module) -> zk.InputFactors:
    """A right factor of every matrix."""
    matrices = {n: p.numel() // p.shape[0] for n, p in model.named_parameters() if p.ndim > 1}
    return zk.InputFactors({n: (torch.arange(2.0 * cols).view(cols, 2) % 7 - 3) / 4 for n, cols in matrices.items()})


def start_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights that a run begins with, as a file of the base has them: every process makes its optimizer of the base."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}


METHODS: dict[str, Callable[..., zk.ZOStep]] = {
    "MeZO": zk.MeZOStep,
    "sign": zk.ZOSignSGD,
    "ranked": lambda m, **k: zk.ZOStep(m, estimator=zk.Shaped(3), **k),
    "scale-free": lambda m, **k: zk.MeZOStep(m, scale_free=zk.ScaleFree(0.9), **k),
    "anchored": lambda m, **k: zk.MeZOStep(m, anchor=zk.Anchor(0.1, 3, start_of(m)), **k),
    "forward gradient": zk.ForwardGrad,
    "momentum": zk.ZOMomentum,
    "momentum recomputed": lambda m, **k: zk.ZOMomentum(m, state="recomputed", history=5, **k),
    "Adam": zk.ZOAdam,
    "Adam recomputed": lambda m, **k: zk.ZOAdam(m, state="recomputed", history=5, **k),
    "Adam in blocks": lambda m, **k: zk.ZOAdam(m, blocks=zk.Blocks(HALVES), **k),
    "HiZOO": lambda m, **k: zk.HiZOO(m, alpha=1e-2, **k),
    "DiZO": lambda m, **k: zk.DiZO(m, **DIZO, **k),
    "DiZO by backpropagation": lambda m, **k: zk.DiZO(m, learn="backpropagation", **DIZO, **k),
    "LOZO": lambda m, **k: zk.LOZO(m, every=5, **k),
    "input subspace": lambda m, **k: zk.MeZOStep(m, queries=2, direction=zk.InputSubspace(given_of(m)), **k),
    "LOZO with momentum": lambda m, **k: zk.LOZO(m, every=5, momentum=0.9, **k),
}
AWAY = ("MeZO", "ranked", "Adam recomputed")  # whose weights may be away
MODES_OF = {name: ("scratch",) if name == "forward gradient" else tuple(MODES)[: 3 if name in PLAIN else 2] for name in METHODS}
MODES_OF |= {name: (*MODES_OF[name], *VISITING) for name in AWAY}
SIGNALS = {"interrupt": signal.SIGINT, "alarm": signal.SIGALRM, "term": signal.SIGTERM}


class Layers(nn.Module):
    """Two layers and a norm of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(13, 37), nn.LayerNorm(37), nn.Linear(37, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)).tanh())


class Attention(nn.Module):
    """A layer whose fused path a step has to keep off."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x.unflatten(1, (-1, 8))))


class Channels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv1d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv1d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x.unflatten(1, (3, -1)))).tanh())


MODELS: dict[str, tuple[type[nn.Module], int]] = {"layers": (Layers, 13), "attention": (Attention, 40), "channels": (Channels, 27)}


class Model(nn.Module):
    """The loss of step k's data, one of which is not finite."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(8)
        kind, self.width = MODELS[name]
        self.inner = kind().eval()
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g).to(dtype)

    def forward(self, k: int) -> Tensor:
        x = torch.randn(4, self.width, generator=torch.Generator().manual_seed(k)).to(next(self.parameters()).dtype)
        loss = self.inner(x).float().square().mean()
        return loss * math.inf if k == 7 else loss


class Died(BaseException):
    """Raised from within; no handler of ours catches it."""


ENDS = (Died, KeyboardInterrupt, TimeoutError, SystemExit)  # what the deaths of this file raise


@dataclass(frozen=True)
class Form:
    model: str
    method: str
    mode: str
    dtype: torch.dtype
    rounding: str

    @classmethod
    def drawn(cls, draw: random.Random, number: int, among: Collection[str] = tuple(MODES)) -> Form:
        """Methods and modes in turn, the rest by chance."""
        turns = [(name, mode) for name, modes in MODES_OF.items() for mode in modes if mode in among]
        method, mode = turns[number % len(turns)]
        model = draw.choice(list(MODELS))
        dtypes = (torch.float32, torch.bfloat16, torch.float16)[: 3 if model == "layers" else 2]
        return cls(model, method, mode, draw.choice(dtypes), draw.choice(list(checks.ROUNDINGS)))

    @property
    def refuses(self) -> bool:
        """Whether an interrupted step may leave weights that no record describes, so that the next one refuses to go on."""
        return self.mode not in ("scratch", *VISITING) and self.method not in PLAIN

    def base(self) -> Model:
        return Model(self.model, self.dtype)

    def file(self, folder: Path) -> Path:
        """Of the weights that a run begins with, where they come from disk."""
        return folder / f"{self.model}.{str(self.dtype).removeprefix('torch.')}.safetensors"

    def optimizer(self, model: Model, path: Path) -> zk.ZOStep:
        settings = {"lr": 1e-3, "eps": 1e-2, "weight_decay": 0.1, "seed": 4, "rounding": self.rounding, **MODES[self.mode]}
        if self.mode in VISITING:  # each layer is a block
            layers = [f"inner.{name}" for name, layer in model.inner.named_children() if any(True for _ in layer.parameters())]
            disk: dict[str, Any] = {"source": self.file(path.parent), "folder": path.parent} if self.mode != "offloaded" else {}
            zk.offload(model, blocks=layers, together=self.rounding == "nearest", **disk, **VISITING[self.mode])
        if self.method == "forward gradient":
            del settings["eps"]
        return METHODS[self.method](model, journal=path, resume=True, **settings)

    def go_on(self, model: Model, optimizer: zk.ZOStep) -> list[Tensor]:
        """The whole run, or what is left of it."""
        while (k := optimizer.steps) < STEPS:
            if k % 6 == 0:
                model(0)  # an evaluation: lazy weights are flushed for it
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 - k / STEPS)
            optimizer.step(lambda k=k: model(k))  # type: ignore[misc]
        optimizer.flush()
        optimizer.close_journal()
        return weights_of(model)

    def run(self, path: Path, death: Death | None, survived: Callable[[], object]) -> list[Tensor]:
        """The run in one process, which ends by its death unless that is one that it goes on behind."""
        optimizer: zk.ZOStep | None = None
        died = False
        while True:
            try:
                if optimizer is None:
                    model = self.base()
                    optimizer = self.optimizer(model, path)
                return self.go_on(model, optimizer)
            except ENDS:
                if death is None or not death.goes_on:
                    raise
                died = True
                survived()
                for how, number in SIGNALS.items():
                    assert signal.getsignal(number) is HANDLERS[how], f"the handler of {how} is not back in its place"
                if optimizer is not None:
                    shutil.copyfile(path, then(path))
                    if self.mode != "lazy":  # whose rounding it would change
                        optimizer.flush()  # the record of a failed attempt waits for the next step, or for this
                    if self.mode != "lazy" and not self.refuses:
                        assert same(self.replayed(path), weights_of(model)), "weights are not those of the journal"
            except RuntimeError as error:
                if not (died and self.refuses and optimizer and "Load the base weights and resume" in str(error)):
                    raise
                optimizer.close_journal()
                optimizer = None
            if optimizer is None:  # what is left of it has the journal's lock
                gc.collect()

    def replayed(self, path: Path) -> list[Tensor]:
        model = self.base()
        zk.replay(model, path)
        return weights_of(model)


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def then(path: Path) -> Path:
    """Where the journal of a run that goes on is kept as its death left it."""
    return path.with_suffix(".then.zoj")


def time_is_up(number: int, frame: FrameType | None) -> NoReturn:
    raise TimeoutError


def leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(143)


HANDLERS: dict[str, Any] = {"interrupt": signal.default_int_handler, "alarm": time_is_up, "term": leave}


@dataclass(frozen=True)
class Death:
    place: str  # closure, pass, write; time: wherever the run is after `count` thousandths of what an undisturbed one takes
    count: int
    how: str  # raise, interrupt, alarm, term, kill
    goes_on: bool = False

    @classmethod
    def drawn(cls, draw: random.Random) -> Death:
        how = draw.choice(("raise", *SIGNALS, "kill", "kill"))
        place = draw.choice(("closure", "pass", "write", *(() if how == "raise" else ("time", "time"))))
        most = {"closure": 2 * STEPS, "pass": 2 * STEPS, "write": STEPS, "time": 1000}[place]
        # A pass or a record that an exception of its own cuts short is the end of a run.
        survives = how in SIGNALS or (how == "raise" and place == "closure")
        return cls(place, draw.randint(1, most), how, survives and draw.random() < 0.5)

    def __str__(self) -> str:
        return f"{self.how}{' and on' if self.goes_on else ''}"

    def install(self, ready: int, takes: float) -> None:
        """In the child: die at the so-manyth visit of the place. `ready`: where the parent waits to be told that it may kill."""
        for how, number in SIGNALS.items():
            signal.signal(number, HANDLERS[how])
        if self.place == "time":
            if self.how == "alarm":
                signal.setitimer(signal.ITIMER_REAL, self.count / 1000 * takes)
            os.write(ready, b"r")
            return
        left = self.count

        def here() -> bool:
            nonlocal left
            left -= 1
            return left == 0

        def die() -> None:
            if self.how == "kill":
                os.write(ready, b"r")
                time.sleep(60)
            if self.how in SIGNALS:
                os.kill(os.getpid(), SIGNALS[self.how])
                return
            raise Died

        def around(function: Callable[..., Any], half: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
            def wrapped(*arguments: Any) -> None:
                if not here():
                    function(*arguments)
                elif self.count % 2:  # half of the passes die with part of the tensors written
                    function(*half(slice(None, None, 2), *arguments))
                    die()
                    function(*half(slice(1, None, 2), *arguments))
                else:
                    die()
                    function(*arguments)

            return wrapped

        def some(part: slice, plans: Any) -> list[Plan]:
            return [Plan(plan.entries[part], plan.device, plan.dtype) for plan in plans if plan.entries[part]]

        def of_pass(part: slice, plans: Any, *rest: Any) -> tuple[Any, ...]:
            return (some(part, plans), *rest)

        def of_rule(part: slice, plans: Any, states: Any, *rest: Any) -> tuple[Any, ...]:
            own = [own[part] for plan, own in zip(plans, states, strict=True) if plan.entries[part]]
            return (some(part, plans), own, *rest)

        if self.place == "closure":
            forward = Model.forward

            def counted(model: Model, k: int) -> Tensor:
                if here():
                    die()
                return forward(model, k)

            Model.forward = counted  # type: ignore[method-assign]
        elif self.place == "pass":
            ops.run, ops.run_sequence = around(ops.run, of_pass), around(ops.run_sequence, of_pass)
            update.run_rule = around(update.run_rule, of_rule)
        elif self.place == "write":
            write = os.write

            def torn(fd: int, data: bytes) -> int:
                if fd == ready or not here():
                    return write(fd, data)
                written = write(fd, data[: self.count * 7 % len(data)])
                die()
                return written + write(fd, data[written:])

            os.write = torn


def child(form: Form, path: Path, death: Death | None, ready: int, takes: float) -> NoReturn:
    """Ends with 0 behind the last step, the weights beside the journal; with 70 and the reason beside it where something fails that is not its death."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        if death is not None:
            death.install(ready, takes)
        weights = form.run(path, death, lambda: os.write(ready, b"s"))
        part = path.with_suffix(".part")
        torch.save(weights, part)
        part.replace(path.with_suffix(".pt"))
    except BaseException as error:
        if death is None or not isinstance(error, ENDS):
            path.with_suffix(".error").write_text("".join(traceback.format_exception(error)))
            os._exit(70)
        if death.how in SIGNALS:  # Python ends as it does: what is registered for its end is called
            raise
        os._exit(1)
    os._exit(0)


def attempt(form: Form, path: Path, death: Death | None, takes: float = 0.0) -> tuple[bool, bool]:
    """One process of the run: whether it came to its end, with its weights beside the journal, and whether it died or went on behind its death."""
    told, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(told)
        child(form, path, death, ready, takes)
    os.close(ready)
    try:
        if death is not None and (death.how == "kill" or (death.place == "time" and death.how != "alarm")):
            select.select([told], [], [], 60)
            if death.place == "time":
                time.sleep(death.count / 1000 * takes)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, SIGNALS.get(death.how, signal.SIGKILL))
        status = os.waitpid(pid, 0)[1]
        survived = b"s" in os.read(told, 16)
    finally:
        os.close(told)
    done = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    return done, survived or not done


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p.view(torch.uint8), q.view(torch.uint8)) for p, q in zip(a, b, strict=True))


@dataclass(frozen=True)
class Undisturbed:
    weights: list[Tensor]
    takes: float  # seconds


def undisturbed(form: Form, path: Path) -> Undisturbed:
    began = time.monotonic()
    done, _ = attempt(form, path, None)
    takes = time.monotonic() - began
    assert done, path.with_suffix(".error").read_text()
    weights = torch.load(path.with_suffix(".pt"))
    assert all(p.isfinite().all() for p in weights) and not same(weights, weights_of(form.base()))
    return Undisturbed(weights, takes)


def wrong(form: Form, path: Path, expected: list[Tensor]) -> str:
    """What is not as it should be behind the last attempt; nothing if all is."""
    if path.with_suffix(".error").exists():
        return path.with_suffix(".error").read_text().strip()
    if not path.with_suffix(".pt").exists():
        return "no end"
    weights, past = torch.load(path.with_suffix(".pt")), journal.read(path)
    if len(past.steps) != STEPS:
        return f"{len(past.steps)} steps in the journal"
    if not same(form.replayed(path), weights):
        return "the replay has other bits"
    went_on = then(path).exists()
    if len(past) > STEPS:  # failed attempts, whose roundings are those of the run that went on
        if form.mode in ("scratch", *VISITING) or form.refuses or not went_on:
            return "failed attempts in the journal"
    elif not same(weights, expected):
        return "other bits than undisturbed"
    if went_on:
        attempt(form, then(path), None)
        return (found := wrong(form, then(path), expected)) and f"the journal that the death left, resumed: {found}"
    return ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", action="append", choices=MODES, help="of this one alone, or of these; by default all are taken")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a fork takes no threads along
    # The first optimizer of a process has torch import its compiler, which each child would do, and which cut short cannot be done again.
    zk.MeZOStep(Model("layers", torch.float32), 1e-3)
    known: dict[Form, Undisturbed] = {}
    given: dict[Path, bytes] = {}
    good = 0
    deaths: Counter[str] = Counter()
    folder = Path(tempfile.mkdtemp(prefix="crash."))
    for number in range(options.runs):
        draw = random.Random(options.seed * 1_000_003 + number)
        form = Form.drawn(draw, number, options.mode or tuple(MODES))
        if form not in known:
            file = form.file(folder)
            if not file.exists():
                named = dict(form.base().named_parameters())
                write_tensors(file, named, named.__getitem__)
                given[file] = file.read_bytes()
            known[form] = undisturbed(form, folder / f"undisturbed.{len(known)}.zoj")
        path = folder / f"{number}.zoj"
        story: list[Death] = []
        while True:
            death = Death.drawn(draw) if len(story) < MOST_DEATHS and (not story or draw.random() < 0.5) else None
            done, died = attempt(form, path, death, known[form].takes)
            if death is not None and died:
                story.append(death)
            if death is None or path.with_suffix(".error").exists() or (done and story):
                break
            if done:  # it ended before it was to die: again from the start
                for left in folder.glob(f"{number}.*"):
                    left.unlink()
        deaths.update(map(str, story))
        found = wrong(form, path, known[form].weights)
        if form.file(folder).read_bytes() != given[form.file(folder)]:
            found = "the file of the base was written to"
        good += not found
        if found:
            print(f"run {number} of seed {options.seed}: {form}, {story}: {found}; kept in {folder}", flush=True)
        if (number + 1) % 20 == 0:
            print(f"{good} of {number + 1}", flush=True)
    if good == options.runs:
        shutil.rmtree(folder)
    kinds = ", ".join(f"{how} {n}" for how, n in sorted(deaths.items()))
    print(f"{good} of {options.runs} runs, {deaths.total()} deaths ({kinds}), {len(known)} configurations")
    return 0 if good == options.runs else 1


if __name__ == "__main__":
    sys.exit(main())
