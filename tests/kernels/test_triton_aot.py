"""What the compiled Triton kernels are made of: compiled ahead of time for sm_80 and sm_90, without a GPU.

Belongs here: bounds on what can be counted in the SASS (`benchmarks/sass_triton.py` says how). Does not belong here: results
(test_triton.py), timings.
"""

from __future__ import annotations

import os
import re

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted in this process, not compiled", allow_module_level=True)

from benchmarks import sass_triton
from zo_kernels._backends import _triton_kernels as kernels
from zo_kernels._backends import triton as backend

# variant -> most instructions per element of a whole tile, and per element and term of the loop over terms. The first two lines are the
# aims of the design; the others are what was counted, with 5 % or so for other versions of Triton and ptxas.
BOUNDS: dict[str, tuple[float, float | None]] = {
    "plain": (16, None),
    "many-terms": (13, 5.5),
    "two-terms": (21, None),
    "device-terms": (16, None),
    "out-of-place": (16, None),
    "rademacher": (12, None),
    "rademacher-many-terms": (9, 6.25),
    "decay": (17, None),
    "stochastic": (34, None),
    "bit-mask": (20, None),
    "random-mask": (27, None),
    "scale": (23.5, None),
    "rsqrt": (57, None),
    "low-rank": (12, 2.3),
    "rows": (20, None),
    "sequence": (13.5, None),  # per pass of one term; CUDA takes 12
    "rademacher-sequence": (9, None),
    "sequence-stochastic": (34, None),
    "everything": (62, 5.9),
    "everything-rows": (85, 5.9),
}
# Every variant on sm_90 in fp16, the lean ones more widely: a compilation takes 1 to 10 seconds.
COMPILED = [(v, "float16", 90) for v in BOUNDS]
COMPILED += [("plain", "float16", 80), ("plain", "float32", 90), ("plain", "bfloat16", 90), ("many-terms", "float16", 80)]
COMPILED += [("stochastic", "bfloat16", 80), ("sequence", "float32", 90), ("sequence", "bfloat16", 80)]


@pytest.mark.parametrize(("variant", "dtype", "arch"), COMPILED)
def test_compiled_kernel(variant: str, dtype: str, arch: int) -> None:
    flags = sass_triton.VARIANTS[variant][1]
    counts = sass_triton.count(sass_triton.compile_kernel(arch, dtype, flags), dtype, flags)
    bound, term_bound = BOUNDS[variant]
    assert counts.per_element <= bound
    if term_bound is not None:
        assert counts.per_element_term is not None
        assert counts.per_element_term <= term_bound
    assert counts.access_bits == 128
    assert counts.spill_bytes == 0
    assert counts.shared_bytes == 0
    many = "everything" in variant or "sequence" in variant or variant in ("rsqrt", "low-rank")
    assert counts.registers <= (128 if many else 80)
    names = {opcode.split(".")[0] for opcode in counts.opcodes}
    assert not names & {"LDL", "STL", "LDS", "STS", "SHFL"}, "local or shared memory, or a shuffle"
    assert {"LDG", "STG"} <= names
    assert ".ftz" not in counts.ptx, "subnormals would be flushed"
    if flags.get("TERMS") != 0 and flags.get("TERMS") != 2 and "SCALE" not in flags and variant != "low-rank":
        assert "FFMA" not in names, "a product that rounds by itself was contracted with a sum"


def test_products_that_round_are_not_contracted() -> None:
    """decay * theta + scale * s: with one term nothing but a contraction could be an fma."""
    flags = {"DECAY": 1, "SCALE": 2, "BIT_MASK": True}
    ptx = sass_triton.compile_kernel(90, "float32", flags).asm["ptx"]
    assert "fma.rn.f32" not in ptx
    assert len(re.findall(r"mul\S*\.f32", ptx)) > 16  # c' f, and the two products


def test_roots_and_quotients_round_to_nearest() -> None:
    """An inverse-square-root scale is two IEEE operations that keep subnormals, not the approximations of the hardware."""
    ptx = sass_triton.compile_kernel(90, "bfloat16", {"SCALE": 6}).asm["ptx"]
    names = set(re.findall(r"\b(?:sqrt|rsqrt|div|rcp)\.[\w.]*f32", ptx))
    assert names == {"sqrt.rn.f32", "div.rn.f32"}


def test_nothing_of_a_step_is_specialised() -> None:
    """Seeds, tags, coefficients, counts: a value may not choose a kernel, nor may its type (int32 whatever it is)."""
    fixed = {"table", "spans"}  # of a plan
    free = {p.name for p in kernels.perturb_kernel.params if not p.is_constexpr} - fixed
    assert {p.name for p in kernels.perturb_kernel.params if p.do_not_specialize} == free
    for word in (0, 1, 16, 2**31 - 1, 2**31, 2**32 - 1):
        assert -(2**31) <= backend._signed(word) < 2**31
        assert backend._signed(word) % 2**32 == word
    for x in (0.0, -0.0, 1e-45, -3.4028235e38, 0.1):
        assert -(2**31) <= backend._float_bits(x) < 2**31


def test_rows_of_the_table() -> None:
    [row] = sass_triton.rows_triton(variants=("plain",), dtypes=("float16",), archs=(90,))
    columns = (
        "backend kernel arch dtype terms instructions_per_element instructions_per_element_term registers spill_bytes access_bits"
    )
    assert list(row) == columns.split()
    assert (row["backend"], row["arch"], row["terms"], row["access_bits"]) == ("triton", "sm_90", "1", 128)


def test_a_row_has_the_flags_of_its_own_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 has nothing to round; the 16-bit rows after it do."""
    seen = []
    monkeypatch.setattr(sass_triton, "compile_kernel", lambda arch, dtype, flags: seen.append((dtype, flags.get("STOCHASTIC"))))
    monkeypatch.setattr(sass_triton, "count", lambda *args: None)
    monkeypatch.setattr(sass_triton, "row", lambda *args: {})
    list(sass_triton.rows_triton(variants=("stochastic", "everything"), archs=(90,)))
    assert seen == 2 * [("float32", False), ("float16", True), ("bfloat16", True)]


def test_the_shortest_way_counts_the_loop() -> None:
    """0 -> 1 -> 2 -> 0, with a detour 1 -> 3 -> 2; 4 lies on no loop."""
    edges = [[1], [2, 3], [0, 4], [2], []]
    assert sorted(sass_triton.way(edges, 2, 2)) == [0, 1, 2]
    assert sorted(sass_triton.way(edges, 3, 3)) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no way"):
        sass_triton.way(edges, 4, 4)


# ---- masks by magnitude -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "dtype"), [(90, "float32"), (90, "float16"), (80, "bfloat16")])
def test_compiled_magnitude_mask(arch: int, dtype: str) -> None:
    """The octet of a byte is read in 16 bytes at a time by the thread that makes it: no shared memory, no shuffle, no spill."""
    kernel = sass_triton.compile_magnitude_mask(arch, dtype)
    code = sass_triton.instructions(kernel.asm["cubin"])
    wide = sum(sass_triton.opcode(text).startswith("LDG") and sass_triton.access_width(text) == 128 for _, text in code)
    assert wide == (4 if dtype == "float32" else 2)  # two octets a thread
    counts = sass_triton.counts_of(kernel, code, 0.0, None, 0)
    assert counts.spill_bytes == 0 and counts.shared_bytes == 0 and counts.registers <= 64
    assert not {opcode.split(".")[0] for opcode in counts.opcodes} & {"LDL", "STL", "LDS", "STS", "SHFL"}


# ---- the perturbed linear ---------------------------------------------------------------------------------------------

# variant -> most instructions per weight of a turn of the loop over K, at 16 rows of x in each half (many: 64, in fp32 32), in 16 bits on
# sm_90 and on sm_80, and in fp32, where every row of x costs an FFMA of its own. Counted, with 5 % or so for other versions.
LINEAR_BOUNDS: dict[str, tuple[float, float, float]] = {
    "perturbed-linear": (20.5, 22.5, 57),
    "perturbed-linear-many-rows": (20.5, 29, 92),
    "perturbed-linear-split": (20.5, 22.5, 57),
    "perturbed-linear-tails": (21.5, 23.5, 58),
    "perturbed-linear-one-half": (17.5, 18, 35),
    "perturbed-linear-rademacher": (16, 18, 54),
}
LINEAR_COMPILED = [(v, "float16", 90) for v in LINEAR_BOUNDS]
LINEAR_COMPILED += [("perturbed-linear-many-rows", "bfloat16", 90), ("perturbed-linear-split", "bfloat16", 80)]
LINEAR_COMPILED += [
    ("perturbed-linear", "float16", 80),
    ("perturbed-linear-many-rows", "float16", 80),
    ("perturbed-linear", "float32", 90),
    ("perturbed-linear-many-rows", "float32", 80),
]


@pytest.mark.parametrize(("variant", "dtype", "arch"), LINEAR_COMPILED)
def test_compiled_linear(variant: str, dtype: str, arch: int) -> None:
    counts = sass_triton.count_linear(sass_triton.compile_linear(arch, dtype, sass_triton.LINEAR_VARIANTS[variant]), dtype)
    assert counts.per_element <= LINEAR_BOUNDS[variant][2 if dtype == "float32" else 0 if arch == 90 else 1]
    assert counts.access_bits == 128
    assert counts.spill_bytes == 0
    assert counts.registers <= 255
    assert counts.shared_bytes <= 72 * 1024, "two programs fit on a multiprocessor of sm_80"
    names = {opcode.split(".")[0] for opcode in counts.opcodes}
    assert not names & {"LDL", "STL"}, "local memory"
    assert ".ftz" not in counts.ptx, "subnormals would be flushed"
    if dtype == "float32":
        assert "tf32" not in counts.ptx, "10 bits of mantissa"
    else:
        assert names & {"HMMA", "HGMMA"}
        products = set(re.findall(r"\S*mma\S*\.f32\.\S+", counts.ptx))
        assert products, "sums of products are not fp32"


def test_compiled_linear_without_spills() -> None:
    """The loop over terms, and the kernel that adds up the parts."""
    for arch in (80, 90):
        many = sass_triton.compile_linear(arch, "float16", {"TERMS": 0})
        assert sass_triton.count_linear(many, "float16").spill_bytes == 0
        finish = sass_triton.compile_linear(arch, "float16", {"SPLIT": True}, finish=True)
        assert re.search(r"STACK:0 .*LOCAL:0 ", sass_triton.cuobjdump(finish.asm["cubin"], "-res-usage"))


def test_nothing_of_a_step_is_specialised_in_the_linear() -> None:
    from zo_kernels._backends import _triton_linear as linear

    fixed = {"x", "weight", "bias", "y", "partial", "N", "K"}  # pointers' alignment, and the matrix
    for kernel in (linear.linear_kernel, linear.finish_kernel):
        free = {p.name for p in kernel.params if not p.is_constexpr} - fixed
        assert {p.name for p in kernel.params if p.do_not_specialize} == free


# ---- update rules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "dtype", "rule", "state", "flags", "wide"),
    [
        # 16-byte loads and stores of a lane: 2 of the weights, 4 of each fp32 state, 2 of a bf16 one.
        (90, "float16", "adam", "float32", {}, 10),
        (80, "bfloat16", "momentum", "bfloat16", {"STOCHASTIC": True, "BIT_MASK": True}, 4),
    ],
    ids=["adam", "momentum"],
)
def test_compiled_rule(arch: int, dtype: str, rule: str, state: str, flags: dict[str, bool], wide: int) -> None:
    """What is loaded in 128 bits is taken apart within its thread: no shared memory, no shuffle, no spill; and a product that rounds by
    itself stays one (the 16 fma of the exact c' f, in the paths of whole and of other tiles, are all there are in the PTX)."""
    kernel = sass_triton.compile_update(arch, dtype, rule, state, flags)
    code = sass_triton.instructions(kernel.asm["cubin"])
    counts = sass_triton.counts_of(kernel, code, 0.0, None, 0)
    for access in ("LDG", "STG"):
        these = [text for _, text in code if sass_triton.opcode(text).startswith(access)]
        assert sum(sass_triton.access_width(text) == 128 for text in these) == wide
    assert counts.spill_bytes == 0
    assert counts.shared_bytes == 0
    assert counts.registers <= 128
    names = {opcode.split(".")[0] for opcode in counts.opcodes}
    assert not names & {"LDL", "STL", "LDS", "STS", "SHFL"}, "local or shared memory, or a shuffle"
    assert ".ftz" not in counts.ptx, "subnormals would be flushed"
    assert counts.ptx.count("fma.rn.f32") == 32
    if rule == "adam":
        counted = sass_triton.count_update(kernel)  # 43.5 and 7.5, with 5 % or so for other versions
        assert counted.per_element <= 46
        assert counted.per_element_term is not None and counted.per_element_term <= 8
        assert counts.ptx.count("sqrt.rn.f32") == 32
        assert counts.ptx.count("div.rn.f32") == 32


def test_nothing_of_a_step_is_specialised_in_a_rule() -> None:
    from zo_kernels._backends import _triton_update as rules

    free = {p.name for p in rules.update_kernel.params if not p.is_constexpr} - {"table", "spans"}
    assert {p.name for p in rules.update_kernel.params if p.do_not_specialize} == free
