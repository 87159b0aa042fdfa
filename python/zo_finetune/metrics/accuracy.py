"""The share of right answers. An example without an answer counts as a wrong one."""

from __future__ import annotations

from torch import Tensor

from zo_finetune.decoding.base import Answers
from zo_finetune.metrics.base import Mean


class Accuracy(Mean):
    name = title = "accuracy"

    def each(self, answers: Answers) -> Tensor:
        return answers.hits().double()
