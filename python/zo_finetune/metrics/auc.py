"""How well two labels are told apart, wherever the line between them is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zo_finetune.decoding.base import Answers
from zo_finetune.metrics.base import Metric, is_number


def auc(margins: Tensor, labels: Tensor) -> float | None:
    """The chance that a random example of label 1 has a larger margin than one of label 0, ties half (Mann-Whitney); None if a
    label is absent, or a margin is NaN.

    No constant added to the margins changes it: what it gains is discrimination, what accuracy gains beyond it is calibration.
    """
    ones, zeros = margins[labels == 1].double(), margins[labels == 0].double()
    if not len(ones) or not len(zeros) or margins.isnan().any():
        return None
    ranks = torch.searchsorted(zeros.sort().values, ones) + torch.searchsorted(zeros.sort().values, ones, right=True)
    return (ranks.double().mean() / 2 / len(zeros)).item()


class AUC(Metric):
    """Of tasks with two labels; the margin is the difference of their scores."""

    name = "auc"

    def measure(self, answers: Answers) -> dict[str, Any]:
        if answers.names is None or len(answers.names) != 2:
            return {}
        return {"auc": auc(answers.scores[:, 1] - answers.scores[:, 0], answers.labels)}

    def fits(self, evaluation: Mapping[str, Any]) -> bool:
        return is_number(evaluation.get("auc"), missing=True)

    def words(self, evaluation: Mapping[str, Any]) -> str:
        return f"AUC {evaluation['auc']:.3f}" if evaluation.get("auc") is not None else ""
