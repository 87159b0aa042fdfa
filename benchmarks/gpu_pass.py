"""One pass theta <- theta + c z over tensors in GPU memory: ours beside what users of PyTorch write today.

    python benchmarks/gpu_pass.py --out gpu_pass.csv [--quick]

Belongs here: which contenders the GPU pass has, and its timing with a cold L2. Does not belong here: their work (contenders.py), CPU
passes (cpu_pass.py), many small tensors and many terms (scaling.py), whole steps (step.py).

All contenders of a size and type are timed in one process, in rounds: each round times every contender once, by CUDA events around a
batch of calls, with the order reversed in every other round. Buffers rotate over more memory than the L2 cache holds. Small sizes are
bound by the launch from Python, as they are in a training loop; nothing is taken off for it. `bytes` is what the pass has to move at
least (weights read and written, a bit mask read), so GB/s of an expression with temporaries is its useful part. `percent_of_copy`
compares with `copy_` between two buffers of the same size in the same rounds.
"""

from __future__ import annotations

import argparse
import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contenders
import harness
import torch
from contenders import FEATURES, notice
from torch import Tensor

ROTATION = 1 << 28  # bytes of weights that the buffers cover: five times the L2 cache of an H100
BATCH = 3e-3  # seconds that a timed batch of calls should last at least, at 1.5 TB/s
FULL_SIZE, SIZES = 1 << 27, (1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 29, 1 << 31)
COLUMNS = ("contender", "feature", "dtype", "weights", "terms", "calls", *harness.TIMING_COLUMNS)
COLUMNS += ("bytes", "gb_per_s", "percent_of_copy", "gterms_per_s")


@dataclass
class Contender:
    """`calls[k]` works on buffer k. `bytes`, `terms`: of one call."""

    name: str
    feature: str
    calls: list[Callable[[], Any]]
    bytes: int
    terms: int = 1


# ---- ours -------------------------------------------------------------------------------------------------------------


def ours(backend: str, perturb: Callable[..., None], feature: str, buffers: list[Tensor], spare: list[Tensor]) -> Contender:
    """One of contenders.FEATURES, on plans that are made once, as an optimizer makes them."""
    made = [contenders.ours(feature, buffer, other) for buffer, other in zip(buffers, spare, strict=True)]
    calls = [lambda m=m: perturb(m.plan, m.record) for m in made]
    return Contender(backend, feature, calls, made[0].bytes, made[0].terms)


# ---- others -----------------------------------------------------------------------------------------------------------


def mezo_value(p: Tensor) -> Tensor:
    return p.add_(torch.randn_like(p) * contenders.EPS)


def compiled(function: Callable[[Tensor], Any], buffers: list[Tensor]) -> Callable[[Tensor], Any] | None:
    """The function by torch.compile, which puts noise of `randn_like` into the loop; None where it does not compile."""
    fast = torch.compile(function, dynamic=False)
    try:
        fast(buffers[0])
    except Exception as error:  # a benchmark goes on without this contender, and says so
        notice(f"torch.compile left out: {type(error).__name__}: {error}")
        return None
    return fast


def others(buffers: list[Tensor], spare: list[Tensor], full: bool) -> Iterator[Contender]:
    size = 2 * buffers[0].nbytes
    functions: dict[str, Callable[[Tensor], Any] | None] = {"mezo": contenders.mezo}
    if full:
        functions |= {
            "normal + add_": contenders.normal_add,
            "randn_like + add_": contenders.randn_add,
            "foreach": contenders.foreach_add,
            "mezo compiled": compiled(mezo_value, buffers),
            "normal + add_ compiled": compiled(contenders.normal_add, buffers),
        }
        stateless = contenders.stateless_add(buffers[0].device, buffers[0].dtype)
        if isinstance(stateless, str):
            notice(f"left out: {stateless}")
        else:
            functions["torch.func._random + add_"] = stateless
    yield Contender("copy_", "copy", [lambda a=a, b=b: b.copy_(a) for a, b in zip(buffers, spare, strict=True)], size, 0)
    for name, function in functions.items():
        if function is not None:
            yield Contender(name, "K=1", [lambda b=b, f=function: f(b) for b in buffers], size)


# ---- measuring --------------------------------------------------------------------------------------------------------


def measure(runners: list[Contender], rounds: int) -> Iterator[tuple[Contender, int, harness.Timing]]:
    """Every contender with the calls of a batch and the seconds of one call."""
    batches = {id(c): max(1, min(200, round(BATCH * 1.5e12 / c.bytes))) for c in runners}
    seconds: dict[int, list[float]] = {id(c): [] for c in runners}
    for c in runners:  # tables, kernels, clocks
        for call in [*c.calls, c.calls[0]]:
            call()
    torch.cuda.synchronize()
    for number in range(rounds):
        marks = []
        for c in runners[:: 1 if number % 2 == 0 else -1]:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for call in itertools.islice(itertools.cycle(c.calls), batches[id(c)]):
                call()
            end.record()
            marks.append((c, start, end))
        torch.cuda.synchronize()
        for c, start, end in marks:
            seconds[id(c)].append(start.elapsed_time(end) / 1e3 / batches[id(c)])
    for c in runners:
        yield c, batches[id(c)], harness.Timing(tuple(seconds[id(c)]))


def rows(dtype_name: str, n: int, full: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """All contenders at one size and type."""
    dtype = harness.DTYPES[dtype_name]
    copies = max(1, -(-ROTATION // (n * dtype.itemsize)))
    # randn would be slow at the largest size, and the time of a pass does not depend on the values
    buffers = [torch.zeros(n, dtype=dtype, device="cuda") for _ in range(copies)]
    spare = [torch.zeros_like(b) for b in buffers]
    runners = list(others(buffers, spare, full))
    for backend, module in contenders.available(buffers[0].device).items():
        for feature in FEATURES if full else FEATURES[:1]:
            if contenders.has(feature, dtype):
                runners.append(ours(backend, module.perturb, feature, buffers, spare))
    results = list(measure(runners, rounds))
    copy = next(t.median / c.bytes for c, _, t in results if c.name == "copy_")
    for c, calls, timing in results:
        yield {
            "contender": c.name,
            "feature": c.feature,
            "dtype": dtype_name,
            "weights": n,
            "terms": c.terms,
            "calls": calls,
            **timing.columns(),
            "bytes": c.bytes,
            "gb_per_s": harness.significant(c.bytes / timing.median / 1e9),
            "percent_of_copy": harness.significant(100 * copy * c.bytes / timing.median, 4),
            "gterms_per_s": harness.significant(c.terms * n / timing.median / 1e9),
        }


def table(results: list[dict[str, Any]], title: str) -> None:
    print(
        f"\n{title}\n{'contender':18} {'feature':14} {'dtype':9} {'weights':>11} {'ms':>9} {'GB/s':>8} {'% copy':>7} {'Gterms/s':>9}"
    )
    for r in results:
        print(
            f"{r['contender']:18} {r['feature']:14} {r['dtype']:9} {r['weights']:11} {1e3 * r['median_s']:9.4f} "
            f"{r['gb_per_s']:8.0f} {r['percent_of_copy']:7.1f} {r['gterms_per_s']:9.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "gpu_pass.csv", help="CSV file to write")
    parser.add_argument("--quick", action="store_true", help="one size, few rounds: to see that everything runs")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_pass.py needs a CUDA device: torch.cuda.is_available() is False")
    rounds = 3 if arguments.quick else 15
    results: list[dict[str, Any]] = []
    plan = [(name, FULL_SIZE, True) for name in harness.DTYPES]
    if not arguments.quick:
        plan += [(name, n, False) for n in SIZES for name in ("float16", "float32")]
    free = torch.cuda.mem_get_info()[0]
    for name, n, full in plan:
        if 6 * n * harness.DTYPES[name].itemsize > free:  # two buffers, and the temporaries of MeZO's expression
            notice(f"left out: {n} weights of {name} do not fit")
            continue
        results += rows(name, n, full, rounds)
        gc.collect()
        torch.cuda.empty_cache()
        harness.write_csv(arguments.out, COLUMNS, results)  # after every size: an interrupted run keeps what it has
    table([r for r in results if r["weights"] == FULL_SIZE], f"2^27 weights, {torch.cuda.get_device_name()}")
    table([r for r in results if r["weights"] != FULL_SIZE], "by size")


if __name__ == "__main__":
    main()
