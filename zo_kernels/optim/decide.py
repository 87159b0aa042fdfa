"""From losses to a step's decision.

Belongs here: the one path of numbers from losses to the record, in float64 over [groups, numbers], on the losses' device; and where the host reads it. Does
not belong here: what the losses tell of the gradient (estimators.py), what a rule makes of it (rules.py).

On a CPU the host reads the result, once. On a GPU nobody reads: what follows from it stays on the device. A graph's recording has the same operations.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zo_kernels.optim import graph
from zo_kernels.optim.decision import Decision
from zo_kernels.optim.method import Method
from zo_kernels.plan import move
from zo_kernels.views import Coefficient


def fp32(x: float) -> float:
    """x rounded to fp32; infinity beyond it."""
    return ctypes.c_float(x).value


def on_host(device: torch.device) -> bool:
    """Whether numbers that come from losses there are known to the host without waiting."""
    return device.type == "cpu"


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
            given = tuple(map(tuple, (self.lr, self.eps, self.decay, self.signs)))
            return _columns(given) if device.type == "cpu" else move(_host(given), device).unbind()
        if device != self.table.device:
            raise graph.Refused(f"the closure returns a loss on {device}: return the tensor that the device computed")
        signs = torch.stack([torch.full((), s, dtype=torch.float64, device=device) for s in self.signs])
        return [*self.table.split(1, 1), signs.unsqueeze(-1)]


def _host(rows: tuple[tuple[Any, ...], ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, device="cpu").unsqueeze(-1)


@functools.lru_cache(maxsize=64)
def _columns(rows: tuple[tuple[Any, ...], ...]) -> tuple[Tensor, ...]:
    """Numbers seldom change from step to step, and to make tensors of them costs as much as the rest of a decision. Nobody writes to these."""
    return _host(rows).unbind()


@dataclass(frozen=True)
class Decided:
    """A decision, and what a later part of the step needs of its way: the numbers as float64 [groups, own] on the losses' device, and the projected
    gradient of the first group and query before clipping, 0-d."""

    decision: Decision
    coefs: Tensor
    gradient: Tensor


def decide(
    method: Method, numbers: Numbers, losses: Tensor, planned: Decision, past: Sequence[Any] = (), behind: Sequence[float] = ()
) -> Decided:
    """The decision of a step.

    Args:
        losses: float64 [points] (with tangents [points, 2]). planned: the decision without what the losses tell. past: |g| before, for a clip.
        behind: the numbers of the first group's record behind the rule's; the host has waited for what they come from, and waits for these losses too.
    """
    read = (on_host(losses.device) or bool(behind)) and numbers.table is None
    if read:
        losses = losses.cpu()
    lr, eps, decay, signs = numbers.on(losses.device)
    raw = method.estimator.gradients(losses, eps)
    curvature = method.estimator.curvature(losses, eps)
    limit: Any = method.clip.limit(past)
    gs = raw if limit is None else raw.clamp(-limit, limit)
    # The numbers as they are recorded, of fp32: what is formed of them later is formed from those.
    coefs = method.rule.decide(signs * gs, lr, curvature).float().double()
    go = (torch.cat((raw, coefs), 1) * 0).sum() == 0  # 0 times what is not finite is no number, and no sum with it is
    first = raw.reshape(-1)[0]
    clipped = first.new_zeros(()) if limit is None else (raw.abs() > limit).any()
    summary = torch.stack((method.estimator.loss(losses), first, go, clipped))
    if read:
        values = torch.cat((summary, coefs.reshape(-1)))
        return Decided(planned.told(values.tolist(), behind), coefs, first)
    coefs = torch.where(go, coefs, 0.0)
    kept = [torch.where(go, d, 1.0) if there else 1.0 for d, there in zip(decay[:, 0].unbind(), numbers.decays, strict=True)]
    return Decided(planned.unread(torch.cat((summary, coefs.reshape(-1))), kept), coefs, first)


def choose(method: Method, decided: Decided, losses: Tensor) -> Decided:
    """The decision once a rule's candidates are evaluated: `losses` float64 [candidates], of which the lowest is the best."""
    coefs = method.rule.choose(losses.to(decided.coefs.device), decided.coefs)
    groups = coefs.tolist() if decided.decision.known else [list(row.unbind()) for row in coefs]
    return replace(decided, decision=replace(decided.decision, coefs=groups), coefs=coefs)
