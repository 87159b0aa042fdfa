"""Which method is above which: the standing of a comparison's methods, as a table and a figure.

Belongs here: from finished runs to what may be said of them. Does not belong here: the runs (compare.py), the arithmetic of intervals (intervals.py).

Every method that ran is in it, the losers too, and beside them what costs no training: the model as it was, the same with its line between two labels
moved to where it is best on the dev examples, and, marked, on the evaluation rows themselves, and always giving the most frequent label. A gain in
accuracy that stays below the third is calibration, and no learning.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zo_finetune import figures
from zo_finetune.intervals import RESAMPLES, Interval, Resampling, as_columns, measured, parted_at, threshold
from zo_finetune.metrics.best_threshold import KEY as LINE
from zo_finetune.outcomes import Outcomes, value_name
from zo_finetune.tasks.base import Task

METHOD, REFERENCE = "method", "reference"
ABOUT = ("kind", "method", "objective", "budget", "forwards", "frozen_forwards", "steps", "seconds", "lr", "edge", "seeds", "rows")
COLOURS = {"above": "#1b7f5c", "below": "#b03a48", "undecided": "0.45", "": "0.45"}


def measures(task: Task) -> tuple[str, ...]:
    """What methods are measured by, the one that ranks them first."""
    labels = 0 if task.class_names is None else len(task.class_names)
    found = (
        ("auc", labels > 1),
        (value_name(task), True),
        (LINE, labels == 2),
        ("loss", task.decoding == "scores" and "loss" in task.metrics),
    )
    return tuple(name for name, there in found if there)


def columns(task: Task) -> tuple[str, ...]:
    """Of ranking.csv."""
    each = (f"{name}{what}" for name in measures(task) for what in ("", "_deviation", "_difference", "_low", "_high"))
    return (*ABOUT, *each, "verdict")


@dataclass(frozen=True)
class Runs:
    """What one method's finished runs came to; of every dict the keys are the seeds.

    label: in a comparison. rows: of compare.csv. before, dev, after: each row of the evaluations; dev: those of the dev examples, before the first step.
    edge: "low" or "high" where the learning rate that was chosen is the lowest or the highest of those tried.
    """

    label: str
    method: str
    objective: str
    budget: int
    rows: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    before: dict[int, Outcomes] = field(default_factory=dict)
    dev: dict[int, Outcomes] = field(default_factory=dict)
    after: dict[int, Outcomes] = field(default_factory=dict)
    edge: str = ""
    kind: str = METHOD


def references(baseline: Runs, labels: int) -> list[Runs]:
    """What costs no training, on the rows of the baseline's runs. `labels`: how many the task has; 0: candidates of their own."""

    def of(name: str, made: Callable[[int], Outcomes], seeds: Sequence[int]) -> Runs:
        return Runs(name, name, "", 0, after={seed: made(seed) for seed in seeds}, kind=REFERENCE)

    seeds, before = list(baseline.before), baseline.before
    found = [of("zero-shot", before.__getitem__, seeds)]
    finite = all(np.isfinite(scores).all() for s in seeds if (scores := before[s].scores) is not None)
    if labels == 2 and finite:
        found.append(
            of("zero-shot, line of the dev rows", lambda s: parted_at(before[s], threshold(baseline.dev[s])), [*baseline.dev])
        )
        found.append(of("zero-shot, line of these rows*", lambda s: parted_at(before[s], threshold(before[s])), seeds))
    if labels:
        found.append(of("most frequent label", lambda s: constant(before[s]), seeds))
    return [one for one in found if one.after]


def constant(found: Outcomes) -> Outcomes:
    """Rows that always get the most frequent label: values alone."""
    most = np.bincount(found.label).argmax()
    return Outcomes(found.rows, (found.label == most).astype(np.float64), found.label)


class Standing:
    """The methods of a comparison against one of them.

    Args:
        runs: of every method, `baseline` among them.
        baseline: a label.
        seed: of the resamples.
    """

    def __init__(self, task: Task, runs: Sequence[Runs], baseline: str, resamples: int = RESAMPLES, seed: int = 0) -> None:
        self.task, self.measures, self.resamples, self.seed = task, measures(task), resamples, seed
        self.baseline = next((one for one in runs if one.label == baseline), None)
        labels = 0 if task.class_names is None else len(task.class_names)
        methods = [self.line(one) for one in runs if one.rows]
        beside = [] if self.baseline is None else [self.line(one) for one in references(self.baseline, labels)]
        first = self.measures[0]
        self.lines = sorted(methods, key=lambda line: math.inf if line[first] is None else -line[first]) + beside

    @functools.cached_property
    def _resampled(self) -> dict[tuple[int, ...], tuple[Resampling, dict[str, Any]]]:
        return {}

    def interval(self, one: Runs, name: str) -> Interval | None:
        """Of a measure of `one` less the baseline's, over the seeds that both have; None: of the baseline itself, or where rows are not known."""
        if self.baseline is None or one is self.baseline:
            return None
        seeds = tuple(seed for seed in self.baseline.after if seed in one.after)
        if not seeds:
            return None
        mine = [self.baseline.after[seed] for seed in seeds]
        resampling, samples = self._resampled.setdefault(seeds, (Resampling(mine, self.resamples, self.seed), {}))
        if name not in samples:
            samples[name] = resampling.sample(name, mine)
        return resampling.interval(resampling.sample(name, [one.after[seed] for seed in seeds]), samples[name])

    def line(self, one: Runs) -> dict[str, Any]:
        """A row of ranking.csv."""
        rows = list(one.rows.values())
        numbers: dict[str, Any] = {}
        found: Interval | None = None
        for name in self.measures:
            bare = any(outcome.scores is None for outcome in one.after.values()) and name != value_name(self.task)
            values = [] if bare else self.values(one, name)
            numbers[name] = statistics.fmean(values) if values else None
            numbers[f"{name}_deviation"] = statistics.stdev(values) if len(values) > 1 else None
            interval = None if bare else self.interval(one, name)
            found = interval if name == self.measures[0] else found
            numbers |= as_columns(name, interval)
        same = {name: rows[0][name] if rows else None for name in ("forwards", "frozen_forwards", "steps", "lr")}
        about = {
            "kind": one.kind,
            "method": one.method,
            "objective": one.objective,
            "budget": one.budget if rows else None,
            **same,
            "seconds": round(statistics.fmean(r["seconds"] for r in rows), 2) if rows else None,
            "edge": one.edge,
            "seeds": len(rows or one.after),
            "rows": min((len(o.rows) for o in one.after.values()), default=None),
        }
        return {**about, **numbers, "verdict": "" if found is None else found.verdict}

    def values(self, one: Runs, name: str) -> list[float]:
        """A measure of each seed's run; none where one is not finite or not known."""
        if len(one.after) < len(one.rows):
            found = [row.get(name) for row in one.rows.values()]
        else:
            found = [float(measured(name, o, np.ones((1, len(o.rows))))[0]) for o in one.after.values()]
        return [] if any(v is None or not math.isfinite(v) for v in found) else [v for v in found if v is not None]

    def words(self) -> str:
        """What the intervals are."""
        if self.baseline is None:
            return ""
        first = title(self.measures[0])
        return (
            f"Against {self.baseline.label}: the difference of {first} with its 95 % interval, of {self.resamples:,} resamples of rows and seeds, paired by "
            "both. Each interval stands alone: of twenty methods that are no better, one is expected to look above or below. "
            "* its line between the labels was chosen on the evaluation rows: what calibration alone could reach."
        )

    def markdown(self) -> str:
        """The table."""
        cost = ("forwards", "of the frozen part", "seconds", "lr")
        against = () if self.baseline is None else (f"{title(self.measures[0])} against {self.baseline.label}", "")
        several = len({line["objective"] for line in self.lines if line["kind"] == METHOD}) > 1
        objective = ("objective",) if several else ()
        lines: list[tuple[str, ...]] = [("method", *objective, *cost, *map(title, self.measures), *against, "seeds")]
        lines.append(tuple("---" for _ in lines[0]))
        for line in self.lines:
            first = self.measures[0]
            numbers = [shown(line[name], line[f"{name}_deviation"]) for name in self.measures]
            difference = "" if line[f"{first}_low"] is None else difference_of(line, first)
            spent = [whole(line[name]) for name in ("forwards", "frozen_forwards", "seconds")]
            lr = "" if line["lr"] is None else f"{line['lr']:g}" + {"low": "↓", "high": "↑"}.get(line["edge"], "")
            beside = () if self.baseline is None else (difference, line["verdict"])
            given = (line["objective"],) if several else ()
            lines.append((line["method"], *given, *spent, lr, *numbers, *beside, str(line["seeds"])))
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def draw(self, path: Path) -> None:
        """Differences from the baseline with their intervals; nothing where there are none."""
        first = self.measures[0]
        lines = [line for line in self.lines if line[f"{first}_low"] is not None][::-1]
        if not lines or self.baseline is None:
            return
        with figures.plain_figure(path, 110, figsize=(9, 1.4 + 0.3 * len(lines))) as figure:
            axes = figure.subplots()
            for k, line in enumerate(lines):
                middle, low, high = (line[f"{first}_{what}"] for what in ("difference", "low", "high"))
                colour = COLOURS[line["verdict"]]
                axes.plot([low, high], [k, k], color=colour)
                axes.plot([middle], [k], "o", color=colour)
            axes.axvline(0, color="0.7", linewidth=0.8)
            axes.set_yticks(range(len(lines)), [name_of(line) for line in lines])
            axes.set(xlabel=f"{title(first)} less that of {self.baseline.label}, 95 %")
            axes.grid(alpha=0.3, axis="x")


def title(measure: str) -> str:
    return {"auc": "AUC", LINE: "at the best line*"}.get(measure, measure)


def name_of(line: Mapping[str, Any]) -> str:
    return ", ".join(filter(None, (line["method"], line["objective"], whole(line["forwards"]))))


def whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def shown(value: float | None, deviation: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def difference_of(line: Mapping[str, Any], name: str) -> str:
    middle, low, high = (line[f"{name}_{what}"] for what in ("difference", "low", "high"))
    return f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]"
