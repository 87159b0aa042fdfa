"""Parameter groups: their numbers, and whether a step can take them.

Belongs here: checks of lr, eps, weight_decay and maximize, and of a group that joins a run. Does not belong here: how parameters are read (parameters.py),
what a step makes of the numbers (decide.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels import _backends as backends
from zo_kernels import checks, parameters
from zo_kernels.optim.decide import Numbers, fp32
from zo_kernels.optim.method import Method
from zo_kernels.optim.refresh import Groups, active
from zo_kernels.optim.run import Run


def check_group(where: str, group: Mapping[str, Any]) -> None:
    """One group's numbers.

    Raises:
        ValueError: names the first that is wrong, behind `where`.
    """
    for key in ("lr", "eps", "weight_decay", "maximize"):
        if key not in group:
            raise ValueError(f"{where}the group has no {key!r}: put it back")
    for key in ("lr", "eps", "weight_decay"):
        if isinstance(group[key], Tensor) and group[key].numel() != 1:
            raise ValueError(f"{where}{key} is a tensor of shape {tuple(group[key].shape)}: give one number")
    lr, eps, decay = (group[k].item() if isinstance(group[k], Tensor) else group[k] for k in ("lr", "eps", "weight_decay"))
    if not (isinstance(lr, (int, float)) and not isinstance(lr, bool) and 0 <= lr < math.inf):
        raise ValueError(f"{where}lr={lr!r} must be a finite number >= 0 (to ascend, use maximize=True)")
    if not (isinstance(eps, (int, float)) and not isinstance(eps, bool) and 0 < fp32(eps) < math.inf):
        raise ValueError(f"{where}eps={eps!r} must be a finite number > 0, in fp32 too")
    if not (isinstance(decay, (int, float)) and not isinstance(decay, bool) and 0 <= decay < math.inf):
        raise ValueError(f"{where}weight_decay={decay!r} must be a finite number >= 0")
    if not isinstance(group["maximize"], bool):
        raise ValueError(f"{where}maximize={group['maximize']!r} must be True or False")


def check_signs(groups: Sequence[Mapping[str, Any]], method: Method, first_order: torch.optim.Optimizer | None) -> None:
    """Whether groups may go in opposite directions: not where one choice is made for all of them.

    Raises:
        ValueError: they do, and may not.
    """
    signs = {bool(g["maximize"]) for g in groups}
    if len(signs) > 1 and (method.projection is not None or first_order is not None or method.rule.one_way):
        raise ValueError(
            "maximize differs between groups, and a projection, a first_order optimizer or the rule Conservative() goes one way for all: "
            "give all groups the same"
        )
    theirs = {bool(g.get("maximize")) for g in first_order.param_groups} if first_order is not None else signs
    if theirs != signs:
        raise ValueError(
            f"maximize={sorted(signs)} and a first_order optimizer that does the opposite: give both the same maximize"
        )


class Accepted:
    """The numbers of a run's parameter groups, looked at when they are not those of the step before: a rate that stays costs a comparison."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.kinds: list[type] = []
        self.numbers: Numbers | None = None

    def of(self, groups: Groups, method: Method, first_order: torch.optim.Optimizer | None) -> Numbers:
        """Of these groups.

        Raises:
            ValueError: what `check_group` and `check_signs` raise.
        """
        seen = [g.get(key) for g in groups for key in ("lr", "eps", "weight_decay", "maximize")]
        kinds = list(map(type, seen))
        if self.numbers is not None and kinds == self.kinds and seen == self.seen:
            return self.numbers
        for number, group in enumerate(groups):
            check_group(f"param_groups[{number}]: ", group)
        check_signs(groups, method, first_order)
        numbers = Numbers.of(groups)
        # A tensor's number may change where it lies, another optimizer's sign beside these.
        still = first_order is None and set(kinds) <= {float, int, bool}
        self.seen, self.kinds, self.numbers = seen, kinds, numbers if still else None
        return numbers


def joining(
    group: Any, there: Groups, defaults: Mapping[str, Any], model: nn.Module | None, run: Run, backend: str | None
) -> tuple[dict[str, Any], dict[str, int]]:
    """A group that is to join those that are there, as torch takes it, and the run's streams with those of its parameters. Changes nothing.

    Raises:
        TypeError, ValueError: no step could take it; says why.
    """
    if not isinstance(group, dict):
        raise TypeError(f"param_group is a {type(group).__name__}: give a dict with the key 'params'")
    (found,) = parameters.read_params([group], model, 0.0, positions=False).groups
    check_group("param_group: ", {**defaults, **found})
    ours = {n: p for g in there for n, p in zip(g["param_names"], g["params"], strict=False)}
    names, tensors = [n for n, _ in found["params"]], [p for _, p in found["params"]]
    if taken := [n for n in names if n in ours]:
        raise ValueError(f"param_group: the name {taken[0]!r} is in use: names give parameters their noise and must be unique")
    streams = parameters.streams_of(names, run.streams)
    parameters.Weights.of_group({**found, "params": tensors, "param_names": names}, streams)
    checks.check_overlap([(f"parameter {n}", p) for n, p in [*ours.items(), *found["params"]]], "a step updates each weight once")
    for p in tensors:
        backends.pick(p.device, backend)
    if run.method.blocks is not None:
        run.method.blocks.split([n for _, n, _ in active(there)] + names)
    return found, streams
