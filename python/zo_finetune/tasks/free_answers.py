"""Questions whose answers are written freely: what SQuAD, DROP and tasks of one's own have in common.

The form is MeZO's: a prompt that ends with "Answer:", behind it a space, the first accepted answer and a new line, where writing ends. Training is on these
tokens; an evaluation compares what the model writes with every accepted answer. An answer of several lines is trained on as one, which scorers read
as the same.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from zo_finetune.tasks.base import BETWEEN_SPANS, Candidate, Example, Form, Row, RowError, Task

NEWLINES = re.compile(r"\s*\n\s*")


def spans_of(task: Task, row: Row, field: str) -> tuple[tuple[str, ...], ...]:
    """The accepted answers in a column, each once, with the one span each: a text, a number, a list of them, or SQuAD's record with `text`."""
    value: Any = row[field]
    if isinstance(value, Mapping):
        value = value.get("text")
    listed = value if isinstance(value, (list, tuple)) else [value]
    if not listed:
        raise RowError(field, row[field], f"{task.name} needs an answer there, or a list of them: correct the row or remove it")
    return tuple(dict.fromkeys((digits(task, one, field),) for one in listed))


def digits(task: Task, value: Any, field: str) -> str:
    """A value as text; of a number, its digits. What is no number is a `RowError`: in a column of numbers it stands for none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return task.clean(value, field)
    if not math.isfinite(value):
        raise RowError(field, value, f"{task.name} needs a text or a finite number there: correct the row or remove it")
    return str(value)


class FreeAnswers(Task):
    objective = "language-model"
    decoding = "generate"
    metrics = ("f1", "em", "loss")

    @abstractmethod
    def prompt(self, row: Row) -> str:
        """What the answer is written behind."""

    @abstractmethod
    def accepted(self, row: Row) -> tuple[tuple[str, ...], ...]:
        """The accepted answers, each as the tuple of its spans; the first is trained on."""

    def example(self, row: Row, form: Form) -> Example:
        prompt, accepted = self.prompt(row), self.accepted(row)
        space = "" if prompt[-1:].isspace() else " "
        text = NEWLINES.sub(" ", BETWEEN_SPANS.join(accepted[0]))
        answer = Candidate(prompt, f"{space}{text}\n", neutral=self.neutral)
        return Example((answer,), 0, references=accepted)
