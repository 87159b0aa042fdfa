"""The mean over the classes of each one's F1, which a model that always gives the most frequent answer has little of.

It is no mean over the examples: its standard error is that of what each example adds to it to first order (the delta method). With a the share of the
examples that are of a class and said to be, and b the shares that are of it and that are said to be, together, its F1 is 2 a / b, and an example adds
2 (its part of a) / b - 2 a (its part of b) / b^2 to it, 0 on average.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zo_finetune.decoding.base import Answers
from zo_finetune.metrics.base import Goal, is_number, standard_error


class MacroF1(Goal):
    """Over the classes that are a label or an answer of some example: those of scikit-learn's `f1_score(average="macro")`."""

    name = "macro-f1"

    def value(self, answers: Answers) -> Tensor:
        return self._with_influences(answers)[0]

    def measure(self, answers: Answers) -> dict[str, Any]:
        value, influences = self._with_influences(answers)
        return {self.name: value.item(), f"{self.name}_stderr": standard_error(influences)}

    @staticmethod
    def _with_influences(answers: Answers) -> tuple[Tensor, Tensor]:
        """The number, and what each example adds to it to first order; float64, 0-d and [N]."""
        classes = torch.arange(answers.scores.shape[1], device=answers.scores.device)[:, None]
        said, wanted = answers.chosen == classes, answers.labels == classes
        both, either = (said & wanted).double(), said.double() + wanted.double()  # [classes, N]
        a, b = both.mean(-1, keepdim=True), either.mean(-1, keepdim=True)
        there = b > 0
        f1 = torch.where(there, 2 * a / b, 0.0)
        added = torch.where(there, (2 * both - f1 * either) / b, 0.0)
        return f1.sum() / there.sum(), added.sum(0) / there.sum()

    def fits(self, evaluation: Mapping[str, Any]) -> bool:
        """The standard error may be missing: earlier versions had none."""
        return is_number(evaluation.get(self.name)) and is_number(evaluation.get(f"{self.name}_stderr"), missing=True)

    def words(self, evaluation: Mapping[str, Any]) -> str:
        error = evaluation.get(f"{self.name}_stderr")
        return f"macro-F1 {evaluation[self.name]:.4f}" + ("" if error is None else f" ± {error:.4f}")
