"""Instruction counts of the GPU kernels, read from their machine code (SASS): no GPU needed.

    python benchmarks/sass.py                                        to standard output
    python benchmarks/sass.py --dtypes float16 --out FILE.csv        to a file, with the columns of the machine

Belongs here: the CUDA kernels of the built extension, and the CSV of both GPU backends. Does not belong here: Triton's kernels
(sass_triton.py), bounds (tests/kernels/test_cuda_host.py), timings.

How instructions are counted: a kernel's loop over a tile is walked once on the shortest way that passes the 16-byte loads of a
whole span, the first term, what the row's feature needs, and the 16-byte stores; everything on the way counts (addresses, bounds,
branches, the loop), divided by the 16 elements that a thread handles. `instructions_per_element_term` is one turn of the loop over
the further terms: a pass of K terms costs K - 1 of them more. Work done once for a tile (of 1 to 16 spans) is not counted. Of a
sequence, `instructions_per_element` is one turn of its loop over passes, the shortest one for a pass with one live term. Of a low-rank
direction they are those of rank 1, and `instructions_per_element_term` is what a further rank costs. Of a rule they are those of a step
with one term; recomputed Adam makes every term in a loop, which is counted by itself and left out of the other number (`terms` is K). Roots
and quotients take their usual ways, not the calls for rare numbers.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from sass_triton import (
    access_width,
    blocks,
    opcode,
    pass_header,
    pass_turn,
    round_trip,
    rows_linear,
    rows_rules,
    rows_triton,
    successors,
    turn,
)

COLUMNS = ("backend", "kernel", "arch", "dtype", "terms", "instructions_per_element", "instructions_per_element_term")
COLUMNS += ("registers", "spill_bytes", "access_bits")
ARCHS = (80, 90)
PER_THREAD = 16
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Kernel:
    """One kernel of the extension for one architecture."""

    dtype: str
    rademacher: bool
    stochastic: bool
    sequence: bool
    form: int  # zo_form of csrc/zo_kernels.h
    arch: int
    code: list[tuple[int, str]]
    registers: int
    spill_bytes: int  # stack and local memory

    @property
    def lean(self) -> bool:
        return self.form == 1

    @property
    def extended(self) -> bool:
        return self.form == 2

    @property
    def name(self) -> str:
        rounding = [name for name, there in (("stochastic", self.stochastic), ("sequence", self.sequence)) if there]
        return "-".join(
            [
                "rademacher" if self.rademacher else "gaussian",
                *rounding,
                *[("general", "lean", "extended")[self.form]] * (not self.lean),
            ]
        )


def find_cuobjdump() -> str | None:
    """The one that Triton bundles, or the toolkit's."""
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


def unavailable() -> str | None:
    """Why the extension's CUDA kernels cannot be disassembled here, or None."""
    from zo_kernels._backends._extension import extension

    module = extension()
    if isinstance(module, str):
        return module
    if not module.WITH_CUDA:
        return "the extension was built without CUDA (no nvcc)"
    return None if find_cuobjdump() else "neither Triton nor the CUDA toolkit offers cuobjdump here"


@dataclass(frozen=True)
class Function:
    """The machine code of one kernel."""

    symbol: str
    code: list[tuple[int, str]]
    registers: int
    spill_bytes: int  # stack and local memory


def functions(arch: int) -> Iterator[Function]:
    """Every kernel of the built extension."""
    from zo_kernels import _C

    def dump(flag: str) -> str:
        command = [str(find_cuobjdump()), "-arch", f"sm_{arch}", flag, str(_C.__file__)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    usage = dict(re.findall(r"Function (\S+?):\s*\n\s*(REG:.*)", dump("-res-usage")))
    for part in dump("-sass").split("Function : ")[1:]:
        symbol = part.split(None, 1)[0]
        code = [(int(a, 16), t.strip()) for a, t in re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+([^;]+);", part, re.M)]
        amount = {what: int(n) for what, n in re.findall(r"(\w+):(\d+)", usage[symbol])}
        yield Function(symbol, code, amount["REG"], amount["STACK"] + amount["LOCAL"])


def kernels(arch: int) -> Iterator[Kernel]:
    """Every kernel of a pass or a sequence."""
    for function in functions(arch):
        found = re.search(r"(F32|F16|BF16)ELi(\d)ELi(\d)ELi(\d)", function.symbol)
        if found is None:
            continue
        yield Kernel(
            dtype=DTYPES[found[1]],
            rademacher=found[2] == "1",
            stochastic=found[3] == "1",
            sequence=found[3] == "2",
            form=int(found[4]),
            arch=arch,
            code=function.code,
            registers=function.registers,
            spill_bytes=function.spill_bytes,
        )


@dataclass(frozen=True)
class RuleKernel:
    """One kernel of an update rule, which holds the loops of both kinds of noise."""

    dtype: str
    rule: str
    states: int
    narrow: bool  # whether the first state is bf16
    arch: int
    function: Function

    @property
    def name(self) -> str:
        return f"{self.rule}-bf16-state" if self.narrow else self.rule


def rule_kernels(arch: int) -> Iterator[RuleKernel]:
    """Every kernel of an update rule."""
    from zo_kernels import update

    codes = {str(rule.code): (name, len(rule.states)) for name, rule in update.RULES.items()}
    for function in functions(arch):
        # S3_ names the first type once more.
        found = re.search(r"UpdateVariantINS0_\d(F32|F16|BF16)ELi(\d)E(NS0_4BF16E|S3_E|NS0_3F32E)", function.symbol)
        if found is None:
            continue
        state = found[1] if found[3] == "S3_E" else found[3][5:-1]
        rule, states = codes[found[2]]
        yield RuleKernel(DTYPES[found[1]], rule, states, state == "BF16", arch, function)


# ---- ways through a kernel -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The places of a kernel that every way passes."""

    edges: list[list[int]]
    load: int  # first 16-byte load of a whole span
    term: int  # the load of the first term from shared memory; of a sequence, that of a pass
    stores: list[int]  # 16-byte stores
    loop: list[int]  # one turn of the loop over the further terms
    usual: list[int]  # the way of a whole span with one term and without any feature; of a sequence, the least of a pass


def shape(kernel: Kernel) -> Shape:
    code, edges = kernel.code, successors(kernel.code)

    def those(name: str) -> list[int]:
        return [n for n, (_, text) in enumerate(code) if opcode(text).startswith(name)]

    loads, stores = those("LDG.E.128"), those("STG.E.128")

    def turns(places: list[int]) -> dict[int, list[int]]:
        """The loops without a store that these instructions lie on."""
        found = {n: turn(edges, n) for n in places}
        return {n: loop for n, loop in found.items() if loop and not set(loop) & set(stores)}

    if kernel.sequence:
        term = pass_header(code, edges)
        (inner,) = [loop for loop in turns(those("LDG.E.64")).values() if term not in loop]
        load = next(n for n in loads if n != term and turn(edges, n))
    else:
        (inner,) = turns(those("LDS.64")).values()
        (term,) = [n for n in those("LDS.64") if n not in inner and turn(edges, n)]
        load = loads[0]
    return Shape(edges, load, term, stores, inner, round_trip(edges, [load, term, stores[-1]]))


def steps(kernel: Kernel, s: Shape) -> dict[str, list[int]]:
    """name -> one turn of a sequence's loop over passes, for a pass with one live term: the cheapest such pass, and one that rounds
    stochastically."""

    def best(count: int, least: int, most: int) -> list[int]:
        return pass_turn(kernel.code, s.edges, s.term, count, least, most)

    result = {kernel.name: best(1, 15, 21)}
    if kernel.dtype != "float32":
        result[kernel.name.replace("sequence", "sequence-stochastic")] = best(2, 45, 61)
    return result


def bit_mask_stops(kernel: Kernel, s: Shape) -> list[int]:
    """The block that loads the two bytes of a whole group."""
    for run in blocks(kernel.code, s.edges):
        loads = [n for n in run if opcode(kernel.code[n][1]).startswith("LDG.E.U8")]
        if len(loads) == 2:
            return loads
    raise ValueError("no block loads two mask bytes")


def random_mask_stops(kernel: Kernel, s: Shape) -> list[int]:
    """The two calls of Philox that lie between the loads and the loop over terms but not on the usual way."""
    between = range(s.load, s.term)
    stops = [n for n in between if opcode(kernel.code[n][1]).startswith("IMAD.WIDE.U32") and n not in set(s.usual)]
    if len(stops) < 36:
        raise ValueError("no random mask before the loop over terms")
    return [stops[0], stops[-1]]


def scale_stops(kernel: Kernel, s: Shape) -> list[int]:
    """For both chunks, the eight products with one scale."""
    stops = []
    for run in blocks(kernel.code, s.edges):
        products = [n for n in run if opcode(kernel.code[n][1]) == "FMUL" and n not in set(s.usual)]
        factors = [set(re.findall(r"\bR\d+\b", kernel.code[n][1].split(",", 1)[1])) for n in products]
        if len(products) >= 8 and set.intersection(*factors[:8]):
            stops += [products[0], products[7]]
    if len(stops) != 4:
        raise ValueError(f"{len(stops) // 2} blocks of eight products with a scale instead of 2")
    return stops


def rank_stops(kernel: Kernel, s: Shape) -> list[int]:
    """For both chunks, the loop over the rank: a place of each, eight products with numbers that two wide loads brought."""
    found: dict[frozenset[int], int] = {}
    for n in (n for n, (_, text) in enumerate(kernel.code) if opcode(text).startswith("LDG.E.128")):
        loop = turn(s.edges, n)
        if sum(opcode(kernel.code[m][1]) == "FFMA" for m in loop) == 8 and not set(loop) & set(s.stores):
            found.setdefault(frozenset(loop), n)
    if len(found) != 2:
        raise ValueError(f"{len(found)} loops over the rank instead of 2")
    return sorted(found.values())


FEATURES: dict[str, tuple[bool, Callable[[Kernel, Shape], list[int]]]] = {  # whether before the loop over terms
    "bit-mask": (True, bit_mask_stops),
    "random-mask": (True, random_mask_stops),
    "scale": (False, scale_stops),
}


def counts(kernel: Kernel) -> dict[str, tuple[int, float, float]]:
    """name -> (width of the narrowest access to weights, instructions per element, per element and term); the features' names
    are appended to the kernel's."""
    s = shape(kernel)
    if kernel.sequence:
        widths = [access_width(kernel.code[n][1]) for n in s.usual if opcode(kernel.code[n][1]).startswith(("LDG.E.128", "STG"))]
        return {name: (min(widths), len(path) / PER_THREAD, len(s.loop) / PER_THREAD) for name, path in steps(kernel, s).items()}
    ways = {kernel.name: s.usual}
    per_term = dict.fromkeys(ways, len(s.loop))
    if kernel.extended:
        stops, name = rank_stops(kernel, s), f"{kernel.name}-low-rank"
        ways[name] = round_trip(s.edges, [s.load, *stops, s.stores[-1]])  # each loop once
        per_term[name] = sum(len(turn(s.edges, n)) for n in stops)
    elif not kernel.lean:
        for feature, (before, stops) in FEATURES.items():
            there = stops(kernel, s)
            middle = [*there, s.term] if before else [s.term, *there]
            ways[f"{kernel.name}-{feature}"] = round_trip(s.edges, [s.load, *middle, s.stores[-1]])
            per_term[f"{kernel.name}-{feature}"] = len(s.loop)
    result = {}
    for name, path in ways.items():
        texts = [kernel.code[n][1] for n in path]
        missing = [n for n in s.stores if n not in path]
        if missing:
            raise ValueError(f"{name}: the way misses the stores {missing}")
        stores = [access_width(t) for t in texts if opcode(t).startswith("STG")]
        loads = [access_width(t) for t in texts if opcode(t).startswith("LDG.E.128")]
        result[name] = (min(loads + stores), len(path) / PER_THREAD, per_term[name] / PER_THREAD)
    return result


def rule_counts(kernel: RuleKernel) -> dict[str, tuple[int, float, float]]:
    """As `counts`, for a whole span of a rule: name -> (width, instructions per element, per element and term), Gaussian and Rademacher."""
    code = kernel.function.code
    edges = successors(code)

    def those(name: str) -> list[int]:
        return [n for n, (_, text) in enumerate(code) if opcode(text).startswith(name)]

    def number(name: str, path: list[int]) -> int:
        return sum(opcode(code[n][1]).split(".")[0] == name for n in path)

    loads, stores = those("LDG.E.128"), those("STG.E.128")
    turns = {n: turn(edges, n) for n in those("LDS.64")}
    loops = {n: loop for n, loop in turns.items() if not set(loop) & set(stores)}
    # Gaussian numbers are made by an fma and end in the mix, four sums for each of the 16; signs need neither.
    (gaussian,) = [loop for loop in loops.values() if number("FFMA", loop)]
    (signs,) = [loop for loop in loops.values() if not number("FFMA", loop)]
    inside = {n for run in loops.values() for n in run}
    (mix,) = [run[0] for run in blocks(code, edges) if number("FADD", run) >= 64 and not set(run) & inside]
    first = [n for n in turns if n not in loops]  # the first term's load: a history has no term before its loop
    ways = {
        kernel.name: (round_trip(edges, [loads[0], *first, mix, stores[-1]] if first else [mix, loads[0], stores[-1]]), gaussian),
        f"rademacher-{kernel.name}": (round_trip(edges, [loads[0], *first, stores[-1]]), signs),
    }
    if mix in ways[f"rademacher-{kernel.name}"][0]:
        raise ValueError(f"{kernel.name}: the way of signs passes the mix of Gaussian numbers")
    result = {}
    for name, (path, loop) in ways.items():
        if missing := set(stores) - set(path):
            raise ValueError(f"{name}: the way misses the stores {sorted(missing)}")
        accesses = [code[n][1] for n in path if opcode(code[n][1]).startswith(("LDG.E.128", "STG"))]
        result[name] = (min(map(access_width, accesses)), len(path) / PER_THREAD, len(loop) / PER_THREAD)
    return result


# ---- rows -------------------------------------------------------------------------------------------------------------


def rows_cuda(archs: tuple[int, ...] = ARCHS, dtypes: tuple[str, ...] = tuple(DTYPES.values())) -> Iterator[dict[str, Any]]:
    for arch in archs:
        for kernel in (k for k in kernels(arch) if k.dtype in dtypes):
            for name, found in counts(kernel).items():
                yield row(name, kernel.arch, kernel.dtype, 1, kernel, found)
        for rule in (k for k in rule_kernels(arch) if k.dtype in dtypes):
            terms = "K" if rule.rule == "adam_history" else 1
            for name, found in rule_counts(rule).items():
                yield row(name, rule.arch, rule.dtype, terms, rule.function, found)


def row(
    name: str, arch: int, dtype: str, terms: int | str, usage: Kernel | Function, found: tuple[int, float, float]
) -> dict[str, Any]:
    bits, per_element, per_term = found
    return {
        "backend": "cuda",
        "kernel": name,
        "arch": f"sm_{arch}",
        "dtype": dtype,
        "terms": terms,
        "instructions_per_element": round(per_element, 2),
        "instructions_per_element_term": round(per_term, 2),
        "registers": usage.registers,
        "spill_bytes": usage.spill_bytes,
        "access_bits": bits,
    }


def left_out() -> list[str]:
    """The backends whose kernels cannot be read here, each with the reason."""
    result = []
    if reason := unavailable():
        result.append(f"CUDA kernels left out: {reason}")
    if importlib.util.find_spec("triton") is None:
        result.append("Triton kernels left out: no triton")
    return result


def rows(dtypes: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Every row that this machine can count."""
    missing = " ".join(left_out())
    if "CUDA" not in missing:
        yield from rows_cuda(dtypes=dtypes)
    if "Triton" not in missing:
        yield from rows_triton(dtypes=dtypes)
        yield from rows_rules(dtypes=dtypes)
        yield from rows_linear(dtypes=dtypes)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the CSV file; default: standard output")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES.values(), default=list(DTYPES.values()))
    args = parser.parse_args(arguments)
    missing = left_out()
    print(*missing, sep="\n", end="\n" * bool(missing), file=sys.stderr)
    if args.out is None:
        writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows(tuple(args.dtypes)))
    elif missing:
        print(f"{args.out.name} is not written: without a backend it would look whole", file=sys.stderr)
    else:
        harness.write_csv(args.out, COLUMNS, rows(tuple(args.dtypes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
