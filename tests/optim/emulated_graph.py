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

_perturb, _update = cpu.perturb, cpu.update


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
        tape = _Tape(self.tape)
        try:
            with tape:
                yield
        finally:
            Emulated.recording = None
            for written, before in reversed(tape.before):  # nothing is executed by a recording
                written.copy_(before)

    def replay(self) -> None:
        self.replays += 1
        for operation in self.tape:
            operation()


class _Tape(TorchDispatchMode):
    def __init__(self, tape: list[Callable[[], Any]]) -> None:
        super().__init__()
        self.tape = tape
        self.before: list[tuple[Tensor, Tensor]] = []  # what operations wrote to, with its contents before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        for k, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[k] if k < len(args) else kwargs.get(argument.name)
                self.before += [(t, t.clone()) for t in tree_leaves(written) if isinstance(t, Tensor)]
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


def _recorded_update(plan: Any, states: Any, p: Any, isa: int | None = None) -> None:
    # As above; and a table of the states, which is uploaded anew where one of them has moved.
    form = isinstance(p.tags, Tensor), len(p.tags), type(p.numbers), p.kind, p.rounding, p.rule
    form += tuple(s.data_ptr() for own in states for s in own)
    loaded = plan.cache.setdefault("emulated", set())
    if Emulated.recording is None:
        loaded.add(form)
        _update(plan, states, p, isa)
    elif form not in loaded or not all(isinstance(x, Tensor) for x in (p.tags, p.coefs, p.numbers)):
        raise RuntimeError(f"operation not permitted when stream is capturing: what {form} needs is loaded")
    else:
        Emulated.recording.tape.append(lambda: _update(plan, states, p, isa))


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    Emulated.made.clear()
    monkeypatch.setattr(graph, "Recording", Emulated)
    monkeypatch.setattr(cpu, "perturb", _recorded_perturb)
    monkeypatch.setattr(cpu, "update", _recorded_update)
    # Models ask: transformers leaves out checks that would wait for the device.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Emulated.recording is not None)
