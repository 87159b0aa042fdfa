"""What a step costs on two trees of this repository, in turn: this one, and one of an earlier commit.

    git worktree add ../before COMMIT && (cd ../before && python setup.py -q build_ext --inplace)
    python benchmarks/against.py --before ../before --out against.csv [--rounds N] [--cases CASE ...]

Belongs here: a comparison of two versions, which no other script can make since it imports one. Does not belong here: what a step costs beside forwards
(step.py), where its time goes (scaling.py).

Each tree runs in a process of its own; a round is some steps of one and as many of the other, the first one first in every other round, in the process's CPU
time with one thread, and in wall time. Every `RENEW` rounds both processes are new ones: where a process's memory lies moves its steps by some per cent,
whatever the code. What a step's forwards take without a step ("bare") is measured beside it, in the same turn of the same process.

Cases: "hidden 64", a model of that size; bare are two of its forwards. "388 tensors between forwards", the tensors of OPT-1.3B with 4 to 32 elements
each and a closure that computes something else, whose 64 MiB push everything of ours out of the caches twice a step, as forwards do; bare is what the
closure takes by its own clock. In the mode "scratch parts" not all values fit into the buffer, as of such a model not all do. "GPT-2 shapes": its 148
tensors, each with a hundredth of its elements, so that the passes over them do not hide the rest, with a closure that computes nothing. "one pass" is over
2^24 weights: theta + c z in place, and from them into a buffer of 2^20, as scratch mode has it; the update of scratch mode, with stochastic rounding in 16
bits; and what lazy steps do in place, two terms. "one mask" is what Sparse-MeZO does before each step, the mask of the smallest weights of a tensor of 2^24.
The rows of these two are in files of their own, against_pass.csv and against_mask.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import harness

RENEW = 10
BETWEEN = "388 tensors between forwards"
TRAINING = ("hidden 64", BETWEEN, "GPT-2 shapes")
CASES = (*TRAINING, "one pass", "one mask")
MODES = {  # of the others: scratch, inplace
    "one pass": ("scratch", "inplace", "update", "two terms"),
    "one mask": ("",),
    BETWEEN: ("scratch", "scratch parts", "inplace"),
}
BARE = ("hidden 64", BETWEEN)  # whose closures compute something
COLUMNS = (
    "case",
    "dtype",
    "mode",
    "steps",
    "before",
    *harness.TIMING_COLUMNS,
    "before_median_s",
    "ratio",
    "ratio_min",
    "ratio_max",
    "wall_median_s",
    "before_wall_median_s",
    "bare_median_s",
    "beside_median_s",
    "beside_min_s",
    "beside_max_s",
    "before_beside_median_s",
    "wall_beside_median_s",
    "before_wall_beside_median_s",
    "over_bare_percent",
    "before_over_bare_percent",
)
WORKER = """
import json, sys, time
import torch
from torch import nn
import zo_kernels as zk
torch.set_num_threads(1)
torch.manual_seed(0)

def gpt2():
    shapes = [(50257, 768), (1024, 768)]
    for _ in range(12):
        shapes += [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,), (768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)]
    shapes += [(768,), (768,)]
    model = nn.Module()
    for k, shape in enumerate(shapes):
        small = (max(1, shape[0] // 100), *shape[1:]) if len(shape) == 2 else (max(1, shape[0] // 100),)
        model.register_parameter(f"w{k}", nn.Parameter(torch.randn(small) * 0.02))
    return model, lambda: 1.0

def hidden64():
    layers = [nn.Embedding(512, 64)]
    for _ in range(4):
        layers += [nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)]
    model = nn.Sequential(*layers, nn.LayerNorm(64), nn.Linear(64, 512))
    ids = torch.randint(0, 512, (8, 16))
    return model, lambda: nn.functional.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten())

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.projections = nn.ModuleList([nn.Linear(4, 4) for _ in range(6)])
        self.norms = nn.ModuleList([nn.LayerNorm(4) for _ in range(2)])

def opt():
    model = nn.ModuleList([nn.Embedding(8, 4), nn.Embedding(8, 4), *[Layer() for _ in range(24)], nn.LayerNorm(4)])
    assert len(list(model.parameters())) == 388
    other = nn.Sequential(*[nn.Sequential(nn.LayerNorm(1024), nn.Linear(1024, 1024), nn.GELU()) for _ in range(16)])
    x = torch.randn(16, 1024)
    losses = iter(range(1, 1 << 40))

    def closure():
        with clock:
            other(x)
            return 1 / next(losses)

    return model, closure

class Clock:
    cpu = wall = 0.0
    def __enter__(self):
        self.began = time.process_time(), time.perf_counter()
    def __exit__(self, *_):
        self.cpu += time.process_time() - self.began[0]
        self.wall += time.perf_counter() - self.began[1]

clock = Clock()

def one_pass(dtype, mode):
    from zo_kernels._backends import cpu
    from zo_kernels.plan import Entry, Pass, Plan
    weights = (torch.randn(1 << 24) * 0.02).to(dtype)
    size = 1 << 20 if mode == "scratch" else weights.numel()
    buffer = torch.empty(size, dtype=dtype)
    plans = [Plan((Entry(w, buffer if mode == "scratch" else w, 5),), w.device, dtype) for w in weights.split(size)]
    tags, coefs = ([7, 8], [1e-3, -1e-3]) if mode == "two terms" else ([7], [1e-3])
    rounding = "stochastic" if mode == "update" else "nearest"
    def step():
        for plan in plans:
            cpu.perturb(plan, Pass(1, tags, coefs, rounding=rounding))
    return step, None

def one_mask(dtype):
    weights = {"weight": (torch.randn(1 << 24) * 0.02).to(dtype)}
    direction = zk.MagnitudeSparse(0.25).of(1)
    direction.limits("weight", weights["weight"], 5)
    return lambda: direction.prepare(0, 0, weights), None

def training(case, dtype, mode):
    model, closure = {"hidden 64": hidden64, "GPT-2 shapes": gpt2}.get(case, opt)()
    parts = {"scratch_bytes": 256} if mode == "scratch parts" else {}
    optimizer = zk.MeZOStep(model.to(dtype), lr=1e-6, eps=1e-3, perturbation=mode.split()[0], seed=1, **parts)

    def bare():
        with torch.no_grad(), clock:
            closure()
            closure()

    return lambda: optimizer.step(closure), bare if case == "hidden 64" else None

cases = {}
for line in sys.stdin:
    case, dtype, mode, steps = json.loads(line)
    key = case, dtype, mode
    if key not in cases:
        kind = getattr(torch, dtype)
        cases[key] = one_pass(kind, mode) if case == "one pass" else one_mask(kind) if case == "one mask" else training(case, kind, mode)
        for _ in range(steps):
            cases[key][0]()
    step, bare = cases[key]
    clock.cpu = clock.wall = 0.0
    start = time.process_time(), time.perf_counter()
    for _ in range(steps):
        step()
    taken = time.process_time() - start[0], time.perf_counter() - start[1]
    if bare is not None:
        for _ in range(steps):
            bare()
    print(json.dumps([x / steps for x in (*taken, clock.cpu, clock.wall)]), flush=True)
"""


class Turn(NamedTuple):
    """Seconds a step, and of the same forwards without one (0.0: of none)."""

    cpu: float
    wall: float
    bare_cpu: float
    bare_wall: float


class Tree:
    """A process that makes steps with the code of one tree."""

    def __init__(self, root: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=root
        )

    def turn(self, *request: Any) -> Turn:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return Turn(*json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.communicate()


def commit_of(root: Path) -> str:
    """The commit of a tree, short."""
    return subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True
    ).stdout.strip()


def turns(root: Path, rounds: int, request: tuple[Any, ...]) -> list[tuple[Turn, Turn]]:
    """Before and now, of each of `rounds` by two new processes; a round before them is not counted."""
    before, now = Tree(root), Tree(Path(__file__).parents[1])
    pairs = []
    for number in range(rounds + 1):
        turn = (before, now) if number % 2 else (now, before)
        taken = {tree: tree.turn(*request) for tree in turn}
        if number:
            pairs.append((taken[before], taken[now]))
    for tree in (before, now):
        tree.close()
    return pairs


def dtypes(case: str) -> Iterable[str]:
    return harness.DTYPES if case not in TRAINING else ("float32",) if case == BETWEEN else ("float32", "bfloat16")


def compared(case: str, turn: Turn) -> float:
    """What a ratio is of: the step, or between forwards what it takes beside them, which are not the model's own."""
    return turn.cpu - turn.bare_cpu if case == BETWEEN else turn.cpu


def beside(case: str, pairs: list[tuple[Turn, Turn]]) -> dict[str, Any]:
    """What a step takes beside its forwards, and in per cent of them; "" where the closure computes nothing."""

    def median(of: Callable[[Turn, Turn], float], digits: int = 4) -> float:
        return harness.significant(statistics.median(of(a, b) for a, b in pairs), digits)

    if case not in BARE:
        return dict.fromkeys(COLUMNS[COLUMNS.index("bare_median_s") :], "")
    found = sorted(b.cpu - b.bare_cpu for _, b in pairs)
    return {
        "bare_median_s": median(lambda a, b: b.bare_cpu),
        "beside_median_s": median(lambda a, b: b.cpu - b.bare_cpu),
        "beside_min_s": harness.significant(found[0], 4),
        "beside_max_s": harness.significant(found[-1], 4),
        "before_beside_median_s": median(lambda a, b: a.cpu - a.bare_cpu),
        "wall_beside_median_s": median(lambda a, b: b.wall - b.bare_wall),
        "before_wall_beside_median_s": median(lambda a, b: a.wall - a.bare_wall),
        "over_bare_percent": median(lambda a, b: 100 * (b.cpu / b.bare_cpu - 1), 3),
        "before_over_bare_percent": median(lambda a, b: 100 * (a.cpu / a.bare_cpu - 1), 3),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="CSV file")
    parser.add_argument("--before", required=True, type=Path, help="the tree of an earlier commit, with its extension built")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=20, help="of a turn")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=TRAINING)
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=harness.DTYPES,
        help="(default: float32 between forwards, and bfloat16 for other steps, otherwise all)",
    )
    args = parser.parse_args(arguments)
    table = harness.Table(args.out, COLUMNS)
    for case in args.cases:
        for dtype in args.dtypes or dtypes(case):
            for mode in MODES.get(case, ("scratch", "inplace")):
                pairs: list[tuple[Turn, Turn]] = []
                while len(pairs) < args.rounds:
                    rounds = min(RENEW, args.rounds - len(pairs))
                    pairs += turns(args.before.resolve(), rounds, (case, dtype, mode, args.steps))
                timing = harness.Timing(tuple(b.cpu for _, b in pairs))
                ratios = sorted(compared(case, b) / compared(case, a) for a, b in pairs)
                row = {
                    "case": case,
                    "dtype": dtype,
                    "mode": mode,
                    "steps": args.steps,
                    "before": commit_of(args.before),
                    **timing.columns(),
                    "before_median_s": harness.significant(statistics.median(a.cpu for a, _ in pairs), 4),
                    "ratio": harness.significant(statistics.median(ratios), 4),
                    "ratio_min": harness.significant(ratios[0], 4),
                    "ratio_max": harness.significant(ratios[-1], 4),
                    "wall_median_s": harness.significant(statistics.median(b.wall for _, b in pairs), 4),
                    "before_wall_median_s": harness.significant(statistics.median(a.wall for a, _ in pairs), 4),
                    **beside(case, pairs),
                }  # fmt: skip
                table.add(row)
                print(" ".join(str(x) for x in row.values()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
