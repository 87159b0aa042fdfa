"""S passes of one term each, as a recorded run has them: as one sequence, one by one, and fused into one pass of S terms.

    python benchmarks/replay.py --device cpu|cuda --out replay.csv [--quick]

Belongs here: the arithmetic of a replay, over weights that lie in memory. Does not belong here: reading a record, single passes
(cpu_pass.py, gpu_pass.py).

`sequence` and `separate` write the same bits, `fused` rounds once and writes others; it is what the noise alone costs. On a CPU the
number of weights falls as S grows beyond 32, so that 2000 passes take seconds, not minutes; what is left are some MiB.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import harness
import torch

from zo_kernels import _backends as registry
from zo_kernels import checks
from zo_kernels.plan import Pass, Passes, make_plans

EPS = 1e-3
PASSES = (1, 8, 64, 2000)
# (dtype, kind, rounding): the 16-bit types also with the rounding that MeZOStep gives them in scratch mode.
VARIANTS = [
    (dtype, "gaussian", rounding)
    for dtype in harness.DTYPES
    for rounding in checks.ROUNDINGS
    if (dtype, rounding) != ("float32", "stochastic")
]
VARIANTS += [("float16", "rademacher", "nearest")]
CONTENDERS = ("sequence", "separate", "fused")
COLUMNS = ("backend", "device", "dtype", "kind", "rounding", "threads", "weights", "passes", "contender", *harness.TIMING_COLUMNS)
COLUMNS += ("gterms_per_s", "ratio_to_separate")


def size(passes: int, most: int, budget: int) -> int:
    """Weights for so many passes: `budget` weights times passes, between 2^16 and `most`. An odd number: real tensors have ends."""
    return max(1 << 16, min(most, budget // passes)) + 17


def measure(
    backend: str, device: torch.device, dtype: str, kind: str, rounding: str, weights: int, passes: int, rounds: int
) -> dict[str, harness.Timing]:
    """The three contenders, interleaved, on plans that are made once."""
    module = registry.load(backend)
    theta = torch.full((weights,), 0.02, dtype=harness.DTYPES[dtype], device=device)
    (plan,) = make_plans([theta], [1])
    tags, coefs = list(range(passes)), [EPS * (-1) ** k for k in range(passes)]  # the signs keep the weights where they are
    sequence = Passes(
        0,
        torch.tensor(tags),
        torch.tensor(coefs, dtype=torch.float32),
        torch.arange(passes + 1),
        torch.ones(passes),
        torch.full((passes,), checks.ROUNDINGS[rounding], dtype=torch.uint8),
        kind,
    ).on(device)
    separate = [Pass(0, [tag], [c], None, kind, rounding) for tag, c in zip(tags, coefs, strict=True)]
    fused = Pass(0, sequence.tags, sequence.coefs, None, kind, rounding)

    def one_by_one() -> None:
        for p in separate:
            module.perturb(plan, p)

    contenders = {
        "sequence": lambda: module.sequence(plan, sequence),
        "separate": one_by_one,
        "fused": lambda: module.perturb(plan, fused),
    }
    return harness.interleaved(contenders, rounds=rounds, device=device)


def rows(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    gpu = device.type == "cuda"
    most, budget = (1 << 27, 1 << 38) if gpu else (1 << 26, 1 << 31)
    if quick:
        most, budget = 1 << 17, 1 << 20
    for backend in ("cuda", "triton") if gpu else ("cpu",):
        if reason := registry.load(backend).status():
            print(f"{backend} left out: {reason}", file=sys.stderr)
            continue
        for dtype, kind, rounding in VARIANTS:
            for passes in PASSES[:3] if quick else PASSES:
                weights = size(passes, most, budget)
                timings = measure(backend, device, dtype, kind, rounding, weights, passes, rounds=2 if quick else 7)
                for name in CONTENDERS:
                    timing = timings[name]
                    yield {
                        "backend": backend,
                        "device": device.type,
                        "dtype": dtype,
                        "kind": kind,
                        "rounding": rounding,
                        "threads": "" if gpu else torch.get_num_threads(),
                        "weights": weights,
                        "passes": passes,
                        "contender": name,
                        **timing.columns(),
                        "gterms_per_s": harness.significant(weights * passes / timing.median / 1e9, 4),
                        "ratio_to_separate": harness.significant(timings["separate"].median / timing.median, 4),
                    }


def main(arguments: list[str] | None = None) -> int:
    return harness.device_script(__doc__ or "", COLUMNS, rows, arguments)


if __name__ == "__main__":
    sys.exit(main())
