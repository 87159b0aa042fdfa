"""What an objective is: how training examples become a micro-batch, and a micro-batch a number to lower.

Belongs here: the base class. Does not belong here: a particular objective (one file each, beside this one), scores and log-probabilities (scoring.py),
what an answer is worth (metrics/).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from zo_finetune.errors import UserError
from zo_finetune.scoring import Encoded, Scorer
from zo_finetune.tasks.base import Task


class Objective(ABC):
    """One instance of a class with a name serves every task."""

    name: ClassVar[str]
    gold_only: ClassVar[bool] = False  # training examples are encoded with the right candidate alone
    chooses: ClassVar[bool] = False  # it compares the candidates of a task, and says nothing of a free answer
    balanced: ClassVar[bool] = False  # its batches hold each label equally often
    differentiable: ClassVar[bool] = True
    captured: bool = True  # whether `loss` may be a part of a CUDA graph: the host reads nothing in it

    def of(self, task: Task, centre: float | None) -> Objective:
        """The objective as it is of a task.

        Args:
            centre: --centre.

        Raises:
            UserError: an option says nothing of it.
        """
        if centre is not None:
            raise UserError(f"--centre {centre:g} is of --objective pairs: leave it out")
        return self

    def check(self, examples: Sequence[Encoded]) -> list[str]:
        """Lines about what it cannot learn from training examples.

        Raises:
            UserError: it can learn from none of them.
        """
        return []

    def batch(self, scorer: Scorer, examples: Sequence[Encoded], multiple: int = 1) -> Any:
        """What `loss` takes; once a step, whatever the number of forward passes. `multiple`: of tokens that widths are padded to."""
        return scorer.collate(examples, multiple)

    @abstractmethod
    def loss(self, scorer: Scorer, batch: Any) -> Tensor:
        """A 0-d tensor, fp32 or wider whatever the model's type: a step divides a difference of two by 2 eps."""
