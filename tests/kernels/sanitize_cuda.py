"""A few dozen cases for compute-sanitizer, which makes them slow:

    PYTHONPATH=. compute-sanitizer --tool memcheck python tests/kernels/sanitize_cuda.py        (or --tool racecheck)

Belongs here: the choice of cases. Does not belong here: anything that must run in `make test`. Results are checked against the
reference too, so that a run proves that the kernels did their work.
"""

from __future__ import annotations

import os
import re
import sys

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # every tensor its own allocation: memcheck sees where each one ends

import torch

from tests.kernels import cases
from zo_kernels import _backends as registry

CHOSEN = re.compile(
    "(float16-gaussian|bfloat16-rademacher|float32-gaussian)-"
    "(K1|K3|K21|out-of-place|misaligned1|misaligned-out|stochastic|decay-only|bitmask|random-mask|scale-block3|everything"
    "|offset-odd-everything|offset-8|rsqrt-everything|low-rank-3-cols8|low-rank-2-cols7|low-rank-mixed|low-rank-everything"
    "|low-rank-offset-odd-everything|sequence-mixed|sequence-misaligned3|sequence-everything)"
)


def main() -> int:
    reason = registry.load("cuda").status()
    if reason:
        print(f"nothing to do: {reason}")
        return 0
    chosen = [case for case in cases.CASES if CHOSEN.fullmatch(case.name)]
    for case in chosen:
        cases.check("cuda", case, "cuda")
    torch.cuda.synchronize()
    print(f"{len(chosen)} cases equal the reference")
    return 0 if chosen else 1


if __name__ == "__main__":
    sys.exit(main())
