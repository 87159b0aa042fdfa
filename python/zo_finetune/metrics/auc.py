"""How well two labels are told apart, wherever the line between them is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zo_finetune.decoding.base import Answers
from zo_finetune.metrics.base import Goal, is_number


def placements(margins: Tensor, others: Tensor) -> Tensor:
    """For each margin, the share of `others` that are smaller, ties half; fp64 [N]."""
    ordered = others.sort().values
    ranks = torch.searchsorted(ordered, margins) + torch.searchsorted(ordered, margins, right=True)
    return ranks.double() / 2 / len(others)


def auc(margins: Tensor, labels: Tensor) -> tuple[float | None, float | None]:
    """The chance that a random example of label 1 has a larger margin than one of label 0, ties half (Mann-Whitney), and its standard error (DeLong
    et al. 1988); None for the first if a label is absent, or a margin is NaN; for the second if one has fewer than two examples.

    No constant added to the margins changes it: what it gains is discrimination, what accuracy gains beyond it is calibration.
    """
    ones, zeros = margins[labels == 1].double(), margins[labels == 0].double()
    if not len(ones) or not len(zeros) or margins.isnan().any():
        return None, None
    above, below = placements(ones, zeros), placements(zeros, ones)
    if min(len(ones), len(zeros)) < 2:
        return above.mean().item(), None
    return above.mean().item(), math.sqrt(above.var().item() / len(ones) + below.var().item() / len(zeros))


class AUC(Goal):
    """Of tasks with two labels; the margin is the difference of their scores."""

    name = "auc"

    def suits(self, names: tuple[str, ...] | None) -> bool:
        return names is not None and len(names) == 2

    def value(self, answers: Answers) -> Tensor:
        """Half where a label is absent: nothing is told apart there."""
        margins, ones = answers.scores[:, 1] - answers.scores[:, 0], answers.labels == 1
        pairs = ones[:, None] & ~ones
        above = (margins[:, None] > margins).double() + 0.5 * (margins[:, None] == margins).double()
        return torch.where(pairs.any(), (above * pairs).sum() / pairs.sum().clamp(min=1), 0.5)

    def measure(self, answers: Answers) -> dict[str, Any]:
        if not self.suits(answers.names):
            return {}
        area, error = auc(answers.scores[:, 1] - answers.scores[:, 0], answers.labels)
        return {"auc": area, "auc_stderr": error}

    def fits(self, evaluation: Mapping[str, Any]) -> bool:
        return all(is_number(evaluation.get(name), missing=True) for name in ("auc", "auc_stderr"))

    def words(self, evaluation: Mapping[str, Any]) -> str:
        if evaluation.get("auc") is None:
            return ""
        error = evaluation.get("auc_stderr")
        return f"AUC {evaluation['auc']:.3f}" + ("" if error is None else f" ± {error:.3f}")
