"""What a run over offloaded weights may do: its updates wait until a block visits, and no state of the weights' size is resident.

Belongs here: what is refused, and why. Does not belong here: how updates wait (views/visiting.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from zo_kernels.optim import directions
from zo_kernels.optim.method import Method
from zo_kernels.views import away_of, place_of


def visited(model: nn.Module | None, scratch: bool) -> bool:
    """Whether a visit of a block serves all forwards of a micro-batch."""
    away = away_of(model) if model is not None and scratch else None
    return away is not None and away.together


def check(params: Sequence[Tensor], method: Method, scratch: bool, cuda_graph: bool, first_order: Any) -> None:
    """Raises ValueError: some of these are offloaded (`zk.offload`), and the run could not be made with them; says why."""
    if all(place_of(p) is None for p in params):
        return
    wrong = "the model's weights are offloaded, and "
    if not scratch:
        raise ValueError(
            wrong
            + "perturbation='inplace' would write to all of them for each forward: take 'scratch' and a plain (not compiled) module"
        )
    if cuda_graph:
        raise ValueError(wrong + "a CUDA graph cannot wait for a block: leave cuda_graph out")
    if first_order is not None:
        raise ValueError(wrong + "first_order backpropagates through all of them at once: leave it out")
    if method.estimator.dual:
        raise ValueError(wrong + "ForwardGradient() is not made for blocks that come and go: take TwoSided()")
    if method.rule.stateful and getattr(method.rule, "state", "stored") != "recomputed":
        raise ValueError(
            wrong
            + f"rule={type(method.rule).__name__}() keeps a state of their size: take SGD or Sign, or state='recomputed', or train an adapter that is "
            "added after zk.offload"
        )
    if not isinstance(method.direction, (directions.Dense, directions.RandomSparse)):
        raise ValueError(
            wrong
            + f"direction={type(method.direction).__name__}() is made of all of them, or of factors that a later visit would no longer have: take Dense() or "
            "RandomSparse()"
        )
    if method.projection is not None or method.anchor is not None:
        part = "projection" if method.projection is not None else "anchor"
        raise ValueError(wrong + f"{part} works on all of them at the end of a step: leave it out")
