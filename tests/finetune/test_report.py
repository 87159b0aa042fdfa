"""The numbers of a run directory, and of an evaluation, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from zo_finetune import compare, figures, report, run_folder
from zo_finetune.evaluate import describe, evaluate
from zo_finetune.scoring import Encoded, Span
from zo_finetune.tasks import get_task

SST2 = get_task("sst2")


class Oracle:
    """Stands for a `Scorer`: the right answer has the score -1, every other -3."""

    def collate(self, examples: Sequence[Encoded], **_: Any) -> Sequence[Encoded]:
        return examples

    def scores(self, batch: Sequence[Encoded]) -> torch.Tensor:
        return torch.tensor([[-1.0 if k == e.label else -3.0 for k in range(2)] for e in batch])


def test_answers_and_labels_belong_together() -> None:
    """Whatever the order in which examples are evaluated: the shortest first."""
    lengths, labels = [9, 2, 7, 1, 5, 3, 8], [0, 1, 1, 0, 1, 1, 0]
    span = Span(0, (0,), (0,))
    examples = [Encoded((tuple(range(n)),), (span, span), label) for n, label in zip(lengths, labels, strict=True)]
    oracle: Any = Oracle()
    found = evaluate(SST2, oracle, examples, 3)
    assert found["accuracy"] == 1.0 and found["auc"] == 1.0 and found["examples"] == 7
    assert found["auc_stderr"] == 0.0 and found["majority"] == 4 / 7
    assert describe(SST2, found).startswith(
        "accuracy 1.0000 ± 0.0000 on 7 examples (majority 0.5714), loss 0.1269, AUC 1.000 ± 0.000"
    )
    assert found["predicted"] == {"negative": pytest.approx(3 / 7), "positive": pytest.approx(4 / 7)}
    assert found["loss"] == pytest.approx(0.126928, abs=1e-6)  # log(1 + e^-2)


def test_a_trailing_mean() -> None:
    assert figures.smoothed([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]
    assert figures.smoothed([1.0, 2.0, 3.0], 5) == [1.0, 1.5, 2.0]
    assert figures.smoothed([], 5) == []


def test_evaluations_of_steps_that_a_resumed_run_will_take_are_cut_off(tmp_path: Path) -> None:
    """The evaluation behind a step is made again with the step."""
    about = {"examples": 4, "accuracy": 0.5, "accuracy_stderr": 0.25, "loss": 0.75}
    kept = run_folder.Evaluations(tmp_path / "evaluations.jsonl", SST2)
    kept.add("before", about)
    for step in (0, 2, 4, 6):
        kept.add("dev", {**about, "step": step})
    before, history = kept.recover(4)
    assert before == about
    assert [e["step"] for e in history] == [0, 2]
    assert kept.recover(9) == (before, history), "the file has no more than that"


@pytest.mark.parametrize("name", ["$_{$", "a$x^$b", "\\frac"])
def test_no_name_is_a_formula(drawn: None, name: str, tmp_path: Path) -> None:
    """A model's folder may be called anything; matplotlib reads what stands between two dollars as a formula."""
    point = {"step": 0, "accuracy": 0.5, "accuracy_stderr": 0.1}
    figures.draw_curve(tmp_path / "curve.png", name, "accuracy", [0.7], {name: [point]})
    run = {"seed": 0, "dev": [(0, 0.7, 0.5), (2, 0.6, 0.5)], "training": []}
    compare.draw(tmp_path / "curves.png", {"curves": {name: [run]}, "model": name, "peft": "none", "seeds": [0], "task": name})
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "curve.png", tmp_path / "curves.png"))


@pytest.mark.parametrize(("still", "smaller"), [(12, False), (11, True)])
def test_gradients_that_became_0_may_be_the_rates(still: int, smaller: bool) -> None:
    """A rate that ends the model in a step leaves scores that nothing changes; there a larger eps alone is the wrong way."""
    (line,) = report.misgivings(report.Outcome(before={}, steps=12, still=still))
    assert f"0 in {still} of 12 steps" in line and "try a larger --eps" in line and ("a smaller --lr" in line) == smaller
