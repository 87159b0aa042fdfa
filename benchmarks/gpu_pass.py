"""One pass theta <- theta + c z over tensors in GPU memory: ours beside what users of PyTorch write today.

    python benchmarks/gpu_pass.py --out gpu_pass.csv [--quick]

Belongs here: the contenders of the GPU pass. Does not belong here: CPU passes (cpu_pass.py), whole steps (step.py).

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
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

import zo_kernels as zk
from zo_kernels import _backends as registry
from zo_kernels import ops

EPS = 1e-3
ROTATION = 1 << 28  # bytes of weights that the buffers cover: five times the L2 cache of an H100
BATCH = 3e-3  # seconds that a timed batch of calls should last at least, at 1.5 TB/s
ROW = 4096  # row length of the scales per row
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


def random_bits(n: int, device: torch.device) -> Tensor:
    """A packed mask that keeps about half of n elements."""
    return torch.randint(0, 256, ((n + 7) // 8,), dtype=torch.uint8, device=device)


def ours(backend: str, feature: str, buffers: list[Tensor], others: list[Tensor]) -> Contender:
    """One of the features below, on plans that are made once, as an optimizer makes them."""
    module = registry.load(backend)
    kind = "rademacher" if feature == "rademacher" else "gaussian"
    terms = int(feature[2:]) if feature.startswith("K=") else 1
    more: dict[str, Any] = {}
    n, device = buffers[0].numel(), buffers[0].device
    size = 2 * n * buffers[0].element_size()
    if feature == "bit mask":
        more["masks"] = [random_bits(n, device)]
        size += n // 8
    elif feature == "random mask":
        more["masks"] = [zk.RandomMask(0.5, tag=1)]
    elif feature == "row scales":
        more["scales"] = [(torch.rand(n // ROW, device=device) + 0.5, ROW)]
    rounding = "stochastic" if feature == "stochastic" else "nearest"
    tags, coefs = list(range(terms)), [EPS * (-1) ** k for k in range(terms)]
    p = ops.Pass(0, tags, coefs, kind=kind, rounding=rounding, decay=0.9999 if feature == "decay" else None)
    if feature in ("K=64", "device terms"):
        p = ops.Pass(0, torch.tensor(tags, device=device), torch.tensor(coefs, dtype=torch.float32, device=device))
    calls = []
    for buffer, other in zip(buffers, others, strict=True):
        (plan,) = ops.make_plans([buffer], [1], out=[other] if feature == "out of place" else None, **more)
        calls.append(lambda plan=plan: module.perturb(plan, p))
    return Contender(backend, feature, calls, size, terms)


FEATURES = (
    "K=1",
    "K=2",
    "K=8",
    "K=64",
    "device terms",
    "out of place",
    "decay",
    "stochastic",
    "bit mask",
    "random mask",
    "row scales",
)
FEATURES += ("rademacher",)


# ---- others -----------------------------------------------------------------------------------------------------------


def mezo(p: Tensor) -> None:
    """The expression of MeZO's public code for one parameter."""
    z = torch.normal(mean=0, std=1, size=p.size(), device=p.device, dtype=p.dtype)
    p.data = p.data + EPS * z


def randn_add(p: Tensor) -> None:
    p.add_(torch.randn_like(p), alpha=EPS)


def foreach_add(p: Tensor) -> None:
    """A list of 64 parameters, as a model has them, and one fused addition for all of them."""
    parts = list(p.chunk(64))
    torch._foreach_add_(parts, [torch.randn_like(part) for part in parts], alpha=EPS)


def mezo_value(p: Tensor) -> Tensor:
    return p.add_(torch.randn_like(p) * EPS)


def compiled(buffers: list[Tensor]) -> Callable[[Tensor], Any] | None:
    """MeZO's expression by torch.compile, which puts the noise into the loop; None where it does not compile."""
    fast = torch.compile(mezo_value, dynamic=False)
    try:
        fast(buffers[0])
    except Exception as error:  # a benchmark goes on without this contender, and says so
        print(f"torch.compile left out: {type(error).__name__}: {error}", file=sys.stderr)
        return None
    return fast


def others(buffers: list[Tensor], spare: list[Tensor], full: bool) -> Iterator[Contender]:
    size = 2 * buffers[0].numel() * buffers[0].element_size()
    functions: dict[str, Callable[[Tensor], Any] | None] = {"mezo": mezo}
    if full:
        functions |= {"randn_like + add_": randn_add, "foreach": foreach_add, "mezo compiled": compiled(buffers)}
    yield Contender("copy_", "copy", [lambda a=a, b=b: b.copy_(a) for a, b in zip(buffers, spare, strict=True)], size, 0)
    for name, function in functions.items():
        if function is not None:
            yield Contender(name, "K=1", [lambda b=b, f=function: f(b) for b in buffers], size)


# ---- measuring --------------------------------------------------------------------------------------------------------


def measure(contenders: list[Contender], rounds: int) -> Iterator[tuple[Contender, int, harness.Timing]]:
    """Every contender with the calls of a batch and the seconds of one call."""
    batches = {id(c): max(1, min(200, round(BATCH * 1.5e12 / c.bytes))) for c in contenders}
    seconds: dict[int, list[float]] = {id(c): [] for c in contenders}
    for c in contenders:  # tables, kernels, clocks
        for call in [*c.calls, c.calls[0]]:
            call()
    torch.cuda.synchronize()
    for number in range(rounds):
        marks = []
        for c in contenders[:: 1 if number % 2 == 0 else -1]:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for call in itertools.islice(itertools.cycle(c.calls), batches[id(c)]):
                call()
            end.record()
            marks.append((c, start, end))
        torch.cuda.synchronize()
        for c, start, end in marks:
            seconds[id(c)].append(start.elapsed_time(end) / 1e3 / batches[id(c)])
    for c in contenders:
        yield c, batches[id(c)], harness.Timing(tuple(seconds[id(c)]))


def available() -> list[str]:
    """The GPU backends that can run here; says why the others cannot."""
    result = []
    for name in ("cuda", "triton"):
        module = registry.load(name)
        reason = module.status() or module.supports(torch.device("cuda", torch.cuda.current_device()))
        if reason:
            print(f"{name} left out: {reason}", file=sys.stderr)
        else:
            result.append(name)
    return result


def rows(dtype_name: str, n: int, full: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """All contenders at one size and type."""
    dtype = harness.DTYPES[dtype_name]
    copies = max(1, -(-ROTATION // (n * dtype.itemsize)))
    # randn would be slow at the largest size, and the time of a pass does not depend on the values
    buffers = [torch.zeros(n, dtype=dtype, device="cuda") for _ in range(copies)]
    spare = [torch.zeros_like(b) for b in buffers]
    contenders = list(others(buffers, spare, full))
    for backend in available():
        for feature in FEATURES if full else FEATURES[:1]:
            if not (feature == "stochastic" and dtype == torch.float32):
                contenders.append(ours(backend, feature, buffers, spare))
    results = list(measure(contenders, rounds))
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
            print(f"left out: {n} weights of {name} do not fit", file=sys.stderr)
            continue
        results += rows(name, n, full, rounds)
        gc.collect()
        torch.cuda.empty_cache()
        harness.write_csv(arguments.out, COLUMNS, results)  # after every size: an interrupted run keeps what it has
    table([r for r in results if r["weights"] == FULL_SIZE], f"2^27 weights, {torch.cuda.get_device_name()}")
    table([r for r in results if r["weights"] != FULL_SIZE], "by size")


if __name__ == "__main__":
    main()
