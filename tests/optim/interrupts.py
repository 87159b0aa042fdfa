"""Ctrl-C at random moments.

Belongs here: when real SIGINTs arrive. Does not belong here: what must hold after them.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


def interrupted(work: Callable[[], Any], times: int = 40) -> Iterator[None]:
    """Run `work` again and again until a SIGINT ends it, 0.5 to 16 ms after it began, and yield: so often."""
    hits = 0
    for k in range(times):
        timer = threading.Timer(0.0005 + 0.0004 * k, signal.raise_signal, [signal.SIGINT])
        try:
            timer.start()
            # Far longer than the timer: an interrupt that came after the loop would stop pytest itself. One that lands in a garbage
            # collector's callback is lost, which is why not every one counts.
            end = time.monotonic() + 3
            while time.monotonic() < end:
                work()
        except KeyboardInterrupt:
            hits += 1
        finally:
            timer.join()
        yield
    assert hits >= 0.75 * times
