"""How good a model is at a task: accuracy with its standard error, loss, and what the model tends to answer.

Belongs here: metrics and the pass over an evaluation set. Does not belong here: how scores come about (scoring.py), training
(train.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zo_finetune.data import in_batches
from zo_finetune.scoring import Encoded, Scorer


def standard_error(p: float, n: int) -> float:
    """Of a share p of n independent examples: sqrt(p (1 - p) / n)."""
    return math.sqrt(p * (1 - p) / n)


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


@torch.no_grad()
def evaluate(
    scorer: Scorer,
    examples: Sequence[Encoded],
    batch_size: int,
    class_names: Sequence[str] | None,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Accuracy and its kin over `examples`.

    Args:
        batch_size: examples in a batch; they are sorted by length first, so that little is padded.
        class_names: of the candidates, if they are the same for every example.
        progress: called with the number of examples of each batch that is done.

    Returns:
        `accuracy`, `accuracy_stderr`, `loss` (mean cross-entropy over the candidates' scores, None where it is not finite), `examples`; with
        class names also `predicted`, the share of each answer, and for two classes `auc`. An example whose best score is not finite has no
        answer: it counts as a wrong one, and `without_score` says how many there are, if there are any.
    """
    scores: list[Tensor] = []
    labels: list[int] = []
    for part in in_batches(sorted(examples, key=lambda e: e.length), batch_size):
        batch = scorer.collate(part)
        scores.extend(scorer.scores(batch))  # rows, which differ in width where examples differ in their number of candidates
        labels.extend(e.label for e in part)
        progress(len(part))
    width = max(len(row) for row in scores)
    table = torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=-torch.inf) for row in scores]).cpu()
    truth = torch.tensor(labels)
    scored = table.max(-1).values.isfinite()  # a NaN is the maximum of its row
    answers = torch.where(scored, table.argmax(-1), -1)
    accuracy = (answers == truth).double().mean().item()
    loss = torch.nn.functional.cross_entropy(table, truth).item()
    result: dict[str, Any] = {
        "accuracy": accuracy,
        "accuracy_stderr": standard_error(accuracy, len(truth)),
        "loss": loss if math.isfinite(loss) else None,
        "examples": len(truth),
    }
    if not scored.all():
        result["without_score"] = int((~scored).sum())
    if class_names is not None:
        result["predicted"] = {name: (answers == k).double().mean().item() for k, name in enumerate(class_names)}
        if len(class_names) == 2:
            result["auc"] = auc(table[:, 1] - table[:, 0], truth)
    return result
