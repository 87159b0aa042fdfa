"""Ranking: right answers above wrong ones, over pairs (losses.py has the formulas and what they are consistent for)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zo_finetune.errors import UserError
from zo_finetune.losses import CENTRE, choice_loss, pair_loss
from zo_finetune.objectives.base import Objective
from zo_finetune.scoring import Batch, Encoded, Scorer
from zo_finetune.tasks.base import Task


class Pairs(Objective):
    """Of examples with different labels; within each example where candidates are its own."""

    name = "pairs"
    chooses = True
    balanced = True

    def __init__(self, centre: float = CENTRE) -> None:
        self.centre = centre

    def of(self, task: Task, centre: float | None) -> Objective:
        if task.class_names is not None:
            return self if centre is None else Pairs(centre)
        if centre:
            raise UserError(
                f"--centre {centre:g} holds the labels' mean scores together, and task {task.name} has no labels: leave it out"
            )
        return Choices()

    def loss(self, scorer: Scorer, batch: Batch) -> Tensor:
        return pair_loss(scorer.contrasts(batch), batch.labels, self.centre)


class Choices(Objective):
    """`Pairs` of a task whose candidates differ from row to row."""

    def check(self, examples: Sequence[Encoded]) -> list[str]:
        alone = sum(len(e.spans) <= len(e.right or {e.label}) for e in examples)
        if alone == len(examples):
            raise UserError("--objective pairs sets right candidates against wrong ones, and no training row has a wrong one")
        told = f"{alone:,} of {len(examples):,} training rows have no wrong candidate: --objective pairs learns nothing of them"
        return [told] if alone else []

    def loss(self, scorer: Scorer, batch: Batch) -> Tensor:
        return choice_loss(scorer.contrasts(batch), batch.right)
