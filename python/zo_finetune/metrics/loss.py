"""Mean cross-entropy over the candidates' scores, or of free answers the mean of -log p over the tokens trained on; null where it is not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from zo_finetune.decoding.base import Answers
from zo_finetune.metrics.base import Metric, is_number


class Loss(Metric):
    name = "loss"

    def measure(self, answers: Answers) -> dict[str, Any]:
        if answers.tokens is None:
            loss = torch.nn.functional.cross_entropy(answers.scores, answers.labels)
        else:
            loss = -(answers.scores[:, 0] * answers.tokens).sum() / answers.tokens.sum()
        return {"loss": loss.item() if loss.isfinite() else None}

    def fits(self, evaluation: Mapping[str, Any]) -> bool:
        return "loss" in evaluation and is_number(evaluation["loss"], missing=True)

    def words(self, evaluation: Mapping[str, Any]) -> str:
        return f"loss {evaluation['loss']:.4f}" if evaluation["loss"] is not None else "loss not finite"
