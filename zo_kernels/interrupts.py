"""Signals wait while weights, record and counters are between two states that agree.

Belongs here: holding back every signal that has a Python handler, and letting the user's own code be interrupted. Does not belong here: what
must not be interrupted (views/, optim/).

CPython runs handlers in the main thread, between two of its instructions. A handler that raises (Ctrl-C, a time limit by SIGALRM, a scheduler's
SIGTERM, SIGCHLD of a dead worker) therefore raises anywhere. Blocking signals in the thread (`pthread_sigmask`) is no way: the system then gives
them to another thread, and the handler runs in the main one all the same. So handlers are exchanged for one that takes a note.

Not held back: exceptions that another thread sends into this one (`PyThreadState_SetAsyncExc`), which no Python code can refuse.
"""

from __future__ import annotations

import importlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

# `signal.signal` and `signal.getsignal` try to make an enum of every answer, which for a handler is an exception each time: several microseconds,
# where the functions below them take a tenth of one. A step exchanges handlers six times.
_builtin = importlib.import_module("_signal")
_get, _set = _builtin.getsignal, _builtin.signal
_NUMBERS = sorted(int(s) for s in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})


class _Signals:
    """Of the main thread: the handlers that are exchanged, and what came in the meantime."""

    def __init__(self) -> None:
        self.depth = 0  # of blocks that hold signals back
        self.stood: dict[int, Any] = {}  # the handlers in whose place `taker` stands
        self.came: dict[int, FrameType | None] = {}  # in the order in which they came; one of a kind, as the system has it
        self.taker = self._take  # one object, to be known by identity
        self.seen: list[Any] = []  # every signal's handler when handlers were last exchanged, and which of them were Python's
        self.python: list[tuple[int, Any]] = []

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.came.setdefault(number, frame)
        if not self.depth:  # left in place by a handler that raised while all were put back
            self.release()

    def hold(self) -> None:
        """Exchange what is not exchanged yet. A handler that is not Python's (None, default, ignore) raises nothing."""
        present = list(map(_get, _NUMBERS))
        if present != self.seen:
            self.python = [(n, h) for n, h in zip(_NUMBERS, present, strict=True) if callable(h) and h is not self.taker]
            self.seen = present
        for number, handler in self.python:
            self.stood[number] = handler
            _set(number, self.taker)

    def release(self) -> None:
        """Put the handlers back, but for those that were changed meanwhile, and deliver what came. A handler that raises keeps nothing of
        this from being done."""
        try:
            for number, handler in list(self.stood.items()):
                if _get(number) is self.taker:
                    _set(number, handler)
                self.stood.pop(number, None)
            while self.came:
                number, frame = next(iter(self.came.items()))
                del self.came[number]
                if callable(handler := _get(number)):
                    handler(number, frame)
        finally:
            if self.stood or self.came:
                self.release()

    def begin(self, depth: int) -> None:
        """Hold back, unless that is done."""
        if self.depth:
            return
        self.depth = depth
        try:
            self.hold()
        except BaseException:  # of a handler whose turn had not come
            self.depth = 0
            raise


_signals = _Signals()


_main = threading.main_thread().ident


def _forked() -> None:
    """The thread that forks is the child's main one."""
    global _main
    _main = threading.get_ident()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _in_main_thread() -> bool:
    return threading.get_ident() == _main


class uninterrupted:
    """Hold signals back until the block is done: half of the tensors are never written, nor is a step half undone. Blocks may nest: the
    outermost one holds. What came is delivered at its end, every kind, in order.

    Only the main thread runs handlers; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.holds = False

    def __enter__(self) -> None:
        if not _in_main_thread():
            return
        if _signals.depth:
            _signals.depth += 1
        else:
            try:
                _signals.begin(1)
            except BaseException:
                _signals.release()
                raise
        self.holds = True

    def __exit__(self, *_: object) -> None:
        if self.holds:
            _signals.depth -= 1
            if not _signals.depth:
                _signals.release()


def outside(function: Callable[..., T], *arguments: Any) -> T:
    """Call code of the user's inside such a block: it may be interrupted, and may install handlers, which stay. Signals are held back again
    when this returns or raises."""
    if not _in_main_thread() or not _signals.depth:
        return function(*arguments)
    depth, _signals.depth = _signals.depth, 0
    # A signal that comes before its handler is exchanged cuts the exchange short. Three of them, within microseconds, do not.
    try:
        try:
            try:
                _signals.release()
                return function(*arguments)
            finally:
                _signals.begin(depth)
        finally:
            _signals.begin(depth)
    finally:
        _signals.begin(depth)
