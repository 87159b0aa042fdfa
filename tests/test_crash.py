"""A short `make crash-test`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_runs_that_die_end_as_undisturbed_ones() -> None:
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.crash", "--runs", "10", "--seed", "1"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("10 of 10 runs, ")
