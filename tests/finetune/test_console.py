"""What a run says: lines where there is no terminal, a bar where there is one, and nothing that could end it."""

from __future__ import annotations

import io
import signal
import sys
import time
import warnings
from typing import Any

import pytest
from zo_finetune import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_lines_every_so_many(capsys: Any) -> None:
    with console.Counter("training", 9, "step", done=1, every=4) as counter:
        for _ in range(8):
            counter.advance(1, "loss 1")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["training: 4 of 9 steps", "training: 8 of 9 steps", "training: 9 of 9 steps"]
    assert all(line.endswith("loss 1") for line in lines)
    assert "left" in lines[0] and "left" not in lines[2]


def test_what_takes_long_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(console, "PATIENCE", 2.0)
    with console.Counter("before", 400, "example") as counter:
        for _ in range(400):
            clock[0] += 1.0
            counter.advance(1)
    lines = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == [f"before: {n} of 400 examples" for n in (2, 4, 8, 16, 32, 64, 124, 184, 244, 304, 364)]


def test_slow_steps_have_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A run of many steps says so every so many, which of slow ones takes an hour."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with console.Counter("training", 20_000, "step", every=1000) as counter:
        for _ in range(8):
            clock[0] += 25.0
            counter.advance(1)
    lines = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == [f"training: {n} of 20000 steps" for n in (3, 6)]


def test_a_long_first_batch_has_begun(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(console, "PATIENCE", 0.05)
    with console.Counter("before", 2, "example") as counter:
        counter._begun.join(10)
        counter.advance(2)
    assert capsys.readouterr().err == "before ...\n"
    with console.Counter("before", 2, "example") as counter:
        counter.advance(2)
    counter._begun.join(10)
    assert capsys.readouterr().err == ""


def test_a_phase_says_so_after_a_while(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with console.Phase("loading"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    with console.Phase("loading \x1b[31m") as phase:
        while not phase._said:
            time.sleep(0.001)
    assert capsys.readouterr().err.splitlines()[0] == r"loading \x1b[31m ..."


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with console.Counter("training", 3, "step", every=1) as counter:
        counter.advance(1, "loss 1")
        console.say("a line")
        counter.advance(2)
    assert "training:" in screen.getvalue() and "3/3" in screen.getvalue() and "a line\n" in screen.getvalue()
    assert "1 of 3" not in screen.getvalue()


@pytest.mark.parametrize("stream", [Gone(), None])
def test_a_reader_that_went_away_ends_nothing(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    console.say("a line")
    console.tell("a line")
    with console.Counter("training", 3, "step", every=1) as counter:
        counter.advance(1)


def test_warnings_are_lines_said_once(capsys: Any) -> None:
    with console.warnings_as_lines():
        warnings.simplefilter("always")
        for _ in range(2):
            warnings.warn("both losses\nare equal", stacklevel=1)
        warnings.warn("another", FutureWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: both losses are equal\nwarning: another\n"


def test_signals_that_are_ignored_stay_ignored() -> None:
    """nohup ignores SIGHUP, and a shell's background job SIGINT; SIGTERM ends both."""
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        with console.Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        assert signals.exit_code == 143
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
