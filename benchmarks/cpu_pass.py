"""One pass theta <- theta + c z over one tensor in host memory: ours beside what users of PyTorch write today.

    pytest benchmarks/cpu_pass.py --benchmark-json=raw.json      then      python benchmarks/cpu_pass.py raw.json cpu_pass.csv

(or `python benchmarks/run.py`, which does both). Belongs here: which contenders the CPU pass has, at one size. Does not belong here:
their work (contenders.py), other sizes and many terms (scaling.py), GPU passes (gpu_pass.py), whole steps (step.py).

All contenders are timed in one process and one run. Sweeps are the outermost loop: each sweep times every contender with every type
and thread count once, so that a disturbance of the machine falls on a sweep, not on a contender; the CSV takes medians over sweeps.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import contenders
import harness
import pytest
import torch
from torch import Tensor

from zo_kernels import backends
from zo_kernels._backends import cpu

ROUNDS = 1  # timings of a contender within a sweep
INFO = ("contender", "isa", "dtype", "threads", "weights", "terms", "fused")
COLUMNS = (
    *(*INFO, *harness.TIMING_COLUMNS, "gweights_per_s", "gterms_per_s"),
    *("bytes", "gb_per_s", "percent_of_rewrite", "ratio_to_strongest"),
)
Work = Callable[[], Any]


# ---- contenders -------------------------------------------------------------------------------------------------------


def compiled(function: Callable[[Tensor], Any], p: Tensor) -> tuple[Work, str]:
    """The compiled function, and whether inductor generated the noise inside the loop ("yes") or wrote it to memory ("no")."""
    from torch._inductor.utils import run_and_get_code

    fast = torch.compile(function, dynamic=False)
    _, code = run_and_get_code(fast, p)
    return lambda: fast(p), "yes" if any("randn_cpu" in text for text in code) else "no"


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    f.__name__: f for f in (contenders.normal_add, contenders.randn_add, contenders.mezo, contenders.foreach_add)
}
# With a buffer for the noise as their second argument.
REUSING: dict[str, Callable[[Tensor, Tensor], Any]] = {f.__name__: f for f in (contenders.normal_reused, contenders.foreach_reused)}
FEATURES = [feature for feature in contenders.FEATURES if feature not in ("K=1", "device terms")]  # K=1 has a row for each ISA
CONTENDERS = (
    *("copy", "rewrite", "zo_kernels portable", "zo_kernels avx2", "zo_kernels avx512"),
    *(f"zo_kernels {feature}" for feature in FEATURES),
    *("normal_add", "normal_reused", "mezo", "foreach_add", "foreach_reused", "stateless"),
    *("compiled normal_add", "compiled mezo", "compiled randn_add"),
)
THREADS = (1, 2) if harness.machine()["cores"] != 1 else (1,)


@dataclass(frozen=True)
class Contender:
    """What is timed, and the columns that only its making tells: the instruction set, and whether the noise was fused."""

    work: Work
    bytes: int
    terms: int = 1
    isa: str = ""
    fused: str = ""


_made: dict[tuple[str, str, int, int], Contender] = {}
_tensors: dict[tuple[str, int, str], Tensor] = {}


def tensor(dtype: str, weights: int, role: str) -> Tensor:
    """One tensor for all contenders of a type, and one more as the target of the copy: the caches see the same addresses."""
    key = (dtype, weights, role)
    if key not in _tensors:
        _tensors[key] = torch.full((weights,), 0.02, dtype=harness.DTYPES[dtype])
    return _tensors[key]


def make_ours(variant: str, p: Tensor, target: Tensor) -> Contender:
    """Not a skip but an error where the extension is missing: a benchmark of ours without ours is worthless."""
    if reason := backends()["cpu"]:
        raise RuntimeError(f"backend 'cpu': {reason}")
    names: tuple[str, ...] = cpu.extension().ISA_NAMES
    best = cpu.extension().cpu_best_isa()
    feature, isa = (variant, best) if variant in FEATURES else ("K=1", names.index(variant))
    if isa > best:
        pytest.skip(f"this processor has no {variant}")
    if not contenders.has(feature, p.dtype):
        pytest.skip(f"{variant} means nothing for {p.dtype}")
    made = contenders.ours(feature, p, target)
    return Contender(lambda: cpu.perturb(made.plan, made.record, isa=isa), made.bytes, made.terms, names[isa])


def make(name: str, dtype: str, threads: int, weights: int) -> Contender:
    """The contender of this name, made once: compilation takes longer than everything else."""
    key = (name, dtype, threads, weights)
    if key not in _made:
        p, target = tensor(dtype, weights, "weights"), tensor(dtype, weights, "target")
        kind, _, variant = name.partition(" ")
        size = 2 * p.nbytes
        if kind == "copy":
            _made[key] = Contender(lambda: target.copy_(p), size, 0)
        elif kind == "rewrite":
            _made[key] = Contender(lambda: harness.rewrite_(p), size, 0)
        elif kind == "zo_kernels":
            _made[key] = make_ours(variant, p, target)
        elif kind == "compiled":
            work, fused = compiled(FUNCTIONS[variant], p)
            _made[key] = Contender(work, size, fused=fused)
        elif kind == "stateless":
            function = contenders.stateless_add(p.device, p.dtype)
            if isinstance(function, str):
                pytest.skip(function)
            _made[key] = Contender(lambda: function(p), size)
        elif kind in REUSING:
            _made[key] = Contender(lambda: REUSING[kind](p, target), size)
        else:
            _made[key] = Contender(lambda: FUNCTIONS[kind](p), size)
    return _made[key]


# ---- under pytest -----------------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    contenders = [c for c in CONTENDERS if not (option("--no-compile") and c.startswith("compiled"))]
    # The first one varies slowest.
    metafunc.parametrize("sweep", range(option("--sweeps")))
    metafunc.parametrize("threads", THREADS)
    metafunc.parametrize("dtype", list(harness.DTYPES))
    metafunc.parametrize("contender", contenders)


@pytest.fixture
def thread_count(threads: int) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield threads
    torch.set_num_threads(before)


@pytest.mark.timeout(600)
def test_pass(benchmark: Any, request: pytest.FixtureRequest, contender: str, dtype: str, thread_count: int, sweep: int) -> None:
    weights = request.config.getoption("--weights")
    torch._dynamo.config.recompile_limit = 64  # one compilation for each type and thread count
    made = make(contender, dtype, thread_count, weights)
    benchmark.extra_info.update(
        contender=contender,
        isa=made.isa,
        dtype=dtype,
        threads=thread_count,
        weights=weights,
        terms=made.terms,
        fused=made.fused,
        bytes=made.bytes,
    )
    benchmark.pedantic(made.work, rounds=ROUNDS, iterations=1, warmup_rounds=1 if sweep == 0 else 0)


# ---- from pytest-benchmark's JSON to CSV ------------------------------------------------------------------------------


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each contender, type and thread count, over all sweeps."""
    seconds: dict[tuple[Any, ...], list[float]] = {}
    for bench in report["benchmarks"]:
        seconds.setdefault(tuple(bench["extra_info"][c] for c in (*INFO, "bytes")), []).extend(bench["stats"]["data"])
    timings = {key: harness.Timing(tuple(values)) for key, values in seconds.items()}
    contender, kind, threads = (INFO.index(c) for c in ("contender", "dtype", "threads"))
    rates = {(key[contender], key[kind], key[threads]): key[-1] / timing.median for key, timing in timings.items()}
    table = []
    for key, timing in timings.items():
        info, nbytes = dict(zip(INFO, key[:-1], strict=True)), key[-1]
        dtype, weights, rate = info["dtype"], info["weights"], 1 / timing.median
        mine = {name: r for (name, d, t), r in rates.items() if (d, t) == (dtype, info["threads"])}
        # The fastest of all that torch offers for one noise a weight.
        strongest = max(r for name, r in mine.items() if not name.startswith(("zo_kernels", "copy", "rewrite")))
        table.append(
            {
                **info,
                **timing.columns(),
                "gweights_per_s": harness.significant(weights * rate / 1e9, 4),
                "gterms_per_s": harness.significant(weights * info["terms"] * rate / 1e9, 4),
                "bytes": nbytes,
                "gb_per_s": harness.significant(nbytes * rate / 1e9, 4),
                "percent_of_rewrite": harness.significant(100 * nbytes * rate / mine["rewrite"], 3),
                "ratio_to_strongest": harness.significant(rate / (strongest / (2 * weights * harness.DTYPES[dtype].itemsize)), 3),
            }
        )
    order = {name: k for k, name in enumerate(harness.DTYPES)}
    return sorted(table, key=lambda row: (row["threads"], order[row["dtype"]]))


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python benchmarks/cpu_pass.py REPORT.json OUTPUT.csv", file=sys.stderr)
        return 2
    with open(arguments[0]) as file:
        harness.write_csv(arguments[1], COLUMNS, rows(json.load(file)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
