"""What is done with projected gradients: terms over the weights, or one fused pass over weights and state.

Belongs here: the update rules, what each records of a step, and how a record becomes a pass. Does not belong here: how g was estimated
(estimators.py), arithmetic on weights (zo_kernels.ops and zo_kernels.update).

A rule works in two halves, so that a run can be replayed. `decide` turns the estimate into a few fp32 numbers, those of the step's record;
`apply` changes weights and state as a function of these numbers alone. A live step and a replay call the same `apply`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from zo_kernels import checks, lowrank, ops, update, views
from zo_kernels.optim.estimators import Number
from zo_kernels.parameters import Weights
from zo_kernels.plan import Entry, Pass, move

Part = tuple[Collection[str] | None, Sequence[tuple[views.Tag, Number]]]  # (names, terms)
STATES = ("stored", "recomputed")
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Applied:
    """One recorded step of one parameter group, as `apply` gets it. Numbers are floats, or 0-d float64 tensors with fp32 values.

    `tags`: of the step's directions. `coefs`: what `decide` gave. `go`: False (or a 0-d bool tensor): the step is skipped, and changes neither
    weights nor state.
    """

    group: int
    tags: Sequence[views.Tag]
    coefs: Sequence[Number]
    decay: Number
    rounding: str
    go: Any

    def live(self, c: Number) -> Number:
        """c, or 0 in a step that is skipped."""
        return torch.where(self.go, c, 0.0) if isinstance(self.go, Tensor) else c


def sign_of(g: Number) -> Number:
    """-1, 0 or 1; NaN stays."""
    return g.sign() if isinstance(g, Tensor) else (g > 0) - (g < 0) if g == g else g


class Rule:
    """What all rules have. Rules are configurations; what they keep between steps is in `Kept`."""

    name: ClassVar[str]
    stateful: ClassVar[bool] = False  # the update is a rule pass over weights and state, not a list of terms

    @property
    def keeps(self) -> Mapping[str, torch.dtype]:
        """The tensors of every parameter that the rule keeps between steps, one number for each weight."""
        return {}

    @property
    def counts(self) -> bool:
        """Whether an update depends on how many steps its parameters have seen, or on which."""
        return False

    def size(self, directions: int) -> int:
        """How many numbers a step records in each group."""
        return directions

    def decide(self, gs: Sequence[Number], lr: Number, curvature: Number | None) -> list[Number]:
        """The numbers of the record, before they are rounded to fp32. `gs` have the sign of the descent: theta + lr mean(g_i z_i) goes downhill."""
        return [lr * g / len(gs) for g in gs]

    def terms(self, kept: Kept, step: Applied, weights: Weights) -> list[Part]:
        """The update as terms, for each part of the group's parameters whose terms are the same; `names` None: all of them."""
        return [(None, list(zip(step.tags, step.coefs, strict=False)))]

    def run(self, kept: Kept, step: Applied, weights: Weights, options: Mapping[str, Any]) -> None:
        """The update as a pass over weights and state, for rules with `stateful`."""
        raise TypeError(f"the rule {self.name!r} is a list of terms")

    def reserve(self, kept: Kept, weights: Weights) -> None:
        """Make the memory of `keeps`: before a step is recorded, so that one that does not fit fails undone."""
        if wanted := self.keeps:
            kept.of(weights, weights.names, wanted)

    def check(self, directions: int, direction: str) -> None:
        """ValueError where the rule makes no sense with so many directions, or this kind of them."""

    def of(self) -> Kept:
        return Kept(self)


@dataclass(frozen=True, eq=False)
class Past:
    """An earlier step as a recomputed state sees it. If it was skipped, `live` and the coefficients are 0."""

    tags: Sequence[views.Tag]
    coefs: Sequence[Number]
    live: Number


@dataclass(frozen=True, eq=False)
class Cohort:
    """Parameters that took part in the same steps. `count`: of those that updated them; `past`: the last of them."""

    names: frozenset[str]
    count: Number = 0
    past: tuple[Past, ...] = ()

    def ages(self) -> list[tuple[Past, Number]]:
        """Each past step with its age, in steps that updated these parameters; the last one first."""
        age: Number = 0
        found = []
        for p in reversed(self.past):
            found.append((p, age))
            age = age + p.live
        return found


class Kept:
    """What a rule keeps between the steps of one optimizer: tensors by parameter name, and which steps updated which parameters. Blocks, and
    parameters that are added, frozen or unfrozen, see different steps: a state is a function of a parameter's own."""

    def __init__(self, rule: Any) -> None:
        self.rule = rule
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self.cohorts: tuple[Cohort, ...] = ()
        self.together = False  # all parameters count all steps, as in runs of blocks that were recorded before cohorts were kept

    def of(self, weights: Weights, names: Collection[str], wanted: Mapping[str, torch.dtype]) -> list[list[list[Tensor]]]:
        """For each plan of a part, for each of its entries, the tensors called `wanted`, zeros at the start."""
        params = dict(zip(weights.names, weights.params, strict=True))
        states: list[list[list[Tensor]]] = []
        for _, members in weights.part(names):
            states.append([])
            for name in members:
                p, mine = params[name], self.tensors.setdefault(name, {})
                for what, dtype in wanted.items():
                    if what not in mine:
                        mine[what] = torch.zeros(p.numel(), dtype=dtype, device=p.device)
                    elif mine[what].device != p.device:
                        mine[what] = mine[what].to(p.device)
                states[-1].append([mine[what] for what in wanted])
        return states

    def advance(self, step: Applied, weights: Weights, gs: Sequence[Number] = (), most: int = 0) -> list[Cohort]:
        """The group's parameters, by what they have seen, this step included; `most` past steps with `gs` are kept. A skipped step takes a place
        among them too, since on a device nobody knows."""
        present = frozenset([str(step.group)] if self.together else weights.names)
        rest, moved, new = [], [], present
        for cohort in self.cohorts:
            inside = cohort.names & present
            if inside:
                moved.append(cohort if len(inside) == len(cohort.names) else replace(cohort, names=inside))
                new -= inside
            if len(inside) < len(cohort.names):
                rest.append(replace(cohort, names=cohort.names - inside) if inside else cohort)
        if new:
            moved.append(Cohort(new))
        live = step.go.double() if isinstance(step.go, Tensor) else int(step.go)
        now = (Past(list(step.tags[: len(gs)]), list(gs), live),) if most else ()
        advanced: dict[Any, Cohort] = {}
        for cohort in moved:
            after = Cohort(cohort.names, cohort.count + live, (*cohort.past, *now)[-most:] if most else ())
            # One pass for all that are in the same state: of the same last steps, or after the same number of them.
            count = ("at", after.count) if isinstance(after.count, int) else ("on a device", id(cohort.count))
            key = tuple(map(id, after.past)) if most else count
            advanced[key] = replace(after, names=after.names | advanced[key].names) if key in advanced else after
        self.cohorts = (*rest, *advanced.values())
        found = list(advanced.values())
        return [replace(c, names=frozenset(weights.names)) for c in found] if self.together else found

    def memory(self) -> list[Tensor]:
        """Every tensor that is held now."""
        return [t for own in self.tensors.values() for t in own.values()]

    def state(self) -> dict[str, Any]:
        """Tensors by what they are and parameter name, and the cohorts. A past step that several cohorts share is the same one after `load`."""
        cohorts = sorted(self.cohorts, key=lambda c: min(c.names, default=""))  # a skipped step moves their order, and nothing else
        past = list({id(p): p for c in cohorts for p in c.past}.values())
        place = {id(p): k for k, p in enumerate(past)}
        return {
            **{what: {n: own[what].clone() for n, own in self.tensors.items() if what in own} for what in self.rule.keeps},
            "past": [([int(t) for t in p.tags], [float(c) for c in p.coefs], int(p.live)) for p in past],
            "cohorts": [(sorted(c.names), int(c.count), [place[id(p)] for p in c.past]) for c in cohorts],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.tensors = {}
        for what in self.rule.keeps:
            for name, t in state[what].items():
                self.tensors.setdefault(name, {})[what] = t.clone()
        past = [Past([int(t) for t in tags], [float(c) for c in coefs], int(live)) for tags, coefs, live in state["past"]]
        self.cohorts = tuple(
            Cohort(frozenset(names), int(count), tuple(past[k] for k in places)) for names, count, places in state["cohorts"]
        )


def _numbers(values: Sequence[Any]) -> Any:
    """Numbers of a rule pass: a list, or one fp32 tensor on the device that one of them is on."""
    device = next((v.device for v in values if isinstance(v, Tensor)), None)
    if device is None:
        return [float(v) for v in values]
    return torch.stack([on_device(v, device) for v in values]).float()


def on_device(value: Any, device: torch.device) -> Tensor:
    """A number as a 0-d float64 tensor, by a fill, which unlike a copy from the host does not wait."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64).reshape(())
    return torch.full((), float(value), dtype=torch.float64, device=device)


def _pass(
    step: Applied, rule: str, coefs: Sequence[Number], numbers: Sequence[Any], options: Mapping[str, Any], **more: Any
) -> update.RulePass:
    tags: Any = [int(t) if not isinstance(t, Tensor) else t for t in step.tags[: len(coefs)]]
    values = _numbers(coefs)
    if isinstance(values, Tensor):
        tags = move(torch.tensor(tags, dtype=torch.int64), values.device)
    return update.RulePass(
        options["seed"], tags, values, options["kind"], step.rounding, rule, _numbers([step.go, step.decay, *numbers]), **more
    )


# ---- clipping ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantileClip:
    """|g| is clipped to the `q` quantile of its last `window` values; not before there are `least`."""

    q: float = 0.95
    window: int = 100
    least: int = 10
    name: ClassVar[str] = "quantile"

    def __post_init__(self) -> None:
        if not (isinstance(self.q, (int, float)) and 0 < self.q <= 1):
            raise ValueError(f"q={self.q!r} must be in (0, 1]")
        if not 1 <= checks.check_word("least", self.least) <= checks.check_word("window", self.window):
            raise ValueError(f"least={self.least} must be in 1 .. window={self.window}")

    def limit(self, past: Sequence[Number]) -> Number | None:
        """The clip for the next step; None: there are too few values yet. Those that are not finite do not count."""
        if len(past) < self.least:
            return None
        if any(isinstance(g, Tensor) for g in past):
            device = next(g.device for g in past if isinstance(g, Tensor))
            values = torch.stack([torch.as_tensor(g, dtype=torch.float64, device=device) for g in past])
            finite = values.isfinite()  # how many there are nobody knows here; infinity limits nothing
            return torch.where(finite.sum() >= self.least, torch.where(finite, values, torch.nan).nanquantile(self.q), torch.inf)
        finite = torch.tensor([g for g in past if math.isfinite(float(g))], dtype=torch.float64)
        return float(finite.quantile(self.q)) if len(finite) >= self.least else None


# ---- rules that are lists of terms --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SGD(Rule):
    """theta <- (1 - lr wd) theta - lr sum_i g_i z_i (ZO-SGD; MeZO, algorithm 1)."""

    name: ClassVar[str] = "sgd"


@dataclass(frozen=True)
class Sign(Rule):
    """theta <- (1 - lr wd) theta - lr sum_i sign(g_i) z_i / q (ZO-SGD-Sign of the ZO-LLM benchmark, arXiv 2402.11592)."""

    name: ClassVar[str] = "sign"

    def decide(self, gs: Sequence[Number], lr: Number, curvature: Number | None) -> list[Number]:
        return [lr * sign_of(g) / len(gs) for g in gs]


@dataclass(frozen=True)
class Conservative(Rule):
    """theta, theta - lr g z and theta + lr g z are evaluated and the best is kept (ZO-SGD-Cons, arXiv 2402.11592); three more forwards. At equal
    losses theta stays. The record has the coefficient that was taken and the one that was tried."""

    name: ClassVar[str] = "conservative"

    def size(self, directions: int) -> int:
        return 2

    def check(self, directions: int, direction: str) -> None:
        if directions != 1:
            raise ValueError(f"rule=Conservative() with {directions} queries: it tries one direction; give queries=1")

    def decide(self, gs: Sequence[Number], lr: Number, curvature: Number | None) -> list[Number]:
        return [0.0, lr * gs[0]]  # nothing taken yet

    def trials(self, tag: views.Tag, tried: Number) -> list[list[tuple[views.Tag, Number]]]:
        """Where the candidates are evaluated."""
        return [[], [(tag, tried)], [(tag, -tried)]]

    def choose(self, losses: Sequence[Tensor], tried: Sequence[Number]) -> list[Number]:
        """Of each group the coefficient of the candidate with the lowest loss; one that is not finite never wins."""
        stay, ahead, back = (torch.where(loss.isfinite(), loss, torch.inf) for loss in losses)
        forward, backward = (ahead < stay) & (ahead <= back), (back < stay) & (back < ahead)
        if all(not isinstance(t, Tensor) for t in tried):
            factor = 1.0 if bool(forward) else -1.0 if bool(backward) else 0.0
            return [factor * t for t in tried]
        return [torch.where(forward, t, torch.where(backward, -t, 0.0)) for t in tried]

    def terms(self, kept: Kept, step: Applied, weights: Weights) -> list[Part]:
        return [(None, [(step.tags[0], step.coefs[0])])]


# ---- momentum -----------------------------------------------------------------------------------------------------------


class _Rated(Rule):
    """The record: the estimate's coefficients g_i, and the learning rate."""

    history: int

    def size(self, directions: int) -> int:
        return directions + 1

    def decide(self, gs: Sequence[Number], lr: Number, curvature: Number | None) -> list[Number]:
        return [*(-g / len(gs) for g in gs), lr]  # the gradient itself, whose sign a rule takes


def _check_state(rule: Any) -> None:
    checks.check_choice("state", rule.state, STATES)
    checks.check_choice("dtype", rule.dtype, STATE_DTYPES)
    if checks.check_word("history", rule.history) < 1:
        raise ValueError("history=0: give the number of steps to remember, at least 1")


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
    def stateful(self) -> bool:  # type: ignore[override]
        return self.state == "stored"

    @property
    def keeps(self) -> Mapping[str, torch.dtype]:
        return {"momentum": STATE_DTYPES[self.dtype]} if self.state == "stored" else {}

    @property
    def counts(self) -> bool:
        return self.state == "recomputed"

    def check(self, directions: int, direction: str) -> None:
        if direction == "low-rank":
            raise ValueError(
                "rule=Momentum() with direction=LowRank(): V changes and the sum of z is of no low rank; take LowRankMomentum()"
            )
        if self.state == "recomputed" and direction not in ("dense",):
            raise ValueError(
                f"state='recomputed' with {direction} directions: past masks and scales are gone; give state='stored' or direction=Dense()"
            )

    def terms(self, kept: Kept, step: Applied, weights: Weights) -> list[Part]:
        *gs, lr = step.coefs
        parts: list[Part] = []
        for cohort in kept.advance(step, weights, gs, self.history):
            # The step's own direction first: it names the draw of stochastic rounding.
            terms = [
                (tag, step.live(-lr * c * self.beta**age))
                for p, age in cohort.ages()
                for tag, c in zip(p.tags, p.coefs, strict=True)
            ]
            parts.append((cohort.names, terms))
        return parts if step.go is not False and parts else [(None, [(step.tags[0], 0.0)])]

    def run(self, kept: Kept, step: Applied, weights: Weights, options: Mapping[str, Any]) -> None:
        *gs, lr = step.coefs
        kept.advance(step, weights)
        if step.go is False:
            return
        states = kept.of(weights, weights.names, self.keeps)
        update.run_rule(weights.update_plans, states, _pass(step, "momentum", gs, [lr, self.beta], options), options["backend"])


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
    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_beta("beta1", self.beta1)
        _check_beta("beta2", self.beta2)
        _check_state(self)
        if not (isinstance(self.eps, (int, float)) and checks.check_fp32("eps", self.eps) > 2.0**-126):
            raise ValueError(f"eps={self.eps!r} must be a positive normal number in fp32: it keeps 0 / 0 away")

    @property
    def keeps(self) -> Mapping[str, torch.dtype]:
        return {"m": STATE_DTYPES[self.dtype], "v": torch.float32} if self.state == "stored" else {}

    @property
    def counts(self) -> bool:
        return True

    def check(self, directions: int, direction: str) -> None:
        if direction == "low-rank":
            raise ValueError(
                "rule=Adam() with direction=LowRank(): a pass with state forms dense directions; take SGD() or LowRankMomentum()"
            )
        if self.state == "recomputed" and directions != 1:
            raise ValueError(
                f"state='recomputed' with {directions} queries: the square of their sum is no sum of squares; give queries=1 or state='stored'"
            )
        if self.state == "recomputed" and direction not in ("dense",):
            raise ValueError(
                f"state='recomputed' with {direction} directions: past masks and scales are gone; give state='stored' or direction=Dense()"
            )

    def run(self, kept: Kept, step: Applied, weights: Weights, options: Mapping[str, Any]) -> None:
        *gs, lr = step.coefs
        if self.state == "recomputed":
            self._from_history(kept, step, weights, options)
            return
        b1, b2 = self.beta1, self.beta2
        for cohort in kept.advance(step, weights):
            if step.go is False:
                continue
            t = cohort.count
            numbers = [lr / (1 - b1**t), b1, 1 - b1, b2, 1 - b2, 1 / (1 - b2**t), self.eps]
            states = kept.of(weights, cohort.names, self.keeps)
            plans = [plan for plan, _ in weights.part(cohort.names)]
            update.run_rule(plans, states, _pass(step, "adam", gs, numbers, options), options["backend"])

    def _from_history(self, kept: Kept, step: Applied, weights: Weights, options: Mapping[str, Any]) -> None:
        g, lr = step.coefs
        for cohort in kept.advance(step, weights, [g], self.history):
            if step.go is False:
                continue
            past = cohort.ages()
            # Of the oldest first, as the weights beta^age always were added.
            sums = [sum(p.live * b**age for p, age in reversed(past)) for b in (self.beta1, self.beta2)]
            first = [p.coefs[0] * (self.beta1**age / sums[0]) for p, age in past]
            second = [p.coefs[0] * p.coefs[0] * (self.beta2**age / sums[1]) for p, age in past]
            own = replace(step, tags=[p.tags[0] for p, _ in past])
            p = _pass(own, "adam_history", first, [lr, self.eps], options, squares=_numbers(second))
            plans = [plan for plan, _ in weights.part(cohort.names)]
            update.run_rule(plans, [[[] for _ in plan.entries] for plan in plans], p, options["backend"])


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
    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (isinstance(self.alpha, (int, float)) and 0 <= self.alpha < 1):
            raise ValueError(f"alpha={self.alpha!r} must be in [0, 1)")
        if not 0 < checks.check_fp32("low", self.low) <= 1 <= checks.check_fp32("high", self.high):
            raise ValueError(f"low={self.low!r} and high={self.high!r} must hold 1, where H starts, between them, low > 0")

    def size(self, directions: int) -> int:
        return 2

    def decide(self, gs: Sequence[Number], lr: Number, curvature: Number | None) -> list[Number]:
        assert curvature is not None
        return [-lr * gs[0], curvature]

    def run(self, kept: Kept, step: Applied, weights: Weights, options: Mapping[str, Any]) -> None:
        lrg, kappa = step.coefs
        kept.advance(step, weights)
        if step.go is False:
            return
        held = options["held"]
        states = [[[held.made[name].scale[0]] for name in members] for _, members in weights.part(weights.names)]
        numbers = [lrg, self.alpha, kappa, self.low, self.high]
        update.run_rule(weights.update_plans, states, _pass(step, "hizoo", [1.0], numbers, options), options["backend"])


class _Factors(Kept):
    """N of the matrices with the tag of the V that each belongs to, and b of the other parameters."""

    def __init__(self, rule: Any) -> None:
        super().__init__(rule)
        self.v: dict[str, int] = {}

    def state(self) -> dict[str, Any]:
        held = {what: {n: own[what].clone() for n, own in self.tensors.items() if what in own} for what in ("factor", "momentum")}
        return {**super().state(), **held, "v": dict(self.v)}

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        for what in ("factor", "momentum"):
            for name, t in state[what].items():
                self.tensors.setdefault(name, {})[what] = t.clone()
        self.v = {n: int(tag) for n, tag in state["v"].items()}


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
    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_beta("beta", self.beta)

    def of(self) -> Kept:
        return _Factors(self)

    def check(self, directions: int, direction: str) -> None:
        if direction != "low-rank":
            raise ValueError(
                f"rule=LowRankMomentum() with {direction} directions: it keeps momentum in a factor of LowRank(); take Momentum()"
            )

    def run(self, kept: Kept, step: Applied, weights: Weights, options: Mapping[str, Any]) -> None:
        assert isinstance(kept, _Factors)
        g, lr = step.coefs
        if step.go is False:
            return
        kick = g * (1 - self.beta)
        matrices = {n for n in weights.names if options["held"].made[n].factors is not None}
        for plan, names in weights.part(set(weights.names) - matrices):
            states = [
                [self._state(kept, n, "momentum", e.src.numel(), plan.device)] for e, n in zip(plan.entries, names, strict=True)
            ]
            update.run_rule([plan], [states], _pass(step, "momentum", [kick], [lr, self.beta], options), options["backend"])
        for plan, names in weights.part(matrices):
            for entry, name in zip(plan.entries, names, strict=True):
                self._advance(kept, step, name, entry, kick, options)
            tags, coefs = [int(t) for t in step.tags[:1]], _numbers([step.live(-lr)])
            decay: Any = (
                step.decay.float().reshape(1) if isinstance(step.decay, Tensor) else None if step.decay == 1 else step.decay
            )
            if isinstance(coefs, Tensor):
                tags = move(torch.tensor(tags, dtype=torch.int64), coefs.device)  # type: ignore[assignment]
            ops.run([plan], Pass(options["seed"], tags, coefs, decay, options["kind"], step.rounding), options["backend"])

    def _state(self, kept: Kept, name: str, what: str, size: int, device: torch.device) -> Tensor:
        mine = kept.tensors.setdefault(name, {})
        if what not in mine:
            mine[what] = torch.zeros(size, dtype=torch.float32, device=device)
        elif mine[what].device != device:
            mine[what] = mine[what].to(device)
        return mine[what]

    def _advance(self, kept: _Factors, step: Applied, name: str, entry: Entry, kick: Number, options: Mapping[str, Any]) -> None:
        """N of a matrix for this step, in the state and, rounded, in the place of U, which is made anew before the next forward."""
        assert entry.left is not None and entry.right is not None
        n = self._state(kept, name, "factor", entry.left.numel(), entry.left.device).view_as(entry.left)
        now = options["held"].v_of[name]
        at = kept.v.setdefault(name, now)
        new = n
        if at != now:
            if isinstance(step.go, Tensor) and not bool(step.go):
                return  # once for each V the host waits, so that a step that is skipped leaves N as it is
            old = lowrank.factors(
                options["seed"], entry.stream, now, at, 1, entry.cols, entry.rank, device=n.device, backend=options["backend"]
            )[1]
            onto = lowrank.round_to_12_bits_((old.double().t() @ entry.right.double() / entry.cols).float()).double()
            # Term by term: the order of a matrix product's sum is the device's.
            total = torch.zeros_like(n, dtype=torch.float64)
            for k in range(entry.rank):
                total += n[:, k : k + 1].double() * onto[k]
            new = total.float()
            kept.v[name] = now
        share = entry.left * (_fp32_on(kick, n.device))
        new = new * self.beta
        new += share
        n.copy_(torch.where(step.go, new, n) if isinstance(step.go, Tensor) else new)
        entry.left.copy_(torch.where(n.abs() < 2.0**-60, 0.0, n))
        lowrank.round_to_12_bits_(entry.left)


def _fp32_on(value: Number, device: torch.device) -> Any:
    """A factor of fp32 tensors: rounded to fp32 once."""
    return value.to(device, torch.float32) if isinstance(value, Tensor) else value


RULES: Sequence[type[Rule]] = (SGD, Sign, Conservative, Momentum, Adam, HessianDiagonal, LowRankMomentum)
