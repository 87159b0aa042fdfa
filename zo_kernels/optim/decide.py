"""From losses to a step's decision.

Belongs here: the one path of numbers from losses to the record, in float64 over [groups, numbers], on the losses' device; and where the host reads it. Does
not belong here: what the losses tell of the gradient (estimators.py), what a rule makes of it (rules.py).

On a CPU the host has read each loss (evaluate.py). On a GPU nobody reads: what follows from it stays there. A graph's recording has the same operations.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_kernels.optim import evaluate, graph
from zo_kernels.optim.decision import Decision
from zo_kernels.optim.method import Method
from zo_kernels.optim.unit import UnitState
from zo_kernels.plan import move
from zo_kernels.views import Coefficient


def fp32(x: float) -> float:
    """x rounded to fp32; infinity beyond it."""
    return ctypes.c_float(x).value


@dataclass(frozen=True)
class Numbers:
    """The parameter groups' numbers in one step, a list over the groups each: floats or, where a graph reads them from device memory, 0-d float64 tensors.

    Attributes:
        eps, decay: fp32 numbers, as a journal records them; decay is 1 - lr weight_decay.
        signs: of g in the update, -1 to descend, 1 to ascend. decays: whether there is a decay.
        table: float64 [groups, 3], lr, eps and decay in the memory that a graph reads; None: there is no graph.
    """

    lr: Sequence[Coefficient]
    eps: Sequence[Coefficient]
    decay: Sequence[Coefficient]
    signs: Sequence[float]
    decays: Sequence[bool]
    table: Tensor | None = None

    @classmethod
    def of(cls, groups: Sequence[Mapping[str, Any]], still: bool = False) -> Numbers:
        """Of torch's parameter groups; `still`: lr = 0, without decay."""
        lr = [0.0 if still else float(g["lr"]) for g in groups]
        decay = [fp32(1 - x * float(g["weight_decay"])) for x, g in zip(lr, groups, strict=True)]
        signs = [1.0 if g["maximize"] else -1.0 for g in groups]
        return cls(lr, [fp32(float(g["eps"])) for g in groups], decay, signs, [d != 1.0 for d in decay])

    def captured(self, table: Tensor, decays: Sequence[bool]) -> Numbers:
        """The same, read from device memory."""
        lr, eps, decay = table.unbind(1)
        factors = [d if there else 1.0 for d, there in zip(decay.unbind(), decays, strict=True)]
        return Numbers(lr.unbind(), eps.unbind(), factors, self.signs, decays, table)

    def rows(self) -> list[list[Coefficient]]:
        """[groups][3], as `captured` reads them."""
        return [list(row) for row in zip(self.lr, self.eps, self.decay, strict=True)]

    def on(self, device: torch.device) -> Sequence[Tensor]:
        """lr, eps, decay and signs, float64 [groups, 1]; the host does not wait for the device."""
        if self.table is None:
            return move(torch.from_numpy(self.here), device).unbind()
        if device != self.table.device:
            raise graph.Refused(f"the closure returns a loss on {device}: return the tensor that the device computed")
        signs = torch.stack([torch.full((), s, dtype=torch.float64, device=device) for s in self.signs])
        return [*self.table.split(1, 1), signs.unsqueeze(-1)]

    @functools.cached_property
    def here(self) -> np.ndarray:
        """The same as numpy has it, float64 [4, groups, 1]; only read."""
        return np.array((self.lr, self.eps, self.decay, self.signs), dtype=np.float64)[:, :, None]


@dataclass(frozen=True)
class Decided:
    """A decision, and what a later part of the step needs of its way: the numbers, float64 [groups, decided], the loss (float64, or float32 where the
    host has it) and the projected gradient of the first group and query before clipping (float64), both 0-d on the losses' device."""

    decision: Decision
    coefs: Any
    loss: Tensor
    gradient: Tensor


def _estimate(method: Method, numbers: Any, losses: Any, limit: Any, clip: Any, unit: Any) -> tuple[Any, list[Any]]:
    """Projected gradients [groups, queries], and the numbers of `Method.decided` in columns, before they are rounded. Arithmetic alone, so that it is the
    same for numpy arrays, with which a dozen operations cost a CPU what two of torch's do, and for tensors that stay on their device."""
    lr, eps, _, signs = numbers
    raw = method.estimator.gradients(losses, eps)
    gs = raw if limit is None else clip(raw, -limit, limit)
    divisor = []
    if method.scale_free is not None:
        gs, s = method.scale_free.divided(gs, unit)
        divisor = [s]
    return raw, [*method.rule.decide(signs * gs, lr, method.estimator.curvature(losses, eps)), *divisor]


def decide(
    method: Method, numbers: Numbers, losses: Tensor, planned: Decision, past: Sequence[Any] = (), behind: Sequence[float] = (),
    unit: UnitState | None = None,
) -> Decided:  # fmt: skip
    """The decision of a step.

    Args:
        losses: float64 [points] (with tangents [points, 2]). planned: the decision without what the losses tell. past: |g| before, for a clip.
        behind: the numbers of the first group's record behind the decided; the host has waited for what they come from, and waits for these losses too.
        unit: what g is divided by, before this step; None: g is taken as it is.
    """
    limit: Any = method.clip.limit(past)
    coefs: Any
    go: Any
    clipped: Any
    loss: Any
    before: Any
    # The numbers as they are recorded, of fp32: what is formed of them later is formed from those.
    on_host = evaluate.on_host(losses.device)
    if on_host and numbers.table is None and unit is None and method.numbers:
        return _of_numbers(method, numbers, losses, planned, None if limit is None else float(limit), behind)
    if (on_host or behind) and numbers.table is None:
        limit = None if limit is None else float(limit)
        here = (losses if on_host else losses.cpu()).numpy()
        with np.errstate(all="ignore"):
            before = unit.here(len(numbers.lr)) if unit is not None else None
            raw, columns = _estimate(method, numbers.here, here, limit, np.clip, before)
            wide = columns[0] if len(columns) == 1 else np.concatenate(columns, 1)
            coefs = wide.astype(np.float32).astype(np.float64)
            clipped = limit is not None and bool((abs(raw) > limit).any())
            loss = float(method.estimator.loss(here))
            returned = np.array(loss, dtype=np.float32)
        flat, gs = coefs.ravel().tolist(), raw.ravel().tolist()
        go = all(map(math.isfinite, gs)) and all(map(math.isfinite, flat))
        told = planned.told([loss, gs[0], go, clipped, *flat], behind)
        found = torch.from_numpy(returned), torch.from_numpy(np.array(gs[0]))
        return Decided(told, coefs, *(found if on_host else (t.to(losses.device) for t in found)))
    loss = method.estimator.loss(losses)
    table = numbers.on(losses.device)
    before = unit.on(len(numbers.lr), losses.device) if unit is not None else None
    raw, columns = _estimate(method, table, losses, limit, torch.clip, before)
    coefs = torch.cat(columns, 1).float().double()
    go = raw.isfinite().all() & coefs.isfinite().all()
    coefs = torch.where(go, coefs, 0.0)
    clipped = torch.zeros_like(go) if limit is None else (abs(raw) > limit).any()
    values = torch.cat((torch.stack((loss, raw[0, 0], go, clipped)), coefs.reshape(-1)))
    kept = [torch.where(go, d, 1.0) if there else 1.0 for d, there in zip(table[2][:, 0].unbind(), numbers.decays, strict=True)]
    return Decided(planned.unread(values, kept), coefs, loss, raw[0, 0])


def _of_numbers(
    method: Method, numbers: Numbers, losses: Tensor, planned: Decision, limit: float | None, behind: Sequence[float]
) -> Decided:
    """`decide` for one direction whose losses the host has, group by group in Python's float64: the same operations, for a fraction of what arrays
    of one number cost between forwards, which push their code out of the caches."""
    found = losses.tolist()
    raw: list[float] = []
    flat: list[float] = []
    clipped = False
    for lr, eps, sign in zip(numbers.lr, numbers.eps, numbers.signs, strict=True):
        raw.append(g := method.estimator.gradients(found, eps))
        if limit is not None:
            clipped = clipped or abs(g) > limit
            g = min(max(g, -limit), limit)
        flat += map(fp32, method.rule.decide(sign * g, lr, None))
    go = all(map(math.isfinite, raw)) and all(map(math.isfinite, flat))
    loss = method.estimator.loss(found)
    told = planned.told([loss, raw[0], go, clipped, *flat], behind)
    return Decided(told, flat, torch.from_numpy(np.array(fp32(loss), dtype=np.float32)), torch.from_numpy(np.array(raw[0])))


def choose(method: Method, decided: Decided, losses: Tensor) -> Decided:
    """The decision once a rule's candidates are evaluated: `losses` float64 [candidates], of which the lowest is the best."""
    before = torch.as_tensor(decided.coefs, device=losses.device)
    coefs = torch.cat([method.rule.choose(losses, before[:, : method.own]), before[:, method.own :]], 1)
    groups = coefs.tolist() if decided.decision.known else [list(row.unbind()) for row in coefs]
    return replace(decided, decision=replace(decided.decision, coefs=groups), coefs=coefs)
