"""Triton's interpreter: a process of it for a file of tests, and its speed.

Belongs here: whether it can run, the process that is interpreted (that is decided when triton is imported), and functions of the interpreter
and of its language that take most of its time, made to remember. Does not belong here: tests; whatever would change what a kernel computes.
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
    """For a process whose kernels are interpreted, which spends its time not in numpy but in what surrounds it: the same results, found once."""
    from triton import language
    from triton.runtime import interpreter

    remember_language(interpreter, language.core)
    remember_types(interpreter, language.core)
    remember_noise(interpreter, language.core)
    # Whether a sum of 32 bits overflows is worked out in 64 of them and asserted with debug=True, which no kernel here is called with.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def remember_language(interpreter: Any, core: Any) -> None:
    """The language is looked through for what to replace, some 400 names of which most are nothing to it, once, not before each call of a helper
    of a kernel; and a helper that knows no other of its modules than the kernel does finds them replaced."""
    names: dict[Any, list[str]] = {}  # of a module or class: what was to be replaced in it when it was first looked through
    replace_all = interpreter._patch_lang

    def patch(place: Any, *rest: Any) -> None:
        if place not in names:
            names[place] = [name for name, member in inspect.getmembers(place) if core.is_builtin(member)]
        for name in names[place]:
            member = getattr(place, name)
            if core.is_builtin(member):  # or else a launch around this call has replaced it
                interpreter._patch_attr(place, name, member, *rest)

    def patch_language(fn: Any) -> Any:
        replaced = not core.is_builtin(interpreter.tl.load) and not any(value is core for value in fn.__globals__.values())
        return interpreter._LangPatchScope() if replaced else replace_all(fn)

    interpreter._patch_builtin = patch
    interpreter._patch_lang = patch_language


def remember_types(interpreter: Any, core: Any) -> None:
    """The types of numpy, of blocks and of shapes, of which there are some dozens, are not made anew for each operation."""
    numpy_types: dict[str, Any] = {}
    blocks: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, tuple[Any, Any]] = {}
    numpy_type, make_block, make_tensor = interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__

    def numpy_type_of(of: Any) -> Any:
        name = of.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(of)
        return numpy_types[name]

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        if isinstance(element_ty, core.pointer_type):  # has no hash
            make_block(self, element_ty, shape)
            return
        key = (element_ty, *(n.value if isinstance(n, core.constexpr) else n for n in shape))
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = (*type.shape,) if type.is_block() else ()
        if key not in shapes:
            make_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    interpreter._get_np_dtype = numpy_type_of
    core.block_type.__init__ = block
    core.tensor.__init__ = tensor


def remember_noise(interpreter: Any, core: Any) -> None:
    """`philox` reads and writes no memory, and three in four of its calls have the arguments of another: tests share seeds, streams and tags."""
    words: dict[Any, Any] = {}
    call = interpreter.InterpretedFunction.__call__

    def called(self: Any, *arguments: Any, **named: Any) -> Any:
        if self.fn.__name__ != "philox":
            return call(self, *arguments, **named)
        key = tuple((str(a.type), a.handle.data.tobytes()) for a in map(core._unwrap_if_constexpr, arguments))
        if key not in words:
            words[key] = call(self, *arguments)
        return words[key]

    interpreter.InterpretedFunction.__call__ = called


if INTERPRETED:
    remember()
