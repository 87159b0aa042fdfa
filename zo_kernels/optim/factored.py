"""Directions whose z of a matrix is a product of two factors: one is noise, new for each direction of a step, the other stays for a while, or for good.

Belongs here: which factors there are, and what of them lies in memory at each point and in the update. Does not belong here: how factors are made of noise
(zo_kernels.lowrank), what a pass makes of them (backends), where given ones come from (inputs.py) and lie (journal/factors.py).

One U a matrix lies in memory, that of the direction at hand. An update along several directions that share V is one pass all the same: sum_k c_k U_k V^T is
(sum_k c_k U_k) V^T, and that sum is made where U lies (docs/numerics.md, section 11).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from zo_kernels import checks, lowrank
from zo_kernels.journal import InputFactors, check_sha256
from zo_kernels.optim.limits import Direction, DirectionState, Limits, check_every
from zo_kernels.parameters import Member, Weights, canonical_name
from zo_kernels.views import Shift, Terms, Work


@dataclass
class Table:
    """The factors of some matrices of one device. `tag`: of the U that they hold; None: of none. `v`: of the V, where it is noise."""

    names: Sequence[str]
    factors: lowrank.Factors
    tag: int | None = None
    v: int | None = None


class Factored(DirectionState):
    """Factors, made for all matrices of a view at once, so that one launch fills them."""

    def __init__(self, config: Any, *of: Any) -> None:
        super().__init__(config, *of)
        self.tables: list[Table] = []
        self.present: list[Table] = []  # of parameters that take part in the step at hand

    def takes(self, name: str, p: Tensor) -> bool:
        """Whether the parameter's z is a product."""
        raise NotImplementedError

    def table(self, members: Sequence[tuple[str, Tensor, int]], shapes: Sequence[tuple[int, int]], **of: Any) -> lowrank.Factors:
        """The factors of these matrices; `of`: streams, seed, device and backend."""
        raise NotImplementedError

    def fill(self, table: Table, step: int, tag: int) -> None:
        """The factors of a step, with the U of its first direction."""
        table.factors.fill(tag)

    def expect(self, params: Sequence[tuple[str, Tensor, int]]) -> None:
        by_device: dict[torch.device, list[tuple[str, Tensor, int]]] = {}
        for name, p, stream in params:
            known = self.made.get(name)
            if self.takes(name, p) and (known is None or not self.fits(known, p)):
                by_device.setdefault(p.device, []).append((name, p, stream))
        for device, members in by_device.items():
            shapes = [(p.shape[0], p.numel() // p.shape[0]) for _, p, _ in members]
            of = {"streams": [stream for _, _, stream in members], "seed": self.seed, "device": device, "backend": self.backend}
            factors = self.table(members, shapes, **of)
            self.tables.append(Table([name for name, _, _ in members], factors))
            scale = 1.0 / factors.rank if self.config.update_differs else None
            for (name, _, _), pair in zip(members, factors.pairs, strict=True):
                self.made[name] = Limits(factors=pair, update_scale=scale)

    def prepare(self, step: int, tag: int, params: Mapping[str, Tensor]) -> None:
        self.present = [t for t in self.tables if any(n in params for n in t.names)]
        for table in self.present:
            self.fill(table, step, tag)
            table.tag = tag

    def follow(self, shifts: Sequence[Shift], back: Callable[[], Any]) -> None:
        tags = {tag for shift in shifts for tag, _ in shift}
        if not tags or {t.tag for t in self.present} <= tags:
            return
        (tag,) = tags  # a point is along one direction
        back()
        for table in self.present:
            table.factors.fill(tag)
            table.tag = int(tag)

    def parted(self, work: Work, weights: Weights) -> Iterable[Work]:
        """Terms of several directions: one for the matrices, whose U becomes their sum; the others as they are."""
        if not isinstance(work, Terms) or len(work.terms) < 2:
            return [work]
        names = frozenset(weights.names if work.names is None else work.names)
        matrices = frozenset(n for n in names if self.factored(n))
        tags, coefs = zip(*work.terms, strict=True)
        outside: Any = 0.0
        for table in self.present:
            if places := [k for k, n in enumerate(table.names) if n in matrices]:
                outside, table.tag = table.factors.combine(tags, coefs, places), None
        parts = [replace(work, names=names - matrices), replace(work, terms=[(tags[0], outside)], names=matrices)]
        return [part for part in parts if part.names]

    def load(self, state: Mapping[str, Any]) -> None:
        self.made, self.tables, self.present = {}, [], []  # made anew, of the loaded run's seed

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own: plans know the tensors' memory."""
        return {**self.__dict__, "made": {}, "tables": [], "present": []}


# ---- V is noise too -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LowRank(Direction):
    """LOZO (Chen et al. 2024, arXiv 2410.07698): z = U V^T for matrices, U [rows, rank] new in each step, V [columns, rank] kept for `every` steps; other
    parameters are perturbed densely. The product is formed in the kernel; only the factors are held. Perturbation and update of a step share
    both factors; several directions of a step share V. The update has the paper's factor 1 / rank, since E[z z^T] is rank times the identity."""

    rank: int = 2
    every: int = 50
    name: ClassVar[str] = "low-rank"
    factored: ClassVar[bool] = True
    update_differs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= checks.check_word("rank", self.rank) <= checks.MAX_RANK:
            raise ValueError(f"rank={self.rank} must be in 1 .. {checks.MAX_RANK}")
        check_every(self.every)

    def check(self, directions: int, kind: str, blocks: bool) -> None:
        if kind != "gaussian":
            raise ValueError(f"direction=LowRank() has Gaussian factors, not {kind} ones: give kind='gaussian'")

    def of(self, seed: int, kind: str = "gaussian", backend: str | None = None) -> DirectionState:
        return _LowRank(self, seed, kind, backend)


class _LowRank(Factored):
    def __init__(self, config: LowRank, *of: Any) -> None:
        super().__init__(config, *of)
        self.v_of: dict[str, int] = {}  # the tag of the V that a parameter's factors have

    def takes(self, name: str, p: Tensor) -> bool:
        return p.ndim >= 2 and p.numel() > 0

    def table(self, members: Sequence[tuple[str, Tensor, int]], shapes: Sequence[tuple[int, int]], **of: Any) -> lowrank.Factors:
        return lowrank.Factors(shapes, rank=self.config.rank, **of)

    def fill(self, table: Table, step: int, tag: int) -> None:
        v = step // self.config.every
        table.factors.fill(tag, None if table.v == v else v)
        if table.v != v:
            self.v_of.update(dict.fromkeys(table.names, v))
        table.v = v

    def square(self, member: Member) -> float:
        return super().square(member) * (self.config.rank if self.factored(member.name) else 1)

    def v_tag(self, name: str) -> int:
        return self.v_of[name]


# ---- V is given ---------------------------------------------------------------------------------------------------------

OTHERS = ("dense", "still")


@dataclass(frozen=True)
class InputSubspace(Direction):
    """z = U V^T with V [columns, rank] given: made of the matrix's inputs over training rows (`zk.input_factors`), so that a step moves what these rows see.
    U [rows, rank] is new in each direction. As an adapter W + B V^T whose V is frozen, without the adapter: B U-shaped steps are W's. The update has no
    factor of its own.

    Args:
        factors: of each matrix that moves in its subspace; of a run that is replayed or resumed, those that it was made with: a journal has their digest,
            and they lie in a file beside it (docs/journal.md).
        others: the trained parameters without factors are perturbed "dense"ly, or are held "still": neither step nor decay changes them.
    """

    factors: InputFactors | str
    others: str = "dense"
    name: ClassVar[str] = "input-subspace"
    factored: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.check_choice("others", self.others, OTHERS)
        if isinstance(self.factors, str):  # of a journal's header: the digest alone
            check_sha256("factors", self.factors)
        elif not isinstance(self.factors, InputFactors):
            raise TypeError(f"factors is a {type(self.factors).__name__}: give InputFactors, as zk.input_factors() returns")

    @property
    def sha256(self) -> str:
        """The digest of the factors."""
        return self.factors if isinstance(self.factors, str) else self.factors.sha256

    def check(self, directions: int, kind: str, blocks: bool) -> None:
        if blocks and self.others == "still":
            raise ValueError("direction=InputSubspace(others='still') with blocks: a block may have none that moves; take 'dense'")

    def over(self, names: Collection[str]) -> None:
        if isinstance(self.factors, InputFactors) and not any(canonical_name(n) in self.factors.matrices for n in names):
            raise ValueError(
                f"direction=InputSubspace(): none of the trained parameters has factors: they are those of {min(self.factors.matrices)!r}, ..., trained is "
                f"{min(names)!r}, ..."
            )

    def of(self, seed: int, kind: str = "gaussian", backend: str | None = None) -> DirectionState:
        if isinstance(self.factors, str):
            raise ValueError(
                f"direction=InputSubspace(): of its factors the digest {self.factors[:16]}... alone is here: give InputFactors"
            )
        return _InputSubspace(self, seed, kind, backend)


class _InputSubspace(Factored):
    config: InputSubspace

    def __init__(self, config: InputSubspace, *of: Any) -> None:
        super().__init__(config, *of)
        self.asked, self.found = 0, frozenset[str]()

    @property
    def given(self) -> InputFactors:
        assert isinstance(self.config.factors, InputFactors)  # `of` has refused a digest
        return self.config.factors

    @property
    def matrices(self) -> Mapping[str, tuple[str, Tensor]]:
        return self.given.matrices

    def moving(self, names: Collection[str]) -> Collection[str] | None:
        if self.config.others == "dense":
            return None
        if len(names) != self.asked:  # a run's names only come to be more
            self.asked, self.found = len(names), frozenset(n for n in names if canonical_name(n) in self.matrices)
        return self.found

    def takes(self, name: str, p: Tensor) -> bool:
        return canonical_name(name) in self.matrices

    def square(self, member: Member) -> float:
        if not self.factored(member.name):
            return super().square(member)
        values = self.matrices[canonical_name(member.name)][1]
        return float(values.double().square().sum()) / max(1, values.shape[0])

    def table(self, members: Sequence[tuple[str, Tensor, int]], shapes: Sequence[tuple[int, int]], **of: Any) -> lowrank.Factors:
        given = [self.matrices[canonical_name(name)] for name, _, _ in members]
        for (name, p, _), (side, values), (rows, cols) in zip(members, given, shapes, strict=True):
            if p.ndim < 2 or values.shape[0] != (cols if side == "right" else rows):
                raise ValueError(
                    f"parameter {name!r} has the shape {tuple(p.shape)}, and its {side} factor {values.shape[0]} rows: the factors are of another model"
                )
        return lowrank.Factors(shapes, rank=self.given.rank, given=given, kind=self.kind, **of)
