"""Which directions a step perturbs along: what limits or scales z in each parameter.

Belongs here: masks and scales as functions of the step and of the clean weights, held in tensors that keep their addresses, so that
plans, tables in device memory and views stay what they are while the contents change. Does not belong here: z from
factors (factored.py), the noise (zo_kernels.ops), which parameters take part in a step (blocks.py).

Everything that a direction holds is a function of the seed, the step and the weights before it, so that a replay makes it again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zo_kernels import checks, ops
from zo_kernels.optim.factored import InputSubspace, LowRank
from zo_kernels.optim.limits import Direction, DirectionState, Limits, check_every, mean_square
from zo_kernels.optim.points import Losses, Point
from zo_kernels.parameters import Member, canonical_name
from zo_kernels.plan import Mask, Plan, RandomMask, make_plans

SUMMED = 1 << 20  # weights whose float64 copies are summed at a time


@dataclass(frozen=True)
class Dense(Direction):
    """Gaussian or Rademacher in every element (`kind` of the optimizer)."""

    name: ClassVar[str] = "dense"
    repeats: ClassVar[bool] = True
    plain: ClassVar[bool] = True


# ---- sparse -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomSparse(Direction):
    """Each weight takes part with probability `keep`; a new mask every `every` steps. Nothing is stored: the mask is noise too (docs/numerics.md,
    section 4), in perturbation and update alike."""

    keep: float = 0.1
    every: int = 1
    name: ClassVar[str] = "random-sparse"

    def __post_init__(self) -> None:
        RandomMask(self.keep)
        check_every(self.every)

    def of(self, seed: int, kind: str = "gaussian", backend: str | None = None) -> DirectionState:
        return _Random(self, seed, kind, backend)


class _Random(DirectionState):
    config: RandomSparse
    mask_tag: int

    def __init__(self, config: RandomSparse, *of: Any) -> None:
        super().__init__(config, *of)
        self.mask_tag = 0

    def fits(self, limits: Limits, p: Tensor) -> bool:
        return isinstance(limits.mask, RandomMask) and limits.mask.tag == self.mask_tag

    def make(self, name: str, p: Tensor, stream: int) -> Limits:
        return Limits(mask=RandomMask(self.config.keep, self.mask_tag))

    def prepare(self, step: int, tag: int, params: Mapping[str, Tensor]) -> None:
        self.mask_tag = step // self.config.every


@dataclass(frozen=True)
class MagnitudeSparse(Direction):
    """Sparse-MeZO (Liu et al. 2024, arXiv 2402.15751): a weight takes part where |theta| <= h, h the `quantile` of its tensor's magnitudes at the
    run's start. The mask is made from the clean weights before each step and held still in it, as bits, in perturbation and update alike: one
    made anew from weights under perturbation flips membership between the passes."""

    quantile: float = 0.75
    name: ClassVar[str] = "magnitude-sparse"
    repeats: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (isinstance(self.quantile, (int, float)) and 0 < self.quantile <= 1):
            raise ValueError(f"quantile={self.quantile!r} must be in (0, 1]: the share of the smallest weights that take part")

    def of(self, seed: int, kind: str = "gaussian", backend: str | None = None) -> DirectionState:
        return _Magnitude(self, seed, kind, backend)


class _Magnitude(DirectionState):
    """One bit a weight and one threshold a tensor."""

    def __init__(self, config: MagnitudeSparse, *of: Any) -> None:
        super().__init__(config, *of)
        self.thresholds: dict[str, float] = {}
        self.placed: Any = None  # where weights, masks and thresholds were when the plans were made
        self.plans: tuple[list[Plan], list[Tensor]] = [], []

    def __getstate__(self) -> dict[str, Any]:
        """A copy has weights of its own, and makes its plans with its next step."""
        return {**self.__dict__, "placed": None, "plans": ([], [])}

    def fits(self, limits: Limits, p: Tensor) -> bool:
        return super().fits(limits, p) and isinstance(limits.mask, Tensor) and limits.mask.numel() == (p.numel() + 7) // 8

    def make(self, name: str, p: Tensor, stream: int) -> Limits:
        if name not in self.thresholds and p.numel():
            magnitudes = p.detach().reshape(-1).abs().float()
            rank = max(1, math.ceil(self.config.quantile * p.numel()))
            self.thresholds[name] = float(magnitudes.kthvalue(rank).values)
        return Limits(mask=torch.empty((p.numel() + 7) // 8, dtype=torch.uint8, device=p.device))

    def prepare(self, step: int, tag: int, params: Mapping[str, Tensor]) -> None:
        bits: list[Any] = [self.made[name].mask for name in params]
        placed = [
            (name, self.thresholds.get(name), p.data_ptr(), m.data_ptr()) for (name, p), m in zip(params.items(), bits, strict=True)
        ]
        if self.placed != placed:
            plans = make_plans(list(params.values()), [0] * len(params), masks=bits)
            limits = [self.thresholds.get(name, 0.0) for name in params]  # of a tensor without elements there is none
            self.plans = (
                plans,
                [torch.tensor([limits[k] for k in plan.members], dtype=torch.float32, device=plan.device) for plan in plans],
            )
            self.placed = placed
        ops.magnitude_masks(*self.plans, backend=self.backend)

    def state(self) -> dict[str, Any]:
        return {"thresholds": dict(self.thresholds)}

    def load(self, state: Mapping[str, Any]) -> None:
        self.thresholds = dict(state["thresholds"])


# ---- scales -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerScale(Direction):
    """MeZO's layer-wise variants (Malladi et al. 2023, appendix B): z of a parameter times 1/d, d large where its weights, or its gradient, are.

    Args:
        by: "rms": d is the root mean square of the parameter's weights, measured every `every` steps. "gradient": of its gradient, a running estimate:
            each step also evaluates theta ± eps z with z in one parameter alone, in turn (two more forwards), whose projected gradient g has
            E g^2 = |grad|^2; the mean over its turns has the factor `beta`. A parameter counts from its first turn on.
        estimate: "variance": the update takes z times d, an unbiased estimate with another variance (definition 6). "expectation": the update
            takes z, an estimate of the gradient divided by d in each parameter (definition 7).
        every: steps between new values of d.
        least: of d / mean, its inverse the most.

    d is the root of a mean over the elements, sqrt(sum x^2 / count), and is divided by its geometric mean over the parameters, so that lr and eps keep
    their meaning.
    """

    by: str = "rms"
    estimate: str = "variance"
    every: int = 100
    beta: float = 0.9
    least: float = 1e-2
    name: ClassVar[str] = "layer-scale"
    update_differs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.check_choice("by", self.by, ("rms", "gradient"))
        checks.check_choice("estimate", self.estimate, ("variance", "expectation"))
        check_every(self.every)
        if not (isinstance(self.beta, (int, float)) and 0 <= self.beta < 1):
            raise ValueError(f"beta={self.beta!r} must be in [0, 1)")
        if not 0 < checks.check_fp32("least", self.least) <= 1:
            raise ValueError(f"least={self.least!r} must be in (0, 1]")

    def check(self, directions: int, kind: str, blocks: bool) -> None:
        if blocks:
            raise ValueError(
                "direction=LayerScale() with blocks: scales are relative to all parameters, of which a block is a part; leave one out"
            )

    @property
    def size(self) -> int:
        return 1 if self.by == "gradient" else 0

    def of(self, seed: int, kind: str = "gaussian", backend: str | None = None) -> DirectionState:
        return _LayerScale(self, seed, kind, backend)


class _LayerScale(DirectionState):
    def __init__(self, config: LayerScale, *of: Any) -> None:
        super().__init__(config, *of)
        self.squares: dict[str, tuple[float, float]] = {}  # of gradients: the weighted sum of g^2, and of the weights
        self.loaded: dict[str, tuple[float, float]] = {}  # of parameters that no view has asked for yet
        self.before: dict[str, tuple[float, float]] = {}  # what the step under way has written over

    def make(self, name: str, p: Tensor, stream: int) -> Limits:
        scale = torch.ones(1, dtype=torch.float32, device=p.device)
        limits = Limits(scale=scale, update_scale=scale.clone() if self.config.estimate == "variance" else 1.0)
        self._set(limits, *self.loaded.pop(name, (1.0, 1.0)))
        return limits

    def undo(self) -> None:
        for name, numbers in self.before.items():
            self._set(self.made[name], *numbers)

    def _get(self, limits: Limits) -> tuple[float, float]:
        return float(limits.scale), float(limits.update_scale)

    def _set(self, limits: Limits, scale: float, update: float) -> None:
        limits.scale.fill_(scale)
        if isinstance(limits.update_scale, Tensor):
            limits.update_scale.fill_(update)

    def prepare(self, step: int, tag: int, params: Mapping[str, Tensor]) -> None:
        self.before = {}
        if step % self.config.every:
            return
        self.before = {n: self._get(self.made[n]) for n in params}
        logs = {n: math.log(d) for n, p in params.items() if (d := self._root_mean_square(n, p)) > 0}
        mean = sum(logs.values()) / max(1, len(logs))
        for name in params:
            relative = max(math.exp(logs[name] - mean), self.config.least) if name in logs else 1.0
            # Rounded to 12 bits: sums in another order, on another device, then give the same scale but in one case in a billion.
            mantissa, exponent = math.frexp(relative)
            d = math.ldexp(round(mantissa * 4096) / 4096, exponent)
            self._set(self.made[name], 1 / d, d)

    def _root_mean_square(self, name: str, p: Tensor) -> float:
        if self.config.by == "gradient":
            total, weight = self.squares.get(name, (0.0, 0.0))
            return math.sqrt(total / weight / max(1, p.numel())) if weight else 0.0
        square = torch.zeros((), dtype=torch.float64, device=p.device)  # read once: a GPU waits for no part
        for part in p.detach().view(-1).split(SUMMED):
            wide = part.double()
            square += torch.dot(wide, wide)
        return math.sqrt(float(square) / max(1, p.numel()))

    def learn(
        self, step: int, tag: int, params: Mapping[str, Tensor], masks: Mapping[str, Mask], eps: float, losses: Losses
    ) -> list[float]:
        name = self._turn(step, params)
        p = params[name]
        clean = p.detach().clone()

        def at(side: float) -> Point:
            def see() -> None:
                ops.perturb_(
                    [clean], [(tag, side)], seed=self.seed, streams=[self.streams[name]], masks=[masks.get(name)], out=[p.detach()],
                    kind=self.kind, backend=self.backend,
                )  # fmt: skip
                torch.clear_autocast_cache()

            return Point(see)

        try:
            plus, minus = losses([at(eps), at(-eps)]).tolist()
        finally:
            p.copy_(clean)
        g = float(torch.tensor((plus - minus) / (2 * eps), dtype=torch.float32))
        return [g if math.isfinite(g) else 0.0]

    def learned(self, step: int, numbers: Sequence[float], params: Mapping[str, Tensor]) -> None:
        name, (g,) = self._turn(step, params), numbers
        total, weight = self.squares.get(name, (0.0, 0.0))
        self.squares[name] = self.config.beta * total + g * g, self.config.beta * weight + 1

    def _turn(self, step: int, params: Mapping[str, Tensor]) -> str:
        names = sorted(params, key=canonical_name)  # wrapped or not
        return names[step % len(names)]

    def expect(self, params: Sequence[tuple[str, Tensor, int]]) -> None:
        self.streams = {name: stream for name, _, stream in params}

    def state(self) -> dict[str, Any]:
        held = {n: self._get(m) for n, m in self.made.items()}
        return {"scales": {**self.loaded, **held}, "squares": dict(self.squares)}

    def load(self, state: Mapping[str, Any]) -> None:
        self.squares = dict(state["squares"])
        self.made, self.loaded = {}, dict(state["scales"])


@dataclass(frozen=True)
class InverseRoot(Direction):
    """z / sqrt(H), H a diagonal that a rule keeps (HiZOO). `DirectionState.made` has it as the rule's state, fp32, ones at the start."""

    name: ClassVar[str] = "inverse-root"
    repeats: ClassVar[bool] = True
    diagonal: ClassVar[bool] = True
    update_differs: ClassVar[bool] = True  # the rule applies H itself

    def of(self, seed: int, kind: str = "gaussian", backend: str | None = None) -> DirectionState:
        return _InverseRoot(self, seed, kind, backend)


class _InverseRoot(DirectionState):
    keeps: ClassVar[Mapping[str, torch.dtype | None]] = {"diagonal": torch.float32}

    def make(self, name: str, p: Tensor, stream: int) -> Limits:
        if (old := self.made.get(name)) is not None and old.scale[0].numel() == p.numel():
            return Limits(scale=(old.scale[0].to(p.device), 1, "rsqrt"))
        return Limits(scale=(torch.ones(p.numel(), dtype=torch.float32, device=p.device), 1, "rsqrt"))

    def fits(self, limits: Limits, p: Tensor) -> bool:
        return super().fits(limits, p) and limits.scale[0].numel() == p.numel()

    def square(self, member: Member) -> float:
        return mean_square(member.scale)  # the update takes it too, by the rule

    def diagonal(self, name: str) -> Tensor:
        found: Tensor = self.made[name].scale[0]
        return found

    def begin(self, params: Mapping[str, Tensor]) -> Mapping[str, Mapping[str, Tensor]]:
        return {"diagonal": {n: torch.ones(p.numel(), dtype=torch.float32, device=p.device) for n, p in params.items()}}

    def state(self) -> dict[str, Any]:
        return {"diagonal": {n: m.scale[0].clone() for n, m in self.made.items()}}

    def written(self) -> dict[str, Any]:
        return self.state()

    def restore(self, written: Mapping[str, Any]) -> None:
        self.load(written)

    def load(self, state: Mapping[str, Any]) -> None:
        for name, values in state["diagonal"].items():
            if name in self.made:
                self.made[name].scale[0].copy_(values)
            else:
                self.made[name] = Limits(scale=(values.clone(), 1, "rsqrt"))


DIRECTIONS: Sequence[type[Direction]] = (Dense, RandomSparse, MagnitudeSparse, LayerScale, InverseRoot, LowRank, InputSubspace)
