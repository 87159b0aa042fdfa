"""The perturbed linear on a GPU: both forwards of one layer in a step, beside what scratch mode does and beside two bare forwards.

    python benchmarks/gpu_linear.py --out gpu_linear.csv [--quick]
    python benchmarks/gpu_linear.py --out FOLDER/gpu_linear.csv --device cpu     a tiny matrix in two passes: only to see that it runs

Belongs here: one matrix at a time. Does not belong here: whole steps (step.py), passes by themselves (gpu_pass.py).

Contenders, for a weight [n, k] and two halves of m rows each: `perturbed_linear` (the kernel: the weight is read once), `two_passes` (as
scratch mode does with a matrix that its buffer holds: theta + c z written there, `F.linear`, and the same with -c), `two_forwards` (`F.linear`
twice with the clean weight, the least that any method without a kernel of its own can take). Calls rotate over more weights than the L2
cache holds. On a GPU the calls of a batch are captured in a CUDA graph and replayed, so that what is timed is the device: the small
matrices take less time there than a launch from Python. `bytes` is what a contender moves of the weights, 1, 6 and 2 times their size; the
passes fewer if the buffer stays in the L2 cache.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor
from torch.nn.functional import linear

import zo_kernels as zk
from zo_kernels import _backends as registry
from zo_kernels.plan import Pass, Plan, make_plans

EPS = 1e-3
ROTATION = 1 << 28  # bytes of weights that a batch covers: five times the L2 cache of an H100
ROWS = (1, 16, 32, 64, 128, 512)
HIDDEN = {"opt-1.3b": 2048, "opt-6.7b": 4096, "opt-13b": 5120}
COLUMNS = ("contender", "backend", "model", "layer", "dtype", "n", "k", "m", "calls", *harness.TIMING_COLUMNS)
COLUMNS += ("bytes", "gb_per_s", "ratio_to_two_forwards")
WEIGHTS_MOVED = {"perturbed_linear": 1, "two_passes": 6, "two_forwards": 2}


def layers(hidden: int) -> dict[str, tuple[int, int]]:
    """The matrices of a block of OPT: name -> (n, k)."""
    return {"attention": (hidden, hidden), "fc1": (4 * hidden, hidden), "fc2": (hidden, 4 * hidden)}


def contenders(weights: list[Tensor], x: Tensor, backend: str, passes: str) -> dict[str, list[Callable[[], Any]]]:
    """name -> a call for each of the weights. `backend` serves the perturbed linear, `passes` the two passes."""
    m = x.shape[0] // 2
    buffer = torch.empty_like(weights[0])
    plus, minus = Pass(0, [1], [EPS]), Pass(0, [1], [-EPS])
    module = registry.load(passes)

    def one(w: Tensor) -> None:
        zk.perturbed_linear(x, w, terms=[(1, EPS)], seed=0, stream=1, backend=backend)

    def two_passes(plan: Plan) -> None:
        module.perturb(plan, plus)
        linear(x[:m], buffer)
        module.perturb(plan, minus)
        linear(x[m:], buffer)

    def two_forwards(w: Tensor) -> None:
        linear(x[:m], w)
        linear(x[m:], w)

    plans = [make_plans([w], [1], out=[buffer])[0] for w in weights]
    return {
        "perturbed_linear": [lambda w=w: one(w) for w in weights],
        "two_passes": [lambda plan=plan: two_passes(plan) for plan in plans],
        "two_forwards": [lambda w=w: two_forwards(w) for w in weights],
    }


def batch(calls: list[Callable[[], Any]], device: torch.device) -> Callable[[], Any]:
    """All calls, one after the other; on a GPU as a graph."""

    def run() -> None:
        for call in calls:
            call()

    run()  # compiles, and fills caches
    if device.type != "cuda":
        return run
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def backends_for(device: torch.device) -> tuple[str, str]:
    """(of the perturbed linear, of the passes): Triton and the best one on a GPU, the best one on a CPU."""
    best = registry.pick(device).__name__.rsplit(".", 1)[-1]
    if device.type != "cuda":
        return best, best
    reason = registry.load("triton").status()
    if reason:
        raise SystemExit(f"gpu_linear.py needs Triton: {reason}")
    return "triton", best


@torch.no_grad()
def rows(
    model: str, layer: str, n: int, k: int, m: int, dtype_name: str, device: torch.device, rounds: int
) -> Iterator[dict[str, Any]]:
    """All contenders for one matrix and one number of rows."""
    dtype = harness.DTYPES[dtype_name]
    size = n * k * dtype.itemsize
    copies = max(1, -(-ROTATION // size)) if device.type == "cuda" else 2
    weights = [torch.randn(n, k, device=device).mul_(0.02).to(dtype) for _ in range(copies)]
    x = torch.randn(2 * m, k, device=device).to(dtype)
    backend, passes = backends_for(device)
    batches = {name: batch(calls, device) for name, calls in contenders(weights, x, backend, passes).items()}
    timings = harness.interleaved(batches, rounds=rounds, device=device)
    seconds = {name: harness.Timing(tuple(s / copies for s in timing.seconds)) for name, timing in timings.items()}
    for name, timing in seconds.items():
        moved = WEIGHTS_MOVED[name] * size
        yield {
            "contender": name,
            "backend": {"perturbed_linear": backend, "two_passes": passes, "two_forwards": ""}[name],
            "model": model,
            "layer": layer,
            "dtype": dtype_name,
            "n": n,
            "k": k,
            "m": m,
            "calls": copies,
            **timing.columns(),
            "bytes": moved,
            "gb_per_s": harness.significant(moved / timing.median / 1e9),
            "ratio_to_two_forwards": harness.significant(timing.median / seconds["two_forwards"].median, 4),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "gpu_linear.csv", help="CSV file to write")
    parser.add_argument("--quick", action="store_true", help="one matrix, few rounds: to see that everything runs")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a tiny matrix; the figures mean nothing")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu_linear.py needs a CUDA device: torch.cuda.is_available() is False")
    plan = [
        (model, layer, *shape, m, dtype)
        for dtype, (model, hidden) in itertools.product(("float16", "bfloat16"), HIDDEN.items())
        for layer, shape in layers(hidden).items()
        for m in ROWS
    ]
    if device.type == "cpu":
        plan = [("tiny", "fc1", 96, 64, m, "float32") for m in (1, 16)]
    elif args.quick:
        plan = [p for p in plan if p[:2] == ("opt-1.3b", "fc1") and p[-1] == "float16"]
    results: list[dict[str, Any]] = []
    for case in plan:
        results += rows(*case, device, 3 if args.quick or device.type == "cpu" else 15)
        harness.write_csv(args.out, COLUMNS, results)  # after every case: an interrupted run keeps what it has
    print(
        f"{'model':9} {'layer':9} {'dtype':9} {'m':>4} {'contender':17} {'us':>9} {'GB/s':>7} {'x two forwards':>14}",
        file=sys.stderr,
    )
    for r in results:
        print(
            f"{r['model']:9} {r['layer']:9} {r['dtype']:9} {r['m']:4} {r['contender']:17} {1e6 * r['median_s']:9.2f} {r['gb_per_s']:7.0f} "
            f"{r['ratio_to_two_forwards']:14.2f}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
