"""The forwards of a step side by side: each in a thread of its own, one of which runs at a time, so that a block of an offloaded model that comes serves all of
them before the next one does.

Belongs here: whose turn it is, and what goes with a forward from turn to turn: its point, its random state, torch's modes of its thread. Does not belong
here: which points (estimators.py), how a block comes (views/away.py).

A forward that asks for a block which is not there waits, and the others come up to theirs; when all wait, the one that ran last brings its block in and goes
on, and then those that wait for the same. That a closure bears to be left in the middle for another call of it, its user says (`zk.offload(together=True)`).
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from zo_kernels.interrupts import uninterrupted
from zo_kernels.optim.generators import Generators
from zo_kernels.optim.points import Point
from zo_kernels.views import Away, Block


class Abandoned(BaseException):
    """Another forward of the step failed, or was interrupted."""


class Forward:
    """One of them. `wants`: the blocks that it waits for; None: it runs, or has not begun."""

    def __init__(self, number: int, point: Point, random: list[Any]) -> None:
        self.number, self.point, self.random = number, point, random
        self.turn = threading.Semaphore(0)
        self.wants: tuple[Block, ...] | None = None
        self.begun = self.done = False
        self.result: Any = None


class Lockstep:
    """`points`: of the forwards, the first of which runs in the thread that has this. `rng`: the generators whose state is `before` when each begins."""

    def __init__(self, away: Away, points: Sequence[Point], rng: Generators, before: list[Any]) -> None:
        self.away, self.rng = away, rng
        self.forwards = [Forward(k, point, before) for k, point in enumerate(points)]
        self.now = self.forwards[0]
        self.abandoned = False
        self.error: BaseException | None = None

    def run(self, job: Callable[[Forward], Any]) -> list[Any]:
        """What `job` gives for each forward, whose point it checks.

        Raises:
            Whatever the first one that failed raised.
        """
        first, *others = self.forwards
        modes = _modes()
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(self._other, one, job, modes), daemon=True)
            for one in others
        ]
        for thread in threads:
            thread.start()
        with self.away.turn:  # another thread's function reads to its end
            self.away.gate, self.away.awaited = self._gate, self._awaited
        try:
            self._do(first, job)
            while not self.abandoned and not all(one.done for one in self.forwards):
                if (following := self._next()) is not None:
                    self._give(following)
                first.turn.acquire()
        except Abandoned:
            pass
        except BaseException as error:
            self.error = self.error or error
        finally:
            with uninterrupted():
                self.abandoned = self.abandoned or self.error is not None
                for one in others:
                    one.turn.release()
                for thread in threads:
                    thread.join()
                self.away.gate, self.away.awaited, self.away.gated = None, lambda: (), set()
        if self.error is not None:
            raise self.error
        return [one.result for one in self.forwards]

    def _do(self, one: Forward, job: Callable[[Forward], Any]) -> None:
        one.begun = True
        self._enter(one)
        one.result = job(one)
        one.random, one.done = self.rng.get(), True

    def _enter(self, one: Forward) -> None:
        self.away.gated.add(threading.get_ident())
        self.rng.set(one.random)
        one.point.see()

    def _other(self, one: Forward, job: Callable[[Forward], Any], modes: Callable[[], contextlib.ExitStack]) -> None:
        one.turn.acquire()
        try:
            if not self.abandoned:
                with modes():
                    self._do(one, job)
        except Abandoned:
            pass
        except BaseException as error:
            self.error, self.abandoned = self.error or error, True
        finally:
            one.done = True
            following = None if self.abandoned else self._next()
            self._give(following or self.forwards[0])

    # -- turns --

    def _next(self) -> Forward | None:
        """Who has not begun, or whose blocks are there; else the one whose turn it was, if it is not done; else whoever waits."""
        left = [one for one in self.forwards if not one.done]
        for one in left:
            if one is not self.now and (not one.begun or self._served(one)):
                return one
        return self.now if self.now in left else left[0] if left else None

    def _served(self, one: Forward) -> bool:
        """It waits, and what it waits for is there."""
        return one.wants is not None and self.away.present(one.wants)

    def _awaited(self) -> list[Block]:
        """What is there, and not only used by whose turn it is: it must not go for a block that is fetched in advance."""
        return [b for one in self.forwards if self._served(one) for b in one.wants or ()]

    def _give(self, to: Forward) -> None:
        self.now = to
        to.turn.release()

    def _gate(self, wanted: tuple[Block, ...]) -> None:
        """The forward whose turn it is asks for blocks that are not there."""
        me = self.now
        me.wants = wanted
        if (following := self._next()) is not None and following is not me:
            me.random = self.rng.get()
            self._give(following)
            me.turn.acquire()
            if not self.abandoned:
                self._enter(me)
        me.wants = None
        if self.abandoned:
            raise Abandoned


def _modes() -> Callable[[], contextlib.ExitStack]:
    """Enters, in another thread, the modes of torch that this one is in."""
    graded = torch.is_grad_enabled()
    casts = [
        (kind, torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled())
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    ]

    def enter() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(torch.set_grad_enabled(graded))
        for kind, dtype, cached in casts:
            stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=cached))
        return stack

    return enter
