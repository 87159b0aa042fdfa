"""How far the last step moved a weight, from the numbers that it decided.

Belongs here: the root mean square of an update, over the weights that take part, as a function of the step's numbers, of what the direction makes of z, and
for rules with a state of that. Does not belong here: the update (rules.py, run.py), what a user is told (findings.py).

An update along sum c_i z_i whose z have E z^2 = 1 moves a weight by sqrt(sum c_i^2): no weight is read for that. The host waits for numbers that lie on a
device here, and not in the step. What decays, and what a projection moves, is no part of it. A state of sharded weights is gathered, one weight at a time, for
the bits of an unsharded run: all processes ask for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from zo_kernels import shards
from zo_kernels.optim import rules
from zo_kernels.optim.decision import Share
from zo_kernels.optim.run import Run
from zo_kernels.optim.workers import Workers
from zo_kernels.parameters import Member, Weights
from zo_kernels.plan import RandomMask


def movement(run: Run, groups: Sequence[Weights], workers: Workers | None) -> float:
    """Of the run's last step; NaN before the first, and where the rule's numbers do not tell.

    Args:
        groups: the weights that took part, as the step had them.

    Raises:
        WorkerError: one process asks alone for what is kept of sharded weights.
    """
    if (done := run.last) is None:
        return math.nan
    if workers is not None and workers.alike and isinstance(run.method.rule, rules.Momentum) and run.method.rule.stateful:
        workers.round("the movement of a step")
    square = count = 0.0
    for k, weights in enumerate(groups[: len(done.decay)]):
        share = done.share(k, (), run.method.own)
        share = replace(share, coefs=[float(c) for c in share.coefs], go=bool(done.go))
        taking = _taking(weights.members)
        square += taking * _HOW.get(type(run.method.rule), _unknown)(run, share, weights) ** 2
        count += taking
    return math.sqrt(square / count) if count else 0.0


def _taking(members: Sequence[Member]) -> float:
    """How many weights take part; of those under a stored mask all are counted."""
    return sum(m.param.numel() * (m.mask.keep if isinstance(m.mask, RandomMask) else 1.0) for m in members)


def _spread(run: Run, members: Sequence[Member]) -> float:
    """The root of the mean of E z^2 in an update of these parameters."""
    squares = sum(_taking([m]) * run.direction.square(m) for m in members)
    return math.sqrt(squares / count) if (count := _taking(members)) else 0.0


def _terms(run: Run, share: Share, weights: Weights) -> float:
    return math.hypot(*share.coefs) * _spread(run, weights.members)


def _taken(run: Run, share: Share, weights: Weights) -> float:
    """Of what a rule tried the one that it took."""
    return _terms(run, replace(share, coefs=share.coefs[:1]), weights)


def _unknown(run: Run, share: Share, weights: Weights) -> float:
    return math.nan


def _held(run: Run, weights: Weights, what: str) -> float:
    """The sum of the squares of a group's states of this name, each read once."""
    square = 0.0
    for m in weights.members:
        t = run.rule.tensors.get(m.name, {}).get(what)
        if m.whole is not None:  # whoever has an empty part has no state of it
            part = t if t is not None else torch.zeros(m.tensor.numel(), dtype=run.method.rule.keeps[what], device=m.tensor.device)
            t = shards.whole(shards.as_part(m.whole, part)).reshape(-1)
        if t is not None:
            square += float(torch.linalg.vector_norm(t, dtype=torch.float32)) ** 2
    return square


def _momentum(run: Run, share: Share, weights: Weights) -> float:
    """lr b, with b as it is held, or as the last records make it."""
    rule, lr = run.method.rule, float(share.coefs[-1])
    assert isinstance(rule, rules.Momentum)
    if not share.go:
        return 0.0
    if rule.stateful:
        return lr * math.sqrt(_held(run, weights, "momentum") / max(1.0, _taking(weights.members)))
    square = 0.0
    for cohort in run.rule.cohorts:
        members = [m for m in weights.members if m.name in cohort.names or run.rule.together]
        coefs = [lr * float(c) * rule.beta ** float(age) for p, age in cohort.ages() for c in p.coefs]
        square += _taking(members) * (math.hypot(*coefs) * _spread(run, members)) ** 2
    return math.sqrt(square / max(1.0, _taking(weights.members)))


def _adam(run: Run, share: Share, weights: Weights) -> float:
    """About: what |g| of one size in each of a parameter's t updates would come to, lr sqrt((1 - b)(1 + b^t) / ((1 + b)(1 - b^t))) with b = beta1."""
    rule = run.method.rule
    assert isinstance(rule, rules.Adam)
    if not share.go:
        return 0.0
    b, square = rule.beta1, 0.0
    for cohort in run.rule.cohorts:
        members = [m for m in weights.members if m.name in cohort.names or run.rule.together]
        past = b ** max(1, int(cohort.count))
        square += _taking(members) * (1 - b) * (1 + past) / ((1 + b) * (1 - past))
    return float(share.coefs[-1]) * math.sqrt(square / max(1.0, _taking(weights.members)))


def _low_rank_momentum(run: Run, share: Share, weights: Weights) -> float:
    """lr b of the dense parameters; of a matrix (lr / rank) N V^T, whose V has E v^2 = 1."""
    if not share.go:
        return 0.0
    square = _held(run, weights, "momentum")
    for m in weights.members:
        if m.factors is not None and (n := run.rule.tensors.get(m.name, {}).get("factor")) is not None:
            rows, rank = m.factors[0].shape
            each = float(torch.linalg.vector_norm(n)) ** 2 / rows
            square += m.tensor.numel() * each / rank**2
    return float(share.coefs[-1]) * math.sqrt(square / max(1.0, _taking(weights.members)))


_HOW: Mapping[type[rules.Rule], Callable[[Run, Share, Weights], float]] = {
    rules.SGD: _terms,
    rules.Sign: _terms,
    rules.Conservative: _taken,
    rules.HessianDiagonal: _taken,  # along z / sqrt(H), with the new H, as though that had not seen z: to within alpha kappa
    rules.Momentum: _momentum,
    rules.Adam: _adam,
    rules.LowRankMomentum: _low_rank_momentum,
}
