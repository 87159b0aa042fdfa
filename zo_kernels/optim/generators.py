"""The random generators whose state is the same at every forward of a step.

Belongs here: the global generators of torch (of the CPU and of the weights' devices), numpy and `random`. Does not belong here: generators that
a closure holds itself, which nobody else can find; the noise of directions, which has no generator (zo_kernels.ops).
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Collection
from typing import Any

import torch

# `numpy.random.get_state` and `random.getstate` copy a state number by number, which takes as long as a small model's step. Whether a generator
# was used since the last time is seen from its memory, which is read and never written.
_MT19937_BYTES = 624 * 4 + 4  # numpy's struct: the key and the position in it


def _view(address: int, size: int) -> Any:
    """Memory that somebody else owns, to be read."""
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


class _Global:
    """A generator that belongs to a module: its whole state, read only if its memory changed."""

    def __init__(self) -> None:
        self.state: Any = None
        self.print: bytes | None = None  # of the memory when `state` was read; None: it tells too little

    def get(self) -> Any:
        seen = self.memory()
        if seen is None or seen != self.print:
            self.state = self.read()
            self.print = self.memory() if self.tells(self.state) else None
        return self.state

    def set(self, state: Any) -> None:
        if state is self.state and self.print is not None and self.memory() == self.print:
            return
        self.write(state)
        self.state, self.print = state, self.memory() if self.tells(state) else None

    def tells(self, state: Any) -> bool:
        """Whether every further draw changes the memory."""
        return True

    def memory(self) -> bytes | None:
        raise NotImplementedError

    def read(self) -> Any:
        raise NotImplementedError

    def write(self, state: Any) -> None:
        raise NotImplementedError


class _Numpy(_Global):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self.current: Any = getattr(module, "get_bit_generator", lambda: None)
        self.generator: Any = None  # whose memory `view` is
        self.view: Any = None

    def memory(self) -> bytes | None:
        generator = self.current()
        if generator is not self.generator:
            self.generator, self.view = generator, None
            if type(generator).__name__ == "MT19937":  # else somebody set another one
                self.view = _view(generator.ctypes.state_address, _MT19937_BYTES)
        return None if self.view is None else self.view.tobytes()

    def tells(self, state: Any) -> bool:
        return not state["has_gauss"]  # a normal number that waits is drawn without a trace in the generator

    def read(self) -> Any:
        return self.module.get_state(legacy=False)

    def write(self, state: Any) -> None:
        self.module.set_state(state)


class _Python(_Global):
    instance: Any = random.random.__self__  # type: ignore[attr-defined]
    head = object.__basicsize__
    size = random.Random.__base__.__basicsize__ - head if random.Random.__base__ is not None else 0

    def __init__(self) -> None:
        super().__init__()
        self.view = _view(id(self.instance) + self.head, self.size) if sys.implementation.name == "cpython" else None

    def memory(self) -> bytes | None:
        waiting = self.instance.gauss_next
        return None if self.view is None else self.view.tobytes() + (b"" if waiting is None else repr(waiting).encode())

    def read(self) -> Any:
        return random.getstate()

    def write(self, state: Any) -> None:
        random.setstate(state)


_python = _Python()
_numpy: _Numpy | None = None


def _globals() -> list[_Global]:
    """Those of modules that are loaded."""
    global _numpy
    if _numpy is None and (module := sys.modules.get("numpy.random")) is not None and hasattr(module, "set_state"):
        _numpy = _Numpy(module)
    return [_python] if _numpy is None else [_python, _numpy]


class Generators:
    """Of a step: those of the CPU, of the weights' CUDA devices, and the global ones of `random` and, if it is loaded, numpy."""

    def __init__(self, devices: Collection[torch.device]) -> None:
        self.cuda = sorted([d.index or 0 for d in devices if d.type == "cuda"])
        self.globals = _globals()

    def get(self) -> list[Any]:
        states = []
        for g in self.globals:
            states.append(g.get())
        states.append(torch.default_generator.get_state())
        for k in self.cuda:
            states.append(torch.cuda.get_rng_state(k))
        return states

    def set(self, states: list[Any]) -> None:
        n = len(self.globals)
        for g, state in zip(self.globals, states, strict=False):
            g.set(state)
        torch.default_generator.set_state(states[n])
        for k, state in zip(self.cuda, states[n + 1 :], strict=True):
            torch.cuda.set_rng_state(state, k)

    @staticmethod
    def drawn(a: list[Any], b: list[Any]) -> list[tuple[Any, Any]]:
        """Of two states, those of the generators that were drawn from between them."""
        pairs = zip(a, b, strict=True)
        return [(x, y) for x, y in pairs if not (torch.equal(x, y) if isinstance(x, torch.Tensor) else x is y)]

    @staticmethod
    def same(a: list[Any], b: list[Any]) -> bool:
        """Of two states, whether nothing was drawn between them."""
        return not Generators.drawn(a, b)
