"""How sure is a difference between two methods? What each row came to in each run, resampled: 95 % intervals, paired by row and seed.

Belongs here: arithmetic on rows of scores. Does not belong here: which runs there are (compare.py), what a table says (ranking.py), files (outcomes.py).

The runs of a method differ by seed, and all are measured on rows that are a sample, too: a method is above another where both, drawn again, would leave it
there. Each resample draws rows with replacement, the same ones for both methods, and seeds with replacement, a seed's two runs together, and takes the
difference of the measures' means over its seeds. Where every run has the same rows, one draw of them serves all seeds; else each seed has its own.

A percentile interval of five seeds is too narrow: drawn with replacement they vary by (S - 1) / S of their variance, and the normal's 1.96 is too
small for so few. The interval of the resamples is therefore widened, as Hesterberg (2015, arXiv 1411.5279) advises, by the ratio of the standard error
below to that of the resamples, and of Student's quantile to the normal's:

    V = V_rows + max(0, V_seeds - V_both),  V_rows: of the difference as rows alone are drawn; V_seeds: the seeds' variance, n - 1, over S;
    V_both = (mean over the seeds of their own V_rows - V_rows) / (S - 1): what is of single runs' rows, and in both of the others

with the degrees of freedom V^2 / (V_seeds^2 / (S - 1) + V_rows^2 / (N - 1)) (Satterthwaite 1946). With one seed the interval is of rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from zo_finetune.outcomes import Floats, Outcomes, Whole

RESAMPLES, LEVEL, NORMAL = 2000, 0.95, 1.959963984540054
CHUNK = 1 << 21  # numbers of a block of resampled rows


Draws = Callable[
    [], Iterator[Floats]
]  # how often each row is drawn, a block of resamples [B, N] at a time; the same ones at every call


@dataclass(frozen=True)
class Interval:
    """A difference and where it lies at 95 %."""

    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Of a measure that is the better the larger it is."""
        return "above" if self.low > 0 else "below" if self.high < 0 else "undecided"


# ---- measures: of weighted rows, [B, N] -> [B] ---------------------------------------------------------------------------------


def mean_of(values: Floats, weights: Floats) -> Floats:
    return weights @ values / weights.sum(1)


def losses_of(found: Outcomes) -> Floats:
    """Cross-entropy of each row."""
    assert found.scores is not None
    most = found.scores.max(1, keepdims=True)
    total = most[:, 0] + np.log(np.exp(found.scores - most).sum(1))
    losses: Floats = total - found.scores[np.arange(len(found.label)), found.label]
    return losses


def area(margins: Floats, ones: NDArray[np.bool_], weights: Floats) -> Floats:
    """The area under the ROC curve; ties count half, and half is what it is where a label is not drawn."""
    order = np.argsort(margins, kind="stable")
    sorted_margins, w = margins[order], weights[:, order]
    first, last = (np.searchsorted(sorted_margins, sorted_margins, side) for side in ("left", "right"))
    below = np.zeros((len(w), len(order) + 1))
    np.cumsum(w * ~ones[order], axis=1, out=below[:, 1:])
    pairs = (w * ones[order]).sum(1) * below[:, -1]
    won = (w * ones[order] * (below[:, first] + below[:, last])).sum(1) / 2
    return np.divide(won, pairs, out=np.full(len(w), 0.5), where=pairs > 0)


def areas(found: Outcomes, weights: Floats) -> Floats:
    """Of two labels the area under the curve; of more its mean over all pairs of them (Hand and Till 2001), each by the difference of their scores."""
    assert found.scores is not None
    labels = range(found.scores.shape[1])
    each = []
    for a, b in ((a, b) for a in labels for b in labels if a < b):
        of_pair = (found.label == a) | (found.label == b)
        margins = (found.scores[:, b] - found.scores[:, a])[of_pair]
        each.append(area(margins, found.label[of_pair] == b, weights[:, of_pair]))
    return np.mean(each, axis=0)


def lines_of(found: Outcomes) -> tuple[Whole, Floats, NDArray[np.bool_]]:
    """Where a line between two labels' scores can lie: the rows by their margin, the margins in that order, and of each of the N + 1 places between and
    around them whether a line fits there: rows of one margin stay together."""
    assert found.scores is not None
    margins = found.scores[:, 1] - found.scores[:, 0]
    order = np.argsort(margins, kind="stable")
    values = margins[order]
    return order, values, np.concatenate(([True], np.diff(values) != 0, [True]))


def best_line(found: Outcomes, weights: Floats) -> Floats:
    """Accuracy of two labels with the line between them where it is best on the rows that were drawn."""
    order, _, parted = lines_of(found)
    w, ones = weights[:, order], found.label[order] == 1
    right = np.zeros((len(w), len(order) + 1))
    np.cumsum(w * np.where(ones, -1, 1), axis=1, out=right[:, 1:])
    best: Floats = (right[:, parted].max(1) + (w * ones).sum(1)) / w.sum(1)
    return best


def threshold(found: Outcomes) -> float:
    """Where the line between two labels' scores is best on these rows: 1 where the margin is above it. The middle of the two margins it lies between,
    the lowest such line of several."""
    order, values, parted = lines_of(found)
    gains = np.append(0, np.cumsum(np.where(found.label[order] == 1, -1, 1)))
    best = int(np.flatnonzero(parted)[np.argmax(gains[parted])])
    if best in (0, len(values)):
        return float(values[0] - 1) if best == 0 else float(values[-1])
    return float(values[best - 1] + values[best]) / 2


def parted_at(found: Outcomes, line: float) -> Outcomes:
    """What a line between two labels' scores makes of rows: values alone."""
    assert found.scores is not None
    said = found.scores[:, 1] - found.scores[:, 0] > line
    return Outcomes(found.rows, (said == (found.label == 1)).astype(np.float64), found.label)


def measured(name: str, found: Outcomes, weights: Floats) -> Floats:
    """A measure of resampled rows; NaN where it has none, since a score is no number.

    Args:
        name: loss, auc, accuracy_at_best_threshold, or any other: the mean of the rows' values.
    """
    if name not in ("loss", "auc", "accuracy_at_best_threshold"):
        return mean_of(found.value, weights)
    if (
        found.scores is None
        or not np.isfinite(found.scores[np.arange(len(found.label)), found.label]).all()
        or not (found.scores < np.inf).all()
    ):
        return np.full(len(weights), np.nan)
    if name == "loss":
        return mean_of(losses_of(found), weights)
    return areas(found, weights) if name == "auc" else best_line(found, weights)


# ---- resampling ---------------------------------------------------------------------------------------------------------------


def draws_of(rows: int, resamples: int, seed: Sequence[int]) -> Draws:
    """So many rows with replacement, `resamples` times."""
    block = max(1, CHUNK // rows)

    def draws() -> Iterator[Floats]:
        generator = np.random.default_rng(seed)
        for start in range(0, resamples, block):
            yield generator.multinomial(rows, np.full(rows, 1 / rows), size=min(block, resamples - start)).astype(np.float64)

    return draws


@dataclass(frozen=True)
class Sampled:
    """A measure of one method's runs: `point` [S], of each seed; `drawn` [B, S], with rows resampled."""

    point: Floats
    drawn: Floats
    rows: int


class Resampling:
    """The resamples that all methods of a comparison share.

    Args:
        like: runs of one method, a seed each, whose rows are those of every other's.
        resamples: how many.
        seed: of the draws.
    """

    def __init__(self, like: Sequence[Outcomes], resamples: int = RESAMPLES, seed: int = 0) -> None:
        self.like = [one.ordered() for one in like]
        self.resamples = resamples
        self.crossed = all(np.array_equal(one.rows, self.like[0].rows) for one in self.like)
        self.draws = [draws_of(len(one.rows), resamples, (seed, 0 if self.crossed else 1 + k)) for k, one in enumerate(self.like)]
        seeds = len(like)
        self.seeds = np.random.default_rng((seed, 1 << 32)).integers(seeds, size=(resamples, seeds))

    def sample(self, name: str, runs: Sequence[Outcomes]) -> Sampled:
        """A measure of a method's runs.

        Raises:
            ValueError: they are not of the rows that the others have.
        """
        runs = [one.ordered() for one in runs]
        if len(runs) != len(self.like) or not all(np.array_equal(a.rows, b.rows) for a, b in zip(runs, self.like, strict=True)):
            raise ValueError("runs that are paired must have the same rows, seed by seed")
        drawn = np.stack(
            [np.concatenate([measured(name, one, w) for w in draws()]) for one, draws in zip(runs, self.draws, strict=True)], axis=1
        )
        point = np.array([measured(name, one, np.ones((1, len(one.rows))))[0] for one in runs])
        return Sampled(point, drawn, min(len(one.rows) for one in runs))

    def interval(self, one: Sampled, other: Sampled) -> Interval | None:
        """Of `one` less `other`; None where a measure is not finite."""
        each, drawn = one.point - other.point, one.drawn - other.drawn
        if not (np.isfinite(each).all() and np.isfinite(drawn).all()):
            return None
        difference, seeds = float(each.mean()), len(each)
        replicates = np.take_along_axis(drawn, self.seeds, axis=1).mean(1) if seeds > 1 else drawn[:, 0]
        low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        wider = widened(each, drawn, replicates, one.rows)
        return Interval(difference, difference + wider * (float(low) - difference), difference + wider * (float(high) - difference))


def widened(each: Floats, drawn: Floats, replicates: Floats, rows: int) -> float:
    """By how much an interval of resamples is widened (see the head)."""
    seeds, spread = len(each), float(replicates.var())
    if seeds == 1 or spread == 0:
        return 1.0
    of_rows, alone = float(drawn.mean(1).var()), float(drawn.var(0).mean())
    of_seeds, both = float(each.var(ddof=1)) / seeds, (alone - of_rows) / (seeds - 1)
    total = of_rows + max(0.0, of_seeds - both)
    freedom = total**2 / (of_seeds**2 / (seeds - 1) + of_rows**2 / max(1, rows - 1))
    return float((total / spread) ** 0.5 * stdtrit(freedom, (1 + LEVEL) / 2) / NORMAL)


def as_columns(prefix: str, interval: Interval | None) -> Mapping[str, Any]:
    """Of a table."""
    found = None if interval is None else (interval.difference, interval.low, interval.high)
    return {f"{prefix}_{name}": None if found is None else found[k] for k, name in enumerate(("difference", "low", "high"))}
