"""What a way to decode is: from a model and examples to answers.

Belongs here: the record of answers and the base class. Does not belong here: a particular way (one file each, beside this one), what answers are
worth (metrics/).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zo_finetune.scoring import Encoded, Scorer


@dataclass(frozen=True)
class Answers:
    """What a model answered to N examples, on the CPU, in their order; metrics read what they need of it.

    scores: fp32 [N, C], of each candidate; -inf where an example has fewer than C.
    labels: int64 [N], the right candidates' indices.
    chosen: int64 [N], the model's; -1 where it has none, since no score is finite.
    names: of the candidates, if they are the same for every example.
    right: N sets of indices that count as right, as an `Example` has them: an empty one is the label alone, and so is no set at all.
    texts, references: of generation, N each: what the model wrote, and the accepted answers as an `Example` has them.
    comparison: how one is compared with the others, as the task says.
    """

    scores: Tensor
    labels: Tensor
    chosen: Tensor
    names: tuple[str, ...] | None = None
    right: tuple[frozenset[int], ...] = ()
    texts: tuple[str, ...] = ()
    references: tuple[tuple[tuple[str, ...], ...], ...] = ()
    comparison: str = "squad"

    def hits(self) -> Tensor:
        """bool [N]: whether the chosen candidate counts as right."""
        own = self.chosen == self.labels
        if not any(self.right):
            return own
        pairs = zip(self.chosen.tolist(), self.right, own.tolist(), strict=True)
        return torch.tensor([chosen in right if right else same for chosen, right, same in pairs])


class Decoding(ABC):
    """One instance serves every task that names it."""

    name: ClassVar[str]

    @abstractmethod
    def answers(
        self,
        scorer: Scorer,
        examples: Sequence[Encoded],
        batch_size: int,
        names: Sequence[str] | None = None,
        progress: Callable[[int], None] = lambda n: None,
    ) -> Answers:
        """The answers to all examples, without gradients.

        Args:
            batch_size: examples in a batch.
            names: of the candidates, if they are the same for every example.
            progress: called with the number of examples of each batch that is done.
        """
