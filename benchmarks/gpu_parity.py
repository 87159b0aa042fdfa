"""The tests that need a GPU, a row each as soon as it has ended: CUDA first, in 8 processes, then Triton's, whose compilations take longest, in 14.

    python benchmarks/gpu_parity.py --out parity.csv [--dry]

Belongs here: the order, and the rows. Does not belong here: tests. --dry: one file of tests that need no GPU, to see that rows are written.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness
import pytest

COLUMNS = ("part", "test", "seconds", "result")
ROOT = Path(__file__).resolve().parents[1]


class Rows:
    """A plugin of pytest: the end of each test, in this process also where others run them."""

    def __init__(self, table: harness.Table, part: str) -> None:
        self.table, self.part = table, part

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            row = (self.part, report.nodeid, harness.significant(report.duration, 3), report.outcome)
            self.table.add(dict(zip(COLUMNS, row, strict=True)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args(arguments)
    table, worst = harness.Table(args.out, COLUMNS), 0
    parallel = importlib.util.find_spec("xdist") is not None
    common = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    if args.dry:
        return int(pytest.main([*common, str(ROOT / "tests/optim/test_recording.py")], plugins=[Rows(table, "dry")]))
    for part, words, processes in (("cuda", "not triton", 8), ("triton", "triton", 14)):
        several = ["-n", str(processes)] if parallel else []
        worst |= int(pytest.main([*common, *several, "-m", "gpu", "-k", words, str(ROOT / "tests")], plugins=[Rows(table, part)]))
        if part == "cuda" and (sanitizer := shutil.which("compute-sanitizer")):
            command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "tests/kernels/sanitize_cuda.py"]
            try:
                code = subprocess.run(command, cwd=ROOT, timeout=60).returncode
            except subprocess.TimeoutExpired:
                code = "cut off"
            table.add(dict(zip(COLUMNS, ("memcheck", "sanitize_cuda.py", "", code), strict=True)))
    return worst


if __name__ == "__main__":
    sys.exit(main())
