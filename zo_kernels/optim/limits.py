"""What a direction does to each parameter, and what holds its tensors in one optimizer.

Belongs here: `Limits`, and what every `DirectionState` has, as views, rules and a run ask for it. Does not belong here: any particular direction
(directions.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from zo_kernels.optim.points import Losses
from zo_kernels.plan import Mask


class Limits(NamedTuple):
    """What a direction does to one parameter. `update_scale`: in the update, where it differs from the perturbation's `scale`."""

    mask: Mask = None
    scale: Any = None
    factors: tuple[Tensor, Tensor] | None = None
    update_scale: Any = None


class DirectionState:
    """The tensors of one optimizer's direction, by parameter name."""

    keeps: ClassVar[Mapping[str, torch.dtype | None]] = {}  # see `RuleState.keeps`

    def __init__(self, config: Any, seed: int, kind: str = "gaussian", backend: str | None = None) -> None:
        self.config, self.seed, self.kind, self.backend = config, seed, kind, backend
        self.made: dict[str, Limits] = {}
        self.mask_tag: int | None = None  # of random masks, where it changes

    def expect(self, params: Sequence[tuple[str, Tensor, int]]) -> None:
        """The (name, parameter, stream) of a new view, before `limits` is asked for each."""

    def limits(self, name: str, p: Tensor, stream: int) -> Limits:
        """For a new view; the same tensors for the same parameter, unless it changed its device or shape."""
        limits = self.made.get(name)
        if limits is None or not self.fits(limits, p):
            limits = self.made[name] = self.make(name, p, stream)
        return limits

    def fits(self, limits: Limits, p: Tensor) -> bool:
        return all(t.device == p.device for t in tensors_of(limits))

    def make(self, name: str, p: Tensor, stream: int) -> Limits:
        return Limits()

    def prepare(self, step: int, tag: int, params: Mapping[str, Tensor]) -> None:
        """Before the forwards of a step, the weights being clean: contents for this step of the parameters that take part."""

    def undo(self) -> None:
        """The step that was prepared last did not take place: what `state` gives is as before."""

    def learn(
        self, step: int, tag: int, params: Mapping[str, Tensor], masks: Mapping[str, Mask], eps: float, losses: Losses
    ) -> list[float]:
        """Before the forwards of a step: forwards of the direction's own, the weights afterwards as before. Returns `size` numbers to record."""
        return []

    def learned(self, step: int, numbers: Sequence[float], params: Mapping[str, Tensor]) -> None:
        """The step with these numbers is done."""

    def begin(self, params: Mapping[str, Tensor]) -> Mapping[str, Mapping[str, Tensor]]:
        """See `RuleState.begin`."""
        return {}

    def memory(self) -> list[Tensor]:
        """Every tensor that is held now."""
        return [t for limits in self.made.values() for t in tensors_of(limits)]

    def factored(self, name: str) -> bool:
        """Whether the parameter's z is a product of factors."""
        return name in self.made and self.made[name].factors is not None

    def v_tag(self, name: str) -> int:
        """The tag of the V that a parameter's factors have now."""
        raise TypeError(f"{self.config.name} directions have no factors")

    def diagonal(self, name: str) -> Tensor:
        """H of a parameter, fp32 [numel], which a rule updates."""
        raise TypeError(f"{self.config.name} directions have no diagonal")

    def written(self) -> dict[str, Any]:
        """A copy of what a rule's pass writes to; `restore` takes it back."""
        return {}

    def restore(self, written: Mapping[str, Any]) -> None:
        """See `written`."""

    def state(self) -> dict[str, Any]:
        """What is no function of the present weights; for state_dict."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        pass


def tensors_of(limits: Limits) -> list[Tensor]:
    found: list[Tensor] = []
    for part in limits:
        for x in part if isinstance(part, tuple) else (part,):
            if isinstance(x, Tensor):
                found.append(x)
    return found
