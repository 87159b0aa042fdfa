"""A CUDA graph on the CPU, for tests: what a step does to memory is recorded operation by operation, and replayed on the same memory.

Stricter than a run that is simply repeated: Python does not run again at a replay, so a number that the host worked out at the time of
the recording stays what it was, and reading a value back is refused, both as with a real graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zo_kernels._backends import cpu
from zo_kernels.optim import graph

_perturb = cpu.perturb


class Emulated:
    made: list[Emulated] = []  # noqa: RUF012
    recording: Emulated | None = None

    def __init__(self, place: Any) -> None:
        self.tape: list[Callable[[], Any]] = []
        self.replays = 0
        Emulated.made.append(self)

    @staticmethod
    def place_on(device: torch.device) -> Any:
        return None

    @staticmethod
    def refuses(device: torch.device) -> str | None:
        return None

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        Emulated.recording = self
        try:
            with _Tape(self.tape):
                yield
        finally:
            Emulated.recording = None

    def replay(self) -> None:
        self.replays += 1
        for operation in self.tape:
            operation()


class _Tape(TorchDispatchMode):
    def __init__(self, tape: list[Callable[[], Any]]) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **kwargs)

        def again() -> None:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self.tape.append(again)
        return result


def _recorded_perturb(plan: Any, p: Any, isa: int | None = None) -> None:
    # A kernel for each form of a pass, and a table for each plan: the first launch loads them, which no capture survives.
    form = isinstance(p.tags, Tensor), len(p.tags), type(p.decay), p.kind, p.rounding
    loaded = plan.cache.setdefault("emulated", set())
    if Emulated.recording is None:
        loaded.add(form)
        _perturb(plan, p, isa)
    elif form not in loaded:
        raise RuntimeError(f"operation not permitted when stream is capturing: the kernel of {form} is loaded")
    else:
        Emulated.recording.tape.append(lambda: _perturb(plan, p, isa))


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    Emulated.made.clear()
    monkeypatch.setattr(graph, "Recording", Emulated)
    monkeypatch.setattr(cpu, "perturb", _recorded_perturb)
    # Models ask: transformers leaves out checks that would wait for the device.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Emulated.recording is not None)
