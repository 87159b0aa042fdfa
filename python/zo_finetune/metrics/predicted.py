"""What the model tends to answer: the share of each of a task's labels among its answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zo_finetune.decoding.base import Answers
from zo_finetune.metrics.base import Metric, is_number


class Predicted(Metric):
    name = "predicted"

    def measure(self, answers: Answers) -> dict[str, Any]:
        if answers.names is None:
            return {}
        return {"predicted": {name: (answers.chosen == k).double().mean().item() for k, name in enumerate(answers.names)}}

    def fits(self, evaluation: Mapping[str, Any]) -> bool:
        shares = evaluation.get("predicted", {})
        return isinstance(shares, dict) and all(map(is_number, shares.values()))

    def words(self, evaluation: Mapping[str, Any]) -> str:
        shares = evaluation.get("predicted", {})
        return "answers " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()) if shares else ""
