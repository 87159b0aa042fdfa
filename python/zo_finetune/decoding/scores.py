"""The answer is the candidate with the highest score: the mean log-probability of its tokens (scoring.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zo_finetune import team
from zo_finetune.data import in_batches
from zo_finetune.decoding.base import Answers, Decoding
from zo_finetune.scoring import Batch, Encoded, Scorer, right_ones
from zo_finetune.tasks.base import Task


class ByScore(Decoding):
    """The candidate with the highest mean log-probability."""

    name = "scores"

    def answers(
        self,
        task: Task,
        scorer: Scorer,
        examples: Sequence[Encoded],
        batch_size: int,
        progress: Callable[[int], None] = lambda n: None,
    ) -> Answers:
        return choose(score_table(scorer.scores, scorer, examples, batch_size, progress), examples, task.class_names)

    def batch(self, scorer: Scorer, examples: Sequence[Encoded], multiple: int = 1) -> Batch:
        return scorer.collate(examples, multiple)

    @torch.no_grad()
    def respond(self, task: Task, scorer: Scorer, batch: Batch) -> Answers:
        scores = scorer.contrasts(batch)  # a goal of choices sets an example's candidates against each other
        return Answers(scores, batch.labels, highest(scores), task.class_names, batch.right)


@torch.no_grad()
def score_table(
    score: Callable[[Batch], Tensor],
    scorer: Scorer,
    examples: Sequence[Encoded],
    batch_size: int,
    progress: Callable[[int], None] = lambda n: None,
) -> Tensor:
    """fp32 [N, C] on the CPU, in the order of the examples; -inf where one has fewer candidates than C. Examples of one length are computed
    together, so that little is padded.

    Args:
        score: [B, C] of a batch.
    """
    parts = list(in_batches(sorted(range(len(examples)), key=lambda k: examples[k].length), batch_size))
    tables = team.mapped(lambda part: score(scorer.collate([examples[k] for k in part])).cpu(), parts, progress, len)
    # Of an example by its place: rows, as wide as the most candidates of their batch.
    found = {k: row for part, table in zip(parts, tables, strict=True) for k, row in zip(part, table, strict=True)}
    width = max(map(len, found.values()))
    rows = (found[k] for k in range(len(examples)))
    return torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=-torch.inf) for row in rows])


def highest(table: Tensor) -> Tensor:
    """int64 [N]: the candidate with the highest score of each row; -1 where none is finite."""
    scored = table.max(-1).values.isfinite()  # a NaN is the maximum of its row
    return torch.where(scored, table.argmax(-1), -1)


def choose(table: Tensor, examples: Sequence[Encoded], names: tuple[str, ...] | None = None) -> Answers:
    """The candidates with the highest scores of `table` [N, C]."""
    labels = torch.tensor([e.label for e in examples])
    return Answers(table, labels, highest(table), names, right_ones(examples, table.shape[1]))


def calibrated_table(
    scorer: Scorer,
    examples: Sequence[Encoded],
    neutrals: Sequence[Encoded],
    batch_size: int,
    progress: Callable[[int], None] = lambda n: None,
) -> Tensor:
    """Calibrated scores (MeZO's "sfc"; Holtzman et al. 2021): an answer's log-probability minus that of the same answer in neutral surroundings. Shape,
    order and arguments as `score_table` has them.

    Args:
        neutrals: of each example the same candidates in neutral surroundings; equal ones are computed once.
    """
    sums = score_table(scorer.sums, scorer, examples, batch_size, progress)
    places = {one: k for k, one in enumerate(dict.fromkeys(neutrals))}
    anyway = score_table(scorer.sums, scorer, [*places], batch_size)[[places[one] for one in neutrals]]
    return torch.where(sums == -torch.inf, sums, sums - anyway)
