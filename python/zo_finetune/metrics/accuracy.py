"""The share of right answers. An example without an answer counts as a wrong one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zo_finetune.decoding.base import Answers
from zo_finetune.metrics.base import Metric, is_number, standard_error


class Accuracy(Metric):
    name = "accuracy"

    def measure(self, answers: Answers) -> dict[str, Any]:
        accuracy = answers.hits().double().mean().item()
        return {"accuracy": accuracy, "accuracy_stderr": standard_error(accuracy, len(answers.labels))}

    def fits(self, evaluation: Mapping[str, Any]) -> bool:
        return is_number(evaluation.get("accuracy")) and is_number(evaluation.get("accuracy_stderr"))

    def words(self, evaluation: Mapping[str, Any]) -> str:
        return f"accuracy {evaluation['accuracy']:.4f} ± {evaluation['accuracy_stderr']:.4f}"
