"""What several files of kernel tests share.

Belongs here: what takes long to make. Does not belong here: cases, assertions.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("cuda_host.cpp")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA kernel's body, compiled for this machine: once for all workers of a run, since it takes 20 seconds."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    own = tmp_path_factory.getbasetemp()
    folder = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own  # the run's, which its workers share
    target, made = folder / "cuda_host.so", folder / "cuda_host.made"
    flags = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-ffp-contract=off", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    with (folder / "cuda_host.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            subprocess.run([compiler, *flags, "-Wall", "-Wextra", "-Werror", "-o", str(target), str(SOURCE)], check=True)
            made.touch()
    return ctypes.CDLL(str(target))
