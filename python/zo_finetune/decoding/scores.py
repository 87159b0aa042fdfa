"""The answer is the candidate with the highest score: the mean log-probability of its tokens (scoring.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zo_finetune.data import in_batches
from zo_finetune.decoding.base import Answers, Decoding
from zo_finetune.scoring import Encoded, Scorer


class ByScore(Decoding):
    """Examples are sorted by length first, so that little is padded."""

    name = "scores"

    @torch.no_grad()
    def answers(
        self,
        scorer: Scorer,
        examples: Sequence[Encoded],
        batch_size: int,
        names: Sequence[str] | None = None,
        progress: Callable[[int], None] = lambda n: None,
    ) -> Answers:
        scores: list[Tensor] = []
        done: list[Encoded] = []
        for part in in_batches(sorted(examples, key=lambda e: e.length), batch_size):
            batch = scorer.collate(part)
            scores.extend(scorer.scores(batch))  # rows, which differ in width where examples differ in their number of candidates
            done.extend(part)
            progress(len(part))
        width = max(len(row) for row in scores)
        table = torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=-torch.inf) for row in scores]).cpu()
        scored = table.max(-1).values.isfinite()  # a NaN is the maximum of its row
        chosen = torch.where(scored, table.argmax(-1), -1)
        labels, right = torch.tensor([e.label for e in done]), tuple(e.right for e in done)
        return Answers(table, labels, chosen, None if names is None else tuple(names), right)
