"""What a metric is: numbers about answers, under keys of an evaluation, and the words for them.

Belongs here: the base class and what several metrics share. Does not belong here: a particular metric (one file each, beside this one), how answers
come about (decoding/).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from zo_finetune.decoding.base import Answers
from zo_finetune.metrics.texts import COMPARISONS


class Metric(ABC):
    """One instance serves every task that names it. An evaluation is a dict of JSON values; a metric owns a few keys of it."""

    name: ClassVar[str]

    @abstractmethod
    def measure(self, answers: Answers) -> dict[str, Any]:
        """Its keys of an evaluation. A task's first metric gives `name` and `name`_stderr, both finite: what curves and tables show."""

    @abstractmethod
    def fits(self, evaluation: Mapping[str, Any]) -> bool:
        """Whether its keys in an evaluation out of a file are as `measure` makes them."""

    @abstractmethod
    def words(self, evaluation: Mapping[str, Any]) -> str:
        """What a line about the evaluation says of it; nothing where there is nothing to say."""


class Goal(Metric):
    """A metric that an objective may raise: one number, the larger the better, under its own name."""

    def suits(self, names: tuple[str, ...] | None) -> bool:
        """Whether it is one of a task whose candidates have these names, if they are the same for every example."""
        return True

    @abstractmethod
    def value(self, answers: Answers) -> Tensor:
        """The number of a batch, 0-d float64, on the answers' device."""


class Mean(Goal):
    """A goal that is the mean of a number of each example."""

    title: ClassVar[str]  # what `words` call it

    @abstractmethod
    def each(self, answers: Answers) -> Tensor:
        """Float64 [N], on the answers' device."""

    def value(self, answers: Answers) -> Tensor:
        return self.each(answers).mean()

    def measure(self, answers: Answers) -> dict[str, Any]:
        values = self.each(answers)
        return {self.name: values.mean().item(), f"{self.name}_stderr": standard_error(values)}

    def fits(self, evaluation: Mapping[str, Any]) -> bool:
        return is_number(evaluation.get(self.name)) and is_number(evaluation.get(f"{self.name}_stderr"))

    def words(self, evaluation: Mapping[str, Any]) -> str:
        return f"{self.title} {evaluation[self.name]:.4f} ± {evaluation[f'{self.name}_stderr']:.4f}"


def is_number(value: Any, missing: bool = False) -> bool:
    """Whether a value out of JSON is a float; `missing`: or null, which stands for what is not finite."""
    return type(value) is float or (missing and value is None)


def standard_error(values: Tensor) -> float:
    """Of the mean of n independent values: sqrt(sum of (value - mean)^2 / n) / sqrt(n), which for zeros and ones is sqrt(p (1 - p) / n)."""
    return (values.double().std(correction=0) / len(values) ** 0.5).item()


def best_of_accepted(answers: Answers, which: int) -> Tensor:
    """Of each written answer, float64 [N], the best of its comparisons with the accepted ones by the task's scorer; which: 0 its F1, 1 its exact match."""
    compare = COMPARISONS[answers.comparison]
    pairs = zip(answers.texts, answers.references, strict=True)
    return torch.tensor([max(compare(text, one)[which] for one in accepted) for text, accepted in pairs], dtype=torch.float64)
