"""Sequences of passes: S passes in one read and write of the weights equal S passes, whatever they are.

Belongs here: the front door `perturb_sequence_`, the record `Passes`, properties, long sequences. Does not belong here: the cases that
every backend runs (cases.py, in each backend's own test file), vectors (tests/vectors).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import zo_kernels as zk
from tests.kernels import cases
from tests.kernels.cases import same_bits, weights
from tests.kernels.test_cuda_host import sequence as on_the_host
from zo_kernels import _backends, checks, ops, reference
from zo_kernels._backends import cpu
from zo_kernels.plan import Entry, Passes, Plan, make_passes, make_plans

ISAS = range(1, 1 + (0 if cpu.status() else cpu.extension().cpu_best_isa()))
GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "triton")]
Run = Callable[[Plan, Passes], None]


def compiled(library: Any) -> dict[str, Run]:
    """Every implementation that runs without a GPU, but Triton's interpreter, which needs a process of its own (test_triton.py)."""

    def isa(k: int) -> Run:
        return lambda plan, passes: cpu.sequence(plan, passes, isa=k)

    return {
        "reference": reference.sequence,
        **{f"cpu {cpu.extension().ISA_NAMES[k]}": isa(k) for k in ISAS},
        "cuda on the host": lambda plan, passes: on_the_host(library, plan, passes),
    }


def passes_of(described: list[dict[str, Any]], kind: str = "gaussian", seed: int = cases.SEED) -> Passes:
    return Passes(seed, *make_passes(described), kind)


def one_by_one(start: Tensor, passes: Passes, run: Any = reference.perturb, **entry: Any) -> Tensor:
    """The definition, as a loop of its own."""
    result = start.clone()
    for p in passes:
        run(Plan((Entry(result, result, 7, **entry),), result.device, result.dtype), p)
    return result


def in_one(run: Run, start: Tensor, passes: Passes, **entry: Any) -> Tensor:
    result = start.clone()
    run(Plan((Entry(result, result, 7, **entry),), result.device, result.dtype), passes)
    return result


# ---- parity -----------------------------------------------------------------------------------------------------------

COEFFICIENTS = st.one_of(st.floats(-10, 10, width=32), st.sampled_from([0.0, 2.0**-100, 2.0**-101, 3e38, 1e-3, float("nan")]))
DECAYS = st.one_of(st.just(1.0), st.floats(-2, 2, width=32), st.sampled_from([float("inf"), float("nan"), 0.0]))


@st.composite
def sequences(draw: st.DrawFn) -> Passes:
    lengths = draw(st.lists(st.sampled_from([0, 1, 1, 1, 2, 3, 9]), max_size=6))
    k, s = sum(lengths), len(lengths)
    return Passes(
        draw(st.integers(0, 2**64 - 1)),
        torch.tensor(draw(st.lists(st.integers(0, 2**32 - 1), min_size=k, max_size=k)), dtype=torch.int64),
        torch.tensor(draw(st.lists(COEFFICIENTS, min_size=k, max_size=k)), dtype=torch.float32),
        torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int64),
        torch.tensor(draw(st.lists(DECAYS, min_size=s, max_size=s)), dtype=torch.float32),
        torch.tensor(draw(st.lists(st.integers(0, 1), min_size=s, max_size=s)), dtype=torch.uint8),
        draw(st.sampled_from(list(checks.KINDS))),
    )


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    passes=sequences(),
    n=st.integers(0, 400),
    dtype=st.sampled_from(cases.DTYPES),
    offset=st.one_of(st.just(0), st.integers(0, 300), st.integers((1 << 36) - 300, 1 << 36)),
    masked=st.sampled_from(["no", "bits", "random"]),
    block=st.sampled_from([0, 1, 5, 8, 33]),
)
def test_any_sequence(passes: Passes, n: int, dtype: torch.dtype, offset: int, masked: str, block: int, library: Any) -> None:
    entry: dict[str, Any] = {"offset": offset}
    if masked == "bits":
        entry["mask"] = zk.pack_mask(torch.rand(n) < 0.5)
    elif masked == "random":
        entry |= {"keep": 1 << 31, "mask_tag": 5}
    if block:
        entry |= {"scale": torch.rand(n // block + 2), "scale_block": block}
    start = weights(n, dtype)
    want = one_by_one(start, passes, **entry)
    for name, run in compiled(library).items():
        assert same_bits(in_one(run, start, passes, **entry), want), name


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("kind", checks.KINDS)
def test_a_thousand_passes(kind: str, dtype: torch.dtype, library: Any) -> None:
    """As a recorded run has them: mostly one term, sometimes stochastic, sometimes with decay or without a live term."""
    described = [
        {
            "terms": [(7 * s + k, 3e-4 / (1 + s % 5) * (-1) ** s) for k in range(0 if s % 97 == 96 else 1 + 2 * (s % 50 == 49))],
            "decay": 0.999 if s % 10 == 0 else 1.0,
            "rounding": "stochastic" if s % 3 == 0 else "nearest",
        }
        for s in range(1000)
    ]
    passes = passes_of(described, kind)
    start = weights(77, dtype, special=False)
    want = one_by_one(start, passes)
    assert not same_bits(start, want)
    for name, run in compiled(library).items():
        assert same_bits(in_one(run, start, passes), want), name


@pytest.mark.parametrize("row_len", [32, 7, 40])
def test_gathered_rows(row_len: int, library: Any) -> None:
    """Rows of the full table, as plans of embeddings have them."""
    rows = torch.tensor([5, 0, 5, 2, 11])
    start = weights(5 * row_len, torch.bfloat16)
    passes = passes_of(cases.MIXED)
    entry: dict[str, Any] = {"rows": rows, "row_len": row_len}
    want = one_by_one(start, passes, **entry)
    for name, run in compiled(library).items():
        assert same_bits(in_one(run, start, passes, **entry), want), name


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_threads_and_tiles(dtype: torch.dtype) -> None:
    """Large enough for several chunks and threads; against separate passes of the same backend, which has its own tests."""
    start = weights(300_001, dtype)
    passes = passes_of(cases.MIXED)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert same_bits(in_one(cpu.sequence, start, passes, offset=37), one_by_one(start, passes, cpu.perturb, offset=37))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("kind", checks.KINDS)
def test_on_a_gpu(kind: str, dtype: torch.dtype, backend: str) -> None:
    """Three million weights through 60 passes, whole tiles and odd ends; numbers and device terms; nothing waits for the device."""
    module = _backends.load(backend)
    if not torch.cuda.is_available() or module.status():
        pytest.skip(f"{backend}: {module.status() or 'no CUDA device'}")
    start = weights(3_000_017, dtype)
    described = [*cases.MIXED, *cases.one_each(40), *cases.one_each(8, rounding="stochastic", decay=0.99)]
    want = one_by_one(start, passes_of(described, kind), cpu.perturb)
    there = start.cuda()
    on_device = [
        {
            **d,
            "terms": (
                torch.tensor([t for t, _ in d["terms"]], dtype=torch.int64).cuda(),
                torch.tensor([c for _, c in d["terms"]]).cuda(),
            ),
        }
        for d in described
    ]
    for passes in (passes_of(described, kind), passes_of(on_device, kind)):
        got = there.clone()
        (plan,) = make_plans([got], [7])
        ops.run_sequence([plan], passes, backend)  # compiles, uploads
        got.copy_(there)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            ops.run_sequence([plan], passes, backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert same_bits(got.cpu(), want)


# ---- the front door ---------------------------------------------------------------------------------------------------


def test_the_reference_is_the_loop() -> None:
    params = [weights(n, d) for n, d in ((40, torch.float16), (33, torch.float32), (0, torch.bfloat16))]
    want, got, out = [p.clone() for p in params], [p.clone() for p in params], [torch.zeros_like(p) for p in params]
    arguments: dict[str, Any] = {"seed": 3, "streams": [1, 2, 3], "backend": "reference"}
    for p in cases.MIXED:
        zk.perturb_(want, **p, **arguments)
    zk.perturb_sequence_(got, cases.MIXED, **arguments)
    zk.perturb_sequence_(params, cases.MIXED, out=out, **arguments)
    assert all(same_bits(a, b) and same_bits(a, c) for a, b, c in zip(want, got, out, strict=True))


def test_terms_as_tensors() -> None:
    """As for `perturb_`: nothing is read back, so what is not finite is skipped and not an error."""
    x = weights(50, torch.float16)
    want, got = x.clone(), x.clone()
    nan = torch.tensor(float("nan"))
    passes = [
        {"terms": (torch.tensor([4, 5]), torch.tensor([1e-3, 2e-3])), "decay": torch.tensor([0.5])},
        {"terms": [(3, 1e-2)]},
        {"terms": [(6, torch.tensor(1e-2)), (7, nan)], "decay": nan},
    ]
    for p in passes:
        zk.perturb_([want], seed=1, streams=[2], **p)
    zk.perturb_sequence_([got], passes, seed=1, streams=[2])
    assert same_bits(got, want)
    zk.perturb_sequence_([], passes, seed=1, streams=[])


W = torch.ones(6)
REFUSED: list[tuple[Any, type[Exception], str]] = [
    (3, TypeError, "passes is a int"),
    ("ab", TypeError, "passes is a str"),
    ([[(1, 1.0)]], TypeError, r"passes\[0\]=.* must be a dict"),
    ([{"terms": []}, {"decay": 1.0}], TypeError, r"passes\[1\]=.* must be a dict with the key terms"),
    ([{"terms": [], "coef": 1.0}], TypeError, r"passes\[0\]=.* must be a dict"),
    ([{"terms": [(-1, 1.0)]}], ValueError, r"passes\[0\]: terms\[0\]: tag=-1"),
    ([{"terms": []}, {"terms": [(0, float("nan"))]}], ValueError, r"passes\[1\]: terms\[0\]: coefficient=nan"),
    ([{"terms": [], "decay": float("inf")}], ValueError, r"passes\[0\]: decay=inf"),
    ([{"terms": [], "decay": torch.ones(2)}], TypeError, r"passes\[0\]: decay is"),
    ([{"terms": [], "rounding": "up"}], ValueError, r"passes\[0\]: rounding='up'"),
]


@pytest.mark.parametrize(("passes", "error", "match"), REFUSED, ids=[m for _, _, m in REFUSED])
def test_refused(passes: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        zk.perturb_sequence_([W], passes, seed=1, streams=[2])
    assert (W == 1).all()


def test_tensors_are_checked_as_by_perturb() -> None:
    good: list[dict[str, Any]] = [{"terms": [(1, 1.0)]}]
    for params, more, match in (
        ([W, W], {"streams": [1, 2]}, "share memory"),
        ([W.double()], {"streams": [1]}, "float64"),
        ([W], {"streams": [-1]}, r"streams\[0\]=-1"),
        ([W], {"streams": [1], "kind": "cauchy"}, "kind='cauchy'"),
        ([W], {"streams": [1], "masks": [torch.ones(3, dtype=torch.bool)]}, r"masks\[0\] has shape"),
        ([W], {"streams": [1], "backend": "tpu"}, "backend='tpu'"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            zk.perturb_sequence_(params, good, seed=1, **more)
    assert (W == 1).all()


def test_a_record_that_would_lead_astray_is_refused() -> None:
    """`first` and `rounding` are indices into memory: nothing reaches a kernel that they could not follow."""
    good = passes_of(cases.MIXED)
    first = good.first.clone()
    first[3] = 10**9
    falling = good.first.clone()
    falling[2] = 0
    for field, value, match in (
        ("first", first, "without falling"),
        ("first", falling, "without falling"),
        ("first", good.first[:-1], "first is torch.int64 of shape"),
        ("first", good.first.int(), "first is torch.int32"),
        ("first", good.first + 1, "from 0"),
        ("decay", good.decay[1:], "decay is"),
        ("coefs", good.coefs.double(), "coefs is torch.float64"),
        ("rounding", good.rounding + 2, "rounding has the value 3"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            replace(good, **{field: value})


@pytest.mark.skipif(cpu.status() is not None, reason=str(cpu.status()))
def test_the_extension_refuses_it_too() -> None:
    module = cpu.extension()
    assert not isinstance(module, str)
    tags, coefs, first = torch.zeros(2, dtype=torch.int64), torch.zeros(2), torch.tensor([0, 3])
    decay, rounding = torch.ones(1), torch.zeros(1, dtype=torch.uint8)
    addresses = [t.data_ptr() for t in (tags, coefs)], [t.data_ptr() for t in (first, decay, rounding)]
    with pytest.raises(RuntimeError, match="out of its range"):
        module.cpu_sequence(0, 0, 1, 0, 0, *addresses[0], 2, *addresses[1], 1, 1, 0)


def test_autograd_sees_the_change() -> None:
    x = torch.ones(5, requires_grad=True)
    y = (x * x).sum()
    with torch.no_grad():
        zk.perturb_sequence_([x], [{"terms": [(1, 1.0)]}], seed=1, streams=[2])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_registered_with_torch() -> None:
    x = weights(9, torch.float32, special=False)
    tensors, rest = ops.tensor_arguments([x], seed=5, streams=[1])
    arguments = (*tensors, *make_passes(cases.MIXED), *rest)
    torch.library.opcheck(torch.ops.zo_kernels.perturb_sequence_.default, arguments, test_utils=("test_schema", "test_faketensor"))
