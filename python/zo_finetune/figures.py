"""Figures: the curve of a run, and the canvas that a comparison's is drawn on too.

Belongs here: matplotlib. Does not belong here: what was measured (evaluate.py, train.py), a comparison's own figure (compare.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zo_finetune.files import replaced


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Trailing mean over `window` values."""
    return [sum(values[max(0, k - window + 1) : k + 1]) / (k + 1 - max(0, k - window + 1)) for k in range(len(values))]


def draw_curve(
    path: Path, title: str, metric: str, losses: Sequence[float], curves: Mapping[str, Sequence[Mapping[str, Any]]], told: str = ""
) -> None:
    """A metric over steps, with a band of one standard error, above the training loss.

    Args:
        losses: of steps 1, 2, ...
        curves: name -> evaluations with `step`, the metric and its `_stderr`.
        told: a line below.
    """
    with plain_figure(path, 130, figsize=(7, 6)) as figure:
        if told:
            figure.supxlabel(told, fontsize="small")
        _draw_curve(figure, title, metric, losses, curves)


@contextlib.contextmanager
def plain_figure(path: Path, dpi: int, **more: Any) -> Iterator[Any]:
    """A figure that is written to `path` when the block ends well. Names in it are other people's: no text is read as a formula."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: it would pick a backend for the whole process
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(layout="constrained", **more)
        FigureCanvasAgg(figure)
        yield figure
        with replaced(path) as file:
            figure.savefig(file, dpi=dpi, format="png")


def _draw_curve(
    figure: Any, title: str, metric: str, losses: Sequence[float], curves: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    top, bottom = figure.subplots(2, 1, sharex=True)
    for name, points in curves.items():
        if not points:
            continue
        steps = [p["step"] for p in points]
        values = [p[metric] for p in points]
        errors = [p[f"{metric}_stderr"] for p in points]
        # two points are a before and an after: what lies between was not measured
        (line,) = top.plot(steps, values, marker="o", linestyle=":" if len(points) == 2 else "-", label=name)
        low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
        top.fill_between(steps, low, high, color=line.get_color(), alpha=0.2)
    top.set(ylabel=metric, title=title)
    if top.lines:
        top.legend(loc="best")
    window = max(1, len(losses) // 20)
    steps = list(range(1, len(losses) + 1))
    bottom.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    bottom.plot(steps, smoothed(losses, window), color="C3", label=f"mean of {window}")
    bottom.set(ylabel="training loss", xlabel="step")
    if losses:
        bottom.legend(loc="best")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
