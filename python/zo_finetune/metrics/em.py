"""The share of written answers that are an accepted one, but for what the task's scorer passes over (texts.py)."""

from __future__ import annotations

from torch import Tensor

from zo_finetune.decoding.base import Answers
from zo_finetune.metrics.base import Mean, best_of_accepted


class ExactMatch(Mean):
    name, title = "em", "EM"

    def each(self, answers: Answers) -> Tensor:
        return best_of_accepted(answers, 1)
