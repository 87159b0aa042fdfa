"""How much of the words of a written answer and of an accepted one is the same (texts.py), the best of the accepted ones."""

from __future__ import annotations

from torch import Tensor

from zo_finetune.decoding.base import Answers
from zo_finetune.metrics.base import Mean, best_of_accepted


class F1(Mean):
    name, title = "f1", "F1"

    def each(self, answers: Answers) -> Tensor:
        return best_of_accepted(answers, 0)
