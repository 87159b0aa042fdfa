"""The Triton backend against the reference, bit for bit: in Triton's interpreter on CPU tensors, and on a GPU where there is one.

Belongs here: what needs Triton to run. Does not belong here: cases (cases.py), what can be read from compiled kernels
(test_triton_aot.py).

Whether kernels are interpreted is decided when triton is imported, so the interpreter needs a process of its own:
`test_in_the_interpreter` runs this file again with TRITON_INTERPRET=1, and only then the tests of the second half exist.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")

import zo_kernels as zk
from tests.kernels import cases, interpreter
from tests.vectors.make import check, vectors
from zo_kernels import _backends, reference
from zo_kernels._backends import triton as backend
from zo_kernels.plan import Entry, Pass, Plan

# A program of the interpreter costs the same whatever its size, and there is one a tensor. The code that it runs is shared: a type of weights
# shows where they are read and written, a kind of noise until its sum over the terms, a size in what is masked at the end of a tile. So it
# runs: all sizes with one term, in one type; what reading and writing do in every type, with three sizes at most; what is between the two
# (masks, scales, factors, shards), more terms than three, which are turns of one loop, most sequences and all that is Rademacher in one type
# each, in turn; features that come after the sum with the Gaussian only; none of 300 tensors. On a GPU all cases run; on the CPU, its kernels
# run all of them.
AFTER_THE_SUM = ("scale", "rsqrt", "mask", "bitmask", "misaligned", "stochastic-K0", "decay-only", "random", "sequence-")
IN_TURN = (
    "scale",
    "rsqrt",
    "bitmask",
    "random",
    "low-rank",
    "offset",
    "sequence",
    "zero",
    "decay-only",
    "stochastic-K0",
    "dead-terms",
    "misaligned8",
    "K8",
    "K21",
)
SLOW = ("many", *(f"sequence-{name}" for name in ("misaligned3", "offset-2^36", "bitmask", "scale-block3", "mixed-out")))


def interpreter_cases() -> Iterator[cases.Case]:
    seen: dict[str, int] = {}
    for case in cases.CASES:
        dtype, kind, what = case.name.split("-", 2)
        turn = seen.setdefault(what, len(seen)) % 3
        own = f"torch.{dtype}" == str(cases.DTYPES[turn])
        if (
            what in SLOW
            or (not own and (kind == "rademacher" or what.startswith(IN_TURN)))
            or (kind == "rademacher" and what.startswith(AFTER_THE_SUM))
        ):
            continue
        yield case if what == "K1" and dtype == "float32" else dataclasses.replace(case, make=partial(some_tensors, case))


def some_tensors(case: cases.Case, most: int = 3) -> tuple[list[Tensor], dict[str, Any]]:
    """The case with so many of its tensors, the largest and those with the most of what a tile can have among them."""
    params, args = case.make()
    chosen = sorted(range(len(params)), key=lambda j: (params[j].numel() not in (4097, 10007, 33, 1), j))[:most]
    lists = ("streams", "masks", "scales", "offsets", "factors")
    some = {key: [value[j] for j in chosen] if key in lists and isinstance(value, list) else value for key, value in args.items()}
    return [params[j] for j in chosen], some


INTERPRETER_CASES = list(interpreter_cases())


def both(plans: Callable[[], list[Plan]], p: Pass) -> None:
    """The same pass by Triton and by the reference over two copies of the plans; same results."""
    for got, want in zip(plans(), plans(), strict=True):
        backend.perturb(got, p)
        reference.perturb(want, p)
        for k, (a, b) in enumerate(zip(got.entries, want.entries, strict=True)):
            assert cases.same_bits(a.dst, b.dst), f"tensor {k}: {(cases.bits(a.dst) != cases.bits(b.dst)).nonzero().flatten()[:8]}"


def row_plan(dtype: torch.dtype, device: str, row_lens: tuple[int, ...], **fields: Any) -> Plan:
    """Gathered rows of tensors of 1000 rows, out of place; `fields` go into every entry, callables of (row_len)."""
    entries = []
    for k, n in enumerate(row_lens):
        rows = torch.randint(1000, (5,), generator=torch.Generator().manual_seed(k))
        source = cases.weights(5 * n, dtype, salt=k).view(5, n).to(device)
        extra = {key: value(n) if callable(value) else value for key, value in fields.items()}
        entries.append(Entry(source, torch.zeros_like(source), 17 + k, rows=rows.to(device), row_len=n, **extra))
    return Plan(tuple(entries), torch.device(device), dtype)


def check_rows(device: str, dtype: torch.dtype) -> None:
    lens = (1, 7, 32, 50, 64, 1000)
    plain = Pass(cases.SEED, [3, 5], [1e-3, -2e-3])
    both(lambda: [row_plan(dtype, device, lens)], plain)
    busy = dataclasses.replace(plain, decay=0.9, rounding="stochastic", kind="rademacher")
    both(
        lambda: [
            row_plan(
                dtype,
                device,
                lens,
                keep=1 << 31,
                mask_tag=4,
                scale=torch.linspace(-1, 2, 1000, device=device),
                scale_block=lambda n: n,
                mask=lambda n: (
                    torch.randint(256, ((5 * n + 7) // 8,), generator=torch.Generator().manual_seed(n)).byte().to(device)
                ),
            )
        ],
        busy,
    )
    pair = {n: cases.low_rank_pair(1000, n, 2) for n in lens}
    factors = {"left": lambda n: pair[n][0].to(device), "right": lambda n: pair[n][1].to(device), "rank": 2, "cols": lambda n: n}
    roots = {"scale": lambda n: torch.linspace(0.1, 3, 1000 * n, device=device), "scale_block": 1, "rsqrt": True}
    both(lambda: [row_plan(dtype, device, lens, **factors, **roots)], Pass(cases.SEED, [3], [1e-3]))

    def mixed() -> list[Plan]:
        rows = row_plan(dtype, device, (64,)).entries
        x = cases.weights(300, dtype).to(device)
        return [Plan((Entry(x, x, 9), *rows, Entry(x + 1, x * 0, 10)), torch.device(device), dtype)]

    both(mixed, plain)


# Terms in device memory: every one of them dead, some dead, none; with and without a loop in the kernel.
COEFFICIENTS = [
    [float("nan")],
    [float("inf"), 0.0],
    [float("nan"), 1e-3],
    [1e-3, float("-inf")],
    [2e-3],
    [1e-40, float("nan"), 0.0],
    [1e-3, float("nan"), 2.0**-101, -1e-2, float("inf")],
]


def check_device_terms(device: str, dtype: torch.dtype, coefs: list[float], decay: float | None, out: bool) -> None:
    tags = torch.arange(len(coefs), device=device) + (7 << 32)  # only the low 32 bits count
    p = Pass(
        cases.SEED,
        tags,
        torch.tensor(coefs, device=device),
        None if decay is None else torch.tensor(decay, device=device),
        rounding="stochastic" if out else "nearest",
    )

    def plans() -> list[Plan]:
        x = [cases.weights(n, dtype).to(device) for n in (40, 8192)]
        y = [torch.zeros_like(t) for t in x] if out else x
        return [Plan(tuple(Entry(a, b, k) for k, (a, b) in enumerate(zip(x, y, strict=True))), torch.device(device), dtype)]

    both(plans, p)
    if decay is None and not out and torch.tensor(coefs).isfinite().sum() == 0:
        [plan] = plans()
        before = [e.dst.clone() for e in plan.entries]
        backend.perturb(plan, p)
        assert all(torch.equal(cases.bits(a), cases.bits(e.dst)) for a, e in zip(before, plan.entries, strict=True))


if not interpreter.INTERPRETED:

    @pytest.mark.slow
    @pytest.mark.timeout(900)
    def test_in_the_interpreter() -> None:
        assert interpreter.run_tests(__file__) > len(INTERPRETER_CASES)

    def test_without_a_gpu_it_says_why() -> None:
        if not torch.cuda.is_available():
            assert "TRITON_INTERPRET=1" in (backend.status() or "")
            with pytest.raises(RuntimeError, match="backend='triton' was asked for"):
                zk.normal(8, seed=1, stream=2, tag=3, backend="triton")
        assert "CUDA tensors" in (backend.supports(torch.device("cpu")) or "")
        assert backend.supports(torch.device("cuda")) is None

    gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

    class TestOnTheGPU:
        pytestmark = gpu

        @pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
        def test_case(self, case: cases.Case) -> None:
            cases.check("triton", case, "cuda")

        @pytest.mark.parametrize("dtype", cases.DTYPES)
        def test_rows(self, dtype: torch.dtype) -> None:
            check_rows("cuda", dtype)

        @pytest.mark.parametrize("dtype", cases.DTYPES)
        def test_blocks_of_columns(self, dtype: torch.dtype) -> None:
            cases.check_columns(dtype, backend.perturb, backend.sequence, "cuda")

        @pytest.mark.parametrize("dtype", cases.DTYPES)
        def test_magnitude_masks(self, dtype: torch.dtype) -> None:
            cases.check_magnitude_masks(dtype, backend.magnitude_mask, "cuda")

        @pytest.mark.parametrize("dtype", cases.DTYPES)
        @pytest.mark.parametrize("decay", [None, 0.9, float("nan")])
        @pytest.mark.parametrize("out", [False, True])
        @pytest.mark.parametrize("coefs", COEFFICIENTS)
        def test_device_terms(self, dtype: torch.dtype, coefs: list[float], decay: float | None, out: bool) -> None:
            check_device_terms("cuda", dtype, coefs, decay, out)

        def test_a_new_step_compiles_nothing(self) -> None:
            """Seeds, tags, coefficients and term counts of every size and sign run the kernel that the first step compiled."""
            from zo_kernels._backends import _triton_kernels

            x = torch.zeros(10_000, device="cuda", dtype=torch.float16)

            def compiled() -> int:
                caches = _triton_kernels.perturb_kernel.device_caches
                return sum(len(cache[0]) for cache in caches.values())

            counts = []
            for seed, tag, coef in [(0, 0, 1.0), (1, 16, 0.0), (2**64 - 1, 2**32 - 1, -1e-3), (2**31, 2**31, 16.0)]:
                for k in (1, 2, 3, 16):
                    zk.perturb_([x], [(tag, coef)] * k, seed=seed, streams=[seed & 0xFFFF], decay=1 - coef / 64, backend="triton")
                counts.append(compiled())
            assert counts[1:] == [counts[0]] * 3 or counts[1:] == [counts[1]] * 3, counts  # decay == 1.0 in one of them is none

        def test_a_new_step_compiles_nothing_of_the_others(self) -> None:
            """Sequences, rules, low-rank directions, masks by magnitude and the perturbed linear: with other seeds, tags, numbers and lengths."""
            from zo_kernels import linear, lowrank, ops, update
            from zo_kernels._backends import _triton_kernels, _triton_linear, _triton_mask, _triton_update
            from zo_kernels.plan import make_plans

            loaded = (_triton_kernels.perturb_kernel, _triton_update.update_kernel, _triton_mask.magnitude_mask_kernel)
            loaded += (_triton_linear.linear_kernel, _triton_linear.finish_kernel)

            def compiled() -> int:
                return sum(len(cache[0]) for kernel in loaded for cache in kernel.device_caches.values())

            x, m = (torch.zeros(64, 160, device="cuda", dtype=torch.float16) for _ in range(2))
            state = torch.zeros(64, 160, device="cuda")
            bits = torch.zeros(1280, dtype=torch.uint8, device="cuda")
            plans = make_plans([x], [1], masks=[bits])
            counts = []
            for seed, tag, coef, many in [
                (0, 0, 1.0, 3),
                (1, 16, 2.0, 5),
                (2**64 - 1, 2**32 - 99, -1e-3, 33),
                (2**31, 2**31, 16.0, 64),
            ]:
                passes = [{"terms": [(tag + k, coef)], "decay": 0.5} for k in range(many)]
                zk.perturb_sequence_([x], passes, seed=seed, streams=[seed & 0xFFFF], backend="triton")
                numbers = [1.0, 0.5, abs(coef), 0.9]
                update.update_(
                    [m],
                    [(tag, coef)],
                    rule="momentum",
                    numbers=numbers,
                    states=[[state]],
                    seed=seed,
                    streams=[tag],
                    backend="triton",
                )
                pair = lowrank.factors(seed, 3, tag, tag, 64, 160, 2, device="cuda", backend="triton")
                zk.perturb_([x], [(tag, coef)], seed=seed, streams=[3], factors=[pair], backend="triton")
                ops.magnitude_masks(plans, [torch.full((1,), coef, device="cuda")], "triton")
                linear.perturbed_linear(m[:16], x, terms=[(tag, coef)], seed=seed, stream=4, backend="triton")
                counts.append(compiled())
            assert counts[1:] == [counts[0]] * 3, counts

else:

    def test_it_must_be_asked_for() -> None:
        assert backend.status() is None
        assert backend.supports(torch.device("cpu")) is None
        assert _backends.pick(torch.device("cpu"), "triton") is backend
        assert _backends.pick(torch.device("cpu")) is not backend

    def test_blocks_of_columns() -> None:
        cases.check_columns(torch.bfloat16, backend.perturb, backend.sequence)

    @pytest.mark.parametrize("dtype", cases.DTYPES)
    def test_magnitude_masks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        """With tiles that a tensor has several of, whole ones among them."""
        monkeypatch.setattr(backend, "INTERPRETER", dataclasses.replace(backend.INTERPRETER, groups=16, max_tiles=2))
        cases.check_magnitude_masks(dtype, backend.magnitude_mask, sizes=(0, 1, 9, 255, 513, 1000))

    @pytest.mark.parametrize("case", INTERPRETER_CASES, ids=lambda c: c.name)
    def test_case(case: cases.Case) -> None:
        cases.check("triton", case)

    @pytest.mark.parametrize("dtype", cases.DTYPES)
    def test_ten_million(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        """10^7 results of all types together, in tiles of 2^20 elements. Against the CPU backend where it is built (its own tests hold it to the
        reference, which needs a second for 10^6)."""
        monkeypatch.setattr(backend, "INTERPRETER", dataclasses.replace(backend.INTERPRETER, groups=1 << 16))
        compiled = not _backends.load("cpu").status()
        settings: list[dict[str, Any]] = [
            {"terms": cases.terms(1)},
            {"terms": cases.terms(2), "rounding": "stochastic", "decay": 0.999},
            {"terms": cases.terms(3), "kind": "rademacher", "masks": [zk.RandomMask(0.37, tag=8)], "offsets": [8 * 12345]},
        ]
        for n, kw in zip((1_200_000, 1_180_001, 1_000_007), settings, strict=True):
            got = cases.weights(n, dtype)
            want = got.clone()
            for x, name in ((got, "triton"), (want, "cpu" if compiled else "reference")):
                zk.perturb_([x], seed=cases.SEED, streams=[99], backend=name, **kw)
            assert cases.same_bits(got, want), kw

    @pytest.mark.parametrize(("dtype", "kind"), [*((dtype, "gaussian") for dtype in cases.DTYPES), (torch.float16, "rademacher")])
    def test_results_do_not_depend_on_the_launch(dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Small tiles, several to a span, masked accesses by columns: what runs on a GPU, at the smallest size that has all of it. Everything
        at once in each type; a plain pass and a loop over terms in one each."""
        launch = backend.Launch(groups=16, warps=1, max_tiles=3, programs=2, narrow=True)
        busy: dict[str, Any] = {
            "masks": cases.random_bits,
            "scales": cases.block_scales(24),
            "decay": 0.9,
            "rounding": "stochastic",
            "offsets": lambda j, t: 8 * (11 + j),
        }
        further: dict[Any, dict[str, Any]] = {
            (torch.float32, "gaussian"): {},
            (torch.float16, "gaussian"): {"scales": cases.block_scales(3), "terms": cases.terms(3)},
            (torch.float16, "rademacher"): {"terms": cases.terms(3)},
        }
        for kw in (busy, *([further[dtype, kind]] if (dtype, kind) in further else [])):
            case = cases.Case(f"launch-{dtype}-{kind}-{sorted(kw)}", cases.build((0, 1, 700, 1300), dtype, kind=kind, **kw))
            with monkeypatch.context() as patch:
                patch.setattr(backend, "INTERPRETER", launch)
                cases.check("triton", case)

    @pytest.mark.parametrize("dtype", cases.DTYPES)
    def test_rows(dtype: torch.dtype) -> None:
        check_rows("cpu", dtype)

    @pytest.mark.parametrize("coefs", COEFFICIENTS)
    @pytest.mark.parametrize("decay", [None, 0.9, float("nan")])
    def test_device_terms(coefs: list[float], decay: float | None) -> None:
        check_device_terms("cpu", torch.float16, coefs, decay, out=False)

    @pytest.mark.parametrize("dtype", cases.DTYPES)
    def test_dead_terms_out_of_place_copy(dtype: torch.dtype) -> None:
        for coefs in ([float("nan")], [0.0, float("inf")], [float("nan")] * 3):
            check_device_terms("cpu", dtype, coefs, None, out=True)

    @pytest.mark.parametrize("v", vectors())
    def test_vectors(v: dict[str, Any]) -> None:
        check(v, backend.perturb, backend.sequence)

    def test_normal_matches_the_frozen_anchor() -> None:
        z = zk.normal(8, seed=0x0123456789ABCDEF, stream=5, tag=7, backend="triton")
        anchor = "0x1.a98494p-2 0x1.bac3c6p-1 0x1.9cb53ep-1 0x1.14b37cp+0 0x1.5e6968p+0 -0x1.dbe614p-2 0x1.e055fp-4 -0x1.54edf8p-3"
        expected: Tensor = torch.tensor([float.fromhex(x) for x in anchor.split()])
        assert torch.equal(z, expected)
