"""Low-rank directions and inverse-square-root scales: what they are, how factors are made, what is refused, and what reads part of a matrix.

Belongs here: what is not a case that every backend runs (cases.py: low-rank-*, rsqrt-*) and not a backend's own (gathered rows in
test_cuda_host.py, test_cuda.py, test_triton.py). Does not belong here: optimizers that use them.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import zo_kernels as zk
from tests.kernels import cases
from tests.kernels.cases import low_rank_pair, same_bits, weights
from zo_kernels import _C, _backends, checks, journal, ops, reference
from zo_kernels._backends import cpu
from zo_kernels.lowrank import FIRST_V, Factors, factors, round_to_12_bits_
from zo_kernels.parameters import Member, Weights
from zo_kernels.plan import Entry, Pass, Passes, Plan, make_plans
from zo_kernels.views import Scratch

SEED = cases.SEED
ISAS = range(1, _C.cpu_best_isa() + 1)


def significant_bits(x: Tensor) -> int:
    """The most of any number of the tensor."""
    mantissas = np.frexp(x.double().numpy())[0]
    return max((k for k in range(54) if (np.ldexp(mantissas, k) % 1 != 0).any()), default=-1) + 1


def z_of(rows: int, cols: int, pair: tuple[Tensor, Tensor], backend: str = "reference", c: float = 1.0) -> Tensor:
    z = torch.zeros(rows, cols)
    zk.perturb_([z], [(5, c)], seed=SEED, streams=[3], factors=[pair], backend=backend)
    return z


# ---- what it is ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 7), (40, 24), (3, 1000), (1000, 3)])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 64])
def test_z_is_left_times_right_transposed(rank: int, rows: int, cols: int, backend: str) -> None:
    """Small integers: the sums are exact, and so is the product in float64. Then any factors: rank roundings of partial sums."""
    g = torch.Generator().manual_seed(rank)
    left = torch.randint(-9, 10, (rows, rank), generator=g).float()
    right = torch.randint(-9, 10, (rank, cols), generator=g).float().t()
    assert torch.equal(z_of(rows, cols, (left, right), backend).double(), left.double() @ right.double().t())
    left, right = low_rank_pair(rows, cols, rank)
    exact, most = left.double() @ right.double().t(), left.double().abs() @ right.double().abs().t()
    assert ((z_of(rows, cols, (left, right), backend).double() - exact).abs() <= rank * 2.0**-24 * most).all()


@pytest.mark.parametrize("shape", [(6, 4, 5), (6, 2, 2, 5), (6, 20), (120,)])
def test_more_dimensions_are_a_matrix(shape: tuple[int, ...]) -> None:
    """[shape[0], the rest]; a flat tensor is what its factors say."""
    pair = low_rank_pair(6, 20, 2)
    x = torch.zeros(shape)
    zk.perturb_([x], [(5, 1.0)], seed=SEED, streams=[3], factors=[pair])
    assert same_bits(x.view(6, 20), z_of(6, 20, pair))


def test_order_of_roundings() -> None:
    """t = RN(c z), u = RN(t scale), r = RN(RN(theta decay) + u): with numpy, step by step; c is not rounded to 17 bits as noise's is."""
    left, right = low_rank_pair(33, 17, 3)
    theta, scale = weights(33 * 17, torch.float32, special=False).view(33, 17), torch.rand(33) + 0.5
    z = z_of(33, 17, (left, right)).numpy()
    c, decay = np.float32(0.1234567), np.float32(0.999)
    want = theta.numpy() * decay + (z * c) * scale.numpy()[:, None]
    for backend in ("reference", "cpu"):
        x = theta.clone()
        zk.perturb_(
            [x],
            [(5, float(c))],
            decay=float(decay),
            seed=SEED,
            streams=[3],
            scales=[scale],
            factors=[(left, right)],
            backend=backend,
        )
        assert same_bits(x, torch.from_numpy(want))


def test_neither_seed_nor_stream_nor_tag_nor_kind_matters_to_z() -> None:
    pair = low_rank_pair(5, 7, 2)
    for seed, stream, tag, kind in ((1, 2, 3, "gaussian"), (2**64 - 1, 0, 2**32 - 1, "rademacher")):
        z = torch.zeros(5, 7)
        zk.perturb_([z], [(tag, 1.0)], seed=seed, streams=[stream], kind=kind, factors=[pair])
        assert same_bits(z, z_of(5, 7, pair))


def test_the_tag_names_the_draw_of_stochastic_rounding() -> None:
    """Two tags round differently, one tag the same: unbiased, replayable."""
    pair = low_rank_pair(50, 40, 2)
    rounded = []
    for tag in (1, 1, 2):
        x = torch.ones(50, 40, dtype=torch.bfloat16)
        zk.perturb_([x], [(tag, 1e-2)], seed=SEED, streams=[3], rounding="stochastic", factors=[pair])
        rounded.append(x)
    assert same_bits(rounded[0], rounded[1])
    assert not same_bits(rounded[0], rounded[2])


def test_a_coefficient_of_zero_keeps_every_bit() -> None:
    x = torch.tensor([[-0.0, 1.0, float("nan"), float("inf")]])
    before = x.clone()
    for terms in ([(1, 0.0)], [], (torch.tensor([1]), torch.tensor([float("nan")]))):
        for backend in ("reference", "cpu"):
            zk.perturb_([x], terms, seed=SEED, streams=[3], factors=[low_rank_pair(1, 4, 1)], backend=backend)
            assert torch.equal(cases.bits(x), cases.bits(before))


def test_the_operator_under_compile() -> None:
    pair = low_rank_pair(5, 10, 2)

    def f(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        y = x * 2
        zk.perturb_([y], [(3, 0.5)], seed=5, streams=[1], scales=[(torch.ones(50), 1, "rsqrt")], factors=[(left, right)])
        return y + 1

    x = torch.randn(5, 10)
    assert same_bits(torch.compile(f, backend="eager", fullgraph=True)(x, *pair), f(x, *pair))
    tensors, rest = ops.tensor_arguments([x], seed=5, streams=[1], factors=[pair], scales=[(torch.ones(50), 1, "rsqrt")])
    args = (*tensors, [1], [0.1], None, None, None, None, "nearest", *rest)
    torch.library.opcheck(torch.ops.zo_kernels.perturb_.default, args, test_utils=("test_schema", "test_faketensor"))


# ---- parts of a matrix --------------------------------------------------------------------------------------------------


def whole_and_pass(rows: int, cols: int, rank: int, dtype: torch.dtype, rsqrt: bool) -> tuple[Entry, Pass]:
    """A matrix of zeros' neighbours with factors and a value for each element, and the pass over it."""
    x = weights(rows * cols, dtype, salt=1, special=False).view(rows, cols)
    values = torch.linspace(0.3, 2.5, rows * cols)
    pairs = [low_rank_pair(rows, cols, rank)] if rank else None
    scale = (values, 1, "rsqrt") if rsqrt else (values, 1)
    (plan,) = make_plans([x], [3], scales=[scale], factors=pairs)
    return plan.entries[0], Pass(SEED, [7], [1e-2], 0.99, rounding="stochastic")


def run_on(entry: Entry, p: Pass, backend: Any, **more: Any) -> Tensor:
    out = torch.full_like(entry.src, float("nan"))
    backend(Plan((replace(entry, dst=out),), out.device, out.dtype), p, **more)
    return out


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    cols=st.integers(1, 70),
    rank=st.integers(0, 6),
    dtype=st.sampled_from(cases.DTYPES),
    rsqrt=st.booleans(),
    isa=st.sampled_from(list(ISAS)),
    data=st.data(),
)
def test_any_part_sees_the_same_direction(
    rows: int, cols: int, rank: int, dtype: torch.dtype, rsqrt: bool, isa: int, data: Any
) -> None:
    """Parts (scratch mode's large matrices), gathered rows (its embeddings) and the whole: the same bits, and those of the reference."""
    entry, p = whole_and_pass(rows, cols, rank, dtype, rsqrt)
    want = run_on(entry, p, reference.perturb)
    assert same_bits(run_on(entry, p, cpu.perturb, isa=isa), want)
    start = data.draw(st.integers(0, rows * cols))
    stop = data.draw(st.integers(start, rows * cols))
    part = entry.part(start, stop, torch.zeros(stop - start, dtype=dtype))
    numbers = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=5)))
    gathered = replace(entry, src=entry.src[numbers].contiguous(), rows=numbers, row_len=cols)
    for backend, more in ((reference.perturb, {}), (cpu.perturb, {"isa": isa})):
        assert same_bits(run_on(part, p, backend, **more), want.view(-1)[start:stop])
        assert same_bits(run_on(gathered, p, backend, **more), want[numbers])


class Model(nn.Module):
    """A large table, a large matrix that is multiplied in parts, and a small bias."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.table = nn.Embedding(50, 24)
        self.matrix = nn.Linear(24, 2000)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g)

    def forward(self, ids: Tensor) -> Tensor:
        return self.matrix(self.table(ids))


def test_scratch_mode_sees_what_a_pass_in_place_writes() -> None:
    """Gathered rows and parts of a matrix, both with factors and inverse-square-root scales; the bias has noise."""
    model, ids = Model(), torch.tensor([[3, 49, 3], [0, 7, 1]])
    params = list(model.parameters())
    pairs = [low_rank_pair(p.shape[0], p.shape[1], 2, k) if p.ndim == 2 else None for k, p in enumerate(params)]
    scales = [(torch.linspace(0.5, 2, p.numel()), 1, "rsqrt") for p in params]
    given = zip(model.named_parameters(), scales, pairs, strict=True)
    table = Weights([Member(n, p, k, scale=s, factors=f) for k, ((n, p), s, f) in enumerate(given)])
    view = Scratch([table], model, scratch_bytes=1 << 16, seed=SEED, kind="gaussian", backend=None)
    seen = []
    with torch.no_grad():
        for _ in range(3):  # it learns what to fill at once
            with view.step():
                view.see([[(4, 1e-2)]])
                seen.append(model(ids))
        assert view.pieces.gathers and view.pieces.parts, "both ways were taken"
        zk.perturb_(
            [p.data for p in params],
            [(4, 1e-2)],
            seed=SEED,
            streams=list(range(len(params))),
            scales=scales,
            factors=pairs,
            backend="reference",
        )
        want = model(ids)
    assert all(torch.allclose(y, want, rtol=1e-5, atol=1e-5) for y in seen)
    clean = Model()
    with torch.no_grad():
        assert (clean(ids) - want).abs().max() > 1e-2, "the perturbation is what is compared"


# ---- inverse-square-root scales -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [None, *ISAS])
def test_roots_are_those_of_ieee(index: int | None) -> None:
    """s = RN(1 / RN(sqrt(v))) for every kind of v, against numpy's two operations; c = ±1 shows s itself."""
    g = torch.Generator().manual_seed(2)
    v = torch.randint(-(2**31), 2**31 - 1, (30011,), generator=g).to(torch.int32).view(torch.float32)
    v[:8] = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45, 1.1754942e-38, 3.4028235e38, 1.0])
    (plan,) = make_plans([torch.zeros_like(v)], [3], scales=[(v, 1, "rsqrt")])
    p = Pass(SEED, [1], [1.0], kind="rademacher")
    reference.perturb(plan, p) if index is None else cpu.perturb(plan, p, isa=index)
    with np.errstate(all="ignore"):
        want = torch.from_numpy(np.float32(1) / np.sqrt(v.numpy()))
    assert same_bits(plan.entries[0].dst.abs(), want.abs())
    assert (plan.entries[0].dst.isfinite() == want.isfinite()).all() and want.isfinite().sum() > 10000


def test_a_value_for_a_block_a_row_or_all() -> None:
    """Blocks that hold the same number give the same bits, and a value of 1 those of no scale."""
    base, results = torch.randn(6, 5), []
    for values, block in (
        (torch.full((30,), 2.5), 1),
        (torch.full((6,), 2.5), 5),
        (torch.tensor([2.5]), 30),
        (torch.tensor([2.5]), 10**30),
    ):
        x = base.clone()
        zk.perturb_([x], [(1, 0.1)], seed=3, streams=[1], scales=[(values, block, "rsqrt")])
        results.append(x)
    assert all(same_bits(r, results[0]) for r in results)
    x, y = base.clone(), base.clone()
    zk.perturb_([x], [(1, 0.1)], seed=3, streams=[1], scales=[(torch.ones(30), 1, "rsqrt")])
    zk.perturb_([y], [(1, 0.1)], seed=3, streams=[1])
    assert same_bits(x, y) and not same_bits(x, results[0])


# ---- factors ------------------------------------------------------------------------------------------------------------


def test_factors_are_noise_of_12_bits() -> None:
    rows, cols, rank, seed, stream = 40, 24, 3, 99, 7
    u, v = factors(seed, stream, 11, 12, rows, cols, rank)
    noise = (
        zk.normal((rows, rank), seed=seed, stream=stream, tag=11),
        zk.normal((rank, cols), seed=seed, stream=stream, tag=12, offset=FIRST_V),
    )
    for got, exact in ((u, noise[0]), (v.t(), noise[1])):
        assert significant_bits(got) == 12 < significant_bits(exact)
        assert ((got - exact).abs() <= exact.abs() * 2.0**-12).all()
    assert FIRST_V == 1 << 55
    assert (u.shape, u.stride()) == ((rows, rank), (rank, 1)) and (v.shape, v.stride()) == ((cols, rank), (1, cols))


def test_anchors() -> None:
    """Those of docs/numerics.md."""
    u, v = factors(0x0123456789ABCDEF, 5, 7, 8, 96, 40, 2)
    firsts = ["0x1.a98p-2", "0x1.bacp-1", "-0x1.3b4p+1", "-0x1.1c4p+0"]
    assert [float(x) for x in (*u[0], *v[0])] == [float.fromhex(x) for x in firsts]
    text = (Path(__file__).resolve().parents[2] / "docs" / "numerics.md").read_text()
    assert all(x in text for x in firsts)
    for digest in (
        hashlib.sha256(u.numpy().tobytes() + v.t().contiguous().numpy().tobytes()).hexdigest(),
        hashlib.sha256(z_of(96, 40, (u, v)).numpy().tobytes()).hexdigest(),
    ):
        assert digest in text


def test_rounding_to_12_bits() -> None:
    """To nearest, ties to even, both signs, across a power of two; numpy in float64 says what is nearest."""
    g = torch.Generator().manual_seed(3)
    x = torch.cat([torch.randn(20000, generator=g), torch.arange(-5000, 5000) / 8192 * 2 + 0.0])
    mantissa, exponent = np.frexp(x.double().numpy())
    want = np.ldexp(np.rint(np.ldexp(mantissa, 12)), exponent - 12)
    assert torch.equal(round_to_12_bits_(x.clone()).double(), torch.from_numpy(want))
    ties = torch.tensor([2048.5, 2049.5, -2048.5, 4095.5, 0.0, -0.0])
    assert same_bits(round_to_12_bits_(ties), torch.tensor([2048.0, 2050.0, -2048.0, 4096.0, 0.0, -0.0]))


def test_factors_depend_on_their_integers_alone() -> None:
    """Not on the matrices beside it, the backend, or what was there before."""
    shapes, streams = [(40, 24), (7, 13), (1, 1), (0, 4), (300, 5)], [3, 9, 1, 2, 8]
    many = Factors(shapes, streams, seed=5, rank=2)
    for tag_u, tag_v in ((7, 11), (2**32 - 1, 0)):
        many.fill(tag_u, tag_v)
        for (rows, cols), stream, pair in zip(shapes, streams, many.pairs, strict=True):
            for backend in ("cpu", "reference"):
                alone = factors(5, stream, tag_u, tag_v, rows, cols, 2, backend=backend)
                assert all(same_bits(a, b) for a, b in zip(pair, alone, strict=True))
    u, v = many.pairs[0]
    assert not torch.equal(u, factors(6, 3, 2**32 - 1, 0, 40, 24, 2)[0])
    assert not torch.equal(u, factors(5, 4, 2**32 - 1, 0, 40, 24, 2)[0])
    assert not torch.equal(v, factors(5, 3, 0, 1, 40, 24, 2)[1])
    same_tag = factors(5, 3, 8, 8, 24, 24, 1)
    assert not torch.equal(same_tag[0], same_tag[1]), "U and V of one tag are other numbers"


def test_fill_keeps_v_and_the_addresses() -> None:
    made = Factors([(40, 24), (7, 13)], [3, 9], seed=5, rank=2)
    addresses = [t.data_ptr() for pair in made.pairs for t in pair]
    assert not any(t.any() for pair in made.pairs for t in pair)
    made.fill(1, 2)
    first = [t.clone() for pair in made.pairs for t in pair]
    made.fill(3)
    second = [t.clone() for pair in made.pairs for t in pair]
    assert same_bits(first[1], second[1]) and same_bits(first[3], second[3])
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[2], second[2])
    made.fill(torch.tensor([1 + (5 << 32)]), torch.tensor(2))  # as a graph gives them; the low 32 bits count
    assert all(same_bits(t, want) for t, want in zip((t for pair in made.pairs for t in pair), first, strict=True))
    assert [t.data_ptr() for pair in made.pairs for t in pair] == addresses


def test_a_fill_is_one_launch_a_side(monkeypatch: pytest.MonkeyPatch) -> None:
    made, launches = Factors([(40, 24)] * 20, list(range(20)), seed=5, rank=2), []
    perturb = cpu.perturb
    monkeypatch.setattr(cpu, "perturb", lambda plan, p: (launches.append(len(plan.entries)), perturb(plan, p)))
    made.fill(1, 2)
    assert launches == [20, 20]
    made.fill(2)
    assert launches == [20, 20, 20]


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_moments_of_z(rank: int) -> None:
    """With A = U^T U / R and B = V^T V / C, both [rank, rank], over the R C elements of one matrix

        mean z   = sum_rho mean(u_rho) mean(v_rho)    has mean 0 and variance rank / (R C); tails of a product of normals: P(15 sigma) < 1e-6
        mean z^2 = sum_ab A_ab B_ab                   has mean rank and variance rank (2/R + 2/C + 4/(R C)) + 2 rank (rank - 1) / (R C)

    and rounding to 12 bits changes a factor by 2^-12 of it at most, z^2 by 2^-10.
    """
    n = 4096
    made = Factors([(n, n)], [3], seed=17, rank=rank)
    made.fill(1, 2)
    u, v = (t.double() for t in made.pairs[0])
    mean = float((u.mean(0) * v.mean(0)).sum())
    second = float(((u.t() @ u) * (v.t() @ v)).sum()) / n**2
    assert abs(mean) < 15 * math.sqrt(rank / n**2)
    spread = math.sqrt(rank * (4 / n + 4 / n**2) + 2 * rank * (rank - 1) / n**2)
    assert abs(second - rank) < 5 * spread + rank * 2.0**-10
    sample = z_of(64, n, (made.pairs[0][0][:64].contiguous(), made.pairs[0][1]), "cpu").double()
    assert torch.allclose(sample, u[:64] @ v.t(), rtol=0, atol=1e-5)


# ---- what is refused ----------------------------------------------------------------------------------------------------

W = torch.ones(6, 4)
PAIR = low_rank_pair(6, 4, 2)


def call(terms: Any = ((0, 1.0),), params: Any = None, **more: Any) -> None:
    zk.perturb_([W] if params is None else params, list(terms) if isinstance(terms, tuple) else terms, seed=1, streams=[2], **more)


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda: call(terms=((0, 1.0), (1, 1.0)), factors=[PAIR]), ValueError, "has one term, this one has 2"),
    (lambda: call(factors=[]), ValueError, "factors has length 0, params has length 1"),
    (lambda: call(factors=[PAIR[0]]), TypeError, r"factors\[0\] is Tensor: give None, or \(left, right\)"),
    (lambda: call(factors=[(PAIR[0], 3)]), TypeError, r"factors\[0\]: right is int"),
    (lambda: call(factors=[(PAIR[0].double(), PAIR[1])]), TypeError, r"factors\[0\]: left is torch.float64 \(6, 2\) on cpu"),
    (lambda: call(factors=[(PAIR[0].view(-1), PAIR[1])]), TypeError, r"left is torch.float32 \(12,\) on cpu; give a float32 tensor of 2"),
    (lambda: call(factors=[(PAIR[0].to("meta"), PAIR[1])]), TypeError, "on meta; give a float32 tensor of 2 dimensions on cpu"),
    (lambda: call(factors=[(PAIR[0].t().contiguous().t(), PAIR[1])]), ValueError, r"left has strides \(1, 6\).* give left.contiguous\(\)"),
    (lambda: call(factors=[(PAIR[0], PAIR[1].contiguous())]), ValueError, r"right has strides \(2, 1\).*right.t\(\).contiguous\(\).t\(\)"),
    (lambda: call(factors=[(PAIR[0], low_rank_pair(6, 4, 3)[1])]), ValueError, "left has rank 2, right 3"),
    (lambda: call(factors=[low_rank_pair(6, 4, 65)]), ValueError, "left has rank 65, right 65; give both the same, 1 .. 64"),
    (lambda: call(factors=[(torch.zeros(6, 0), torch.zeros(0, 4).t())]), ValueError, "left has rank 0"),
    (lambda: call(factors=[low_rank_pair(5, 4, 2)]), ValueError, r"those of a 5 x 4 matrix; 24 elements of shape \(6, 4\) from 0"),
    (lambda: call(factors=[low_rank_pair(4, 6, 2)]), ValueError, "those of a 4 x 6 matrix"),
    (lambda: call(factors=[PAIR], offsets=[1]), ValueError, "24 elements of shape .* from 1 are not part of it"),
    (lambda: call(scales=[(torch.ones(24), 1, "sqrt")]), ValueError, r"scales\[0\]: its third item 'sqrt' must be \"rsqrt\""),
    (lambda: call(scales=[(torch.ones(24), 1, 2.0)]), ValueError, "its third item 2.0"),
    (lambda: call(scales=[(torch.ones(5), 4, "rsqrt")]), ValueError, "need 6"),
    (lambda: call(scales=[(2.0, 1, "rsqrt")]), TypeError, "contiguous float32 tensor"),
    (lambda: zk.perturb_sequence_([W], [{"terms": [(0, 1.0)]}], seed=1, streams=[2], scales=[(torch.ones(24), 1, "rsqrt")]), ValueError,
     "a sequence of passes cannot have factors or inverse-square-root scales"),
    (lambda: Factors([(6, 4)], [1], seed=1, rank=0), ValueError, r"rank=0 must be an integer in 1 .. 64"),
    (lambda: Factors([(6, 4)], [1], seed=1, rank=65), ValueError, "rank=65"),
    (lambda: Factors([(6, 4)], [1], seed=-1, rank=1), ValueError, "seed=-1"),
    (lambda: Factors([(6, 4)], [1, 2], seed=1, rank=1), ValueError, "streams has length 2"),
    (lambda: Factors([(6, -4)], [1], seed=1, rank=1), ValueError, r"shapes\[0\]=-4"),
    (lambda: Factors([(1 << 55, 4)], [1], seed=1, rank=2), ValueError, "more than 2\\^55 numbers"),
    (lambda: factors(1, 2, -1, 0, 6, 4, 2), ValueError, "tag_u=-1"),
    (lambda: factors(1, 2, 0, 2**32, 6, 4, 2), ValueError, "tag_v=4294967296"),
    (lambda: Factors([(6, 4)], [1], seed=1, rank=1).fill(torch.tensor([1.0])), TypeError, "tag_u is torch.float32"),
    (lambda: journal.described("w", W, None, (torch.ones(24), 1, "rsqrt")), ValueError, 'scale of w is an "rsqrt" scale'),
]  # fmt: skip


@pytest.mark.parametrize(("refused", "error", "match"), REFUSED, ids=[m for _, _, m in REFUSED])
def test_refused(refused: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        refused()
    assert (W == 1).all(), "changed something before it refused"


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_plans_of_one_list_are_all_asked_first(name: str) -> None:
    """A list of two dtypes is two plans; the second one's refusal leaves the first as it was. And a sequence of an inner caller."""
    params = [torch.ones(6, 4, dtype=torch.float16), torch.ones(6, 4)]
    plans = make_plans(params, [1, 2], factors=[None, PAIR])
    p = Pass(1, [1, 2], [1.0, 1.0])
    passes = Passes(1, *(torch.tensor(x) for x in ([1], [1.0], [0, 1], [1.0])), torch.zeros(1, dtype=torch.uint8))
    backend = _backends.load(name)
    for run in (
        lambda: ops.run(plans, p, name),
        lambda: ops.run_sequence(plans, passes, name),
        lambda: backend.perturb(plans[1], p),
        lambda: backend.sequence(plans[1], passes),
    ):
        with pytest.raises(ValueError, match=r"one term|a sequence of passes"):
            run()
        assert all((t == 1).all() for t in params)


def test_plain_entries_stay_plain() -> None:
    """What decides on the lean kernels, and on the extended ones."""
    (plain,) = make_plans([W], [1])
    (ranked,) = make_plans([W], [1], factors=[PAIR])
    (rooted,) = make_plans([W], [1], scales=[(torch.ones(24), 1, "rsqrt")])
    (scaled,) = make_plans([W], [1], scales=[(torch.ones(24), 1)])
    assert [(p.plain, p.extended, p.low_rank) for p in (plain, ranked, rooted, scaled)] == [
        (True, False, False),
        (False, True, True),
        (False, True, False),
        (False, False, False),
    ]
    assert _C.MAX_RANK == checks.MAX_RANK
