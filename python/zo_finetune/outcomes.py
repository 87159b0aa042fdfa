"""What an evaluation made of each row, as a file of a run's folder: what intervals are made of.

Belongs here: from answers to a table of rows, its file, and back. Does not belong here: when a run writes one (run.py), what rows are worth together
(metrics/, intervals.py, which a training need not load).

A line for each row, in the order of the evaluation: the row's number in its file, what it counts in the task's metric, the right candidate, and the score of
each candidate, in digits that give the fp32 numbers back. `nan` stands for what is no number.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from zo_finetune import files
from zo_finetune.decoding import Answers
from zo_finetune.errors import UserError, one_line
from zo_finetune.metrics import METRICS
from zo_finetune.metrics.base import Mean
from zo_finetune.tasks.base import Task

BEFORE, DEV, AFTER = NAMES = ("scores_before.csv", "scores_dev.csv", "scores_after.csv")  # the second: before, on the dev examples
MOST_NUMBERS = 4_000_000  # in a file, which has less than `files.MOST_BYTES` then; of more none is written
OWN = ("row", "value", "label")

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]


@dataclass(frozen=True)
class Outcomes:
    """What an evaluation made of each of N rows.

    rows: their numbers, by which runs are paired. value: [N], of the task's metric (1 for a right answer). label: [N], the right candidate.
    scores: [N, C]; -inf where a row has fewer candidates; None where answers have none.
    """

    rows: Whole
    value: Floats
    label: Whole
    scores: Floats | None = None

    def ordered(self) -> Outcomes:
        """In the order of the rows' numbers."""
        at = np.argsort(self.rows, kind="stable")
        return Outcomes(self.rows[at], self.value[at], self.label[at], None if self.scores is None else self.scores[at])


def outcomes_of(task: Task, answers: Answers, rows: Sequence[int]) -> Outcomes:
    """What each row came to.

    Args:
        rows: their numbers.
    """
    means = [metric for name in task.metrics if isinstance(metric := METRICS[name], Mean)]
    value = means[0].each(answers) if means else answers.hits().double()
    scores = None if answers.texts else answers.scores.double().numpy()
    return Outcomes(np.array(rows), value.numpy(), answers.labels.numpy(), scores)


def value_name(task: Task) -> str:
    """Whose values an `Outcomes` of the task has."""
    return next((name for name in task.metrics if isinstance(METRICS[name], Mean)), "accuracy")


def write(path: Path, found: Outcomes) -> None:
    """The file; none where there are too many rows."""
    width = 0 if found.scores is None else found.scores.shape[1]
    if len(found.rows) * (len(OWN) + width) > MOST_NUMBERS:
        return
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow((*OWN, *(f"score_{k}" for k in range(width))))
    scores = found.scores if found.scores is not None else np.empty((len(found.rows), 0))
    for row, value, label, given in zip(found.rows, found.value, found.label, scores, strict=True):
        writer.writerow((row, f"{value:.9g}", label, *(f"{score:.9g}" for score in given)))
    files.write_text(path, text.getvalue())


def read(path: Path) -> Outcomes | None:
    """What `write` wrote; None if it wrote nothing.

    Raises:
        UserError: it holds something else.
    """
    try:
        with files.open_plain(path) as raw:
            head, *lines = csv.reader(io.TextIOWrapper(raw, newline=""))
        if tuple(head[: len(OWN)]) != OWN or not lines:
            raise ValueError(f"its first line is {','.join(head)!r:.80}")
        table = np.array([[float(word) for word in line] for line in lines])
        if not (np.abs(table[:, [0, 2]]) < 1 << 53).all():
            raise ValueError("a row's number or label is none")
        whole = table[:, [0, 2]].astype(np.int64)
        width = len(head) - len(OWN)
        labels = whole[:, 1]
        if (
            table.shape[1] != len(head)
            or (whole != table[:, [0, 2]]).any()
            or labels.min() < 0
            or (width and labels.max() >= width)
        ):
            raise ValueError("a row's number or label is none")
        if len(np.unique(whole[:, 0])) != len(whole):
            raise ValueError("a row is there twice")
    except FileNotFoundError:
        return None
    except (csv.Error, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not as a run wrote it: {one_line(error)}") from error
    return Outcomes(whole[:, 0], table[:, 1], labels, table[:, len(OWN) :] if width else None)


def fits(found: Outcomes, examples: int, value: float) -> bool:
    """Whether these are the rows of an evaluation of so many examples with this mean of the metric."""
    tensor = torch.from_numpy(found.value)
    return len(tensor) == examples and abs(tensor.mean().item() - value) < 1e-6
