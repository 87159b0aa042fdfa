"""The cases in which every backend's update rules must equal the reference, bit for bit.

Belongs here: plans, states and rule passes, and the comparison. Does not belong here: anything that knows a backend.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import zo_kernels as zk
from tests.kernels import cases
from zo_kernels import checks, reference, update
from zo_kernels.plan import Plan, make_plans

NUMBERS = {
    "momentum": [1.0, 0.999, 1e-2, 0.9],
    "adam": [1.0, 0.999, 1e-2, 0.9, 0.1, 0.99, 0.01, 1.7, 1e-8],
    "hizoo": [1.0, 0.999, 0.03, 0.5, 0.7, 0.25, 2.0],
    "adam_history": [1.0, 0.999, 1e-2, 1e-8],
}
# rule, dtype of its first state
RULES = [
    ("momentum", torch.float32),
    ("momentum", torch.bfloat16),
    ("adam", torch.float32),
    ("adam", torch.bfloat16),
    ("hizoo", torch.float32),
    ("adam_history", torch.float32),
]
SHORT = (1, 33, 257, 2049)

Run = Callable[[Plan, update.States, update.RulePass], None]


def state(rule: str, j: int, n: int, dtype: torch.dtype, salt: int) -> Tensor:
    """Values that a run could leave, with zeros, subnormals and the largest numbers among them."""
    x = cases.weights(n, dtype, salt=100 + 10 * j + salt)
    if rule == "hizoo":
        return torch.rand(n, generator=torch.Generator().manual_seed(salt)) * 2 + 0.1
    return x.abs() if j == 1 else x


@dataclass
class Case:
    name: str
    rule: str
    dtype: torch.dtype
    state_dtype: torch.dtype
    sizes: tuple[int, ...] = SHORT
    misalign: int = 0
    terms: int = 1
    rounding: str = "nearest"
    kind: str = "gaussian"
    numbers: dict[int, float] = field(default_factory=dict)  # other numbers than usual, by place
    coefs: dict[int, float] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)

    def rule_pass(self) -> update.RulePass:
        numbers = list(NUMBERS[self.rule])
        for k, x in self.numbers.items():
            numbers[k] = x
        terms = [(3, 1.0)] if self.rule == "hizoo" else cases.terms(self.terms)
        coefs = [self.coefs.get(k, c) for k, (_, c) in enumerate(terms)]
        squares = [1e-3 * (k + 1) for k in range(len(terms))] if self.rule == "adam_history" else None
        return update.RulePass(cases.SEED, [t for t, _ in terms], coefs, self.kind, self.rounding, self.rule, numbers, squares)

    def make(self, device: str = "cpu") -> tuple[Plan, list[list[Tensor]], list[Tensor]]:
        """(plan, states, all buffers with their sentinels)."""
        buffers, params, states = [], [], []
        for j, n in enumerate(self.sizes):
            own = []
            for k, (_, dtypes) in enumerate(update.RULES[self.rule].states):
                values = state(self.rule, k, n, self.state_dtype if len(dtypes) > 1 else torch.float32, j)
                buffer, view = cases.guarded(values, self.misalign, device)
                buffers.append(buffer)
                own.append(view)
            buffer, view = cases.guarded(cases.weights(n, self.dtype, salt=j), self.misalign, device)
            buffers.append(buffer)
            params.append(view)
            states.append(own)
        extra = {
            key: [cases.to_device(value(j, p), device) for j, p in enumerate(params)] if callable(value) else value
            for key, value in self.plan.items()
        }
        (plan,) = make_plans(params, [7 + 3 * j for j in range(len(params))], **extra)
        update.check_plan(plan, states, self.rule_pass())
        return plan, states, buffers


def case_list() -> Iterator[Case]:
    for (rule, held), dtype in itertools.product(RULES, cases.DTYPES):
        label = f"{rule}-{str(held)[6:]}-{str(dtype)[6:]}"

        def case(
            name: str, rule: str = rule, dtype: torch.dtype = dtype, held: torch.dtype = held, label: str = label, **kw: Any
        ) -> Case:
            return Case(f"{label}-{name}", rule, dtype, held, **kw)

        yield case("plain", sizes=cases.SIZES)
        yield case("stochastic", sizes=(33, 1000, 4097), terms=3, rounding="stochastic")
        yield case("rademacher", kind="rademacher", terms=2)
        yield case("misaligned", misalign=3, terms=2)
        yield case("bit-mask", plan={"masks": cases.random_bits}, rounding="stochastic", terms=2)
        scales = {} if rule == "hizoo" else {"scales": cases.block_scales(40)}
        yield case("random-mask", plan={"masks": lambda j, p: zk.RandomMask(0.3, tag=9 + j), **scales})
        yield case(
            "shard",
            sizes=(1000, 257),
            rounding="stochastic",
            kind="rademacher",
            terms=11,
            plan={
                "offsets": lambda j, p: 37 + 11 * j,
                "masks": cases.random_bits,
                **({} if rule == "hizoo" else {"scales": lambda j, p: (torch.linspace(-1, 2, 200), 11)}),
            },
        )
        yield case(
            "columns",
            sizes=(5 * 37, 3 * 130, 64),
            rounding="stochastic",
            terms=2,
            plan={
                "offsets": [3 * 80 + 41, 5, 9],
                "columns": [(37, 80), (130, 256), None],
                "masks": cases.random_bits,
                **({} if rule == "hizoo" else {"scales": lambda j, p: (torch.linspace(-1, 2, 90), 11)}),
            },
        )
        yield case("far", sizes=(1000,), rounding="stochastic", plan={"offsets": [(1 << 36) - 512]})
        yield case(
            "octets", sizes=(1000,), rounding="stochastic", plan={"offsets": [(1 << 35) - 512], "masks": [zk.RandomMask(0.5)]}
        )
        if rule != "hizoo":
            yield case("no-term", terms=0, rounding="stochastic")
            yield case("dead-term", terms=2, coefs={0: 0.0, 1: 2.0**-110})
            # Without a live term u = 0, whatever the scale; with one its infinities and NaN count, but for what is masked out.
            wild = {"scales": cases.wild_scales(3), "masks": cases.random_bits}
            yield case("wild-scale", terms=2, rounding="stochastic", kind="rademacher", plan=wild)
            yield case("wild-scale-dead", terms=2, coefs={0: 0.0, 1: 2.0**-110}, rounding="stochastic", plan=wild)
            yield case("wild-scale-no-term", terms=0, plan={"scales": cases.wild_scales(8)})
            last = {"offsets": lambda j, p: checks.MAX_INDEX - p.numel(), "scales": lambda j, p: -1.5}
            yield case("scale-number-last", sizes=(1000, 33), plan=last)
            yield case("scale-number", plan={"scales": lambda j, p: -1.5}, kind="rademacher")


CASES = list(case_list())
GROUPS: dict[str, list[Case]] = {}  # by what they are about, in every rule and of all types: a test each
for _case in CASES:
    GROUPS.setdefault(_case.name.split("-", 3)[3], []).append(_case)


def result(run: Run, case: Case, p: update.RulePass | None = None, device: str = "cpu") -> list[Tensor]:
    """Every buffer after the pass, sentinels included, on the CPU."""
    plan, states, buffers = case.make(device)
    run(plan, states, p or case.rule_pass())
    return [b.cpu() for b in buffers]


_expected: dict[str, list[Tensor]] = {}


def check(run: Run, case: Case, device: str = "cpu") -> None:
    if case.name not in _expected:
        _expected[case.name] = result(reference.update, case)
    for k, (got, want) in enumerate(zip(result(run, case, device=device), _expected[case.name], strict=True)):
        if not cases.same_bits(got, want):
            differing = ((cases.bits(got) != cases.bits(want)) & ~(got.isnan() & want.isnan())).nonzero().flatten()
            e = int(differing[0])
            raise AssertionError(
                f"{case.name}: differs from the reference at {len(differing)} of {got.numel()} elements of buffer {k}, first at "
                f"{e}: {got[e].item()!r} instead of {want[e].item()!r}"
            )
