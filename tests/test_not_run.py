"""The last lines of a test run say what was not run, and why, whether one process runs it or several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import conftest
from zo_kernels import _C

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest

@pytest.mark.parametrize("k", range(7))
def test_often(k):
    if k:
        pytest.skip("no such device")

@pytest.mark.skipif(True, reason="no compiler")
def test_once(): pass

@pytest.mark.gpu
@pytest.mark.parametrize("k", range(3))
def test_gpu(k): pass
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_was_not_run_is_said_last(workers: str, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -ra\nmarkers = gpu: needs a CUDA device\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        "-n",
        workers,
        "-m",
        "not gpu",
        "test_some.py",
    ]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    head, _, last = done.stdout.partition(" not run =")
    assert "short test summary info" in head
    lines = [line.strip() for line in last.splitlines()[1:-1]]
    assert lines[:3] == ["6 skipped: no such device", "1 skipped: no compiler", "3 left out by -m 'not gpu'"]
    assert len(lines) == 3 + len(list(conftest.missing()))
    assert last.splitlines()[-1].startswith("=") and "1 passed, 7 skipped" in last.splitlines()[-1]


def test_what_a_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a build without nvcc: that no machine code was looked at."""
    monkeypatch.setattr(_C, "cpu_best_isa", lambda: len(_C.ISA_NAMES) - 1)
    monkeypatch.setattr(_C, "WITH_CUDA", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(conftest.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(conftest, "SHARED", Path("/nowhere"))
    lacks = dict(conftest.missing())
    assert list(lacks) == ["nvcc (the extension was built without CUDA)", "triton", "a GPU", "../shared"]
    assert "machine code of the CUDA kernels was not looked at" in lacks["nvcc (the extension was built without CUDA)"]
    monkeypatch.setattr(_C, "cpu_best_isa", lambda: _C.ISA_NAMES.index("avx2"))
    assert dict(conftest.missing())["a processor with avx512"].endswith("those of avx2")
    for name, there in (("WITH_CUDA", True), ("cpu_best_isa", lambda: len(_C.ISA_NAMES) - 1)):
        monkeypatch.setattr(_C, name, there)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(conftest.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(conftest, "SHARED", ROOT)
    assert list(conftest.missing()) == []
