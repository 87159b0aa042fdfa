"""Accuracy of two labels if the line between their scores lay where it is best on these same rows: the most that calibration could reach without
learning anything. A bound to compare with, chosen with the labels in sight, and no result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zo_finetune.decoding.base import Answers
from zo_finetune.metrics.base import Metric, is_number

KEY = "accuracy_at_best_threshold"


def best_accuracy(margins: Tensor, labels: Tensor) -> float | None:
    """The highest accuracy of "1 where the margin is above t, else 0" over all t; None if a margin is NaN."""
    if margins.isnan().any():
        return None
    values, places = margins.double().sort()
    ones = (labels[places] == 1).long()
    # the first k rows get 0, the others 1; rows of one margin stay together
    right = torch.cat((ones.sum().view(1), ones.sum() + torch.cumsum(1 - 2 * ones, 0)))
    parted = torch.cat((torch.tensor([True]), values[1:] != values[:-1], torch.tensor([True])))
    return right[parted].max().item() / len(labels)


class BestThreshold(Metric):
    """Of tasks with two labels; the margin is the difference of their scores."""

    name = "best-threshold"

    def measure(self, answers: Answers) -> dict[str, Any]:
        if answers.names is None or len(answers.names) != 2:
            return {}
        return {KEY: best_accuracy(answers.scores[:, 1] - answers.scores[:, 0], answers.labels)}

    def fits(self, evaluation: Mapping[str, Any]) -> bool:
        return is_number(evaluation.get(KEY), missing=True)

    def words(self, evaluation: Mapping[str, Any]) -> str:
        return ""
