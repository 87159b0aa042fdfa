"""What a way to decode is: from a model and examples to answers.

Belongs here: the record of answers and the base class. Does not belong here: a particular way (one file each, beside this one), what answers are
worth (metrics/).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from zo_finetune.scoring import Encoded, Scorer
from zo_finetune.tasks.base import Task


@dataclass(frozen=True)
class Answers:
    """What a model answered to N examples, on the CPU, in their order; metrics read what they need of it.

    scores: fp32 [N, C], of each candidate; -inf where an example has fewer than C.
    labels: int64 [N], the right candidates' indices.
    chosen: int64 [N], the model's; -1 where it has none, since no score is finite.
    names: of the candidates, if they are the same for every example.
    right: bool [N, C], which candidates count as right; without it the labels alone.
    texts, references: of free answers, N each: what the model wrote, and the accepted answers as an `Example` has them.
    comparison: how one is compared with the others, as the task says.
    tokens: int64 [N], of free answers: how many the one that is trained on has, whose mean log-probability is the score.
    """

    scores: Tensor
    labels: Tensor
    chosen: Tensor
    names: tuple[str, ...] | None = None
    right: Tensor | None = None
    texts: tuple[str, ...] = ()
    references: tuple[tuple[tuple[str, ...], ...], ...] = ()
    comparison: str = "squad"
    tokens: Tensor | None = None

    def hits(self) -> Tensor:
        """bool [N]: whether the chosen candidate counts as right."""
        if self.right is None:
            return self.chosen == self.labels
        return self.right.gather(1, self.chosen.clamp(min=0)[:, None])[:, 0] & (self.chosen >= 0)


class Decoding(ABC):
    """One instance serves every task that names it."""

    name: ClassVar[str]
    captured: ClassVar[bool] = True  # whether `respond` may be a part of a CUDA graph: the host reads nothing in it

    @abstractmethod
    def answers(
        self,
        task: Task,
        scorer: Scorer,
        examples: Sequence[Encoded],
        batch_size: int,
        progress: Callable[[int], None] = lambda n: None,
    ) -> Answers:
        """The answers to all examples, without gradients.

        Args:
            batch_size: examples in a batch.
            progress: called with the number of examples of each batch that is done.
        """

    @abstractmethod
    def batch(self, scorer: Scorer, examples: Sequence[Encoded], multiple: int = 1) -> Any:
        """What `respond` takes, on the model's device; `multiple`: of tokens that widths are padded to."""

    @abstractmethod
    def respond(self, task: Task, scorer: Scorer, batch: Any) -> Answers:
        """The answers to one batch, on the model's device, without gradients."""
