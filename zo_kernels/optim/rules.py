"""What is done with projected gradients: the update rules, what each records of a step, and which work on the weights a record stands for.

Belongs here: the rules. Does not belong here: how g was estimated (estimators.py), the memory of what a rule keeps between steps (states.py), how work is
done (views/), arithmetic on weights (zo_kernels.ops and zo_kernels.update).

A rule works in two halves, so that a run can be replayed. `decide` turns the estimates of all groups into the few numbers of the step's record; `work`
says, as a function of those numbers and of the rule's state alone, what is to be done to the weights of one group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from zo_kernels import checks, lowrank, update
from zo_kernels.optim.decision import Share
from zo_kernels.optim.factored import LowRank
from zo_kernels.optim.limits import Direction, DirectionState
from zo_kernels.optim.states import FactorState, RuleState
from zo_kernels.parameters import Weights
from zo_kernels.plan import Entry, move
from zo_kernels.views import Coefficient, RuleWork, Tag, Terms, Work

STATES = ("stored", "recomputed")
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _count(gs: Any) -> int:
    """Of the directions: the columns of an array, one of a number."""
    return getattr(gs, "shape", (1, 1))[1]


class Rule:
    """What all rules have. Rules are configurations; what they keep between steps is in a `RuleState`."""

    name: ClassVar[str]
    tries: ClassVar[int] = 0  # candidates that are evaluated before the step is decided
    diagonal: ClassVar[bool] = False  # it updates the H of a direction that is scaled by it, from the estimator's curvature
    one_way: ClassVar[bool] = False  # one choice is made for all groups: they descend together, or ascend
    scheduled: ClassVar[bool] = False  # a record's numbers are not the coefficients of the update

    @property
    def stateful(self) -> bool:
        """Whether its work begins at the clean weights: it reads a state, or changes what perturbs."""
        return False

    @property
    def keeps(self) -> Mapping[str, torch.dtype]:
        """The tensors of every parameter that the rule keeps between steps, one number for each weight."""
        return {}

    @property
    def counts(self) -> bool:
        """Whether an update depends on how many steps its parameters have seen, or on which."""
        return False

    @property
    def repeats(self) -> bool:
        """Whether its work is the same in every step, on the same memory, but for numbers that a device can know: a CUDA graph repeats it."""
        return True

    def size(self, directions: int) -> int:
        """How many numbers a step records in each group."""
        return directions

    def decide(self, gs: Any, lr: Any, curvature: Any) -> list[Any]:
        """The numbers of the record before they are rounded to fp32, float64, in columns [groups, ...] that come to `size`. Given are tensors, numpy
        arrays or, of one group and one direction, numbers; used is what all have.

        Args:
            gs: float64 [groups, directions], with the sign of the descent: theta + lr mean(g_i z_i) goes downhill. lr: float64 [groups, 1].
            curvature: float64 [groups, 1], where the estimator measures it.
        """
        return [lr * gs / _count(gs)]

    def trials(self, tag: Tag, coefs: Sequence[Coefficient]) -> list[list[tuple[Tag, Coefficient]]]:
        """Where the candidates are evaluated: `tries` shifts of one group."""
        return []

    def choose(self, losses: Tensor, coefs: Tensor) -> Tensor:
        """The numbers of the record, float64 [groups, size], once the candidates' losses [tries] are known."""
        return coefs

    def work(self, state: RuleState, share: Share, weights: Weights, direction: DirectionState) -> list[Work]:
        """What the update does to one group's weights and the rule's state: here terms, the same for all of the group. Changes nothing
        but `state` (LOZO-M also the U of its direction, which is made anew before the next forward)."""
        return [Terms(share.group, list(zip(share.tags, share.coefs, strict=False)), share.decay, share.rounding)]

    def reserve(self, state: RuleState, weights: Weights) -> None:
        """Make the memory of `keeps`: before a step is recorded, so that one that does not fit fails undone."""
        if wanted := self.keeps:
            state.of(weights, weights.names, wanted)

    def check(self, directions: int, direction: Direction) -> None:
        """ValueError where the rule makes no sense with so many directions, or this kind of them."""

    def of(self) -> RuleState:
        return RuleState(self)


def _numbers(values: Sequence[Any]) -> Any:
    """Numbers of a rule pass: a list, or one fp32 tensor on the device that one of them is on."""
    device = next((v.device for v in values if isinstance(v, Tensor)), None)
    if device is None:
        return [float(v) for v in values]
    return torch.stack([_on_device(v, device) for v in values]).float()


def _on_device(value: Any, device: torch.device) -> Tensor:
    """A number as a 0-d float64 tensor, by a fill, which unlike a copy from the host does not wait."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64).reshape(())
    return torch.full((), float(value), dtype=torch.float64, device=device)


def _pass(
    share: Share, rule: str, coefs: Sequence[Coefficient], numbers: Sequence[Any], direction: DirectionState, **more: Any
) -> update.RulePass:
    tags: Any = list(share.tags[: len(coefs)])
    if any(isinstance(t, Tensor) for t in tags):  # a graph's, and what stands beside it lies on its device too
        tags = torch.stack([t.to(torch.int64).reshape(()) for t in tags])
        values: Any = torch.stack([_on_device(c, tags.device) for c in coefs]).float()
    elif isinstance(values := _numbers(coefs), Tensor):
        tags = move(torch.tensor(tags, dtype=torch.int64), values.device)
    given = _numbers([share.go, share.decay, *numbers])
    return update.RulePass(direction.seed, tags, values, direction.kind, share.rounding, rule, given, **more)


# ---- rules that are lists of terms --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SGD(Rule):
    """theta <- (1 - lr wd) theta - lr sum_i g_i z_i (ZO-SGD; MeZO, algorithm 1)."""

    name: ClassVar[str] = "sgd"


@dataclass(frozen=True)
class Sign(Rule):
    """theta <- (1 - lr wd) theta - lr sum_i sign(g_i) z_i / q (ZO-SGD-Sign of the ZO-LLM benchmark, arXiv 2402.11592)."""

    name: ClassVar[str] = "sign"

    def decide(self, gs: Any, lr: Any, curvature: Any) -> list[Any]:
        return [lr * ((gs > 0) * 1.0 - (gs < 0) * 1.0) / _count(gs)]


@dataclass(frozen=True)
class Conservative(Rule):
    """theta, theta - lr g z and theta + lr g z are evaluated and the best is kept (ZO-SGD-Cons, arXiv 2402.11592); three more forwards. At equal
    losses theta stays. The record has the coefficient that was taken and the one that was tried."""

    name: ClassVar[str] = "conservative"

    tries: ClassVar[int] = 3
    one_way: ClassVar[bool] = True
    scheduled: ClassVar[bool] = True

    def size(self, directions: int) -> int:
        return 2

    def check(self, directions: int, direction: Direction) -> None:
        if directions != 1:
            raise ValueError(f"rule=Conservative() with {directions} queries: it tries one direction; give queries=1")

    def decide(self, gs: Any, lr: Any, curvature: Any) -> list[Any]:
        return [0.0 * gs, lr * gs]  # nothing taken yet

    def trials(self, tag: Tag, coefs: Sequence[Coefficient]) -> list[list[tuple[Tag, Coefficient]]]:
        return [[], [(tag, coefs[1])], [(tag, -coefs[1])]]

    def choose(self, losses: Tensor, coefs: Tensor) -> Tensor:
        """The candidate with the lowest loss; one that is not finite never wins."""
        stay, ahead, back = torch.where(losses.isfinite(), losses, torch.inf)
        forward, backward = (ahead < stay) & (ahead <= back), (back < stay) & (back < ahead)
        tried = coefs[:, 1:]
        return torch.cat([(forward.double() - backward.double()) * tried, tried], 1)

    def work(self, state: RuleState, share: Share, weights: Weights, direction: DirectionState) -> list[Work]:
        return [Terms(share.group, [(share.tags[0], share.coefs[0])], share.decay, share.rounding)]


# ---- momentum -----------------------------------------------------------------------------------------------------------


class _Rated(Rule):
    """The record: the estimate's coefficients g_i, and the learning rate."""

    scheduled: ClassVar[bool] = True
    history: int

    def size(self, directions: int) -> int:
        return directions + 1

    def decide(self, gs: Any, lr: Any, curvature: Any) -> list[Any]:
        return [-gs / _count(gs), lr]  # the gradient itself, whose sign a rule takes


def _check_state(rule: Any) -> None:
    checks.check_choice("state", rule.state, STATES)
    checks.check_choice("dtype", rule.dtype, STATE_DTYPES)
    if checks.check_word("history", rule.history) < 1:
        raise ValueError("history=0: give the number of steps to remember, at least 1")


def _check_past(direction: Direction) -> None:
    """Of a rule that forms its state anew from past steps."""
    if not direction.plain:
        raise ValueError(
            f"state='recomputed' with {direction.name} directions: past masks and scales are gone; give state='stored' or direction=Dense()"
        )


def _check_beta(name: str, beta: Any) -> None:
    if not (isinstance(beta, (int, float)) and 0 <= beta < 1):
        raise ValueError(f"{name}={beta!r} must be in [0, 1)")


@dataclass(frozen=True)
class Momentum(_Rated):
    """b <- beta b + sum_i g_i z_i; theta <- (1 - lr wd) theta - lr b.

    Args:
        state: "stored": b is held, 4 bytes a weight (or 2), and updated with the weights in one pass. "recomputed": b is formed anew from the last
            `history` records of steps that a parameter took part in, one pass with history * q terms and nothing held. What is left out then is
            beta^history of b.
        dtype: of a stored b: "float32", or "bfloat16" (rounded stochastically: unbiased).
    """

    beta: float = 0.9
    state: str = "stored"
    history: int = 32
    dtype: str = "float32"
    name: ClassVar[str] = "momentum"

    def __post_init__(self) -> None:
        _check_beta("beta", self.beta)
        _check_state(self)

    @property
    def stateful(self) -> bool:
        return self.state == "stored"

    @property
    def keeps(self) -> Mapping[str, torch.dtype]:
        return {"momentum": STATE_DTYPES[self.dtype]} if self.state == "stored" else {}

    @property
    def counts(self) -> bool:
        return self.state == "recomputed"

    @property
    def repeats(self) -> bool:
        return self.state == "stored"

    def check(self, directions: int, direction: Direction) -> None:
        if direction.factored:
            remedy = "the sum of z is of no low rank once V changes; take LowRankMomentum()"
            if not isinstance(direction, LowRank):
                remedy = "a pass with state forms dense directions; take SGD()"
            raise ValueError(f"rule=Momentum() with direction={type(direction).__name__}(): {remedy}")
        if self.state == "recomputed":
            _check_past(direction)

    def work(self, state: RuleState, share: Share, weights: Weights, direction: DirectionState) -> list[Work]:
        *gs, lr = share.coefs
        if self.state == "stored":
            state.advance(share, weights)
            if share.go is False:
                return []
            states = state.of(weights, weights.names, self.keeps)
            return [RuleWork(share.group, _pass(share, "momentum", gs, [lr, self.beta], direction), states)]
        found: list[Terms] = []
        for cohort in state.advance(share, weights, gs, self.history):
            # The step's own direction first: it names the draw of stochastic rounding.
            terms = [
                (tag, share.live(-lr * c * self.beta**age))
                for p, age in cohort.ages()
                for tag, c in zip(p.tags, p.coefs, strict=True)
            ]
            found.append(Terms(share.group, terms, share.decay, share.rounding, cohort.names))
        if len(found) == 1:
            found = [replace(found[0], names=None)]
        if share.go is False or not found:  # a step that is skipped still brings the weights back from where they were perturbed
            return [Terms(share.group, [(share.tags[0], 0.0)], share.decay, share.rounding)]
        return list(found)


@dataclass(frozen=True)
class Adam(_Rated):
    """m <- b1 m + (1 - b1) u, v <- b2 v + (1 - b2) u^2, u = sum_i g_i z_i;
    theta <- (1 - lr wd) theta - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps). t counts a parameter's own updates, as torch.optim.Adam does:
    steps of other blocks, and those before it was added or unfrozen, are none of it.

    Args:
        state: "stored": m and v are held (8 bytes a weight, 6 with a bfloat16 m) and updated with the weights in one pass. v is fp32 always: in
            fp16 it underflows, and an eps of 1e-8 is 0. "recomputed": both are formed anew from the last `history` records, nothing is held; one
            direction a step. The weights beta^age of those records are divided by their own sum, so that the average stays one.
        dtype: of a stored m: "float32", or "bfloat16" (rounded stochastically).
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    state: str = "stored"
    history: int = 32
    dtype: str = "float32"
    name: ClassVar[str] = "adam"

    def __post_init__(self) -> None:
        _check_beta("beta1", self.beta1)
        _check_beta("beta2", self.beta2)
        _check_state(self)
        if not (isinstance(self.eps, (int, float)) and checks.check_fp32("eps", self.eps) > 2.0**-126):
            raise ValueError(f"eps={self.eps!r} must be a positive normal number in fp32: it keeps 0 / 0 away")

    @property
    def stateful(self) -> bool:
        return True

    @property
    def keeps(self) -> Mapping[str, torch.dtype]:
        return {"m": STATE_DTYPES[self.dtype], "v": torch.float32} if self.state == "stored" else {}

    @property
    def counts(self) -> bool:
        return True

    @property
    def repeats(self) -> bool:
        return self.state == "stored"

    def check(self, directions: int, direction: Direction) -> None:
        if direction.factored:
            raise ValueError(
                f"rule=Adam() with direction={type(direction).__name__}(): a pass with state forms dense directions; take SGD() or LowRankMomentum()"
            )
        if self.state == "recomputed" and directions != 1:
            raise ValueError(
                f"state='recomputed' with {directions} queries: the square of their sum is no sum of squares; give queries=1 or state='stored'"
            )
        if self.state == "recomputed":
            _check_past(direction)

    def work(self, state: RuleState, share: Share, weights: Weights, direction: DirectionState) -> list[Work]:
        if self.state == "recomputed":
            return self._from_history(state, share, weights, direction)
        *gs, lr = share.coefs
        b1, b2 = self.beta1, self.beta2
        found: list[Work] = []
        for cohort in state.advance(share, weights):
            if share.go is False:
                continue
            t = cohort.count
            numbers = [lr / (1 - b1**t), b1, 1 - b1, b2, 1 - b2, 1 / (1 - b2**t), self.eps]
            states = state.of(weights, cohort.names, self.keeps)
            found.append(RuleWork(share.group, _pass(share, "adam", gs, numbers, direction), states, cohort.names))
        return list(found)

    def _from_history(self, state: RuleState, share: Share, weights: Weights, direction: DirectionState) -> list[Work]:
        g, lr = share.coefs
        found: list[Work] = []
        for cohort in state.advance(share, weights, [g], self.history):
            if share.go is False:
                continue
            past = cohort.ages()
            # Of the oldest first, as the weights beta^age always were added.
            sums = [sum(p.live * b**age for p, age in reversed(past)) for b in (self.beta1, self.beta2)]
            first = [p.coefs[0] * (self.beta1**age / sums[0]) for p, age in past]
            second = [p.coefs[0] * p.coefs[0] * (self.beta2**age / sums[1]) for p, age in past]
            own = replace(share, tags=[p.tags[0] for p, _ in past])
            p = _pass(own, "adam_history", first, [lr, self.eps], direction, squares=_numbers(second))
            found.append(RuleWork(share.group, p, None, cohort.names))
        return found


@dataclass(frozen=True)
class HessianDiagonal(Rule):
    """HiZOO (Zhao et al. 2024, arXiv 2402.15173): H <- clamp(H + alpha H (kappa z^2 - 1), low, high) with kappa = |L+ + L- - 2 L0| / (2 eps^2),
    theta <- (1 - lr wd) theta - lr g z / sqrt(H), with the new H. H is fp32: in fp16 the update of relative size alpha vanishes.

    Needs `ThreePoint` and `InverseRoot`, which hold H and perturb by eps z / sqrt(H).
    """

    alpha: float = 1e-8
    low: float = 1e-4
    high: float = 1e4
    name: ClassVar[str] = "hessian-diagonal"
    diagonal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (isinstance(self.alpha, (int, float)) and 0 <= self.alpha < 1):
            raise ValueError(f"alpha={self.alpha!r} must be in [0, 1)")
        if not 0 < checks.check_fp32("low", self.low) <= 1 <= checks.check_fp32("high", self.high):
            raise ValueError(f"low={self.low!r} and high={self.high!r} must hold 1, where H starts, between them, low > 0")

    @property
    def stateful(self) -> bool:
        return True

    def size(self, directions: int) -> int:
        return 2

    def decide(self, gs: Any, lr: Any, curvature: Any) -> list[Any]:
        return [-lr * gs, curvature]

    def work(self, state: RuleState, share: Share, weights: Weights, direction: DirectionState) -> list[Work]:
        lrg, kappa = share.coefs
        state.advance(share, weights)
        if share.go is False:
            return []
        states = [[[direction.diagonal(name)] for name in members] for _, members in weights.part(weights.names)]
        numbers = [lrg, self.alpha, kappa, self.low, self.high]
        return [RuleWork(share.group, _pass(share, "hizoo", [1.0], numbers, direction), states)]


@dataclass(frozen=True)
class LowRankMomentum(_Rated):
    """LOZO-M (Chen et al. 2024, arXiv 2410.07698, algorithm 2): the momentum of a matrix is kept in the factor that changes from step to step,

        N <- N V_old^T V / columns, in the step that renews V;    N <- beta N + (1 - beta) g U;    theta <- (1 - lr wd) theta - (lr / rank) N V^T

    with N = 0 at the start. Other parameters: b <- beta b + (1 - beta) g z, theta <- (1 - lr wd) theta - lr b, as in the authors' code (which
    begins with N = g U and b = g z). N is fp32, 4 rank (rows) bytes a matrix; the update takes it rounded to 12 significant bits, as all factors
    are, and what is smaller than 2^-60 as 0. Each operation rounds once; V_old^T V is summed in float64 and its quotient rounded to 12 bits, so that sums
    in another order, on another device, give the same bits but in one case in a billion.

    Needs `LowRank`, which holds U and V.
    """

    beta: float = 0.9
    name: ClassVar[str] = "low-rank-momentum"

    def __post_init__(self) -> None:
        _check_beta("beta", self.beta)

    @property
    def stateful(self) -> bool:
        return True

    @property
    def repeats(self) -> bool:
        return False  # the step that renews V is another one

    def of(self) -> RuleState:
        return FactorState(self)

    def check(self, directions: int, direction: Direction) -> None:
        if not isinstance(direction, LowRank):
            other = "SGD" if direction.factored else "Momentum"
            raise ValueError(
                f"rule=LowRankMomentum() with {direction.name} directions: it keeps momentum in a factor of LowRank(); take {other}()"
            )
        if directions != 1:
            raise ValueError(f"rule=LowRankMomentum() with {directions} queries: one U lies beside N; give queries=1")

    def work(self, state: RuleState, share: Share, weights: Weights, direction: DirectionState) -> list[Work]:
        assert isinstance(state, FactorState)
        g, lr = share.coefs
        if share.go is False:
            return []
        kick = g * (1 - self.beta)
        matrices = frozenset(n for n in weights.names if direction.factored(n))
        others = frozenset(weights.names) - matrices
        states = [
            [[state.tensor(n, "momentum", e.src.numel(), plan.device)] for e, n in zip(plan.entries, names, strict=True)]
            for plan, names in weights.part(others)
        ]
        momentum = _pass(share, "momentum", [kick], [lr, self.beta], direction)
        for one, names in weights.part(matrices):
            for entry, name in zip(one.entries, names, strict=True):
                self._advance(state, share, name, entry, kick, direction)
        return [
            RuleWork(share.group, momentum, states, others),
            Terms(share.group, [(share.tags[0], share.live(-lr))], share.decay, share.rounding, matrices),
        ]

    def _advance(
        self, state: FactorState, share: Share, name: str, entry: Entry, kick: Coefficient, direction: DirectionState
    ) -> None:
        """N of a matrix for this step, in the state and, rounded, in the place of U, which is made anew before the next forward."""
        assert entry.left is not None and entry.right is not None
        n = state.tensor(name, "factor", entry.left.numel(), entry.left.device).view_as(entry.left)
        now = direction.v_tag(name)
        at = state.v.setdefault(name, now)
        new = n
        if at != now:
            if not share.go:
                return  # once for each V the host waits, so that a step that is skipped leaves N as it is
            old = lowrank.factors(
                direction.seed, entry.stream, now, at, 1, entry.cols, entry.rank, device=n.device, backend=direction.backend
            )[1]
            onto = lowrank.round_to_12_bits_((old.double().t() @ entry.right.double() / entry.cols).float()).double()
            # Term by term: the order of a matrix product's sum is the device's.
            total = torch.zeros_like(n, dtype=torch.float64)
            for k in range(entry.rank):
                total += n[:, k : k + 1].double() * onto[k]
            new = total.float()
            state.v[name] = now
        share_of_u = entry.left * (_fp32_on(kick, n.device))
        new = new * self.beta
        new += share_of_u
        n.copy_(share.either(new, n))
        entry.left.copy_(torch.where(n.abs() < lowrank.LEAST, 0.0, n))
        lowrank.round_to_12_bits_(entry.left)


def _fp32_on(value: Coefficient, device: torch.device) -> Any:
    """A factor of fp32 tensors: rounded to fp32 once."""
    return value.to(device, torch.float32) if isinstance(value, Tensor) else value


RULES: Sequence[type[Rule]] = (SGD, Sign, Conservative, Momentum, Adam, HessianDiagonal, LowRankMomentum)
