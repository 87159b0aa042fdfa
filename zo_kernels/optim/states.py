"""What a rule keeps between the steps of one optimizer: tensors by parameter name, and which steps updated which parameters.

Belongs here: the memory of rules, and its form in a `state_dict`. Does not belong here: what a rule makes of it (rules.py), what a direction holds
(directions.py), the form of a whole saved run (saved.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zo_kernels import shards
from zo_kernels.optim.decision import Share
from zo_kernels.parameters import Weights
from zo_kernels.views import Coefficient, Tag


@dataclass(frozen=True, eq=False)
class Past:
    """An earlier step as a recomputed state sees it. If it was skipped, `live` and the coefficients are 0."""

    tags: Sequence[Tag]
    coefs: Sequence[Coefficient]
    live: Coefficient


@dataclass(frozen=True, eq=False)
class Cohort:
    """Parameters that took part in the same steps. `count`: of those that updated them; `past`: the last of them."""

    names: frozenset[str]
    count: Coefficient = 0
    past: tuple[Past, ...] = ()

    def ages(self) -> list[tuple[Past, Coefficient]]:
        """Each past step with its age, in steps that updated these parameters; the last one first."""
        age: Coefficient = 0
        found = []
        for p in reversed(self.past):
            found.append((p, age))
            age = age + p.live
        return found


class RuleState:
    """What a rule keeps between the steps of one optimizer: tensors by parameter name, and which steps updated which parameters. Blocks, and
    parameters that are added, frozen or unfrozen, see different steps: a state is a function of a parameter's own."""

    def __init__(self, rule: Any) -> None:
        self.rule = rule
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self.cohorts: tuple[Cohort, ...] = ()
        self.held = False  # counts lie in memory that stays, see `hold`
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

    def hold(self, groups: Sequence[Weights], device: torch.device) -> None:
        """From here on counts lie in memory of a device that stays, one for each cohort of a group, and a step adds to them there: launched as a graph,
        it counts without the host."""
        found: list[Cohort] = []
        for weights in groups:
            new = frozenset(weights.names)
            for cohort in self.cohorts:
                if inside := cohort.names & new:
                    count = torch.full((), float(cohort.count), dtype=torch.float64, device=device)
                    found.append(replace(cohort, names=inside, count=count))
                    new -= inside
            if new:
                found.append(Cohort(new, torch.zeros((), dtype=torch.float64, device=device)))
        taken = frozenset(name for c in found for name in c.names)
        outside = [replace(c, names=c.names - taken) for c in self.cohorts if c.names - taken]
        self.cohorts, self.held = (*outside, *found), True

    def advance(self, share: Share, weights: Weights, gs: Sequence[Coefficient] = (), most: int = 0) -> list[Cohort]:
        """The group's parameters, by what they have seen, this step included; `most` past steps with `gs` are kept. A skipped step takes a place
        among them too, since on a device nobody knows."""
        live = share.go.double() if isinstance(share.go, Tensor) else int(share.go)
        if self.held and not most:
            mine = [c for c in self.cohorts if c.names <= frozenset(weights.names)]
            for c in mine:
                c.count.add_(live)  # type: ignore[union-attr]
            return mine
        present = frozenset([str(share.group)] if self.together else weights.names)
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
        now = (Past(list(share.tags[: len(gs)]), list(gs), live),) if most else ()
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

    @property
    def keeps(self) -> Mapping[str, torch.dtype | None]:
        """See `Rule.keeps`: of a saved state these tensors are checked."""
        found: Mapping[str, torch.dtype] = self.rule.keeps
        return found

    def begin(self, params: Mapping[str, Tensor]) -> Mapping[str, Mapping[str, Tensor]]:
        """The tensors of `keeps` as they are before a first step."""
        return {
            what: {n: torch.zeros(shards.memory_of(p).numel(), dtype=dtype, device=p.device) for n, p in params.items()}
            for what, dtype in self.keeps.items()
        }

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


class FactorState(RuleState):
    """N of the matrices with the tag of the V that each belongs to, and b of the other parameters."""

    def __init__(self, rule: Any) -> None:
        super().__init__(rule)
        self.v: dict[str, int] = {}

    def tensor(self, name: str, what: str, size: int, device: torch.device) -> Tensor:
        """fp32 [size], zeros at the start."""
        mine = self.tensors.setdefault(name, {})
        if what not in mine:
            mine[what] = torch.zeros(size, dtype=torch.float32, device=device)
        elif mine[what].device != device:
            mine[what] = mine[what].to(device)
        return mine[what]

    def state(self) -> dict[str, Any]:
        held = {what: {n: own[what].clone() for n, own in self.tensors.items() if what in own} for what in ("factor", "momentum")}
        return {**super().state(), **held, "v": dict(self.v)}

    def load(self, state: Mapping[str, Any]) -> None:
        if lost := sorted(set(state["v"]) - set(state["factor"])):
            raise ValueError(f"the 'factor' of parameter {lost[0]!r} was lost ({len(lost)} in all)")
        super().load(state)
        for what in ("factor", "momentum"):
            for name, t in state[what].items():
                self.tensors.setdefault(name, {})[what] = t.clone()
        self.v = {n: int(tag) for n, tag in state["v"].items()}
