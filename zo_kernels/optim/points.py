"""A point where the loss of a step is wanted, and the one function that gives losses.

Belongs here: the two types that whoever needs forwards (a step, a rule's candidates, a direction's own measurements, a projection) shares with who makes
them. Does not belong here: how they are made (evaluate.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


def stay() -> None:
    """The weights are there already; nothing is refused."""


class Point(NamedTuple):
    """`see` brings the weights, as the model reads them, there; `check`, after the forwards, refuses those that changed weights. `rounds`: seeing it leaves
    a trace in the weights, so that of workers that share a step each sees all such points."""

    see: Callable[[], None] = stay
    check: Callable[[], None] = stay
    rounds: bool = False


class Losses(Protocol):
    """The mean loss over the micro-batches at each of these points: float64 [points], on the losses' device; with tangents [points, 2]."""

    def __call__(self, points: Sequence[Point]) -> Tensor: ...
