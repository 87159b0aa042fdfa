"""A view in place that gathers passes instead of making them: a recorded run's passes in one read and write of the weights each few thousand.

Belongs here: the queue. Does not belong here: which passes there are and where the weights stand between them (inplace.py), records (optim/repeat.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from zo_kernels import checks, ops
from zo_kernels.plan import Pass, Passes, Plan
from zo_kernels.views.inplace import InPlace
from zo_kernels.views.work import Shift, Terms, Work

MOST = 4096  # passes that are gathered


class Queued(InPlace):
    """The passes wait until `apply`, or until there are many. Work over whole groups alone, and no forward."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.waiting: list[list[Pass]] = [[] for _ in self.groups]

    def expect(self) -> None:
        """No closure runs that could write."""

    def run(self, work: Terms, update: bool) -> None:
        if (p := self._pass(work.terms, work.decay, work.rounding)) is not None:
            self.waiting[work.group].append(p)

    def execute(self, works: Iterable[Work], *, from_clean: bool = False, ahead: Sequence[Shift] | None = None) -> None:
        super().execute(works, from_clean=from_clean, ahead=ahead)
        if max(map(len, self.waiting), default=0) >= MOST:
            self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Make the passes that wait."""
        for weights, passes in zip(self.groups, self.waiting, strict=True):
            sequence(weights.plans, passes, self.backend)
            passes.clear()


def sequence(plans: Sequence[Plan], passes: Sequence[Pass], backend: str | None) -> None:
    """The passes one after another, in one read and write of the weights."""
    if not passes or not plans:
        return
    tags, coefs, decays = [t for p in passes for t in p.tags], [c for p in passes for c in p.coefs], [p.decay for p in passes]
    joined = Passes(
        passes[0].seed,
        torch.tensor(tags, dtype=torch.int64),
        torch.tensor(coefs, dtype=torch.float32),
        torch.tensor([0, *itertools.accumulate(len(p.tags) for p in passes)], dtype=torch.int64),
        torch.tensor([1.0 if d is None else d for d in decays], dtype=torch.float32),
        torch.tensor([checks.ROUNDINGS[p.rounding] for p in passes], dtype=torch.uint8),
        passes[0].kind,
    )
    ops.run_sequence(plans, joined, backend)
