"""Every script of examples/ runs, and what it prints at the end says that it learned something.

Belongs here: the scripts as they are. Does not belong here: what their parts compute.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "tiny")
LOWER = {"loss": True, "reward": False}  # what it prints: whether less is better


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_learns(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    last = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(r"(\w+) ([\d.]+) -> ([\d.]+)", last)
    assert found, last
    what, before, after = found.groups()
    assert (float(after) < float(before)) is LOWER[what], last
