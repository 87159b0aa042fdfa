"""Recorded steps again: a run that is resumed, or replayed.

Belongs here: from a journal's records to the steps of a `Run`, in their order. Does not belong here: what a step does (run.py), from which weights a journal's
run is replayed (zo_kernels.replay), a live run's journal (record.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from zo_kernels import journal, views
from zo_kernels.optim.decision import decisions
from zo_kernels.optim.method import counted
from zo_kernels.optim.run import Params, Run
from zo_kernels.parameters import Weights


def repeat(run: Run, header: journal.Header, records: np.ndarray, view: Callable[[], views.View], params: Params) -> None:
    """The recorded steps again, which take the run on from where it is.

    Args:
        view: of the weights of the next step. params: those that are trained, by name.
    """
    run.rule.together = run.method.blocks is not None and run.method.rule.counts and not counted(header)
    for decision in decisions(header, records):
        if not run.steps:
            run.first_tag = int(decision.tag)
        run.tag = int(decision.tag)
        run.repeat(decision, view(), params)


def queue(groups: Sequence[Weights], header: journal.Header, backend: str | None) -> views.Queued:
    """A view of these weights that gathers the passes of steps which are nothing but terms.

    Raises:
        ValueError: this version cannot replay them.
    """
    if header.terms != 1 and header.perturbation != "scratch":
        raise ValueError(f"the journal has {header.terms} terms in {header.perturbation} mode, which this version cannot replay")
    return views.Queued(groups, None, header.perturbation == "lazy", seed=header.seed, kind=header.kind, backend=backend)


@torch.no_grad()
def resume(
    run: Run,
    past: journal.Journal,
    view: views.View,
    refresh: Callable[[], views.View],
    params: Params,
) -> None:
    """Take a run that has not begun on to where its journal ends.

    Args:
        view: of the weights that the run started from. refresh: the view of the next step's weights. params: those that are trained, by name.
    """
    if past.header.method is None and not view.defers:
        queued = queue(view.groups, past.header, view.backend)
        repeat(run, past.header, past.records, lambda: queued, params)
        queued.apply()
        view.stand(queued.standing())
    else:
        repeat(run, past.header, past.records, refresh, params)
    run.go_on(past.next_tag, past.next_tag - len(past.steps) * run.method.terms)
    run.skipped = int(past.flag("skipped").sum())
