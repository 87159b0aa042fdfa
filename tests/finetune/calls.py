"""Calls of a function that are counted, one of which ends as a user's Ctrl-C would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn


def interrupt() -> NoReturn:
    raise KeyboardInterrupt


@dataclass
class Calls:
    """`made`: so far. Before the `stop`-th (0: none) `do` is called."""

    stop: int = 0
    do: Callable[[], Any] = interrupt
    made: int = 0

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted; as a plain function, which a class binds."""

        def counted(*args: Any, **more: Any) -> Any:
            self.made += 1
            if self.made == self.stop:
                self.do()
            return function(*args, **more)

        return counted
