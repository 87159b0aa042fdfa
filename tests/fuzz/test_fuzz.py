"""A short run of every fuzz target without atheris, and the proof that the engine finds what there is to find."""

from __future__ import annotations

import math
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import zo_kernels
from tests.fuzz import run
from tests.fuzz.targets import TARGETS, Journal
from tests.journal.samples import header
from zo_kernels import journal
from zo_kernels.journal import reader

RUNS = {
    "journal": 3000,
    "factors": 1500,
    "start": 1500,
    "masks": 500,
    "scales": 1000,
    "options": 300,
    "folder": 300,
    "rows": 2000,
    "tables": 1500,
}
NEED = {"factors": "safetensors", "start": "safetensors", "options": "transformers", "folder": "transformers", "rows": "datasets"}


@pytest.mark.parametrize("name", TARGETS)
def test_short_run(name: str) -> None:
    if name in NEED:
        pytest.importorskip(NEED[name])
    if name in ("masks", "scales") and (reason := zo_kernels.backends()["cpu"]):
        pytest.skip(f"backend cpu: {reason}")
    target = TARGETS[name]()
    try:
        tally = run.fuzz_random(target, RUNS[name], seed=5)
    finally:
        target.close()
    assert tally.runs == RUNS[name]
    assert 0.02 < tally.accepted / tally.runs < 0.98  # both sides of the reader are reached


def test_the_summary_of_a_record_may_be_anything(tmp_path: Path) -> None:
    """docs/journal.md: loss and gradient are for people, NaN included; a target that took them for a pass's numbers found what is none."""
    target = Journal()
    try:
        with journal.create(tmp_path / "run.zoj", header(), fsync_every=0) as writer:
            writer.append(0, [[0.5]], loss=math.inf, gradient=math.nan)
        assert target.check((tmp_path / "run.zoj").read_bytes())
    finally:
        target.close()


FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "records are not checked": ("_good", lambda chunk, size, first, crc: len(chunk) // size),
    "their place is not checked": ("checksum", lambda payload, index, crc: zlib.crc32(payload, crc)),
    "tags are not checked": ("_impossible", lambda header, records: None),
    "a tail is dropped in silence": ("_tail", lambda source, at, size, index: None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reader_with_a_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name, function = FAULTS[fault]
    target = Journal()
    target.seeds()  # written by a library that is still whole
    monkeypatch.setattr(reader, name, function)
    try:
        with pytest.raises((AssertionError, journal.DamagedError, ValueError)):
            run.fuzz_random(target, 20_000, seed=1, crashes=tmp_path / "crashes")
    finally:
        target.close()
    assert len(list((tmp_path / "crashes").iterdir())) == 1


def test_an_input_that_hangs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hangs(Journal):
        def check(self, data: bytes) -> bool:
            while True:
                pass

    monkeypatch.setattr(run, "LONGEST", 1)
    with pytest.raises(TimeoutError, match="more than 1 s"):
        run.fuzz_random(Hangs(), 1, seed=0)


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz.run", "--engine=random", "--runs=50", "--crashes", str(tmp_path)]
    done = subprocess.run([*command, "--target", "journal", "rows"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "journal: 50 inputs by random" in done.stdout and "rows: 50 inputs by random" in done.stdout
