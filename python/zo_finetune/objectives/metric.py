"""A metric of a task, raised (MeZO, Malladi et al. 2023, section 3.3): the loss is 1 - the metric over the batch. It has no derivative, and needs none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zo_finetune.decoding import DECODINGS
from zo_finetune.metrics.base import Goal
from zo_finetune.objectives.base import Objective
from zo_finetune.scoring import Encoded, Scorer
from zo_finetune.tasks.base import Task


class OfMetric(Objective):
    """Answers come about as in an evaluation: chosen by their scores, or written. One instance for a task and a metric of it."""

    differentiable = False

    def __init__(self, task: Task, metric: Goal) -> None:
        self.task, self.metric, self.decoding = task, metric, DECODINGS[task.decoding]
        self.captured = self.decoding.captured

    def batch(self, scorer: Scorer, examples: Sequence[Encoded], multiple: int = 1) -> Any:
        return self.decoding.batch(scorer, examples, multiple)

    def loss(self, scorer: Scorer, batch: Any) -> Tensor:
        return 1 - self.metric.value(self.decoding.respond(self.task, scorer, batch))
