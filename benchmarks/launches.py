"""What a launch through Triton costs the host, on a GPU that is emulated (emulated_triton.py).

    python benchmarks/launches.py --out launches.csv [--rounds N]

Belongs here: the host's side of a launch, for machines without a GPU. Does not belong here: what a pass costs on a real one (gpu_pass.py, scaling.py).

"search": every launch goes through Triton's JIT function, which binds the arguments and looks for the kernel that they choose. "ready": the second and later
launches of a form, as the library makes them. The launch itself, in Triton's C code and the driver, is part of neither. CPU time of one thread.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import emulated_triton
import harness
import torch

COLUMNS = ("pass", "way", "calls", *harness.TIMING_COLUMNS, "wall_median_s", "ratio")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="CSV file")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--calls", type=int, default=200, help="of a timing")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, form in emulated_triton.FORMS.items():
        with emulated_triton.emulated() as gpu:
            contenders = emulated_triton.ways(form)
            counted = {way: harness.calls(function) for way, function in contenders.items()}
            timings = harness.interleaved(
                contenders,
                rounds=args.rounds,
                calls=args.calls,
                around=dict.fromkeys(contenders, (gpu.noted.clear, gpu.noted.clear)),
            )
        for way, timing in timings.items():
            cpu = harness.Timing(timing.cpu)
            rows.append({
                "pass": name,
                "way": way,
                "calls": counted[way],
                **cpu.columns(),
                "wall_median_s": harness.significant(timing.median, 4),
                "ratio": harness.significant(cpu.median / harness.Timing(timings["search"].cpu).median, 4),
            })  # fmt: skip
            print(f"{name}, {way}: {1e6 * cpu.median:.1f} µs, {counted[way]} calls", flush=True)
    harness.write_csv(args.out, COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
