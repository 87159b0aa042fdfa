"""The table of a suite: rows of table.csv to table.md and its figure, ours beside the paper's.

Belongs here: what is made of scores: means, standard errors, marks, the page, the figure. Does not belong here: which cells there are and how a score
comes about (suite.py), the papers' figures (suites/).

Two standard errors stand behind a score, and they answer different questions. Over rows: how far another sample of as many evaluation rows would move one
seed's score (the root mean square of the seeds' own). Over seeds: how far other seeds, that is other training rows, orders and noise, would move the mean
(sample standard deviation over the root of their number). Seeds share evaluation rows, so the first is not divided by their number.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_finetune import figures
from zo_finetune.suites import Suite

OURS = "ours"
SCORES = (
    "suite",
    "source",
    "model",
    "task",
    "column",
    "title",
    "peft",
    "seed",
    "metric",
    "score",
    "stderr",
    "examples",
    "majority",
    "threshold",
)
COST = ("steps", "forwards", "lr", "eps", "loss", "dev_loss", "seconds", "peak_memory_bytes", "state_bytes")
COLUMNS = (*SCORES, *COST)  # of table.csv; scores are shares of 1
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """Of one column on one task, or of its mean over tasks; shares of 1. `over_seeds`: None of one seed."""

    mean: float
    over_rows: float
    over_seeds: float | None = None

    @classmethod
    def of(cls, scores: Sequence[float], errors: Sequence[float]) -> Score:
        """From each seed's score and its standard error over rows."""
        deviation = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None
        return cls(statistics.fmean(scores), math.sqrt(statistics.fmean(e * e for e in errors)), deviation)

    def words(self) -> str:
        seeds = "" if self.over_seeds is None else f" ± {100 * self.over_seeds:.1f}"
        return f"{100 * self.mean:.1f} ± {100 * self.over_rows:.1f}{seeds}"


def paper_rows(suite: Suite, tasks: Iterable[str]) -> list[dict[str, Any]]:
    """The paper's figures as rows of table.csv."""
    fixed = {"suite": suite.name, "source": f"{suite.paper}, {suite.table}", "model": suite.model}
    found = ((task, column, suite.paper_score(task, column.label)) for task in tasks for column in suite.columns)
    return [
        {**fixed, "task": task, "column": column.label, "title": column.title, "score": score}
        for task, column, score in found
        if score is not None
    ]


def to_csv(rows: Iterable[Row]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class Table:
    """What rows of table.csv say. Values may be text, as a CSV file has them, and "" is none.

    apart: tasks that are kept out of means.
    """

    def __init__(self, rows: Sequence[Row], apart: Sequence[str]) -> None:
        self.ours = [row for row in rows if row["source"] == OURS]
        self.papers = [row for row in rows if row["source"] != OURS]
        self.tasks = list(dict.fromkeys(row["task"] for row in self.ours))
        self.titles = {row["column"]: row["title"] for row in self.ours}  # column -> title, in order
        self._cells: dict[tuple[str, str], list[Row]] = {}
        for row in self.ours:
            self._cells.setdefault((row["task"], row["column"]), []).append(row)
        self.scores = {
            place: Score.of([float(r["score"]) for r in mine], [float(r["stderr"]) for r in mine])
            for place, mine in self._cells.items()
        }
        self.averaged = [t for t in self.tasks if t not in apart and all((t, c) in self.scores for c in self.titles)]
        if len(self.averaged) < 2:
            self.averaged = []

    def number(self, task: str, name: str) -> float | None:
        """Of a task, the mean over all rows that have the number."""
        found = [float(row[name]) for row in self.ours if row["task"] == task and row[name] not in (None, "")]
        return statistics.fmean(found) if found else None

    def majority(self, task: str) -> float | None:
        """None where the score is no accuracy."""
        return self.number(task, "majority") if self.metric(task).endswith("accuracy") else None

    def metric(self, task: str) -> str:
        return str(next(row["metric"] for row in self.ours if row["task"] == task))

    def marks(self, task: str, column: str) -> str:
        """m: not above the majority rate. t: not above what the best threshold on the zero-shot scores reaches; its own column has no such mark."""
        mean, majority = self.scores[task, column].mean, self.majority(task)
        threshold = None if column == "zero-shot" else self.number(task, "threshold")
        found = [mark for mark, least in (("m", majority), ("t", threshold)) if least is not None and mean <= least]
        return f" ({', '.join(found)})" if found else ""

    def average(self, column: str) -> Score:
        """Over the tasks that every column has, as if their rows were independent; over seeds that have them all."""
        mine = {task: self._cells[task, column] for task in self.averaged}
        by_seed = [{str(row["seed"]): float(row["score"]) for row in rows} for rows in mine.values()]
        seeds = [s for s in by_seed[0] if all(s in scores for scores in by_seed)]
        means = [statistics.fmean(scores[s] for scores in by_seed) for s in seeds]
        over_rows = math.sqrt(sum(self.scores[task, column].over_rows ** 2 for task in mine)) / len(mine)
        mean = statistics.fmean(self.scores[task, column].mean for task in mine)
        return Score(mean, over_rows, statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None)

    def paper(self, task: str, column: str) -> float | None:
        return next((float(r["score"]) for r in self.papers if (r["task"], r["column"]) == (task, column)), None)

    def paper_average(self, column: str) -> float | None:
        scores = [self.paper(task, column) for task in self.averaged]
        return statistics.fmean(s for s in scores if s is not None) if scores and None not in scores else None

    def markdown(self) -> str:
        """A row for each column of the paper's table, ours and then the paper's; a column for each task."""
        lines = [["", *self.tasks, *(["mean"] if self.averaged else [])]]
        lines.append(["---"] * len(lines[0]))
        blank = [""] if self.averaged else []
        lines.append(["metric", *map(self.metric, self.tasks), *blank])
        lines.append(["rows evaluated", *(f"{self.number(task, 'examples') or 0:g}" for task in self.tasks), *blank])
        lines.append(["majority rate", *(percent(self.majority(task)) for task in self.tasks), *blank])
        if any(self.number(task, "threshold") is not None for task in self.tasks):
            lines.append(["best zero-shot threshold", *(percent(self.number(task, "threshold")) for task in self.tasks), *blank])
        for column, title in self.titles.items():
            places = [(task, column) for task in self.tasks]
            cells = [self.scores[p].words() + self.marks(*p) if p in self.scores else "" for p in places]
            lines.append([title, *cells, *([self.average(column).words()] if self.averaged else [])])
            theirs = [self.paper(task, column) for task in self.tasks]
            if any(score is not None for score in theirs):
                average = [italic(self.paper_average(column))] if self.averaged else []
                model = next(str(row["model"]) for row in self.papers)
                lines.append([f"*{title}, the paper's {model}*", *map(italic, theirs), *average])
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def legend(self) -> str:
        """What stands before the table."""
        seeds = list(dict.fromkeys(str(row["seed"]) for row in self.ours))
        spread = (
            f", ± standard error over {len(seeds)} seeds ({', '.join(seeds)})" if len(seeds) > 1 else f"; seed {seeds[0]} alone"
        )
        text = (
            f"Percent; ± standard error over the rows evaluated{spread}. (m): not above the "
            "majority rate; (t): not above what the best threshold on the zero-shot scores reaches on the same rows, so that what was gained may be "
            "calibration alone."
        )
        if self.averaged:
            text += f" Mean: over {', '.join(self.averaged)}."
        if self.papers:
            sources = dict.fromkeys(f"{row['source']}, {row['model']}" for row in self.papers)
            text += f" In italics, the figures of {'; '.join(sources)}: of another model, on other rows, and no result of ours."
        return text


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def italic(share: float | None) -> str:
    return "" if share is None else f"*{percent(share)}*"


def page(rows: Sequence[Row], apart: Sequence[str]) -> str:
    """table.md, without what was left out."""
    table = Table(rows, apart)
    return f"{table.legend()}\n\n{table.markdown()}"


def draw(path: Path, title: str, rows: Sequence[Row], apart: Sequence[str]) -> None:
    """Scores by task: ours with their standard error over rows, the paper's as hollow marks, the majority rate as a line."""
    table = Table(rows, apart)
    with figures.plain_figure(path, 110, figsize=(max(7.0, 3 + 0.22 * len(table.tasks) * (2 + len(table.titles))), 5.5)) as figure:
        _draw(figure.subplots(), title, table)


def _draw(axes: Any, title: str, table: Table) -> None:
    from matplotlib import colormaps

    colours = {column: colormaps["tab20"](k % 20) for k, column in enumerate(table.titles)}
    width = 0.8 / max(1, len(table.titles))

    def places(column: str) -> Callable[[str], float]:
        shift = (list(table.titles).index(column) - (len(table.titles) - 1) / 2) * width
        return lambda task: table.tasks.index(task) + shift

    for column, name in table.titles.items():
        x, tasks = places(column), [task for task in table.tasks if (task, column) in table.scores]
        mine = [table.scores[task, column] for task in tasks]
        at, means, errors = [x(t) for t in tasks], [100 * s.mean for s in mine], [100 * s.over_rows for s in mine]
        axes.errorbar(at, means, errors, fmt="o", markersize=4, color=colours[column], label=name)
        known = [(x(task), 100 * score) for task in table.tasks if (score := table.paper(task, column)) is not None]
        if known:
            axes.plot(*zip(*known, strict=True), "D", markersize=4, markerfacecolor="none", color=colours[column], alpha=0.6)
    for name, style in (("majority", "-"), ("threshold", ":")):
        found = ((k, table.majority(t) if name == "majority" else table.number(t, name)) for k, t in enumerate(table.tasks))
        levels = [(k, 100 * level) for k, level in found if level is not None]
        label = "majority rate" if name == "majority" else "best zero-shot threshold"
        for n, (k, level) in enumerate(levels):
            axes.plot([k - 0.45, k + 0.45], [level, level], style, color="0.3", linewidth=1, label=label if n == 0 else None)
    if table.papers:
        axes.plot([], [], "D", markersize=4, markerfacecolor="none", color="0.3", label=f"the paper's {table.papers[0]['model']}")
    axes.set(xticks=range(len(table.tasks)), xticklabels=table.tasks, ylabel="percent", title=title)
    axes.grid(alpha=0.3, axis="y")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize="small")
