"""Static counts of the Triton kernels: compiled ahead of time for sm_80 and sm_90, no GPU needed, read from their SASS.

Belongs here: compiling the variants and reading Triton's bundled cuobjdump. Does not belong here: bounds (tests/kernels/
test_triton_aot.py), timings.

How instructions are counted: a kernel's tile loop has a path for whole tiles, the one with the 128-bit stores. The count is the shortest way
round that loop through those stores, everything included (addresses, bounds, loop), divided by the elements that a thread handles
on the way. Work done once per span of up to 16 tiles is outside the loop and not counted. With a run-time number of terms the
loop over them lies on that way; it is counted by itself, per element and term, and left out of the other number. So it is with update rules, whose
terms are always a loop.

The perturbed linear's elements are those of the weight: the count is one turn of its loop over K, with 16 rows of x in each half (`many-rows`:
64, in fp32 32), tensor core instructions and the traffic of x included, divided by a thread's share of the tile of weights.
"""

from __future__ import annotations

import heapq
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHS = (80, 90)
PLAIN: dict[str, Any] = {
    "KIND": 0,
    "TERMS": 1,
    "HOST_TERMS": True,
    "DECAY": 0,
    "BIT_MASK": False,
    "RANDOM_MASK": False,
    "SCALE": 0,
    "ROWS": False,
    "STOCHASTIC": False,
    "IN_PLACE": True,
    "SEQUENCE": False,
}
LOOP = {"TERMS": 0, "HOST_TERMS": False}
# name -> (terms column, flags); every feature alone, then the heaviest mixtures.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("1", {}),
    "two-terms": ("2", {"TERMS": 2}),
    "device-terms": ("1", {"HOST_TERMS": False}),
    "many-terms": ("K", LOOP),
    "rademacher": ("1", {"KIND": 1}),
    "rademacher-many-terms": ("K", {"KIND": 1, **LOOP}),
    "out-of-place": ("1", {"IN_PLACE": False}),
    "decay": ("1", {"DECAY": 1}),
    "stochastic": ("1", {"STOCHASTIC": True}),
    "bit-mask": ("1", {"BIT_MASK": True}),
    "random-mask": ("1", {"RANDOM_MASK": True}),
    "scale": ("1", {"SCALE": 1}),
    "rsqrt": ("1", {"SCALE": 6}),  # a value for each element
    "low-rank": ("1", {"KIND": 2}),  # of rank 0; what a rank costs is counted as a term's
    "rows": ("1", {"ROWS": True, "IN_PLACE": False}),
    "sequence": ("S", {**LOOP, "SEQUENCE": True}),
    "rademacher-sequence": ("S", {"KIND": 1, **LOOP, "SEQUENCE": True}),
    "sequence-stochastic": ("S", {**LOOP, "SEQUENCE": True, "STOCHASTIC": True}),
    "everything": (
        "K",
        {**LOOP, "DECAY": 2, "STOCHASTIC": True, "BIT_MASK": True, "RANDOM_MASK": True, "SCALE": 2, "IN_PLACE": False},
    ),
    "everything-rows": (
        "K",
        {
            **LOOP,
            "DECAY": 2,
            "STOCHASTIC": True,
            "BIT_MASK": True,
            "RANDOM_MASK": True,
            "SCALE": 2,
            "ROWS": True,
            "IN_PLACE": False,
        },
    ),
}


@dataclass(frozen=True)
class Counts:
    """What the SASS of one kernel says."""

    per_element: float
    per_element_term: float | None
    registers: int
    spill_bytes: int  # stack: spills and local arrays
    shared_bytes: int
    access_bits: int  # of the weights' loads and stores on the way of a whole tile, the narrowest
    opcodes: frozenset[str]  # all of the kernel
    ptx: str


def compile_kernel(arch: int, dtype: str, flags: dict[str, Any]) -> Any:
    """`perturb_kernel` as `zo_kernels._backends.triton` would launch it, compiled for `arch`. Not in an interpreter process."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from zo_kernels._backends import _triton_kernels as kernels
    from zo_kernels._backends.triton import GPU, loop_options

    launch = GPU
    constants = {**PLAIN, **flags, "DTYPE": getattr(tl, dtype), "P": launch.groups, "NARROW": launch.narrow, "INTERPRETED": False}
    pointers = {"table": "*i64", "spans": "*i64"}
    if constants["HOST_TERMS"]:
        constants |= {"tags": None, "coefs": None, "terms": None}
    else:
        pointers |= {"tags": "*i32", "coefs": "*fp32"}
        if constants["TERMS"]:
            constants["terms"] = None
        else:
            pointers["terms"] = "*i64"
    if constants["DECAY"] == 2:
        pointers["decay_ptr"] = "*fp32"
    else:
        constants["decay_ptr"] = None
    of_a_sequence = {"firsts": "*i64", "decays": "*fp32", "roundings": "*u8", "steps": "*i64"}
    if constants["SEQUENCE"]:
        pointers |= of_a_sequence
    else:
        constants |= dict.fromkeys(of_a_sequence)
    names = kernels.perturb_kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("table", "spans")}
    source = ASTSource(kernels.perturb_kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": launch.warps, "enable_fp_fusion": False, **loop_options(constants)}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def gpu_linear_launch(dtype: str) -> Any:
    import torch

    from zo_kernels._backends import triton as backend

    return backend.gpu_linear_launch(getattr(torch, dtype))


UPDATE_PLAIN: dict[str, Any] = {"KIND": 0, "BIT_MASK": False, "RANDOM_MASK": False, "SCALE": False, "STOCHASTIC": False}


def compile_update(arch: int, dtype: str, rule: str, state: str, flags: dict[str, Any]) -> Any:
    """`update_kernel` as `zo_kernels._backends.triton.update` would launch it."""
    import torch
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from zo_kernels import update
    from zo_kernels._backends import _triton_update as kernels
    from zo_kernels._backends.triton import GPU, update_options

    launch, chosen = GPU, update.RULES[rule]
    constants = {**UPDATE_PLAIN, **flags, "DTYPE": getattr(tl, dtype), "STATE": getattr(tl, state), "P": launch.groups}
    constants |= {"RULE": chosen.code, "NUMBERS": len(chosen.numbers), "INTERPRETED": False}
    pointers = {**dict.fromkeys(("table", "states", "spans"), "*i64"), "tags": "*i32", "coefs": "*fp32", "numbers": "*fp32"}
    if rule == "adam_history":
        pointers["squares"] = "*fp32"
    else:
        constants["squares"] = None
    names = kernels.update_kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("table", "spans")}
    source = ASTSource(kernels.update_kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": launch.warps, "enable_fp_fusion": False, **update_options(rule, getattr(torch, state), constants)}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile_magnitude_mask(arch: int, dtype: str) -> Any:
    """`magnitude_mask_kernel` as `zo_kernels._backends.triton.magnitude_mask` would launch it."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from zo_kernels._backends import _triton_mask as kernels
    from zo_kernels._backends.triton import GPU

    names = kernels.magnitude_mask_kernel.arg_names
    constants = {"DTYPE": getattr(tl, dtype), "P": GPU.groups}
    pointers = {"table": "*i64", "limits": "*fp32", "spans": "*i64"}
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("table", "spans")}
    source = ASTSource(kernels.magnitude_mask_kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": GPU.warps})


LINEAR_PLAIN: dict[str, Any] = {"KIND": 0, "TERMS": 1, "HALVES": True, "BIAS": True, "SPLIT": False, "EVEN_K": True, "BM": 16}
LINEAR_VARIANTS: dict[str, dict[str, Any]] = {
    "perturbed-linear": {},
    "perturbed-linear-many-rows": {"BM": "most"},  # as many as a tile takes
    "perturbed-linear-split": {"SPLIT": True},
    "perturbed-linear-tails": {"EVEN_K": False},
    "perturbed-linear-one-half": {"HALVES": False},
    "perturbed-linear-rademacher": {"KIND": 1},
}


def compile_linear(arch: int, dtype: str, flags: dict[str, Any], finish: bool = False) -> Any:
    """`linear_kernel` (or `finish_kernel`) as `zo_kernels._backends.triton.linear` would launch it on aligned tensors."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from zo_kernels._backends import _triton_linear as kernels

    launch = gpu_linear_launch(dtype)
    function = kernels.finish_kernel if finish else kernels.linear_kernel
    names = function.arg_names
    constants = {**LINEAR_PLAIN, **flags, "DTYPE": getattr(tl, dtype), "BN": launch.w_rows, "BK": launch.columns}
    if constants["BM"] == "most":
        constants["BM"] = launch.x_rows
    constants |= {"INTERPRETED": False} | ({"tags": None, "coefs": None} if constants["TERMS"] else {})
    constants |= {} if constants["BIAS"] else {"bias": None}
    constants |= {} if constants["SPLIT"] else {"partial": None}
    constants = {name: value for name, value in constants.items() if name in names}
    element = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[dtype]
    types = {**dict.fromkeys(("x", "weight", "bias", "y"), f"*{element}"), "partial": "*fp32", "tags": "*i32", "coefs": "*fp32"}
    types |= {"offset": "i64", "bias_offset": "i64"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in ("x", "weight", "bias", "y", "partial", "N", "K") if name in names and name not in constants]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(function, signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def cuobjdump(cubin: bytes, flag: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), flag, file.name], check=True, capture_output=True, text=True).stdout


def instructions(cubin: bytes) -> list[tuple[int, str]]:
    """(address, text) in order; the text keeps its predicate."""
    return [
        (int(a, 16), t.strip()) for a, t in re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+([^;]+);", cuobjdump(cubin, "-sass"), re.M)
    ]


def opcode(text: str) -> str:
    return text.split()[1 if text.startswith("@") else 0]


def successors(code: list[tuple[int, str]]) -> list[list[int]]:
    """For each instruction the ones that may run next."""
    place = {address: n for n, (address, _) in enumerate(code)}
    result = []
    for n, (_, text) in enumerate(code):
        name, after = opcode(text).split(".")[0], [n + 1] if n + 1 < len(code) else []
        if name == "BRA":
            target = place[int(re.findall(r"0x([0-9a-f]+)", text)[-1], 16)]
            always = not text.startswith("@") and not re.search(r"BRA(\.\S+)?\s+!?U?P\d", text)
            result.append([target] if always else [*after, target])
        elif name == "CALL" and text.startswith("@"):  # not a call: how ptxas for sm_80 leaves a loop
            result.append([*after, place[int(re.findall(r"0x([0-9a-f]+)", text)[-1], 16)]])
        # A call is the rare way of a root or a quotient, whose instructions lie elsewhere: no shortcut.
        elif name == "CALL" or (name in ("EXIT", "RET") and not text.startswith("@")):
            result.append([])
        else:
            result.append(after)
    return result


def way(edges: list[list[int]], start: int, goal: int) -> list[int]:
    """The shortest way from one instruction to another (or back to itself), without its start."""
    before: dict[int, int] = {}
    queue = [(1, n, start) for n in edges[start]]
    while queue:
        cost, n, source = heapq.heappop(queue)
        if n in before:
            continue
        before[n] = source
        if n == goal:
            found = [n]
            while (source := before[found[-1]]) != start:
                found.append(source)
            return found[::-1]
        for m in edges[n]:
            heapq.heappush(queue, (cost + 1, m, n))
    raise ValueError(f"no way from instruction {start} to {goal}")


def round_trip(edges: list[list[int]], stops: list[int]) -> list[int]:
    """The shortest way that passes all stops in order and ends where it began."""
    return [n for a, b in zip(stops, [*stops[1:], stops[0]], strict=True) for n in way(edges, a, b)]


def turn(edges: list[list[int]], n: int) -> list[int]:
    """The shortest loop that an instruction lies on; empty if there is none."""
    try:
        return way(edges, n, n)
    except ValueError:
        return []


def blocks(code: list[tuple[int, str]], edges: list[list[int]]) -> Iterator[list[int]]:
    """Maximal runs of instructions that are entered only at their start and left only at their end."""
    entered = {m for n, after in enumerate(edges) for m in after if m != n + 1}
    run: list[int] = []
    for n in range(len(code)):
        if n in entered and run:
            yield run
            run = []
        run.append(n)
        if edges[n] != [n + 1]:
            yield run
            run = []
    if run:
        yield run


def pass_header(code: list[tuple[int, str]], edges: list[list[int]]) -> int:
    """The load with which a turn of a sequence's loop over passes begins, on the way of a whole tile: of the loads from which 128-bit
    stores are reached without a narrower one, the one on most of the loops without a store."""
    stores = {n for n, (_, text) in enumerate(code) if opcode(text).startswith("STG")}
    wide = min(n for n in stores if access_width(code[n][1]) == 128)
    narrow = {n for n in stores if access_width(code[n][1]) != 128}
    inner = {}
    for n, (_, text) in enumerate(code):
        loop = turn(edges, n) if opcode(text).startswith("LDG") else []
        if loop and not stores & set(loop) and not narrow & set(way(edges, n, wide)):
            inner[n] = loop
    return max(inner, key=lambda n: sum(n in loop for loop in inner.values()))


def pass_turn(code: list[tuple[int, str]], edges: list[list[int]], header: int, count: int, least: int, most: int) -> list[int]:
    """The shortest turn of that loop past `count` blocks with calls of Philox, in which `least` to `most` of their products are done: a
    call has 20, less those of the first rounds that do not depend on the tag, and those of which only one half is used."""

    def products(path: list[int]) -> int:
        return sum(opcode(code[n][1]).startswith("IMAD.WIDE.U32") for n in path)

    found = []
    for stops in itertools.permutations([run[0] for run in blocks(code, edges) if products(run) >= 10], count):
        try:
            path = round_trip(edges, [header, *stops])
        except ValueError:
            continue
        stores = any(opcode(code[n][1]).startswith("STG") for n in path)
        if path.count(header) == 1 and not stores and least <= products(path) <= most:
            found.append(path)
    return min(found, key=len)


def term_loop(code: list[tuple[int, str]], edges: list[list[int]], whole: list[int], gaussian: bool) -> float:
    """Instructions per element and term of the innermost loop before the whole tile's stores."""
    products = [n for n, (_, text) in enumerate(code) if opcode(text).startswith("IMAD.WIDE.U32")]
    first_store = min(n for n in whole if opcode(code[n][1]).startswith("STG"))
    loops = []
    for n in products:
        try:
            loop = way(edges, n, n)
        except ValueError:
            continue
        if not any(opcode(code[m][1]).startswith("STG") for m in loop):
            loops.append((abs(first_store - n), loop))
    if not loops:
        raise ValueError("no loop over terms")
    inner = min(loops)[1]
    sums = sum(opcode(code[m][1]).split(".")[0] == ("FFMA" if gaussian else "FADD") for m in inner)
    return len(inner) / sums  # one sum for each element and term, however often the loop was unrolled


def rank_loop(code: list[tuple[int, str]], edges: list[list[int]]) -> float:
    """Instructions per element and rank of the loop over the rank, as it is unrolled where the rank allows."""
    turns = []
    for n, (_, text) in enumerate(code):
        loop = turn(edges, n) if opcode(text).startswith("FFMA") else []
        if any(opcode(code[m][1]).startswith("LDG.E.128") for m in loop):
            turns.append(len(loop) / sum(opcode(code[m][1]).startswith("FFMA") for m in loop))
    return min(turns)


def count(kernel: Any, dtype: str, flags: dict[str, Any]) -> Counts:
    from zo_kernels._backends.triton import GPU as launch

    cubin = kernel.asm["cubin"]
    code = instructions(cubin)
    edges = successors(code)
    stores = [n for n, (_, text) in enumerate(code) if opcode(text).startswith("STG")]
    widest = max(access_width(code[n][1]) for n in stores)
    wide = [n for n in stores if access_width(code[n][1]) == widest]
    whole = way(edges, wide[0], wide[0])
    per_thread = 16 * launch.groups // (32 * launch.warps)
    if {**PLAIN, **flags}["SEQUENCE"]:
        header = pass_header(code, edges)
        whole = pass_turn(code, edges, header, *((1, 30, 61) if flags.get("STOCHASTIC") else (1, 10, 21)))
        wide = []
    missing = [n for n in wide if n not in whole]
    if missing:
        raise ValueError(f"the way round the loop misses the stores {missing}")
    term = None
    if {**PLAIN, **flags}["TERMS"] == 0 and not {**PLAIN, **flags}["SEQUENCE"]:
        term = term_loop(code, edges, whole, {**PLAIN, **flags}["KIND"] == 0)
    if {**PLAIN, **flags}["KIND"] == 2:
        term = rank_loop(code, edges)
    return counts_of(kernel, code, len(whole) / per_thread, term, widest)


def count_update(kernel: Any) -> Counts:
    """The shortest way round the loop over tiles past the 128-bit stores, which makes no term; roots and quotients take their usual ways."""
    from zo_kernels._backends.triton import GPU as launch

    code = instructions(kernel.asm["cubin"])
    edges = successors(code)
    wide = [n for n, (_, text) in enumerate(code) if opcode(text).startswith("STG") and access_width(text) == 128]
    whole = round_trip(edges, [wide[0], wide[-1]])
    if missing := [n for n in wide if n not in whole]:
        raise ValueError(f"the way round the loop misses the stores {missing}")
    per_thread = 16 * launch.groups // (32 * launch.warps)
    products = [n for n, (_, text) in enumerate(code) if opcode(text).startswith("IMAD.WIDE.U32")]
    loops = [loop for n in products if (loop := turn(edges, n)) and not any(opcode(code[m][1]).startswith("STG") for m in loop)]
    # The loops of whole tiles and of others, each as it is without what a compiler moved out of it: the one that leads to the wide stores.
    inner = min((loop for loop in loops if leads(edges, loop[0], wide[0], code)), key=len)
    return counts_of(kernel, code, len(whole) / per_thread, len(inner) / per_thread, 128)


def leads(edges: list[list[int]], start: int, goal: int, code: list[tuple[int, str]]) -> bool:
    """Whether the shortest way passes no store but those of the goal's width."""
    return all(access_width(code[n][1]) == 128 for n in way(edges, start, goal) if opcode(code[n][1]).startswith("STG"))


def counts_of(kernel: Any, code: list[tuple[int, str]], per_element: float, per_element_term: float | None, bits: int) -> Counts:
    usage = cuobjdump(kernel.asm["cubin"], "-res-usage")
    registers, stack, local = (int(re.findall(rf"{what}:(\d+)", usage)[0]) for what in ("REG", "STACK", "LOCAL"))
    return Counts(
        per_element=per_element,
        per_element_term=per_element_term,
        registers=registers,
        spill_bytes=stack + local,
        shared_bytes=kernel.metadata.shared,
        access_bits=bits,
        opcodes=frozenset(opcode(text) for _, text in code),
        ptx=kernel.asm["ptx"],
    )


def count_linear(kernel: Any, dtype: str) -> Counts:
    launch = gpu_linear_launch(dtype)
    code = instructions(kernel.asm["cubin"])
    edges = successors(code)
    products = [n for n, (_, text) in enumerate(code) if re.match("HGMMA|HMMA" if dtype != "float32" else "FFMA", opcode(text))]
    turn = max((way for n in products if (way := cycle(edges, n))), key=len)
    missing = [n for n in products if n not in turn]
    if missing:
        raise ValueError(f"the way round the loop misses the products {missing}")
    # x has fewer bytes than the tile of weights: what is left when the widest loads have brought as much as the tile has is x's.
    threads, tile = 32 * launch.warps, launch.w_rows * launch.columns
    needed = tile * (4 if dtype == "float32" else 2) // threads
    loads = (access_width(code[n][1]) for n in turn if opcode(code[n][1]).startswith("LDG") and "DEPBAR" not in code[n][1])
    for bits in sorted(loads, reverse=True):
        needed -= bits // 8
        if needed <= 0:
            return counts_of(kernel, code, len(turn) / (tile / threads), None, bits)
    raise ValueError("the loop over K loads less than its tile of weights")


def cycle(edges: list[list[int]], start: int) -> list[int] | None:
    try:
        return way(edges, start, start)
    except ValueError:
        return None


def access_width(text: str) -> int:
    """Bits of a load or store."""
    for field in opcode(text).split("."):
        if field in ("64", "128"):
            return int(field)
        if re.fullmatch(r"[US](8|16)", field):
            return int(field[1:])
    return 32


def rows_triton(
    variants: tuple[str, ...] = tuple(VARIANTS),
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16"),
    archs: tuple[int, ...] = ARCHS,
) -> Iterator[dict[str, Any]]:
    """One CSV row for each variant, dtype and architecture; columns as in `benchmarks/sass.py`."""
    for name in variants:
        terms, given = VARIANTS[name]
        for dtype in dtypes:
            # As the launch does: fp32 has nothing to round.
            flags = {**given, "STOCHASTIC": False} if dtype == "float32" and given.get("STOCHASTIC") else given
            for arch in archs:
                yield row(name, arch, dtype, terms, count(compile_kernel(arch, dtype, flags), dtype, flags))


def rows_rules(
    rules: tuple[str, ...] = ("momentum", "adam", "hizoo", "adam_history"),
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16"),
    archs: tuple[int, ...] = ARCHS,
) -> Iterator[dict[str, Any]]:
    """The same for the update rules with fp32 states, whose terms are always a loop."""
    for rule in rules:
        for dtype in dtypes:
            for arch in archs:
                yield row(rule, arch, dtype, "K", count_update(compile_update(arch, dtype, rule, "float32", {})))


def rows_linear(dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")) -> Iterator[dict[str, Any]]:
    """The same for the perturbed linear."""
    for name, flags in LINEAR_VARIANTS.items():
        for dtype in dtypes:
            for arch in ARCHS:
                yield row(name, arch, dtype, "1", count_linear(compile_linear(arch, dtype, flags), dtype))


def row(name: str, arch: int, dtype: str, terms: str, c: Counts) -> dict[str, Any]:
    return {
        "backend": "triton",
        "kernel": name,
        "arch": f"sm_{arch}",
        "dtype": dtype,
        "terms": terms,
        "instructions_per_element": round(c.per_element, 2),
        "instructions_per_element_term": "" if c.per_element_term is None else round(c.per_element_term, 2),
        "registers": c.registers,
        "spill_bytes": c.spill_bytes,
        "access_bits": c.access_bits,
    }


if __name__ == "__main__":
    import csv
    import sys

    writer = None
    for line in itertools.chain(rows_triton(), rows_rules(), rows_linear()):
        if writer is None:
            writer = csv.DictWriter(sys.stdout, line)
            writer.writeheader()
        writer.writerow(line)
        sys.stdout.flush()
