"""What a suite is: a table of a paper as data, its tasks, its columns, the options of its runs and its figures.

Belongs here: the record types. Does not belong here: a particular suite (one file each, beside this one), what is run and written (suite.py,
suite_table.py), prompts (tasks/), learning rates (methods.py).

Figures of a paper stand beside ours and are never taken for results of ours. One that could not be read where it was published is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

BASELINES = ("zero-shot", "in-context", "probe")  # what trains no weight of the model
SHOTS = 32  # demonstrations of in-context learning (MeZO)


@dataclass(frozen=True)
class Column:
    """One column of a paper's table.

    label: what runs: one of `BASELINES`, or METHOD[:KEY=VALUE...], where the key peft is the kind of tuning and the others are the method's own.
    title: what the paper calls it.
    options: of its runs (`Config`), where the paper has others than for the rest of the table.
    """

    label: str
    title: str
    options: Mapping[str, Any] = field(default_factory=dict)


class Suite:
    """Subclasses hold data and nothing else."""

    name: ClassVar[str]
    summary: ClassVar[str]  # one line for `--help`
    paper: ClassVar[str]
    table: ClassVar[str]  # which of the paper's
    model: ClassVar[str]  # that the paper's figures are of
    tasks: ClassVar[tuple[str, ...]]
    columns: ClassVar[tuple[Column, ...]]
    options: ClassVar[Mapping[str, Any]] = {"keep": "best"}  # of all runs (`Config`), where they are not its defaults
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)
    apart: ClassVar[tuple[str, ...]] = (
        "wsc",
    )  # kept out of averages: the most that the papers' methods reach there is the majority rate
    scores: ClassVar[Mapping[str, tuple[float | None, ...]]] = {}  # task -> percent in each column; None: the paper has none

    def paper_score(self, task: str, label: str) -> float | None:
        """The paper's figure, as a share of 1; None where there is none."""
        for column, score in zip(self.columns, self.scores.get(task, ()), strict=False):
            if column.label == label and score is not None:
                return score / 100
        return None
