"""What a run says while it goes, and how it is stopped: lines on stderr, a bar where stderr is a terminal, signals.

Belongs here: everything that meets a terminal. Does not belong here: what is said (run.py, train.py, compare.py, cli.py). Nothing here imports torch:
the first word is said before that.
"""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from zo_finetune.errors import printable

PATIENCE = 2.0  # seconds after which whatever is going on says so
LONGEST = 60.0  # seconds between two lines about the same


_silent = False


def hush(silent: bool) -> None:
    """Of several processes of one run one speaks."""
    global _silent
    _silent = silent


def is_terminal() -> bool:
    if _silent:
        return False
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # none, or closed
        return False


def say(line: str, aloud: bool = False) -> None:
    """One line on stderr, above a bar if there is one. A terminal that was closed, or a reader that went away, ends no run. `aloud`: of a process that
    is silent otherwise, too."""
    if _silent and not aloud:
        return
    line = printable(line)
    with contextlib.suppress(OSError, ValueError):
        if is_terminal() and (bars := sys.modules.get("tqdm")) is not None:
            bars.tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)


def tell(text: str) -> None:
    """What a command was asked for, on stdout."""
    if _silent:
        return
    with contextlib.suppress(OSError, ValueError):
        print(text, flush=True)


class Phase:
    """Something of unknown length: `with Phase("loading the model"):` says so after two seconds, and what it took when it is over."""

    def __init__(self, what: str) -> None:
        self.what, self._since, self._said = what, 0.0, False
        self._timer = threading.Timer(PATIENCE, self._say)
        self._timer.daemon = True

    def _say(self) -> None:
        self._said = True
        say(f"{self.what} ...")

    def __enter__(self) -> Phase:
        self._since = time.monotonic()
        self._timer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._timer.cancel()
        if self._said and kind is None:
            say(f"{self.what}: {time.monotonic() - self._since:.0f} s")


class Counter:
    """How far something of known length is: a bar on a terminal; elsewhere lines, `every` so many and at least one a minute, or where that is 0 after
    two seconds and then ever more rarely, but at least one a minute. What has said nothing in two seconds says that it has begun."""

    def __init__(self, what: str, total: int, unit: str, done: int = 0, every: int = 0) -> None:
        self.what, self.total, self.unit, self.done, self.every = what, total, unit, done, every
        self._since, self._wait, self._first, self._last = time.monotonic(), PATIENCE, done, 0.0
        self._begun = threading.Timer(PATIENCE, lambda: say(f"{what} ..."))
        self._begun.daemon = True
        self._bar: Any = None
        if is_terminal():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=done,
                unit=unit,
                desc=what,
                dynamic_ncols=True,
                delay=0 if every else PATIENCE,
                leave=bool(every),
            )
        else:
            self._begun.start()

    def advance(self, n: int, note: str = "") -> None:
        before, self.done = self.done, self.done + n
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.set_postfix_str(note, refresh=False)
                self._bar.update(n)
            return
        seconds = time.monotonic() - self._since
        if self.every:
            due = self.done // self.every > before // self.every or self.done == self.total or seconds - self._last >= LONGEST
        else:
            due = self._wait <= seconds and self.done < self.total
        if due:
            self._begun.cancel()
            self._last = seconds
            while self._wait <= seconds:
                self._wait += min(self._wait, LONGEST)
            left = seconds / (self.done - self._first) * (self.total - self.done)
            rest = f", about {left:.0f} s left" if self.done < self.total else ""
            say(f"{self.what}: {self.done} of {self.total} {self.unit}s, {seconds:.0f} s{rest}{', ' + note if note else ''}")

    def close(self) -> None:
        self._begun.cancel()
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.close()

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Signals:
    """Inside the block SIGTERM, and SIGHUP unless it is ignored (nohup), do what Ctrl-C does: they raise SIGINT, whose handler is the one that
    the library holds back where weights are being written. `exit_code`: what a shell expects of a process that a signal ended."""

    def __init__(self) -> None:
        self.number: int = signal.SIGINT
        self._before: dict[int, Any] = {}
        self._deaf = False

    @property
    def exit_code(self) -> int:
        return 128 + self.number

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._deaf = (
            signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        )  # a background job of a shell: SIGTERM must end it all the same
        self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                self._before[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.number, self._deaf = number, False
        signal.raise_signal(signal.SIGINT)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._deaf:
            raise KeyboardInterrupt


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """A library's warning is a line, said once, without the place in the code that it came from."""
    said: set[str] = set()

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        text = " ".join(str(message).split())
        if text not in said:
            said.add(text)
            say(f"warning: {text}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def take_any_text() -> None:
    """What the terminal's encoding lacks is printed as its escape: no run ends for a ± in an ASCII locale."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
