"""Triton's interpreter: a process of it for a file of tests, and its speed.

Belongs here: whether it can run, the process that is interpreted (that is decided when triton is imported), and two functions of the interpreter
that took a third of its time, made to remember. Does not belong here: tests; whatever would change what a kernel computes.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).parents[2]


def run(*command: str) -> str:
    """What Python prints, interpreting kernels, when it is called with these arguments; it must succeed."""
    pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")
    triton, numpy = (metadata.version(name).split(".")[:2] for name in ("triton", "numpy"))
    if [*map(int, triton)] < [3, 7] and [*map(int, numpy)] >= [2, 4]:
        pytest.skip(f"the interpreter of triton {'.'.join(triton)} needs numpy < 2.4, and this is {'.'.join(numpy)}")
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-W", "ignore", *command], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def run_tests(*arguments: str) -> int:
    """How many tests pass there; they must all."""
    said = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", "-n", "0", *arguments)
    passed = re.search(r"(\d+) passed", said)
    assert passed, said[-2000:]
    return int(passed[1])


def remember() -> None:
    """For a process whose kernels are interpreted: its language is not looked through anew for what to replace, some 400 names of which most
    are nothing to it, before each call of a helper of a kernel; nor is the table of types made anew for each operation."""
    from triton.language import core
    from triton.runtime import interpreter

    names: dict[Any, list[str]] = {}  # of a module or class: what was to be replaced in it when it was first looked through
    types: dict[str, Any] = {}
    numpy_type = interpreter._get_np_dtype

    def patch(place: Any, *rest: Any) -> None:
        if place not in names:
            names[place] = [name for name, member in inspect.getmembers(place) if core.is_builtin(member)]
        for name in names[place]:
            member = getattr(place, name)
            if core.is_builtin(member):  # or else a launch around this call has replaced it
                interpreter._patch_attr(place, name, member, *rest)

    def numpy_type_of(of: Any) -> Any:
        name = of.scalar.name
        if name not in types:
            types[name] = numpy_type(of)
        return types[name]

    interpreter._patch_builtin = patch
    interpreter._get_np_dtype = numpy_type_of


if INTERPRETED:
    remember()
