"""The mean over the classes of each one's F1, which a model that always gives the most frequent answer has little of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zo_finetune.decoding.base import Answers
from zo_finetune.metrics.base import Goal, is_number


class MacroF1(Goal):
    """Over the classes that are a label or an answer of some example: those of scikit-learn's `f1_score(average="macro")`."""

    name = "macro-f1"

    def value(self, answers: Answers) -> Tensor:
        classes = torch.arange(answers.scores.shape[1], device=answers.scores.device)[:, None]
        said, wanted = answers.chosen == classes, answers.labels == classes
        both, either = (said & wanted).sum(-1).double(), said.sum(-1) + wanted.sum(-1)
        return (2 * both / either.clamp(min=1)).sum() / (either > 0).sum()

    def measure(self, answers: Answers) -> dict[str, Any]:
        return {self.name: self.value(answers).item()}

    def fits(self, evaluation: Mapping[str, Any]) -> bool:
        return is_number(evaluation.get(self.name))

    def words(self, evaluation: Mapping[str, Any]) -> str:
        return f"macro-F1 {evaluation[self.name]:.4f}"
