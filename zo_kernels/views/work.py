"""What is to be done to weights, as data: rules and a run say it, views do it.

Belongs here: the kinds of work. Does not belong here: which work a step is (optim/rules.py), where the weights stand before and after (inplace.py,
scratch.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from zo_kernels import update
from zo_kernels.plan import Plan

Tag = int | Tensor  # a tensor: 0-d int64
Coefficient = float | Tensor  # a tensor: 0-d float64, on any device; nothing is read back from it
Shift = Sequence[tuple[Tag, Coefficient]]  # theta + sum c z(tag), as (tag, c)


class Worker(Protocol):
    """What work needs of a view."""

    backend: str | None

    def run(self, work: Terms, update: bool) -> None: ...

    def update_plans(self, group: int, names: Collection[str] | None) -> list[Plan]: ...


@dataclass(frozen=True)
class Work:
    """One pass over the clean weights of a parameter group.

    Attributes:
        group: its number. names: of the parameters that take part; None: all of the group.
    """

    group: int

    @property
    def whole(self) -> Terms | None:
        """Itself where it is terms over a whole group, which may be one pass with the way back to the clean weights."""
        return None

    def do(self, view: Worker) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Terms(Work):
    """theta <- round(decay theta + sum c z(tag))."""

    terms: Shift
    decay: Coefficient = 1.0
    rounding: str = "nearest"
    names: Collection[str] | None = None

    @property
    def whole(self) -> Terms | None:
        return self if self.names is None else None

    def do(self, view: Worker) -> None:
        view.run(self, update=True)


@dataclass(frozen=True)
class RuleWork(Work):
    """A pass over weights and their states (update.py). `states`: for each plan, for each of its entries, the tensors; None: the rule has none."""

    rule: update.RulePass
    states: Sequence[Any] | None
    names: Collection[str] | None = None

    def do(self, view: Worker) -> None:
        plans = view.update_plans(self.group, self.names)
        states = self.states if self.states is not None else [[[] for _ in plan.entries] for plan in plans]
        update.run_rule(plans, states, self.rule, view.backend)


PIECE = 1 << 22  # weights that are pulled at a time: temporary memory is some bytes for each


@dataclass(frozen=True)
class Pull(Work):
    """theta <- theta + share (theta_0 - theta), in fp32, each operation rounded, the result to nearest.

    Attributes:
        params: (name, weight) of those that are pulled. of: gives theta_0 of a name, in host memory or wherever it is. share: an fp32 number. go: False, or a
            0-d bool tensor: nothing is pulled.
    """

    params: Sequence[tuple[str, Tensor]]
    of: Callable[[str], Tensor]
    share: float
    go: Any = True

    def do(self, view: Worker) -> None:
        if self.go is False:
            return
        for name, p in self.params:
            theta = self.of(name).detach().reshape(p.shape)
            rows = max(1, PIECE // max(1, p.numel() // max(1, p.shape[0]))) if p.ndim else 1
            for start in range(0, p.shape[0] if p.ndim else 1, rows):
                part, base = (t.detach()[start : start + rows] if p.ndim else t.detach() for t in (p, theta))
                now = part.float()
                way = base.to(part.device, part.dtype).float() - now
                way *= self.share
                way += now
                part.copy_(torch.where(self.go, way, now) if isinstance(self.go, Tensor) else way)
