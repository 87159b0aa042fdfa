"""Cross-entropy over the candidates' scores (MeZO, appendix E)."""

from __future__ import annotations

import torch
from torch import Tensor

from zo_finetune.objectives.base import Objective
from zo_finetune.scoring import Batch, Scorer


class Classification(Objective):
    name = "classification"
    chooses = True

    def loss(self, scorer: Scorer, batch: Batch) -> Tensor:
        return torch.nn.functional.cross_entropy(scorer.contrasts(batch), batch.labels)
