"""What a step costs on two trees of this repository, in turn: this one, and one of an earlier commit.

    git worktree add ../before COMMIT && (cd ../before && python setup.py -q build_ext --inplace)
    python benchmarks/against.py --before ../before --out against.csv [--rounds N] [--cases CASE ...]

Belongs here: a comparison of two versions, which no other script can make since it imports one. Does not belong here: what a step costs beside forwards
(step.py), where its time goes (scaling.py).

Each tree runs in a process of its own; a round is some steps of one and as many of the other, the first one first in every other round, in the process's CPU
time with one thread. Every `RENEW` rounds both processes are new ones: where a process's memory lies moves its steps by some per cent, whatever the
code. Contenders: a model of hidden size 64 with its forwards, and the shapes of GPT-2 small (148 tensors, each with a hundredth of its
elements, so that the passes over them do not hide the rest) with a closure that computes nothing. "one pass" is over 2^24 weights: theta + c z in place,
and from them into a buffer of 2^20, as scratch mode has it; the update of scratch mode, with stochastic rounding in 16 bits; and what lazy steps do in place,
two terms. "one mask" is what Sparse-MeZO does before each step, the mask of the smallest weights of a tensor of 2^24. The rows of these two are in files of
their own, against_pass.csv and against_mask.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness

RENEW = 10
TRAINING = ("hidden 64", "GPT-2 shapes")
CASES = (*TRAINING, "one pass", "one mask")
MODES = {"one pass": ("scratch", "inplace", "update", "two terms"), "one mask": ("",)}  # of the others: scratch, inplace
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
    return step

def one_mask(dtype):
    weights = {"weight": (torch.randn(1 << 24) * 0.02).to(dtype)}
    direction = zk.MagnitudeSparse(0.25).of(1)
    direction.limits("weight", weights["weight"], 5)
    return lambda: direction.prepare(0, 0, weights)

def training(case, dtype, mode):
    model, closure = {"hidden 64": hidden64, "GPT-2 shapes": gpt2}[case]()
    optimizer = zk.MeZOStep(model.to(dtype), lr=1e-6, eps=1e-3, perturbation=mode, seed=1)
    return lambda: optimizer.step(closure)

cases = {}
for line in sys.stdin:
    case, dtype, mode, steps = json.loads(line)
    key = case, dtype, mode
    if key not in cases:
        kind = getattr(torch, dtype)
        cases[key] = one_pass(kind, mode) if case == "one pass" else one_mask(kind) if case == "one mask" else training(case, kind, mode)
        for _ in range(steps):
            cases[key]()
    step = cases[key]
    start = time.process_time()
    for _ in range(steps):
        step()
    print(json.dumps((time.process_time() - start) / steps), flush=True)
"""


class Tree:
    """A process that makes steps with the code of one tree."""

    def __init__(self, root: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=root
        )

    def seconds(self, *request: Any) -> float:
        """CPU seconds a step."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return float(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.communicate()


def commit_of(root: Path) -> str:
    """The commit of a tree, short."""
    return subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True
    ).stdout.strip()


def turns(root: Path, rounds: int, request: tuple[Any, ...]) -> list[tuple[float, float]]:
    """CPU seconds a step, before and now, of each of `rounds` by two new processes; a round before them is not counted."""
    before, now = Tree(root), Tree(Path(__file__).parents[1])
    pairs = []
    for number in range(rounds + 1):
        turn = (before, now) if number % 2 else (now, before)
        taken = {tree: tree.seconds(*request) for tree in turn}
        if number:
            pairs.append((taken[before], taken[now]))
    for tree in (before, now):
        tree.close()
    return pairs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="CSV file")
    parser.add_argument("--before", required=True, type=Path, help="the tree of an earlier commit, with its extension built")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=20, help="of a turn")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=TRAINING)
    parser.add_argument(
        "--dtypes", nargs="+", choices=harness.DTYPES, help="(default: float32 and bfloat16 for steps, otherwise all)"
    )
    args = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for case in args.cases:
        for dtype in args.dtypes or (("float32", "bfloat16") if case in TRAINING else harness.DTYPES):
            for mode in MODES.get(case, ("scratch", "inplace")):
                pairs: list[tuple[float, float]] = []
                while len(pairs) < args.rounds:
                    rounds = min(RENEW, args.rounds - len(pairs))
                    pairs += turns(args.before.resolve(), rounds, (case, dtype, mode, args.steps))
                timing = harness.Timing(tuple(b for _, b in pairs))
                ratios = sorted(b / a for a, b in pairs)
                rows.append({
                    "case": case,
                    "dtype": dtype,
                    "mode": mode,
                    "steps": args.steps,
                    "before": commit_of(args.before),
                    **timing.columns(),
                    "before_median_s": harness.significant(statistics.median(a for a, _ in pairs), 4),
                    "ratio": harness.significant(statistics.median(ratios), 4),
                    "ratio_min": harness.significant(ratios[0], 4),
                    "ratio_max": harness.significant(ratios[-1], 4),
                })  # fmt: skip
                print(f"{case} {dtype} {mode}: {1e6 * timing.median:.0f} µs a step, {rows[-1]['ratio']} of before", flush=True)
    harness.write_csv(args.out, COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
