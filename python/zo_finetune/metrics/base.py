"""What a metric is: numbers about answers, under keys of an evaluation, and the words for them.

Belongs here: the base class and what several metrics share. Does not belong here: a particular metric (one file each, beside this one), how answers
come about (decoding/).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from zo_finetune.decoding.base import Answers


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


def is_number(value: Any, missing: bool = False) -> bool:
    """Whether a value out of JSON is a float; `missing`: or null, which stands for what is not finite."""
    return type(value) is float or (missing and value is None)


def standard_error(p: float, n: int) -> float:
    """Of a share p of n independent examples: sqrt(p (1 - p) / n)."""
    return math.sqrt(p * (1 - p) / n)
