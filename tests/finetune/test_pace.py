"""What a run says of how far its rate moves weights.

Belongs here: when there is a line, and the numbers of a run. Does not belong here: how far a step moves a weight (tests/optim/test_movement.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from zo_finetune.cli import main
from zo_finetune.pace import LOOKS, Pace

WEIGHTS = [torch.full((3, 4), 0.2), torch.tensor([-0.2])]


def said(movements: list[float], lrs: list[float], weights: list[torch.Tensor] = WEIGHTS) -> list[str]:
    pace = Pace(weights, lrs)
    assert not weights or pace.size == pytest.approx(0.2)
    return [words for m, lr in zip(movements, lrs, strict=True) if (words := pace.saw(m, lr)) is not None]


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (1.1, "a walk as long as the weights are large (1.1 times)"),
        (0.9, ""),
        (1.1e-3, ""),
        (0.9e-3, "100 such steps are 0.0009 of that, too little to teach anything; take a larger --lr"),
    ],
)
def test_one_line_where_the_walk_is_out_of_range(factor: float, words: str) -> None:
    """100 steps of m are a walk of 10 m."""
    found = said([factor * 0.02] * 100, [1e-3] * 100)
    assert len(found) == bool(words) and all(words in line for line in found)


def test_the_schedule_counts() -> None:
    """Of a linear one the rates' root mean square, which is 1 / sqrt(3) of the first."""
    lrs = [1e-3 * (1 - k / 1000) for k in range(1000)]
    way = 1.05 * 0.2 * math.sqrt(3 / 1000)
    assert len(said([way * lr / 1e-3 for lr in lrs], lrs)) == 1
    assert not said([0.9 * way * lr / 1e-3 for lr in lrs], lrs)


def test_a_word_is_of_several_steps_and_of_what_is_known() -> None:
    """Of one tenth as large as the others, of steps without a rate, and where nobody knows."""
    lrs = [1e-3] * 100
    assert not said([1.0] + [1e-3] * (LOOKS - 1), lrs[:LOOKS])[1:] and said([1.0] * 3, lrs[:3]), (
        "a short run has no more to look at"
    )
    assert not said([math.nan] * 100, lrs) and not said([1.0] * 100, [0.0] * 100) and not said([0.0] * 100, lrs)
    assert not said([1.0] * 100, lrs, []), "weights that were added are not judged"


def test_a_run_shows_it(train_command: Callable[..., list[str]], tmp_path: Path, capsys: Any) -> None:
    assert main(train_command(tmp_path / "run", "--lr", "1e-3", "--steps", "3", "--no-save")) == 0
    lines = capsys.readouterr().err.splitlines()
    moved = json.loads((tmp_path / "run" / "result.json").read_text())["last_movement"]
    assert any(line.startswith("training: 3 of 3 steps") and f"a weight moved by {moved:.2g}, " in line for line in lines)
    assert 0 < moved < 0.1
    assert main(train_command(tmp_path / "run", "--method", "sign", "--lr", "10", "--steps", "3", "--no-save", "--overwrite")) == 0
    assert sum("a step at --lr 10 moves a weight by about 10, " in line for line in capsys.readouterr().err.splitlines()) == 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["last_movement"] == pytest.approx(10)
    assert (
        main(train_command(tmp_path / "run", "--method", "adamw", "--lr", "1e-3", "--steps", "3", "--no-save", "--overwrite")) == 0
    )
    assert "a weight moved" not in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["last_movement"] is None
