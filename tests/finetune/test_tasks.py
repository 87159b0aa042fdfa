"""What a task makes of a row: prompts and candidates written out by hand, the labels of every source, and what is refused.

Belongs here: tasks as a user meets them. Does not belong here: scores of examples written for the purpose (test_scoring.py), tables of any kind
(test_data.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from zo_finetune.data import load_splits
from zo_finetune.decoding import Answers
from zo_finetune.errors import UserError
from zo_finetune.metrics import METRICS
from zo_finetune.tasks.base import ClassificationTask, Row

from tests.finetune.conftest import write_jsonl


def test_several_candidates_may_count_as_right() -> None:
    """An answer among several right ones is right, whichever of them is trained on; without others the label alone is."""
    scores = torch.tensor([[0.0, 1.0, 2.0]] * 3 + [[float("nan")] * 3])
    chosen = torch.tensor([2, 2, 2, -1])
    labels = torch.tensor([0, 0, 2, 0])
    right = (frozenset({0, 2}), frozenset({0, 1}), frozenset[int](), frozenset({0, 1}))
    assert METRICS["accuracy"].measure(Answers(scores, labels, chosen, None, right))["accuracy"] == 0.5
    assert METRICS["accuracy"].measure(Answers(scores, labels, chosen))["accuracy"] == 0.25


class Moods(ClassificationTask):
    name, fields, labels, words = "moods", ("text", "label"), ("low", "high"), (" low", " high")
    aliases: ClassVar = {"text": ("sentence", "review")}

    def prompt(self, row: Row) -> str:
        return self.text(row, "text")


def test_a_column_may_have_another_name(tmp_path: Path) -> None:
    """The field's own name comes first, then its aliases in their order, and --column before both."""
    plain = [{"label": k % 2, "own": f"own {k}", "sentence": f"sentence {k}", "review": f"review {k}"} for k in range(10)]

    def contexts(*drop: str, columns: dict[str, str] | None = None) -> set[str]:
        kept = [{("text" if c == "own" else c): v for c, v in row.items() if c not in drop} for row in plain]
        path = write_jsonl(tmp_path / "rows.jsonl", kept)
        return {
            e.candidates[0].context.split()[0] for e in load_splits(str(path), Moods(), "causal", seed=0, columns=columns).train
        }

    assert contexts() == {"own"} and contexts("own") == {"sentence"} and contexts("own", "sentence") == {"review"}
    assert contexts(columns={"text": "review"}) == {"review"}
    with pytest.raises(UserError, match=r"has the columns label; task moods needs text, label: rename them"):
        contexts("own", "sentence", "review")
