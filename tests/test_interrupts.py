"""Signals of every kind at every place of an exchange of handlers, and around a step.

Belongs here: which handlers stand when, and what is delivered. Does not belong here: what an interrupt in a step leaves behind
(tests/optim/test_faults.py).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from zo_kernels import interrupts

KINDS = (signal.SIGUSR1, signal.SIGALRM, signal.SIGTERM, signal.SIGCHLD, signal.SIGINT)


class Stop(Exception):
    pass


def stop(number: int, frame: Any) -> None:
    raise Stop(number)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {s: signal.getsignal(s) for s in KINDS}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)
    assert not interrupts._signals.depth and not interrupts._signals.stood and not interrupts._signals.came


def test_every_kind_is_held_back_and_delivered_in_order() -> None:
    got: list[int] = []
    for s in KINDS:
        signal.signal(s, lambda number, _: got.append(number))
    sent = [signal.SIGALRM, signal.SIGUSR1, signal.SIGALRM, signal.SIGINT, signal.SIGCHLD]
    with interrupts.uninterrupted():
        with interrupts.uninterrupted():
            for s in sent:
                signal.raise_signal(s)
        assert not got
    assert got == [signal.SIGALRM, signal.SIGUSR1, signal.SIGINT, signal.SIGCHLD]


def test_signals_without_a_handler_of_python_are_left_alone() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with interrupts.uninterrupted():
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


def test_one_handler_that_raises_does_not_lose_the_others() -> None:
    got: list[int] = []
    signal.signal(signal.SIGUSR1, stop)
    signal.signal(signal.SIGALRM, lambda number, _: got.append(number))

    def block() -> None:
        with interrupts.uninterrupted():
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGALRM)

    with pytest.raises(Stop):
        block()
    assert got == [signal.SIGALRM]
    assert signal.getsignal(signal.SIGUSR1) is stop


def test_the_users_code_is_interrupted_and_its_handlers_stay() -> None:
    def mine(number: int, _: Any) -> None:
        raise KeyError(number)

    def work() -> None:
        assert signal.getsignal(signal.SIGALRM) is stop
        signal.signal(signal.SIGALRM, mine)
        signal.raise_signal(signal.SIGUSR1)

    signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGUSR1, stop)
    with interrupts.uninterrupted():
        with pytest.raises(Stop):
            interrupts.outside(work)
        signal.raise_signal(signal.SIGUSR1)  # held back again
        with pytest.raises(Stop):
            interrupts.outside(list)
    assert signal.getsignal(signal.SIGALRM) is mine and signal.getsignal(signal.SIGUSR1) is stop


@pytest.mark.parametrize("at", range(16))
@pytest.mark.parametrize("twice", [False, True])
def test_a_signal_at_any_exchange(monkeypatch: pytest.MonkeyPatch, at: int, twice: bool) -> None:
    """Before each call that sets a handler, and twice in a row: handlers are back, and what was to be whole is whole."""
    for s in KINDS:
        signal.signal(s, stop)
    real, calls, inside = interrupts._set, 0, []

    def exchange(number: int, handler: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at or (twice and calls == at + 1):
            signal.raise_signal(KINDS[calls % len(KINDS)])
        return real(number, handler)

    def whole() -> None:
        inside.append("began")
        signal.raise_signal(signal.SIGTERM)
        inside.append("ended")

    monkeypatch.setattr(interrupts, "_set", exchange)
    try:
        with interrupts.uninterrupted():
            try:
                interrupts.outside(list)
            finally:
                whole()
    except Stop:
        pass
    assert inside in ([], ["began", "ended"])
    assert all(signal.getsignal(s) is stop for s in KINDS)


def test_other_threads_change_nothing() -> None:
    seen = []
    signal.signal(signal.SIGUSR1, stop)

    def work() -> None:
        with interrupts.uninterrupted():
            seen.append(interrupts.outside(lambda: signal.getsignal(signal.SIGUSR1)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [stop]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_of_a_threads_fork_has_that_thread_as_its_main_one() -> None:
    assert interrupts._in_main_thread()
    found: list[int] = []

    def fork() -> None:
        if (child := os.fork()) == 0:
            os._exit(10 + interrupts._in_main_thread())
        found.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        found.append(interrupts._in_main_thread())

    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
    assert found == [11, False]
