"""The cases in which every backend must equal the reference, bit for bit.

Belongs here: builders of argument lists for `perturb_`, and the comparison. Does not belong here: anything that knows a
backend; each backend's test file runs `CASES` with its name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import zo_kernels as zk
from zo_kernels import checks, reference
from zo_kernels.plan import Entry, Pass, Passes, Plan, make_passes, make_plans

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Around every boundary of the contract: octets (8), groups (16, 32), Rademacher calls (128), SIMD blocks and launch tiles.
SIZES = (0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 127, 128, 129, 255, 257, 511, 513, 1000, 2047, 4097, 10007)
SEED = 0x0123456789ABCDEF
GUARD = 64  # sentinel elements around every buffer


def weights(n: int, dtype: torch.dtype, salt: int = 0, special: bool = True) -> Tensor:
    """Weights of many magnitudes, with both zeros, subnormals, the largest finite value and infinity among them."""
    g = torch.Generator().manual_seed(1000 * salt + n)
    x = torch.randn(n, generator=g) * torch.exp(4 * torch.randn(n, generator=g) - 4)
    x = x.to(dtype)
    if special and n >= 32:
        info = torch.finfo(dtype)
        some = torch.tensor(
            [0.0, -0.0, info.tiny, -info.tiny / 2, info.smallest_normal / 4, info.max, -info.max, float("inf")], dtype=torch.float64
        ).to(dtype)
        x[torch.randperm(n, generator=g)[:8]] = some
    return x


@dataclass
class Case:
    """One call of `perturb_`, or of `perturb_sequence_` if the arguments have `passes` instead of `terms`. `make()` gives (params,
    keyword arguments) on the CPU, fresh each time."""

    name: str
    make: Callable[[], tuple[list[Tensor], dict[str, Any]]]
    out_of_place: bool = False
    misalign: int = 0  # elements by which every buffer is shifted from its allocation's alignment
    numel: int = field(default=0)


def terms(k: int) -> list[tuple[int, float]]:
    coefs = [1e-3, -2e-5, 3.3e-4, -1e-4, 7e-5, -0.5, 1e-2, 2.0**-90]
    return [((0xFFFFFFF0 + 5 * j) & 0xFFFFFFFF, coefs[j % 8]) for j in range(k)]


def one_each(s: int, **more: Any) -> list[dict[str, Any]]:
    """s passes of one term, as most of a recorded run."""
    return [{"terms": [term], **more} for term in terms(s)]


# Numbers of terms, decays and roundings of every kind one after another; passes without a term, and without a live one.
MIXED: list[dict[str, Any]] = [
    {"terms": terms(1)},
    {"terms": terms(3), "rounding": "stochastic"},
    {"terms": [], "decay": 0.75},
    {"terms": terms(2), "decay": 0.999},
    {"terms": [], "decay": 0.7, "rounding": "stochastic"},
    {"terms": [(77, 1e-3)], "decay": 1.01, "rounding": "stochastic"},
    {"terms": [(5, 0.0), (6, 1e-40)]},
    {"terms": [(5, 0.0), (6, 2e-3), (7, 2.0**-101)], "rounding": "stochastic"},
    {"terms": [(9, 1e-41)], "decay": 0.3, "rounding": "stochastic"},
    {"terms": []},
    {"terms": terms(11)},
    {"terms": [(1, -1e-3)]},
]


def build(sizes: tuple[int, ...], dtype: torch.dtype, **kw: Any) -> Callable[[], tuple[list[Tensor], dict[str, Any]]]:
    """A case over tensors of these sizes; a callable keyword is called with (index, tensor) to make each tensor's entry."""

    def make() -> tuple[list[Tensor], dict[str, Any]]:
        params = [weights(n, dtype, salt=j) for j, n in enumerate(sizes)]
        args: dict[str, Any] = {"seed": SEED, "streams": [(0xDEADBEEF + 7 * j) & 0xFFFFFFFF for j in range(len(sizes))]}
        if "passes" not in kw:
            args["terms"] = terms(1)
        for key, value in kw.items():
            args[key] = [value(j, p) for j, p in enumerate(params)] if callable(value) else value
        return params, args

    return make


def random_bits(j: int, p: Tensor) -> Tensor:
    return torch.rand(p.shape, generator=torch.Generator().manual_seed(j)) < 0.4


def block_scales(block: int) -> Callable[[int, Tensor], Any]:
    def scale(j: int, p: Tensor) -> Any:
        n = max(1, -(-p.numel() // block))
        return torch.rand(n, generator=torch.Generator().manual_seed(j)) * 3 - 0.5, block

    return scale


def wild_scales(block: int) -> Callable[[int, Tensor], Any]:
    """Infinities, NaN and zeros of both signs among ordinary values."""

    def scale(j: int, p: Tensor) -> Any:
        values, _ = block_scales(block)(j, p)
        for k, x in enumerate((float("inf"), float("nan"), -float("inf"), 0.0, -0.0)):
            values[k::7] = x
        return values, block

    return scale


def roots(block: int) -> Callable[[int, Tensor], Any]:
    """Inverse-square-root scales: values of many magnitudes, subnormals and those that have no root among them."""

    def scale(j: int, p: Tensor) -> Any:
        n = max(1, -(-p.numel() // block))
        x = torch.exp(20 * torch.rand(n, generator=torch.Generator().manual_seed(j)) - 10)
        x[::31] = 1e-42
        x[30::97] = 0.0
        x[60::97] = -1.0
        return x, block, "rsqrt"

    return scale


def low_rank_pair(rows: int, cols: int, rank: int, salt: int = 0) -> tuple[Tensor, Tensor]:
    """Factors of 12 significant bits, within buffers of NaNs: what reads outside of them gives NaNs."""
    pair = []
    for side, n in enumerate((rows, cols)):
        g = torch.Generator().manual_seed(1000 * salt + 10 * rank + side)
        table = torch.full((n * rank + 2 * GUARD,), float("nan"))[GUARD:-GUARD].view(n, rank)
        table.copy_(torch.randint(-2047, 2048, (n, rank), generator=g) * torch.exp2(torch.randint(-12, -8, (n, rank), generator=g)))
        pair.append(table)
    left, right = pair
    columns = torch.full((cols * rank + 2 * GUARD,), float("nan"))[GUARD:-GUARD].view(rank, cols).copy_(right.t())
    return left, columns.t()


def low_rank(cols: int, rank: int, offset: int = 0) -> Callable[[int, Tensor], Any]:
    """Factors of the matrix with so many columns that each tensor, from element `offset` on, is a part of."""
    return lambda j, p: low_rank_pair(-(-(offset + max(1, p.numel())) // cols), cols, rank, j)


def cases() -> Iterator[Case]:
    short = (0, 1, 33, 257, 4097)
    for dtype, kind in itertools.product(DTYPES, ("gaussian", "rademacher")):
        tag = f"{str(dtype)[6:]}-{kind}"

        def case(name: str, sizes: tuple[int, ...] = short, out: bool = False, misalign: int = 0, **kw: Any) -> Case:
            return Case(f"{tag}-{name}", build(sizes, dtype, kind=kind, **kw), out, misalign)  # noqa: B023

        for k in (0, 1, 2, 3, 8, 21):
            yield case(f"K{k}", sizes=SIZES if k in (1, 3) else short, terms=terms(k))
        yield case("out-of-place", sizes=SIZES, out=True, terms=terms(2))
        for shift in (1, 3, 8):
            yield case(f"misaligned{shift}", misalign=shift)
        yield case("misaligned-out", misalign=5, out=True)
        yield case("stochastic", sizes=SIZES, rounding="stochastic")
        yield case("stochastic-K3-decay", rounding="stochastic", terms=terms(3), decay=0.99)
        yield case("stochastic-K0", rounding="stochastic", terms=[], decay=0.7)
        yield case("decay", sizes=SIZES, decay=0.999)
        yield case("decay-only", terms=[], decay=0.5)
        yield case("zero-coefficient", terms=[(3, 0.0)])
        yield case("dead-terms", terms=[(3, 0.0), (4, 1e-40), (5, 2e-3), (6, 2.0**-101)])
        yield case("overflow", terms=[(1, 3e38), (2, 6e4)])
        yield case("subnormal", terms=[(1, 2.0**-99), (2, 1e-7)])
        yield case("bitmask", sizes=SIZES, masks=random_bits)
        yield case("bitmask-decay-out", out=True, masks=random_bits, decay=0.9, terms=terms(2))
        yield case("random-mask", sizes=SIZES, masks=lambda j, p: zk.RandomMask(0.3, tag=9 + j))
        yield case("random-mask-rare", sizes=(100003,), masks=lambda j, p: zk.RandomMask(1e-4, tag=5))
        yield case("scale-number", scales=lambda j, p: 0.5 + j)
        for block in (1, 3, 8, 24, 32, 1000):
            yield case(f"scale-block{block}", scales=block_scales(block))
        for block in (1, 8):
            yield case(f"scale-wild{block}", scales=wild_scales(block), terms=terms(2), masks=random_bits, decay=0.9)
        yield case("scale-wild-dead", scales=wild_scales(3), terms=[(3, 0.0), (4, 2.0**-101)], rounding="stochastic", decay=0.9)
        # One block for all, up to the last index there is.
        yield case(
            "scale-number-last", sizes=(1000, 33), scales=lambda j, p: -1.5, offsets=lambda j, p: checks.MAX_INDEX - p.numel()
        )
        yield case("everything", scales=block_scales(40), masks=random_bits, decay=0.99, rounding="stochastic", terms=terms(3))
        yield case("everything-random", scales=block_scales(7), masks=lambda j, p: zk.RandomMask(0.6, tag=j), decay=1.01,
                   rounding="stochastic", terms=terms(2), out=True)  # fmt: skip
        # Shards: at group boundaries, off them, and across q = 2^32 (i = 2^36; Rademacher i = 2^39; octets i = 2^35).
        for at in (1 << 36, 1 << 39, 1 << 35):
            yield case(f"offset-2^{at.bit_length() - 1}", sizes=(1000, 4097), offsets=lambda j, p, at=at: at - 512, rounding="stochastic",
                       masks=lambda j, p: zk.RandomMask(0.5, tag=j), terms=terms(2))  # fmt: skip
        yield case("offset-odd", sizes=(1000, 257), offsets=lambda j, p: 37 + 11 * j, terms=terms(2))
        yield case("offset-odd-everything", sizes=(1000, 257), offsets=lambda j, p: 37 + 11 * j, masks=random_bits, rounding="stochastic",
                   scales=lambda j, p: (torch.linspace(-1, 2, 200), 11), decay=0.9)  # fmt: skip
        yield case("offset-8", sizes=(1000, 257), offsets=lambda j, p: 8 * (1 + j), terms=terms(2))
        yield case("sequence", sizes=SIZES, passes=one_each(5))
        yield case("sequence-out", passes=one_each(3), out=True)
        yield case("sequence-mixed", sizes=(0, 1, 33, 511, 10007), passes=MIXED)
        yield case("sequence-mixed-out", passes=MIXED, out=True)
        yield case("sequence-misaligned3", passes=MIXED, misalign=3)
        yield case("sequence-dead", passes=MIXED[6:7] * 2)
        yield case("sequence-dead-out", passes=[{"terms": []}, *MIXED[6:7]], out=True)
        yield case("sequence-none", passes=[])
        yield case("sequence-none-out", passes=[], out=True)
        yield case(
            "sequence-overflow", passes=[{"terms": [(1, 3e38)]}, {"terms": [(1, -3e38)]}, *one_each(2, rounding="stochastic")]
        )
        yield case("sequence-offset-odd", sizes=(1000, 257), offsets=lambda j, p: 37 + 11 * j, passes=MIXED)
        yield case(
            "sequence-offset-2^36", sizes=(1000, 4097), offsets=lambda j, p: (1 << 36) - 512, passes=one_each(2) + MIXED[1:3]
        )
        yield case("sequence-bitmask", passes=MIXED, masks=random_bits)
        yield case("sequence-random-mask", passes=MIXED, masks=lambda j, p: zk.RandomMask(0.3, tag=9 + j))
        yield case("sequence-scale-block3", passes=MIXED, scales=block_scales(3))
        yield case("sequence-everything", passes=MIXED, scales=block_scales(40), masks=random_bits, out=True)
        yield case("sequence-offset-odd-everything", sizes=(1000, 257), offsets=lambda j, p: 37 + 11 * j, passes=MIXED, masks=random_bits,
                   scales=lambda j, p: (torch.linspace(-1, 2, 200), 11))  # fmt: skip
        yield case("many", sizes=tuple(1 + (37 * j) % 301 for j in range(300)), terms=terms(2))
        for block in (1, 3, 8, 1000):
            yield case(f"rsqrt-block{block}", scales=roots(block))
        yield case(
            "rsqrt-everything", scales=roots(1), masks=random_bits, decay=0.99, rounding="stochastic", terms=terms(3), out=True
        )
        yield case(
            "rsqrt-among-others", sizes=(33, 4097, 300), scales=lambda j, p: (None, roots(8)(j, p), block_scales(7)(j, p))[j]
        )
        # Some tensors of the list have factors, others have noise; a number of columns for every way of lying across chunks of 8.
        yield case(
            "low-rank-mixed", sizes=(0, 700, 4097, 33, 513), factors=lambda j, p: low_rank(40, 2)(j, p) if j % 2 == 0 else None
        )
        if kind == "rademacher":  # factors do not know the kind
            continue
        for rank, cols in enumerate((1, 7, 8, 40, 1000), start=1):
            yield case(f"low-rank-{rank}-cols{cols}", sizes=SIZES if rank == 2 else short, factors=low_rank(cols, rank))
        yield case("low-rank-64", sizes=(33, 4097), factors=low_rank(100, 64))
        yield case("low-rank-out", out=True, misalign=5, factors=low_rank(32, 3))
        yield case("low-rank-stochastic", rounding="stochastic", factors=low_rank(64, 2), terms=[(7, -1e-3)])
        yield case("low-rank-decay", sizes=(257, 4097), decay=0.99, factors=low_rank(24, 1))
        yield case("low-rank-decay-only", terms=[], decay=0.9, factors=low_rank(24, 1))
        yield case("low-rank-dead", terms=[(3, 1e-40)], factors=low_rank(24, 1))
        # Live as it stands, but not as c' of the Gaussian, and the other way round: each tensor goes by its own rule.
        for c in (3.4e38, 2.0**-100 * 0.9):
            yield case(f"low-rank-live-{c:.1g}", terms=[(3, c)], factors=lambda j, p: low_rank(24, 1)(j, p) if j % 2 == 0 else None)
        yield case("low-rank-mask", masks=random_bits, factors=low_rank(16, 2))
        yield case("low-rank-everything", scales=roots(1), masks=lambda j, p: zk.RandomMask(0.6, tag=j), decay=1.01, rounding="stochastic",
                   factors=low_rank(40, 2), out=True)  # fmt: skip
        yield case("low-rank-offset-odd-everything", sizes=(1000, 257), offsets=lambda j, p: 37 + 11 * j, masks=random_bits,
                   scales=lambda j, p: (torch.linspace(-1, 2, 200), 11), rounding="stochastic", factors=low_rank(30, 5, 48), decay=0.9)  # fmt: skip
        yield case("low-rank-offset-8", sizes=(1000, 257), offsets=lambda j, p: 8 * (1 + j), factors=low_rank(16, 4, 16))


CASES = list(cases())
# By what they are about, in every type and of both kinds: a test each, whose assertions name the case. Most take less than a test's own cost.
GROUPS: dict[str, list[Case]] = {}
for _case in CASES:
    GROUPS.setdefault(_case.name.split("-", 2)[2], []).append(_case)


def guarded(t: Tensor, misalign: int, device: str) -> tuple[Tensor, Tensor]:
    """A copy of t inside a buffer of NaN sentinels: (whole buffer, view of the copy)."""
    buffer = torch.full((t.numel() + 2 * GUARD + misalign,), float("nan"), dtype=t.dtype, device=device)
    view = buffer[GUARD + misalign : GUARD + misalign + t.numel()]
    view.copy_(t)
    return buffer, view


def bits(t: Tensor) -> Tensor:
    t = t.detach().cpu().contiguous()
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal on every bit; a NaN equals any NaN (its payload is not part of the contract)."""
    nan = a.isnan().cpu() & b.isnan().cpu()
    return bool(((bits(a) == bits(b)) | nan).all())


def to_device(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(to_device(v, device) for v in value)
    return value


def one_by_one(params: list[Tensor], passes: list[dict[str, Any]], out: list[Tensor] | None = None, **args: Any) -> None:
    """What `perturb_sequence_` must equal: a call of `perturb_` for each pass, by the reference."""
    for source, target in zip(params, params if out is None else out, strict=True):
        target.copy_(source)
    for p in passes:
        zk.perturb_(params if out is None else out, backend="reference", **p, **args)


def call(backend: str, case: Case, device: str) -> list[Tensor]:
    """Run a case; check that sentinels and sources are untouched; return the results on the CPU."""
    params, args = case.make()
    args = dict(args)
    for key in ("masks", "scales", "factors"):
        if key in args:
            args[key] = [to_device(v, device) for v in args[key]]
    sources = [guarded(p, case.misalign, device) for p in params]
    targets = [guarded(torch.zeros_like(p), case.misalign, device) for p in params] if case.out_of_place else sources
    if case.out_of_place:
        args["out"] = [view for _, view in targets]
    views = [view for _, view in sources]
    if "terms" in args:
        zk.perturb_(views, args.pop("terms"), backend=backend, **args)
    elif backend == "reference":
        one_by_one(views, **args)
    else:
        zk.perturb_sequence_(views, args.pop("passes"), backend=backend, **args)
    for p, (buffer, view) in zip(params, targets, strict=True):
        start = view.data_ptr() - buffer.data_ptr()
        k = start // p.element_size()
        assert buffer[:k].isnan().all() and buffer[k + p.numel() :].isnan().all(), f"{case.name}: wrote outside the tensor"
    if case.out_of_place:
        for p, (_, view) in zip(params, sources, strict=True):
            assert same_bits(p, view.cpu()), f"{case.name}: changed its source"
    return [view.cpu() for _, view in targets]


_expected: dict[str, list[Tensor]] = {}


def check(backend: str, case: Case, device: str = "cpu") -> None:
    if case.name not in _expected:
        _expected[case.name] = call("reference", case, "cpu")
    for k, (got, want) in enumerate(zip(call(backend, case, device), _expected[case.name], strict=True)):
        if not same_bits(got, want):
            differing = ((bits(got) != bits(want)) & ~(got.isnan() & want.isnan())).nonzero().flatten()
            e = int(differing[0])
            raise AssertionError(
                f"{case.name}: {backend} on {device} differs from the reference at {len(differing)} of {got.numel()} elements of tensor {k}, "
                f"first at {e}: {got[e].item()!r} instead of {want[e].item()!r}"
            )


def check_every_half(dtype: torch.dtype, perturb: Callable[[Plan, Pass], None], device: str = "cpu") -> None:
    """Every value of a 16-bit type, NaNs included, through passes that leave it alone, scale it, and move it by more or less than its
    rounding. Shifted by one, too, so that each value meets the code for whole vectors and the code for the rest."""
    everything = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for rounding, (terms, decay) in itertools.product(
        checks.ROUNDINGS, (([], None), ([], 0.999), ([(3, 1e-6)], None), ([(3, 1.0)], 1.5))
    ):
        p = Pass(1, [t for t, _ in terms], [c for _, c in terms], decay, rounding=rounding)
        for offset in (0, 1):
            want, got = torch.zeros_like(everything), torch.zeros_like(everything, device=device)
            reference.perturb(make_plans([everything], [3], out=[want], offsets=[offset])[0], p)
            perturb(make_plans([everything.to(device)], [3], out=[got], offsets=[offset])[0], p)
            assert same_bits(got, want), (rounding, terms, decay, offset)


# (rows, elements of a row of the full tensor), then the rows and the columns of the block: what no group of 8, 16, 32 or 128 divides, one
# column, one row, and halves of even rows.
BLOCKS = (
    ((5, 37), (0, 5), (0, 19)),
    ((5, 37), (2, 5), (19, 37)),
    ((4, 300), (1, 3), (131, 300)),
    ((3, 100), (0, 3), (33, 34)),
    ((2, 512), (0, 2), (256, 512)),
    ((3, 70), (1, 2), (8, 48)),
)


def check_columns(
    dtype: torch.dtype, perturb: Callable[[Plan, Pass], None], sequence: Callable[[Plan, Passes], None], device: str = "cpu"
) -> None:
    """Blocks of rows and columns beside a whole tensor: every element as the reference has it in the whole tensors."""
    plain = Pass(SEED, [3], [1e-3])
    busy = Pass(SEED, [3, 4, 5], [1e-3, -2e-3, 0.5], 0.9, rounding="stochastic")
    passes = Passes(SEED, *make_passes(MIXED))
    kinds: tuple[tuple[Pass | Passes, tuple[str, ...]], ...] = (
        (plain, ()),
        (busy, ("scales", "masks")),
        (replace(busy, kind="rademacher"), ("random",)),
        (passes, ("scales", "masks")),
    )
    for number, (p, limits) in enumerate(kinds):
        wholes, given, places = [], [], []
        for k, (shape, rows, columns) in enumerate(BLOCKS):
            keep = torch.rand(shape, generator=torch.Generator().manual_seed(k)) < 0.7
            scale = torch.linspace(-1, 2, shape[0])
            mask = zk.RandomMask(0.5, tag=k) if "random" in limits else keep if "masks" in limits else None
            whole = {"masks": mask, "scales": scale if "scales" in limits else None}
            part = dict(whole)
            if isinstance(mask, Tensor):
                part["masks"] = keep[slice(*rows), slice(*columns)].contiguous()
            if part["scales"] is not None:
                part["scales"] = scale[slice(*rows)].contiguous()
            wholes.append((weights(shape[0] * shape[1], dtype, salt=k).view(shape), whole))
            given.append((wholes[-1][0][slice(*rows), slice(*columns)], part))
            places.append({"offsets": rows[0] * shape[1] + columns[0], "columns": (columns[1] - columns[0], shape[1])})
        wholes.append((weights(40, dtype), {"masks": None, "scales": None}))
        given.append(wholes[-1])
        places.append({"offsets": 0, "columns": None})
        targets, buffers = [], []
        for t, _ in given:
            buffer, view = guarded(t.reshape(-1), number % 3, device)
            targets.append(view.view(t.shape))
            buffers.append(buffer)

        def plan_of(tensors: list[Tensor], own: list[dict[str, Any]], **more: Any) -> Plan:
            listed = {key: [to_device(o[key], str(tensors[0].device)) for o in own] for key in ("masks", "scales")}
            (plan,) = make_plans(tensors, list(range(7, 7 + len(tensors))), **listed, **more)
            return plan

        plan = plan_of(targets, [own for _, own in given], **{key: [at[key] for at in places] for key in ("offsets", "columns")})
        expected = [t.clone() for t, _ in wholes]
        whole_plan = plan_of(expected, [own for _, own in wholes])
        if isinstance(p, Passes):
            sequence(plan, p.on(plan.device))
            reference.sequence(whole_plan, p)
        else:
            perturb(plan, p)
            reference.perturb(whole_plan, p)
        for k, (_, rows, columns) in enumerate(BLOCKS):
            expected[k] = expected[k][slice(*rows), slice(*columns)]
        for k, (got, want, buffer) in enumerate(zip(targets, expected, buffers, strict=True)):
            assert same_bits(got, want), (number, k)
            before = GUARD + number % 3
            assert buffer[:before].isnan().all() and buffer[before + want.numel() :].isnan().all(), (number, k)


__all__ = ["CASES", "GROUPS", "Case", "bits", "check", "check_columns", "check_every_half", "reference", "same_bits", "weights"]


# ---- masks by magnitude -------------------------------------------------------------------------------------------------

LIMITS = (0.5, 0.0, -0.0, 1e-41, 70000.0, float("inf"), -1.0, float("nan"))  # one that fp32 alone has, one beyond fp16


def check_magnitude_masks(
    dtype: torch.dtype, run: Callable[[Plan, Tensor], None], device: str = "cpu", sizes: Sequence[int] = SIZES
) -> None:
    """The bits of `pack_mask(|x| <= limit)`, weight by weight, of whole and of misaligned tensors and of blocks of columns, in one list; and not a bit
    beside them."""
    tensors, limits, columns = [], [], []
    for k, n in enumerate(sizes):
        for shift in (0, 1, 3):
            x = weights(n + shift, dtype, salt=k)
            x[::7] = float("nan")
            x[5::11] = -0.0
            tensors.append(x.to(device)[shift:])
            some = x[shift:].float().abs().nan_to_num(0.25)
            limits.append(float(some[n // 2]) if n and shift == 3 else LIMITS[(3 * k + shift) % len(LIMITS)])
            columns.append(None)
    for k, (shape, rows, of_row) in enumerate(BLOCKS):
        whole = weights(shape[0] * shape[1], dtype, salt=k).view(shape)
        tensors.append(whole[slice(*rows), slice(*of_row)].contiguous().to(device))
        limits.append(LIMITS[k % 2])
        columns.append((of_row[1] - of_row[0], shape[1]))
    strides = [(t.numel() // c[0], c[0]) if c else (1, t.numel()) for t, c in zip(tensors, columns, strict=True)]
    held = [torch.full((rows * ((n + 7) // 8) + 2 * GUARD,), 0xA5, dtype=torch.uint8, device=device) for rows, n in strides]
    entries = tuple(
        Entry(t, t, 1, 40 + 3 * k, mask=bits[GUARD:-GUARD], width=c[0] if c else 0, pitch=c[1] if c else 0)
        for k, (t, bits, c) in enumerate(zip(tensors, held, columns, strict=True))
    )
    plan = Plan(entries, torch.device(device), dtype)
    run(plan, torch.tensor(limits).repeat_interleave(torch.tensor(plan.rows)).to(device))
    for k, (t, bits, (rows, n), limit) in enumerate(zip(tensors, held, strides, limits, strict=True)):
        kept = [abs(x) <= limit for x in t.cpu().double().flatten().tolist()]
        want = [sum(kept[r * n + e + j] << j for j in range(min(8, n - e))) for r in range(rows) for e in range(0, n, 8)]
        assert bits[GUARD:-GUARD].tolist() == want, f"tensor {k} of {t.numel()} elements, limit {limit}"
        assert set(bits[:GUARD].tolist() + bits[-GUARD:].tolist()) == {0xA5}, f"tensor {k}: bytes beside the mask"
