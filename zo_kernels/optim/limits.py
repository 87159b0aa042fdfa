"""What a direction does to each parameter, and what holds its tensors in one optimizer.

Belongs here: `Limits`, and what every `Direction` and every `DirectionState` has, as views, rules and a run ask for it. Does not belong here: any particular
direction (directions.py, factored.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from zo_kernels import checks
from zo_kernels.journal import InputFactors
from zo_kernels.optim.points import Losses
from zo_kernels.parameters import Member, Weights
from zo_kernels.plan import Mask
from zo_kernels.views import Shift, Work


class Limits(NamedTuple):
    """What a direction does to one parameter. `update_scale`: in the update, where it differs from the perturbation's `scale`."""

    mask: Mask = None
    scale: Any = None
    factors: tuple[Tensor, Tensor] | None = None
    update_scale: Any = None


class Direction:
    """A configuration; `of` makes what holds its tensors in one optimizer."""

    name: ClassVar[str]
    repeats: ClassVar[bool] = (
        False  # what perturbs lies in the same memory in every step, written before its forwards: a CUDA graph may read it
    )
    plain: ClassVar[bool] = False  # z is the noise itself, which is known at any later time by its tag
    factored: ClassVar[bool] = False  # z of a matrix is a product of factors
    diagonal: ClassVar[bool] = False  # z is scaled by an H that a rule updates
    update_differs: ClassVar[bool] = False  # perturbation and update use different scales

    @property
    def size(self) -> int:
        """Numbers of a step's record that are the direction's own."""
        return 0

    def check(self, directions: int, kind: str, blocks: bool) -> None:
        """ValueError where it makes no sense with so many directions a step, this kind of noise, or steps of blocks."""

    def over(self, names: Collection[str]) -> None:
        """ValueError where it makes no sense for a run that trains the parameters of these names."""

    def of(self, seed: int, kind: str = "gaussian", backend: str | None = None) -> DirectionState:
        """What holds the tensors of one optimizer, whose noise is of this seed and kind, made by this backend."""
        return DirectionState(self, seed, kind, backend)


class DirectionState:
    """The tensors of one optimizer's direction, by parameter name."""

    keeps: ClassVar[Mapping[str, torch.dtype | None]] = {}  # see `RuleState.keeps`

    def __init__(self, config: Any, seed: int, kind: str = "gaussian", backend: str | None = None) -> None:
        self.config, self.seed, self.kind, self.backend = config, seed, kind, backend
        self.made: dict[str, Limits] = {}
        self.mask_tag: int | None = None  # of random masks, where it changes

    @property
    def given(self) -> InputFactors | None:
        """What a replay needs besides the journal, and the journal has the digest of."""
        return None

    def moving(self, names: Collection[str]) -> Collection[str] | None:
        """Which of these parameters a step may change; None: all."""
        return None

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

    def follow(self, shifts: Sequence[Shift], back: Callable[[], Any]) -> None:
        """Before the weights of each group go to theta + shift: contents for it. `back` brings them to theta along what is held now."""

    def parted(self, work: Work, weights: Weights) -> Iterable[Work]:
        """A rule's work on these weights, as passes that what is held can serve."""
        return [work]

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

    def square(self, member: Member) -> float:
        """The mean of E z^2 in the update of a parameter, over its weights that take part. What lies on a device is waited for."""
        return mean_square(member.update_scale if self.config.update_differs else member.scale)

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


def check_every(every: Any) -> None:
    if checks.check_word("every", every) < 1:
        raise ValueError("every=0: give a number of steps, at least 1")


def mean_square(scale: Any) -> float:
    """Of a scale as `perturb_` takes it, over its values."""
    if scale is None:
        return 1.0
    inverse = isinstance(scale, tuple) and len(scale) == 3
    values = scale[0] if isinstance(scale, tuple) else scale
    if not isinstance(values, Tensor):
        return float(values) ** 2
    wide = values.double()
    return float((1 / wide if inverse else wide.square()).mean()) if wide.numel() else 1.0
