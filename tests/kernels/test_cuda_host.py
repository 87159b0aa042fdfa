"""The CUDA kernel without a GPU: its body as host code against the reference, and its machine code against stated bounds.

Belongs here: what can be known of csrc/cuda from a machine with a C++ compiler (bits) or with the built extension and a
disassembler (instructions). Does not belong here: anything that launches (test_cuda.py).
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import zo_kernels as zk
from tests.kernels import cases
from tests.vectors.make import check, vectors
from zo_kernels import _backends, checks, reference
from zo_kernels import update as rules
from zo_kernels._backends import cuda
from zo_kernels.plan import WORDS, Entry, Pass, Passes, Plan, make_plans

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # sass.py
INLINE = 8  # ZO_INLINE_TERMS


class CPass(ctypes.Structure):
    """zo_pass of csrc/zo_kernels.h."""

    _fields_ = [
        ("seed", ctypes.c_uint64),
        *[(name, ctypes.c_int32) for name in ("dtype", "kind", "rounding", "has_decay")],
        ("n_terms", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("tags", "coefs", "decay_ptr")],
        ("decay", ctypes.c_float),
        ("inline_tags", ctypes.c_uint32 * INLINE),
        ("inline_coefs", ctypes.c_float * INLINE),
        ("n_passes", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("first", "decays", "roundings", "scratch")],
    ]


class CUpdate(ctypes.Structure):
    """zo_update of csrc/zo_kernels.h."""

    _fields_ = [
        ("c", CPass),
        ("rule", ctypes.c_int32),
        ("state_dtype", ctypes.c_int32),
        ("squares", ctypes.c_void_p),
        ("number_ptr", ctypes.c_void_p),
        ("numbers", ctypes.c_float * 9),
        ("inline_squares", ctypes.c_float * INLINE),
    ]


def perturb(library: ctypes.CDLL, plan: Plan, p: Pass, spans: int = 1, device_terms: bool = False) -> None:
    """What `cuda.perturb` does, with host memory in the place of device memory."""
    tags = np.asarray([int(t) for t in p.tags], dtype=np.int64)
    coefs = np.asarray([float(c) for c in p.coefs], dtype=np.float32)
    decay = None if p.decay is None else np.asarray(float(p.decay), dtype=np.float32)
    c = CPass(p.seed, checks.DTYPES[plan.dtype], checks.KINDS[p.kind], checks.ROUNDINGS[p.rounding], decay is not None, len(tags))
    if device_terms or len(tags) > INLINE:
        c.tags, c.coefs = tags.ctypes.data, coefs.ctypes.data
    else:
        c.inline_tags[: len(tags)], c.inline_coefs[: len(tags)] = tags.tolist(), coefs.tolist()
    if decay is not None and device_terms:
        c.decay_ptr = decay.ctypes.data
    elif decay is not None:
        c.decay = float(decay)
    form = cuda.form_of(plan)
    launch(library, plan, c, spans, cuda.GENERAL if form == cuda.LEAN and decay is not None else form)


def sequence(library: ctypes.CDLL, plan: Plan, passes: Passes, spans: int = 1) -> None:
    """What `cuda.sequence` does. The scratch memory starts as NaNs."""
    n, n_terms = len(passes), passes.tags.numel()
    scratch = np.full(16 * n + 8 * n_terms + 16, 255, dtype=np.uint8)
    start = scratch[-scratch.ctypes.data % 16 :]
    c = CPass(passes.seed, checks.DTYPES[plan.dtype], checks.KINDS[passes.kind], n_terms=n_terms, n_passes=n)
    c.tags, c.coefs, c.first = passes.tags.data_ptr(), passes.coefs.data_ptr(), passes.first.data_ptr()
    c.decays, c.roundings, c.scratch = passes.decay.data_ptr(), passes.rounding.data_ptr(), start.ctypes.data
    launch(library, plan, c, spans, cuda.form_of(plan))


def update(library: ctypes.CDLL, plan: Plan, states: rules.States, p: rules.RulePass, spans: int = 1) -> None:
    """What `cuda.update` does: few terms and the numbers in the struct if they are lists, in memory if they are tensors."""
    tags, coefs, numbers, squares = p.tensors_on(plan.device)
    c = CUpdate(CPass(p.seed, checks.DTYPES[plan.dtype], checks.KINDS[p.kind], checks.ROUNDINGS[p.rounding], n_terms=len(tags)))
    c.rule, c.state_dtype = rules.RULES[p.rule].code, checks.DTYPES[rules.state_dtype(states)]
    if isinstance(p.tags, torch.Tensor) or len(tags) > INLINE:
        c.c.tags, c.c.coefs, c.squares = tags.data_ptr(), coefs.data_ptr(), None if p.squares is None else squares.data_ptr()
    else:
        c.c.inline_tags[: len(tags)], c.c.inline_coefs[: len(tags)] = tags.tolist(), coefs.tolist()
        c.inline_squares[: len(squares)] = squares.tolist()
    if isinstance(p.numbers, torch.Tensor):
        c.number_ptr = numbers.data_ptr()
    else:
        c.numbers[: len(numbers)] = numbers.tolist()
    tile, table = spans * cuda.SPAN, rules.state_table(plan, states)
    blocks = cuda.work_map(plan.table, tile)
    addresses = (ctypes.c_void_p(x.ctypes.data) for x in (plan.table, table, blocks))
    assert library.zo_cuda_update(ctypes.byref(c), *addresses, ctypes.c_int64(len(blocks)), ctypes.c_int64(tile), None) == 0


def launch(library: ctypes.CDLL, plan: Plan, c: CPass, spans: int, form: int) -> None:
    tile = spans * cuda.SPAN
    blocks = cuda.work_map(plan.table, tile)
    code = library.zo_cuda_perturb(
        ctypes.byref(c),
        ctypes.c_void_p(plan.table.ctypes.data),
        ctypes.c_void_p(blocks.ctypes.data),
        ctypes.c_int64(len(blocks)),
        ctypes.c_int64(tile),
        ctypes.c_int(form),
        None,
    )
    assert code == 0


@pytest.mark.parametrize("what", cases.GROUPS)
def test_cases(what: str, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case, with tiles of one and of three spans (a tile's whole and partial spans), numbers and device terms."""
    pick = _backends.pick
    for spans, device_terms in ((1, False), (3, True)):

        def run(plan: Plan, p: Pass, spans: int = spans, device_terms: bool = device_terms) -> None:
            perturb(library, plan, p, spans, device_terms)

        def run_sequence(plan: Plan, passes: Passes, spans: int = spans) -> None:
            sequence(library, plan, passes, spans)

        body = SimpleNamespace(perturb=run, sequence=run_sequence)

        def pick_body(device: torch.device, name: str | None = None, body: object = body) -> object:
            return body if name == "body" else pick(device, name)

        with monkeypatch.context() as patch:
            patch.setattr(_backends, "pick", pick_body)
            for case in cases.GROUPS[what]:
                cases.check("body", case)


@pytest.mark.parametrize("v", vectors())
def test_vectors(v: dict[str, Any], library: ctypes.CDLL) -> None:
    check(v, functools.partial(perturb, library), functools.partial(sequence, library))


@pytest.mark.parametrize("kind", checks.KINDS)
@pytest.mark.parametrize("terms", [64, 1023, 1024, 1025, 1500])
def test_many_terms(terms: int, kind: str, library: ctypes.CDLL) -> None:
    """On both sides of what shared memory holds."""
    want, got = cases.weights(700, torch.float16), cases.weights(700, torch.float16)
    p = Pass(cases.SEED, list(range(5, 5 + terms)), [1e-3 * (-1) ** k / (k + 1) for k in range(terms)], kind=kind)
    reference.perturb(make_plans([want], [3])[0], p)
    perturb(library, make_plans([got], [3])[0], p)
    assert cases.same_bits(got, want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 0.0, 2.0**-101])
@pytest.mark.parametrize("kind", checks.KINDS)
def test_dead_device_terms(kind: str, bad: float, library: ctypes.CDLL) -> None:
    """A coefficient in device memory that is not finite or too small skips its term, whichever it is; a pass without a live term
    changes nothing in place and copies out of place, negative zeros and NaNs included."""
    start = cases.weights(500, torch.bfloat16)
    start[7], start[8] = float("nan"), -0.0
    for coefs in ([bad], [bad, 2e-3], [2e-3, bad, 1e-3]):
        tags = [4, 5, 6][: len(coefs)]
        p = Pass(cases.SEED, tags, coefs, kind=kind)
        kept = [(tag, c) for tag, c in zip(tags, coefs, strict=True) if c is not bad]
        live = Pass(cases.SEED, [tag for tag, _ in kept], [c for _, c in kept], kind=kind)
        want, got, out = start.clone(), start.clone(), torch.zeros_like(start)
        reference.perturb(make_plans([want], [3])[0], live)
        perturb(library, make_plans([got], [3])[0], p, device_terms=True)
        perturb(library, make_plans([start], [3], out=[out])[0], p, device_terms=True)
        assert cases.same_bits(got, want)
        assert cases.same_bits(out, want)


@pytest.mark.parametrize("decay", [float("nan"), float("inf"), 0.9])
@pytest.mark.parametrize("coefs", [[], [1e-3]])
def test_device_decay(decay: float, coefs: list[float], library: ctypes.CDLL) -> None:
    """A non-finite decay in device memory counts as 1."""
    want, got = cases.weights(500, torch.float16), cases.weights(500, torch.float16)
    p = Pass(cases.SEED, list(range(len(coefs))), coefs, decay=torch.tensor(decay))
    reference.perturb(make_plans([want], [3])[0], p)
    perturb(library, make_plans([got], [3])[0], p, device_terms=True)
    assert cases.same_bits(got, want)


@pytest.mark.parametrize("row_len", [32, 96, 1024, 1, 7, 40, 2100, 4096])
@pytest.mark.parametrize("feature", ["plain", "bitmask", "random-mask", "scale", "rsqrt", "low-rank"])
def test_rows(row_len: int, feature: str, library: ctypes.CDLL) -> None:
    """Gathered rows are the rows of the full tensor, in any order and repeatedly; lengths with and without whole groups."""
    rows = torch.tensor([5, 0, 5, 2, 11, 10])
    full = cases.weights(12 * row_len, torch.bfloat16).view(12, row_len)
    source, got, want = full[rows].contiguous(), torch.zeros(6, row_len).bfloat16(), torch.zeros(6, row_len).bfloat16()
    more: dict = {}
    if feature == "bitmask":
        more["mask"] = zk.pack_mask(torch.rand(source.shape, generator=torch.Generator().manual_seed(1)) < 0.5)
    elif feature == "random-mask":
        more |= {"keep": 1 << 31, "mask_tag": 3}
    elif feature == "scale":
        more |= {"scale": torch.linspace(-1, 2, 12), "scale_block": row_len}
    elif feature == "rsqrt":
        more |= {"scale": torch.linspace(0.1, 2, 12 * row_len), "scale_block": 1, "rsqrt": True}
    elif feature == "low-rank":
        left, right = cases.low_rank_pair(12, row_len, 3)
        more |= {"left": left, "right": right, "rank": 3, "cols": row_len}
    terms = 1 if feature == "low-rank" else 2
    p = Pass(cases.SEED, [1, 2][:terms], [1e-2, 3e-3][:terms], rounding="stochastic")
    for target, run in ((want, reference.perturb), (got, lambda plan, p: perturb(library, plan, p))):
        entry = Entry(source.view(-1), target.view(-1), 77, rows=rows, row_len=row_len, **more)
        run(Plan((entry,), source.device, source.dtype), p)
    assert cases.same_bits(got, want)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_blocks_of_columns(dtype: torch.dtype, library: ctypes.CDLL) -> None:
    cases.check_columns(dtype, functools.partial(perturb, library), functools.partial(sequence, library))


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_magnitude_masks(dtype: torch.dtype, library: ctypes.CDLL) -> None:
    for spans in (1, 3):

        def run(plan: Plan, limits: torch.Tensor, spans: int = spans) -> None:
            tile = spans * cuda.SPAN
            blocks = cuda.work_map(plan.table, tile)
            addresses = (ctypes.c_void_p(x) for x in (plan.table.ctypes.data, limits.data_ptr(), blocks.ctypes.data))
            numbers = (ctypes.c_int64(x) for x in (len(blocks), tile))
            assert library.zo_cuda_magnitude_mask(checks.DTYPES[dtype], *addresses, *numbers, None) == 0

        cases.check_magnitude_masks(dtype, run, sizes=(*cases.SIZES, 3 * cuda.SPAN + 5))


def test_work_map_covers_every_element_once() -> None:
    """Brute force over the definition in zo_kernels.h."""
    tensors = [(0, 5), (1, 0), (5000, 31), (4096, 0), (4065, 32 * 7 + 31), (2048, 1 << 40)]
    table = np.zeros((len(tensors), WORDS), dtype=np.uint64)
    table[:, 2:4] = tensors
    tile = cuda.SPAN
    covered = [np.zeros(n, dtype=int) for n, _ in tensors]
    for tensor, part in cuda.work_map(table, tile):
        numel, offset = tensors[tensor]
        first = int(part) * tile - offset % 32
        assert first < numel, "a block without work"
        covered[tensor][max(first, 0) : first + tile] += 1
    assert all((c == 1).all() for c in covered)


def test_tile_size() -> None:
    """A multiple of a span, at most 16 of them, small enough for eight rounds of blocks wherever a span is."""
    for elements in (0, 1, 10**6, 10**8, 1 << 27, 1 << 31, 10**12):
        tile = cuda.tile_size(elements, 132)
        assert tile % cuda.SPAN == 0
        assert cuda.SPAN <= tile <= 16 * cuda.SPAN
        assert tile == cuda.SPAN or elements / tile >= 8 * cuda.BLOCKS * 132


def test_constants_match_the_header() -> None:
    header = (ROOT / "csrc" / "zo_kernels.h").read_text()
    assert int(re.findall(r"ZO_CUDA_SPAN (\d+)", header)[0]) == cuda.SPAN
    assert int(re.findall(r"ZO_INLINE_TERMS (\d+)", header)[0]) == INLINE
    assert ctypes.sizeof(CPass) == 168
    assert int(re.findall(r"ZO_RULE_NUMBERS (\d+)", header)[0]) == 9 == max(len(rule.numbers) for rule in rules.RULES.values())
    assert ctypes.sizeof(CUpdate) == 264


# ---- machine code -----------------------------------------------------------------------------------------------------

# Instructions per element of one pass with one term, per element and further term (how they are counted: benchmarks/sass.py).
# The first row is the issue's: an H100 issues 2.9e13 a second and moves 3e12 bytes, so that 4 bytes of traffic leave room for 38.
BOUNDS = {
    "gaussian": (14.0, 5.5),
    "gaussian-stochastic": (30.0, 5.5),
    "gaussian-general": (18.5, 5.5),
    "gaussian-general-bit-mask": (19.5, 5.5),
    "gaussian-general-random-mask": (29.0, 5.5),
    "gaussian-general-scale": (22.5, 5.5),
    "gaussian-stochastic-general": (34.5, 5.5),
    "gaussian-stochastic-general-random-mask": (44.0, 5.5),  # the only way that may bind on instructions instead of memory
    "rademacher": (10.5, 6.0),
    "rademacher-stochastic": (26.0, 6.0),
    "rademacher-general": (15.0, 6.0),
    "rademacher-stochastic-general": (31.0, 6.0),
    "gaussian-extended": (19.0, 5.5),
    "gaussian-extended-low-rank": (20.0, 3.0),  # of rank 1; per element and further rank
    # Sequences: per element and pass of one term; per element and further term of a pass.
    "gaussian-sequence": (12.0, 5.75),
    "gaussian-sequence-stochastic": (31.0, 5.75),
    "gaussian-sequence-general": (18.0, 5.75),
    "gaussian-sequence-stochastic-general": (33.0, 5.75),
    "rademacher-sequence": (8.75, 6.5),
    "rademacher-sequence-stochastic": (27.5, 6.5),
    "rademacher-sequence-general": (14.0, 6.5),
    "rademacher-sequence-stochastic-general": (29.0, 6.5),
}


@cache
def disassembled(arch: int) -> list:
    import sass

    reason = sass.unavailable()
    if reason:
        pytest.skip(reason)
    return list(sass.kernels(arch))


@pytest.mark.parametrize("arch", [80, 90])
def test_machine_code(arch: int) -> None:
    """No spills, no local memory, 16-byte accesses, and no more instructions than stated, for every kernel."""
    import sass

    kernels = disassembled(arch)
    # 2 kinds x ((2 types x 2 roundings + fp32) x lean, general and extended + 3 types of sequences x lean and general)
    assert len(kernels) == 42
    counted = set()
    for kernel in kernels:
        label = f"sm_{arch} {kernel.dtype} {kernel.name}"
        assert kernel.spill_bytes == 0, label
        opcodes = {sass.opcode(text).split(".")[0] for _, text in kernel.code}
        assert not opcodes & {"LDL", "STL", "LD", "ST"}, label
        for name, (bits, per_element, per_term) in sass.counts(kernel).items():
            assert bits == 128, f"{label}: {name} accesses {bits} bits"
            if name in BOUNDS:
                counted.add(name)
                assert per_element <= BOUNDS[name][0], f"{label}: {name} takes {per_element} instructions per element"
                assert per_term <= BOUNDS[name][1], f"{label}: {name} takes {per_term} per element and term"
    assert counted == set(BOUNDS)


@pytest.mark.parametrize("arch", [80, 90])
def test_accesses_of_a_group(arch: int) -> None:
    """A group of 16 is two 16-byte loads and stores with 16-bit weights, four with 32-bit ones, and no narrower ones."""
    import sass

    for kernel in disassembled(arch):
        shape = sass.shape(kernel)
        names = [sass.opcode(kernel.code[n][1]) for n in shape.usual]
        wanted = 4 if kernel.dtype == "float32" else 2
        assert sum(name.startswith("STG") for name in names) == wanted
        assert sum(name.startswith("STG.E.128") for name in names) == wanted
        loads = [n for n in shape.usual if n != shape.term and sass.opcode(kernel.code[n][1]).startswith("LDG.E.128")]
        assert len(loads) == wanted
        assert kernel.registers <= (128 if kernel.extended or (kernel.sequence and not kernel.lean) else 96)


# rule -> most instructions per element of one pass with one term (of a history: without any), per element and further term; for Gaussian noise
# and for signs. Counted, with 5 % or so for other versions. Reading and writing a state in bf16 costs 17 more, its stochastic rounding.
RULE_BOUNDS = {
    "momentum": ((29.5, 5.5), (25.0, 6.0)),
    "adam": ((60.0, 5.5), (56.0, 6.0)),
    "hizoo": ((60.0, 5.5), (56.0, 6.0)),
    "adam_history": ((41.5, 15.0), (37.0, 14.5)),
}


@pytest.mark.parametrize("arch", [80, 90])
def test_machine_code_of_rules(arch: int) -> None:
    """No spills and no local memory; of a group that lies inside, weights and states are read and written in 16 bytes at a time; and no more
    instructions than stated, for both kinds of noise that a kernel holds."""
    import sass

    reason = sass.unavailable()
    if reason:
        pytest.skip(reason)
    found = list(sass.rule_kernels(arch))
    assert len(found) == 18  # 3 types x (momentum and Adam with states of 2 types, HiZOO, recomputed Adam)
    assert len({(kernel.dtype, kernel.name) for kernel in found}) == 18
    for kernel in found:
        f, label = kernel.function, f"sm_{arch} {kernel.dtype} {kernel.name}"
        weights = 4 if kernel.dtype == "float32" else 2
        wanted = weights + (0 if kernel.states == 0 else (2 if kernel.narrow else 4) + 4 * (kernel.states - 1))
        names = [sass.opcode(text) for _, text in f.code]
        assert sum(name.startswith("STG.E.128") for name in names) == wanted, label
        assert sum(name.startswith("LDG.E.128") for name in names) == wanted, label
        assert not {name.split(".")[0] for name in names} & {"LDL", "STL", "LD", "ST"}, label
        assert f.spill_bytes == 0, label
        assert f.registers <= 128, label
        gaussian, signs = kernel.name, f"rademacher-{kernel.name}"
        counts = sass.rule_counts(kernel)
        assert list(counts) == [gaussian, signs]
        for name, (most, most_term) in zip((gaussian, signs), RULE_BOUNDS[kernel.rule], strict=True):
            bits, per_element, per_term = counts[name]
            assert bits == 128, f"{label}: {name} accesses {bits} bits"
            assert per_element <= most + 17 * kernel.narrow, f"{label}: {name} takes {per_element} instructions per element"
            assert per_term <= most_term, f"{label}: {name} takes {per_term} per element and term"
        # The mix of a group is four sums for each number, and a further term costs signs a bit more, which they draw from other words.
        assert 3.5 <= counts[gaussian][1] - counts[signs][1] <= 4.5, label
        assert (counts[gaussian][2] < counts[signs][2]) == (kernel.rule != "adam_history"), label  # which mixes each term


@pytest.mark.parametrize("arch", [80, 90])
def test_machine_code_of_magnitude_masks(arch: int) -> None:
    """Both octets of a thread are read in 16 bytes at a time, before either is compared; no spills."""
    import sass

    if reason := sass.unavailable():
        pytest.skip(reason)
    found = [f for f in sass.functions(arch) if "magnitude_mask" in f.symbol]
    assert len(found) == 3
    for f in found:
        names = [sass.opcode(text) for _, text in f.code]
        assert sum(name.startswith("LDG.E.128") for name in names) == (4 if "F32" in f.symbol else 2), f.symbol
        assert not {name.split(".")[0] for name in names} & {"LDL", "STL", "LD", "ST"}, f.symbol
        assert f.spill_bytes == 0 and f.registers <= 64, f.symbol


def test_rows_of_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named as Triton's, with the terms that are in the number; a row for each kernel and kind."""
    import sass

    function = sass.Function("", [], 99, 0)
    rules_there = [sass.RuleKernel("float16", "adam", 2, narrow, 90, function) for narrow in (False, True)]
    rules_there.append(sass.RuleKernel("float16", "adam_history", 0, False, 90, function))
    monkeypatch.setattr(sass, "kernels", lambda arch: [])
    monkeypatch.setattr(sass, "rule_kernels", lambda arch: rules_there)
    monkeypatch.setattr(sass, "rule_counts", lambda kernel: {kernel.name: (128, 20.123, 5.0)})
    rows = list(sass.rows_cuda(archs=(90,)))
    assert all(tuple(row) == sass.COLUMNS for row in rows)
    assert [(row["kernel"], row["terms"]) for row in rows] == [("adam", 1), ("adam-bf16-state", 1), ("adam_history", "K")]
    assert {(row["backend"], row["arch"], row["dtype"], row["registers"]) for row in rows} == {("cuda", "sm_90", "float16", 99)}
    assert rows[0]["instructions_per_element"] == 20.12


def test_a_call_is_no_shortcut() -> None:
    """The rare way of a root or a quotient is one instruction here and dozens elsewhere: the usual way past it is the one that counts."""
    import sass

    texts = ["LDG.E.128 R4, [R2]", "@P0 BRA 0x40", "CALL.REL.NOINC 0x90", "BRA 0x70", "MUFU.RSQ R8, R4", "FFMA R8, R4, R8, R8"]
    texts += ["FFMA R9, R8, R8, R4", "STG.E.128 [R2], R8", "BRA 0x0", "RET.REL.NODEC R8 0x0"]
    code = [(16 * n, text) for n, text in enumerate(texts)]
    path = sass.round_trip(sass.successors(code), [0, 7])
    assert path == [1, 4, 5, 6, 7, 8, 0]
