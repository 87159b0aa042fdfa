"""Mean cross-entropy over the candidates' scores; null where it is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from zo_finetune.decoding.base import Answers
from zo_finetune.metrics.base import Metric, is_number


class Loss(Metric):
    name = "loss"

    def measure(self, answers: Answers) -> dict[str, Any]:
        loss = torch.nn.functional.cross_entropy(answers.scores, answers.labels).item()
        return {"loss": loss if math.isfinite(loss) else None}

    def fits(self, evaluation: Mapping[str, Any]) -> bool:
        return "loss" in evaluation and is_number(evaluation["loss"], missing=True)

    def words(self, evaluation: Mapping[str, Any]) -> str:
        return f"loss {evaluation['loss']:.4f}" if evaluation["loss"] is not None else "loss not finite"
