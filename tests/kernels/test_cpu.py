"""The CPU backend: every instruction set of this machine, bit for bit, and what only this backend has (threads, ISA choice).

Belongs here: what runs through zo_kernels._C. Does not belong here: the contract's statistics, the casts of noise.h
(test_noise_h.py), the cases themselves (cases.py).
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import zo_kernels as zk
from tests.kernels import cases
from tests.kernels.cases import same_bits
from zo_kernels import _C, _backends, checks, ops, reference
from zo_kernels._backends import cpu
from zo_kernels._backends._extension import extension
from zo_kernels.plan import WORDS, Entry, Pass, Plan, make_plans, pack_mask

ISAS = [
    pytest.param(k, id=name, marks=pytest.mark.skipif(k > _C.cpu_best_isa(), reason=f"this processor or build lacks {name}"))
    for k, name in enumerate(_C.ISA_NAMES)
    if k
]
AVAILABLE = range(1, _C.cpu_best_isa() + 1)
CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.fixture
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Forces an instruction set (indirect parameter) on everything that goes through the backend."""
    index: int = request.param
    for name in ("perturb", "sequence"):
        monkeypatch.setattr(cpu, name, functools.partial(getattr(cpu, name), isa=index))
    return index


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def clone_plan(plan: Plan) -> Plan:
    """The same plan over a copy of its weights, in place."""
    entries = []
    for e in plan.entries:
        t = e.src.clone()
        entries.append(replace(e, src=t, dst=t))
    return Plan(tuple(entries), plan.device, plan.dtype)


def results(plan: Plan, p: Pass, index: int | None) -> list[Tensor]:
    """The weights after the pass, by an instruction set (0: the best), or by the reference (None)."""
    plan = clone_plan(plan)
    reference.perturb(plan, p) if index is None else cpu.perturb(plan, p, isa=index)
    return [e.dst for e in plan.entries]


# ---- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("what", cases.GROUPS)
def test_case(what: str, isa: int) -> None:
    for case in cases.GROUPS[what]:
        cases.check("cpu", case)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_blocks_of_columns(dtype: torch.dtype) -> None:
    cases.check_columns(dtype, reference.perturb, reference.sequence)
    for index in AVAILABLE:
        cases.check_columns(dtype, functools.partial(cpu.perturb, isa=index), functools.partial(cpu.sequence, isa=index))


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_magnitude_masks(dtype: torch.dtype) -> None:
    cases.check_magnitude_masks(dtype, reference.magnitude_mask)
    for index in AVAILABLE:
        cases.check_magnitude_masks(dtype, functools.partial(cpu.magnitude_mask, isa=index))


@pytest.mark.parametrize("index", ISAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_magnitude_masks_of_every_half(dtype: torch.dtype, index: int) -> None:
    """Every value of a 16-bit type as a weight, beside limits on, below and above each power of two and the largest value, in fp32."""
    everything = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    bits = torch.empty(1 << 13, dtype=torch.uint8)
    (plan,) = make_plans([everything], [1], masks=[bits])
    on = torch.cat([2.0 ** torch.arange(-30.0, 16.0), torch.tensor([torch.finfo(dtype).max])])
    for limit in torch.cat([on, torch.nextafter(on, torch.zeros(1)), torch.nextafter(on, torch.full((1,), torch.inf))]).split(1):
        cpu.magnitude_mask(plan, limit, isa=index)
        assert torch.equal(bits, pack_mask(everything.float().abs() <= limit)), float(limit)


def test_threads_share_no_byte_of_a_mask(threads: None) -> None:
    """Chunks of a list begin anywhere in a tensor."""
    tensors = [cases.weights(n, torch.float32) for n in (3, 700_001, 5, 700_003)]
    masks = [torch.full(((t.numel() + 7) // 8,), 0xA5, dtype=torch.uint8) for t in tensors]
    (plan,) = make_plans(tensors, [1] * 4, masks=masks)
    torch.set_num_threads(4)
    for _ in range(5):
        ops.magnitude_masks([plan], [torch.full((4,), 0.01)])
        for t, mask in zip(tensors, masks, strict=True):
            assert torch.equal(mask, pack_mask(t.abs() <= 0.01))
            mask.fill_(0xA5)


def test_magnitude_masks_are_refused_where_no_kernel_finds_its_way() -> None:
    t, mask = torch.zeros(8), torch.zeros(1, dtype=torch.uint8)
    (bare,), (plan,) = make_plans([t], [1]), make_plans([t], [1], masks=[mask])
    rows = Plan((Entry(t, t, 1, mask=mask, rows=torch.tensor([0]), row_len=8),), t.device, t.dtype)
    for wrong in (bare, rows):
        with pytest.raises(ValueError, match="has no mask to be written, or gathered rows"):
            ops.magnitude_masks([wrong], [torch.zeros(1)])
        with pytest.raises(RuntimeError, match="out of its range"):
            cpu.magnitude_mask(wrong, torch.zeros(1))
    for limits in (torch.zeros(2), torch.zeros(1).double(), torch.zeros(1, device="meta")):
        with pytest.raises(ValueError, match=r"give float32 \(1,\) on cpu, one for each row"):
            ops.magnitude_masks([plan], [limits])


@pytest.mark.parametrize("index", ISAS)
@pytest.mark.parametrize("row_len", [1, 7, 32, 48, 64, 300])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_gathered_rows(dtype: torch.dtype, row_len: int, index: int) -> None:
    """An embedding's rows, some of them twice, get the noise of their places in the full table."""
    rows = torch.tensor([5, 0, 5, 3, 1000003, 2, 5])
    t = cases.weights(len(rows) * row_len, dtype)
    source = t.clone()
    everything = {"mask": pack_mask(torch.rand(t.shape) < 0.7), "scale": torch.rand(1000004), "scale_block": row_len}
    for extra, p in (({}, Pass(3, [1, 2], [1e-2, 1e-3])), (everything, Pass(3, [1], [0.1], 0.9, "rademacher", "stochastic"))):
        plan = Plan((Entry(source, t, 77, rows=rows, row_len=row_len, **extra),), t.device, dtype)  # type: ignore[arg-type]
        cpu.perturb(plan, p, isa=index)
        got = t.clone()
        reference.perturb(plan, p)
        assert same_bits(got, t)
    plain = zk.normal((6, row_len), seed=3, stream=77, tag=9, dtype=dtype, backend="reference")
    t.zero_()
    cpu.perturb(Plan((Entry(t, t, 77, rows=rows, row_len=row_len),), t.device, dtype), Pass(3, [9], [1.0]), isa=index)
    for k, row in enumerate(rows.tolist()):
        if row < 6:
            assert same_bits(t.view(-1, row_len)[k], plain[row])


@pytest.mark.parametrize("index", ISAS)
def test_a_dead_first_term_names_the_draw(index: int) -> None:
    """Of stochastic rounding: the list's first tag, whether its coefficient counts or not."""
    (plan,) = make_plans([cases.weights(700, torch.bfloat16)], [3])
    p = Pass(cases.SEED, [5, 6], [0.0, 2e-3], rounding="stochastic")
    (got,), (want,) = results(plan, p, index), results(plan, p, None)
    assert same_bits(got, want)
    assert not same_bits(got, results(plan, replace(p, tags=[6], coefs=[2e-3]), index)[0])


@pytest.mark.parametrize("index", ISAS)
@pytest.mark.parametrize("decay", [float("nan"), float("inf"), -float("inf")])
def test_a_decay_that_is_no_number(decay: float, index: int) -> None:
    """In a tensor, where nobody has looked at it: it counts as 1."""
    (plan,) = make_plans([cases.weights(700, torch.float16)], [3])
    p = Pass(cases.SEED, [5], [2e-3])
    assert same_bits(results(plan, replace(p, decay=torch.tensor(decay)), index)[0], results(plan, p, None)[0])


@pytest.mark.parametrize("index", ISAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half(dtype: torch.dtype, index: int) -> None:
    cases.check_every_half(dtype, functools.partial(cpu.perturb, isa=index))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["plain", "everything", "rademacher"])
def test_ten_million(variant: str, dtype: torch.dtype) -> None:
    """10^7 results of a type are the reference's, for every instruction set."""
    n = 10_000_019
    t = cases.weights(1 << 16, dtype).repeat(n // (1 << 16) + 1)[:n]
    kw: dict[str, Any] = {}
    p = Pass(cases.SEED, [1], [0.3])
    if variant == "everything":
        kw = {"masks": [zk.RandomMask(0.6, tag=3)], "scales": [(torch.rand(n // 50 + 1), 50)], "offsets": [(1 << 35) - 5_000_000]}
        p = Pass(cases.SEED, [4], [1e-3], 0.999, rounding="stochastic")
    elif variant == "rademacher":
        p = Pass(cases.SEED, [1, 2, 3], [1e-3, -1e-4, 0.3], kind="rademacher")
    (plan,) = make_plans([t], [5], **kw)
    want = results(plan, p, None)[0]
    assert all(same_bits(results(plan, p, k)[0], want) for k in AVAILABLE)


@pytest.mark.parametrize("index", ISAS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_whole_blocks(dtype: torch.dtype, index: int) -> None:
    """What goes from registers to the weights, in blocks: any number of terms, decay and both casts, where the high word of the calls'
    counter changes, of the rounding (2^35) and of the noise (2^36), and where a block ends with it or begins."""
    t = cases.weights(1500, dtype)
    t = t.nan_to_num(posinf=1.0)  # what is not finite is the business of test_every_half
    for offset in (0, 32, 2**35 - 512, 2**35 - 480, 2**36 - 1024, 2**36 - 736):
        (plan,) = make_plans([t], [5], offsets=[offset])
        for k, decay, rounding in itertools.product((1, 2, 3, 4), (None, 0.875), checks.ROUNDINGS):
            tags, coefs = zip(*cases.terms(k), strict=True)
            p = Pass(cases.SEED, list(tags), list(coefs), decay, rounding=rounding)
            assert same_bits(results(plan, p, index)[0], results(plan, p, None)[0]), (offset, p)


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[tuple[Any, ...]], torch.dtype, Pass]:
    """(numel, offset, mask kind, scale block, salt) of each tensor, a dtype and a pass."""
    dtype = draw(st.sampled_from(cases.DTYPES))
    offset = st.one_of(
        st.just(0), st.integers(0, 300), st.integers((1 << 35) - 300, 1 << 35), st.integers((1 << 36) - 300, 1 << 36)
    )
    tensor = st.tuples(
        st.integers(0, 700),
        offset,
        st.sampled_from(["none", "bits", "random"]),
        st.sampled_from([0, 1, 5, 8, 33]),
        st.integers(0, 99),
    )
    coefs = st.one_of(st.floats(-10, 10, width=32), st.sampled_from([0.0, 2.0**-100, 2.0**-101, 3e38, 1e-3]))
    terms = draw(st.lists(st.tuples(st.integers(0, 2**32 - 1), coefs), max_size=12))
    decay = draw(st.one_of(st.none(), st.floats(-2, 2, width=32)))
    kind, rounding = draw(st.sampled_from(list(checks.KINDS))), draw(st.sampled_from(list(checks.ROUNDINGS)))
    p = Pass(draw(st.integers(0, 2**64 - 1)), [t for t, _ in terms], [c for _, c in terms], decay, kind, rounding)
    return draw(st.lists(tensor, min_size=1, max_size=4)), dtype, p


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plans())
def test_random_plans(drawn: tuple[list[tuple[Any, ...]], torch.dtype, Pass]) -> None:
    shapes, dtype, p = drawn
    params, masks, scales = [], [], []
    for n, offset, mask, block, salt in shapes:
        t = cases.weights(n, dtype, salt)
        params.append(t)
        masks.append(cases.random_bits(salt, t) if mask == "bits" else zk.RandomMask(0.37, salt) if mask == "random" else None)
        blocks = (offset + n) // block - offset // block + 1 if block else 0
        scales.append((torch.linspace(-1, 2, blocks), block) if block else None)
    (plan,) = make_plans(params, [salt for *_, salt in shapes], masks=masks, scales=scales, offsets=[s[1] for s in shapes])
    want = results(plan, p, None)
    for index in AVAILABLE:
        for got, expected in zip(results(plan, p, index), want, strict=True):
            assert same_bits(got, expected), _C.ISA_NAMES[index]


@pytest.mark.parametrize("index", ISAS)
@pytest.mark.parametrize("k", [0, 1, 8, 9, 40])
def test_terms_in_tensors(k: int, index: int) -> None:
    """Terms, decay and their non-finite values behind addresses act as the same numbers in lists do."""
    (plan,) = make_plans([cases.weights(999, torch.float16)], [5])
    tags, coefs = [7 * j for j in range(k)], [1e-2 / (1 + j) for j in range(k)]
    lists = results(plan, Pass(1, tags, coefs, 0.75), index)
    tensors = Pass(1, torch.tensor(tags, dtype=torch.int64), torch.tensor(coefs, dtype=torch.float32), torch.tensor([0.75]))
    assert same_bits(lists[0], results(plan, tensors, index)[0])
    bad = torch.tensor([*coefs, float("nan"), float("inf")])
    dead = Pass(1, torch.tensor([*tags, 1, 2]), bad, torch.tensor(float("nan")))
    assert same_bits(results(plan, Pass(1, tags, coefs), index)[0], results(plan, dead, index)[0])


# ---- threads and the processor's state ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_threads_do_not_matter(dtype: torch.dtype, threads: None) -> None:
    """Lists whose chunks begin inside tensors, at their ends and in empty ones."""
    sizes = [300_000, 0, 1, 262_143, 1 << 18, 77, 1_500_001, 0, *range(100)]
    (plan,) = make_plans([cases.weights(n, dtype, special=False) for n in sizes], list(range(len(sizes))))
    p = Pass(2, [5, 6], [1e-2, 3e-3], 0.99, rounding="stochastic")
    torch.set_num_threads(1)
    want = results(plan, p, 0)
    for n in (2, 5):
        torch.set_num_threads(n)
        assert all(same_bits(a, b) for a, b in zip(results(plan, p, 0), want, strict=True))


def test_concurrent_calls(threads: None) -> None:
    """Python threads may call at the same time: the GIL is released and no state is shared."""
    torch.set_num_threads(2)
    tensors = [torch.zeros(1_000_003) for _ in range(4)]

    def work(j: int) -> None:
        for tag in range(5):
            zk.perturb_([tensors[j]], [(tag, 1.0)], seed=j, streams=[j], backend="cpu")

    pool = [threading.Thread(target=work, args=(j,)) for j in range(4)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    for j, t in enumerate(tensors):
        want = torch.zeros_like(t)
        for tag in range(5):
            zk.perturb_([want], [(tag, 1.0)], seed=j, streams=[j], backend="cpu")
        assert torch.equal(t, want)


def test_forked_worker(threads: None) -> None:
    """A DataLoader worker is forked from a process whose threads have already worked, and has none of them; torch's own OpenMP hangs
    there, so that the child gets its tensor ready made."""
    torch.set_num_threads(2)
    t = torch.zeros(1 << 20)
    work = functools.partial(zk.perturb_, [t], [(1, 1.0)], seed=0, streams=[0], backend="cpu")
    work()
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(30)
    hangs = child.is_alive()
    child.kill()
    assert not hangs
    assert child.exitcode == 0


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("n", [333, 1 << 20])
def test_flush_denormal_is_overruled(n: int, isa: int, threads: None) -> None:
    """The contract keeps subnormals, in the caller's thread and in new ones, whatever mode torch was put in, and puts it back."""
    torch.set_num_threads(2)
    want, got = torch.full((n,), 1e-39), torch.full((n,), 1e-39)
    keep = cases.random_bits(0, want)
    args: dict[str, Any] = {"seed": 4, "streams": [9], "decay": 0.5, "masks": [keep], "backend": "cpu"}
    zk.perturb_([want], [(1, 2.0**-99)], **args)
    assert torch.equal(want[~keep], torch.full((n,), 1e-39)[~keep] * 0.5)
    torch.set_flush_denormal(True)
    try:
        zk.perturb_([got], [(1, 2.0**-99)], **args)
        assert (torch.full((64,), 1e-39) * 0.5).view(torch.int32).eq(0).all(), "the caller's mode was not restored"
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(got, want)


# ---- the choice of the instruction set, and refusals ----------------------------------------------------------------------


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    cpu.chosen_isa.cache_clear()
    yield
    cpu.chosen_isa.cache_clear()


def test_isa_from_environment(monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    monkeypatch.setenv("ZO_KERNELS_ISA", "portable")
    assert cpu.chosen_isa() == 1
    assert cpu.status() is None


def test_unknown_isa_is_refused(monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    monkeypatch.setenv("ZO_KERNELS_ISA", "sse9")
    assert "ZO_KERNELS_ISA='sse9' must be one of 'portable', 'avx2', 'avx512'" in (cpu.status() or "")


@pytest.mark.parametrize("request_by_name", [{}, {"backend": "cpu"}])
def test_a_refused_isa_is_not_replaced_by_another_backend(
    monkeypatch: pytest.MonkeyPatch, fresh_choice: None, request_by_name: dict[str, str]
) -> None:
    monkeypatch.setenv("ZO_KERNELS_ISA", "sse9")
    monkeypatch.setattr(_backends, "_pick", _backends._pick.__wrapped__)
    t = torch.zeros(8)
    with pytest.raises(ValueError, match="ZO_KERNELS_ISA='sse9'"):
        zk.perturb_([t], [(1, 1.0)], seed=1, streams=[1], **request_by_name)
    assert not t.any()
    monkeypatch.setenv("ZO_KERNELS_ISA", "avx2")
    monkeypatch.setattr(cpu, "extension", lambda: "the extension is not there")
    with pytest.raises(RuntimeError, match="ZO_KERNELS_ISA='avx2', but the extension is not there"):
        zk.perturb_([t], [(1, 1.0)], seed=1, streams=[1], **request_by_name)
    zk.perturb_([t], [(1, 1.0)], seed=1, streams=[1], backend="reference")
    assert t.any()


def test_the_reference_does_not_take_over_in_silence(monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    monkeypatch.delenv("ZO_KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(_backends, "_pick", _backends._pick.__wrapped__)
    monkeypatch.setattr(cpu, "extension", lambda: "the extension is not there")
    with pytest.warns(UserWarning, match="served by the reference.*cpu: the extension is not there"):
        zk.perturb_([torch.zeros(8)], [(1, 1.0)], seed=1, streams=[1])
    with pytest.raises(RuntimeError, match="backend='cpu' was asked for and cannot serve cpu: the extension is not there"):
        zk.perturb_([torch.zeros(8)], [(1, 1.0)], seed=1, streams=[1], backend="cpu")


def test_missing_isa_is_refused(monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    monkeypatch.setattr(cpu, "extension", lambda: SimpleNamespace(ISA_NAMES=_C.ISA_NAMES, cpu_best_isa=lambda: 2))
    monkeypatch.setenv("ZO_KERNELS_ISA", "avx512")
    assert "the best instruction set of this processor and build is 'avx2'" in (cpu.status() or "")


@pytest.fixture
def fresh_import() -> Iterator[None]:
    extension.cache_clear()
    yield
    extension.cache_clear()


def test_missing_extension_is_explained(monkeypatch: pytest.MonkeyPatch, fresh_import: None) -> None:
    monkeypatch.setitem(sys.modules, "zo_kernels._C", None)
    assert "pip install -e ." in (cpu.status() or "")
    (plan,) = make_plans([torch.zeros(3)], [0])
    with pytest.raises(RuntimeError, match=r"zo_kernels\._C cannot be imported"):
        cpu.perturb(plan, Pass(0, [1], [1.0]))


def module(**changes: Any) -> SimpleNamespace:
    """The extension with other attributes; None: without."""
    mine = {name: getattr(_C, name) for name in dir(_C)} | changes
    return SimpleNamespace(**{name: value for name, value in mine.items() if value is not None})


def function(signature: str) -> SimpleNamespace:
    return SimpleNamespace(__doc__=signature)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"TENSOR_WORDS": 13}, "its TENSOR_WORDS is 13, this version's 14"),
        ({"TENSOR_WORDS": None}, "its TENSOR_WORDS is None"),
        ({"STATE_WORDS": 3}, "its STATE_WORDS is 3, this version's 2"),
        ({"KINDS": ("rademacher", "gaussian")}, "its KINDS is"),
        ({"RULES": _C.RULES[:3]}, "its RULES is"),
        ({"RULES": (("momentum", 5, 1), *_C.RULES[1:])}, "its RULES is"),
        ({"cpu_update": None}, "its function cpu_update is 'missing'"),
        ({"cpu_perturb": function(_C.cpu_perturb.__doc__.replace("decay: ", "factor: "))}, "its function cpu_perturb is"),
        ({"cpu_best_isa": function("cpu_best_isa(n: int) -> int")}, "its function cpu_best_isa is"),
        ({"WITH_CUDA": True, "cuda_update": None}, "its function cuda_"),
        ({"INLINE_TERMS": None}, "it has no INLINE_TERMS"),
    ],
    ids=str,
)
def test_an_extension_of_another_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, fresh_import: None, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "zo_kernels._C", module(**changes))
    with pytest.raises(ImportError, match=r"is another version's: .*pip install -e \.") as refused:
        extension()
    assert message in str(refused.value)


def test_an_extension_of_another_version_is_refused_when_zo_kernels_is_imported() -> None:
    code = "import sys, types; sys.modules['zo_kernels._C'] = types.SimpleNamespace(TENSOR_WORDS=13); import zo_kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: the extension zo_kernels._C is another version's: its TENSOR_WORDS is 13" in done.stderr


def test_other_devices_are_refused() -> None:
    assert cpu.supports(torch.device("cpu")) is None
    assert "cuda" in (cpu.supports(torch.device("cuda")) or "")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"isa": 4}, "out of its range"),
        ({"dtype": 3}, "out of its range"),
        ({"kind": -1}, "out of its range"),
        ({"n": -1}, "out of its range"),
        ({"table": 0}, "out of its range"),
        ({"coefs": [1.0, 2.0]}, "differ in length"),
        ({"tags": 1.5}, "two lists"),
        ({"tags": [2**70]}, "too big"),
        ({"tags": ["x"]}, "str"),
        ({"decay": "x"}, "must be real number"),
    ],
    ids=str,
)
def test_binding_refuses(change: dict[str, Any], error: str) -> None:
    t = torch.ones(40)
    (plan,) = make_plans([t], [0])
    args = {"table": plan.table.ctypes.data, "n": 1, "seed": 0, "dtype": 0, "kind": 0, "rounding": 0, "tags": [1], "coefs": [1.0]}
    args |= {"n_terms": 0, "decay": None, "threads": 1, "isa": 0}
    with pytest.raises((RuntimeError, ValueError, TypeError, OverflowError), match=error):
        _C.cpu_perturb(**(args | change))
    assert (t == 1).all()


@pytest.mark.parametrize("column", ["numel", "scale_block", "row_len", "rank", "rsqrt"])
def test_unsound_table_is_refused(column: str) -> None:
    """Checked for the whole list before the first weight is written. A rank without factors, and a rsqrt that is no flag."""
    tensors = [torch.ones(40), torch.ones(40)]
    (plan,) = make_plans(tensors, [0, 1])
    table = plan.table.copy()
    rows = np.zeros(1, dtype=np.int64)
    word = {"numel": 2, "scale_block": 6, "row_len": 8, "rank": 10, "rsqrt": 10}[column]
    table[1, word] = np.uint64(1 << 32 if column == "rank" else 2**63)
    table[1, 7] = rows.ctypes.data
    with pytest.raises(RuntimeError, match="out of its range"):
        _C.cpu_perturb(table.ctypes.data, 2, 0, 0, 0, 0, [1], [1.0], 0, None, 1, 0)
    assert all((t == 1).all() for t in tensors)


def test_table_layout() -> None:
    assert make_plans([torch.zeros(1)], [0])[0].table.shape[1] == WORDS


# ---- sanitizers ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers(sanitizers: str, tmp_path: Path) -> None:
    """sanitize.cpp over exactly sized allocations: no access outside, no undefined behaviour, no race, the same bits for every ISA."""
    cxx = os.environ.get("CXX") or shutil.which("c++")
    if not cxx:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }")
    if subprocess.run([cxx, *flags, str(probe), "-o", str(tmp_path / "probe")], capture_output=True).returncode:
        pytest.skip("this compiler lacks the sanitizers' libraries")
    if subprocess.run([str(tmp_path / "probe")], capture_output=True).returncode:
        pytest.skip("the sanitizers do not run on this system")
    isa_flags = {
        "perturb_avx2": ["-mavx2", "-mfma", "-mf16c"],
        "perturb_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-w"],
    }
    if _C.cpu_best_isa() == 1:
        isa_flags = {stem: [] for stem in isa_flags}
    else:  # looked at where it is run
        unseen = [s for k, s in ((2, "perturb_avx2"), (3, "perturb_avx512")) if k > _C.cpu_best_isa() or sanitizers == "thread"]
        isa_flags |= {stem: [*isa_flags[stem], "-O0", "-fno-sanitize=all"] for stem in unseen}
    sources = [*sorted((CSRC / "cpu").glob("*.cpp")), Path(__file__).parent / "sanitize.cpp"]
    sources.sort(key=lambda s: s.stem in isa_flags)  # where objects share a function, the linker takes the first one's
    jobs = [
        subprocess.Popen([cxx, *flags, *isa_flags.get(s.stem, []), f"-I{CSRC}", "-c", str(s), "-o", str(tmp_path / f"{s.stem}.o")])
        for s in sources
    ]
    assert not any(job.wait() for job in jobs)
    program = tmp_path / "sanitize"
    objects = [str(tmp_path / f"{s.stem}.o") for s in sources]
    subprocess.run([cxx, *flags, *objects, "-pthread", "-o", str(program)], check=True)
    env = os.environ | {"TSAN_OPTIONS": "die_after_fork=0"}  # the child starts threads, as it should
    words = ["threads"] if sanitizers == "thread" else []  # a thread alone races with nobody
    done = subprocess.run([str(program), *words], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
