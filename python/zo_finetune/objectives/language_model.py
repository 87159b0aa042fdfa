"""The mean of -log p over the right answers' tokens, which all count the same."""

from __future__ import annotations

from torch import Tensor

from zo_finetune.losses import token_loss
from zo_finetune.objectives.base import Objective
from zo_finetune.scoring import Batch, Scorer


class LanguageModelling(Objective):
    name = "language-model"
    gold_only = True

    def loss(self, scorer: Scorer, batch: Batch) -> Tensor:
        return token_loss(scorer.token_log_probs(batch), batch.present)
