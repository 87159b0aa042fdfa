"""How good a model is at a task: the task's way to decode, then its metrics; and an evaluation's line of words.

Belongs here: what every evaluation has, whatever the task. Does not belong here: a metric (metrics/), a way to decode (decoding/), training
(train.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from zo_finetune.decoding import DECODINGS, Answers
from zo_finetune.metrics import METRICS
from zo_finetune.metrics.base import is_number
from zo_finetune.scoring import Encoded, Scorer
from zo_finetune.tasks.base import Task


def evaluate(
    task: Task,
    scorer: Scorer,
    examples: Sequence[Encoded],
    batch_size: int,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """What `measure` says of the model's answers to `examples`.

    Args:
        batch_size: examples in a batch.
        progress: called with the number of examples of each batch that is done.
    """
    return measure(task, answers_of(task, scorer, examples, batch_size, progress))


def answers_of(
    task: Task,
    scorer: Scorer,
    examples: Sequence[Encoded],
    batch_size: int,
    progress: Callable[[int], None] = lambda n: None,
) -> Answers:
    """The model's answers to `examples`, as the task decodes them; arguments as `evaluate`'s."""
    return DECODINGS[task.decoding].answers(task, scorer, examples, batch_size, progress)


def measure(task: Task, answers: Answers) -> dict[str, Any]:
    """The numbers of `task`'s metrics.

    Returns:
        what each metric measures, `examples`, and `majority`: what always giving the most frequent right label would be worth as accuracy (None where
        candidates are no labels). An example whose best score is not finite has no answer: `without_score` says how many there are, if there are any.
    """
    result: dict[str, Any] = {}
    for name in task.metrics:
        result |= METRICS[name].measure(answers)
    result["examples"] = len(answers.labels)
    counts = None if answers.names is None else torch.bincount(answers.labels)
    result["majority"] = None if counts is None else counts.max().item() / len(answers.labels)
    if silent := int((answers.chosen < 0).sum()):
        result["without_score"] = silent
    return result


def is_evaluation(task: Task, value: Any) -> bool:
    """Whether a value out of JSON is what `measure` returns for the task."""
    if not isinstance(value, dict) or type(value.get("examples")) is not int or not is_number(value.get("majority"), missing=True):
        return False
    return all(METRICS[name].fits(value) for name in task.metrics)


def describe(task: Task, evaluation: Mapping[str, Any]) -> str:
    """One line about an evaluation of the task."""
    first, *others = (METRICS[name].words(evaluation) for name in task.metrics)
    majority = "" if evaluation.get("majority") is None else f" (majority {evaluation['majority']:.4f})"
    line = ", ".join(filter(None, (f"{first} on {evaluation['examples']} examples{majority}", *others)))
    if evaluation.get("without_score"):
        line += f"; {evaluation['without_score']} examples have no score: the model's numbers are not finite"
    return line
