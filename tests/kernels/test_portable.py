"""The portable CPU code as other compilers and processors see it: every case and vector on an emulated AArch64, and the machine code.

Belongs here: perturb_portable.cpp compiled by hand. Does not belong here: the portable code of this machine's build (test_cpu.py).
Debian's packages g++-aarch64-linux-gnu and qemu-user bring what the first part needs.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels import cases
from tests.kernels.test_build import setup  # noqa: F401  (a fixture)
from tests.kernels.test_cuda_host import CPass
from tests.vectors.make import check, vectors
from zo_kernels import _backends, checks
from zo_kernels.plan import Pass, Passes, Plan

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
# name, compiler and its target, disassembler
COMPILERS = {
    "x86-64 g++": (["g++"], "x86_64", "objdump"),
    "x86-64 clang++": (["clang++", "--target=x86_64-linux-gnu"], "x86_64", "objdump"),
    "AArch64 g++": (["aarch64-linux-gnu-g++"], "aarch64", "aarch64-linux-gnu-objdump"),
    "AArch64 clang++": (["clang++", "--target=aarch64-linux-gnu"], "aarch64", "aarch64-linux-gnu-objdump"),
}


def compiler(name: str) -> tuple[list[str], str, str]:
    command, machine, disassembler = COMPILERS[name]
    for program in (command[0], disassembler):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    if machine == "aarch64" and not Path("/usr/aarch64-linux-gnu/include").is_dir():
        pytest.skip("the headers of AArch64 are not installed (Debian: g++-aarch64-linux-gnu)")
    found = subprocess.run([*command, "-dumpmachine"], capture_output=True, text=True).stdout
    if not found.startswith(machine):
        pytest.skip(f"{command[0]} compiles for {found.strip()}")
    return command, machine, disassembler


# ---- bits, on an emulated AArch64 ---------------------------------------------------------------------------------------


class Remote:
    """A process that runs remote.cpp; `perturb` and `sequence` are a backend's."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def perturb(self, plan: Plan, p: Pass) -> None:
        c = CPass(p.seed, checks.DTYPES[plan.dtype], checks.KINDS[p.kind], checks.ROUNDINGS[p.rounding], p.decay is not None)
        c.decay = 0.0 if p.decay is None else float(p.decay)
        tags = np.asarray([int(t) for t in p.tags], dtype=np.int64)
        coefs = np.asarray([float(c) for c in p.coefs], dtype=np.float32)
        self.call(plan, c, [tags.tobytes(), coefs.tobytes(), b"", b"", b""])

    def sequence(self, plan: Plan, passes: Passes) -> None:
        c = CPass(passes.seed, checks.DTYPES[plan.dtype], checks.KINDS[passes.kind])
        c.n_passes = len(passes)
        self.call(plan, c, [raw(t) for t in (passes.tags, passes.coefs, passes.first, passes.decay, passes.rounding)])

    def call(self, plan: Plan, c: CPass, arrays: list[bytes]) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        message = [struct.pack("<6q", len(plan.entries), *map(len, arrays)), bytes(c), *arrays]
        for entry, record in zip(plan.entries, plan.table, strict=True):
            right = None if entry.right is None else entry.right.t()
            parts = [raw(t) for t in (entry.src, entry.mask, entry.scale, entry.rows, entry.left, right)]
            message += [record.tobytes(), struct.pack("<6q", *map(len, parts)), *parts]
        self.process.stdin.write(b"".join(message))
        self.process.stdin.flush()
        code, broken = struct.unpack("<qq", self.process.stdout.read(16))
        assert (code, broken) == (0, 0)
        for entry in plan.entries:
            if entry.dst.numel():
                answer = bytearray(self.process.stdout.read(len(raw(entry.dst))))
                entry.dst.copy_(torch.frombuffer(answer, dtype=entry.dst.dtype).view(entry.dst.shape))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)


def raw(t: Tensor | None) -> bytes:
    if t is None:
        return b""
    return t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def aarch64(setup: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:  # noqa: F811
    command, _, _ = compiler("AArch64 g++")
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if qemu is None:
        pytest.skip("qemu-aarch64 is not installed (Debian: qemu-user)")
    program = tmp_path_factory.mktemp("aarch64") / "remote"
    flags = [*setup.CXX_FLAGS, *setup.WARNINGS, "-Werror", "-static", "-pthread", f"-I{CSRC}"]
    sources = [CSRC / "cpu" / "perturb.cpp", CSRC / "cpu" / "perturb_portable.cpp", HERE / "remote.cpp"]
    subprocess.run([*command, *flags, *map(str, sources), "-o", str(program)], check=True)
    remote = Remote([qemu, str(program)])
    yield remote
    remote.close()


@pytest.mark.parametrize("what", cases.GROUPS)
def test_cases(what: str, aarch64: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    pick = _backends.pick

    def pick_remote(device: torch.device, name: str | None = None) -> object:
        return aarch64 if name == "aarch64" else pick(device, name)

    monkeypatch.setattr(_backends, "pick", pick_remote)
    for case in cases.GROUPS[what]:
        cases.check("aarch64", case)


@pytest.mark.parametrize("v", vectors())
def test_vectors(v: dict[str, Any], aarch64: Remote) -> None:
    check(v, aarch64.perturb, aarch64.sequence)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half(dtype: torch.dtype, aarch64: Remote) -> None:
    cases.check_every_half(dtype, aarch64.perturb)


# ---- machine code -------------------------------------------------------------------------------------------------------

Line = tuple[int, str, str]  # address, mnemonic, operands


def innermost_loops(text: str) -> Iterator[list[Line]]:
    """The instructions between a backward branch's target and the branch, where no other backward branch lies between."""
    for function in re.split(r"\n\n", text):
        lines = [(int(a, 16), op, rest) for a, op, rest in re.findall(r"^ *([0-9a-f]+):\t(\S+)[ \t]*(.*)$", function, re.M)]
        back = []
        for at, op, rest in lines:
            target = re.search(r"(?:^|, )([0-9a-f]+) <", rest) if re.match(r"j|b$|b\.|cb|tb", op) else None
            if target and int(target[1], 16) < at:
                back.append((int(target[1], 16), at))
        for start, end in back:
            if not any(start <= other[0] and other[1] < end for other in back):
                yield [line for line in lines if start <= line[0] <= end]


VECTOR_PRODUCT = {"x86_64": r"pmuludq .*", "aarch64": r"umull2? v.*"}
SCALAR_PRODUCT = {"x86_64": r"(mul|imul) .*", "aarch64": r"(umull|umulh|umaddl|mul) [wx].*"}
VECTOR_SUM = {"x86_64": r"(addps|subps) .*", "aarch64": r"(fadd|fsub) v\d+\.4s.*"}
SCALAR_SUM = {"x86_64": r"(addss|subss) .*", "aarch64": r"(fadd|fsub) s.*"}


def count(loop: list[Line], pattern: str) -> int:
    return sum(re.fullmatch(pattern, f"{op} {rest}") is not None for _, op, rest in loop)


def loops(name: str, flags: list[str], folder: Path) -> tuple[str, list[list[Line]]]:
    command, machine, disassembler = compiler(name)
    target = folder / "portable.o"
    source = CSRC / "cpu" / "perturb_portable.cpp"
    subprocess.run([*command, *flags, f"-I{CSRC}", "-c", str(source), "-o", str(target)], check=True)
    text = subprocess.run([disassembler, "-d", "--no-show-raw-insn", str(target)], capture_output=True, text=True, check=True)
    return machine, list(innermost_loops(text.stdout))


@pytest.mark.parametrize("name", COMPILERS)
def test_machine_code(name: str, setup: Any, tmp_path: Path) -> None:  # noqa: F811
    """Philox and the mix run four calls abreast, and no loop has them one call at a time."""
    machine, found = loops(name, [*setup.CXX_FLAGS, *setup.WARNINGS, "-Werror"], tmp_path)
    philox = [loop for loop in found if count(loop, VECTOR_PRODUCT[machine]) >= 36]
    mixes = [loop for loop in found if count(loop, VECTOR_SUM[machine]) >= 64]
    assert philox
    assert mixes
    for loop in found:
        assert count(loop, SCALAR_PRODUCT[machine]) < 10, f"a scalar Philox in the loop at {loop[0][0]:x}"
        assert count(loop, SCALAR_SUM[machine]) < 8, f"a scalar mix in the loop at {loop[0][0]:x}"
    # A round is 4 vector products (2 for each half of the calls), taking their halves apart (x86 shuffles more), and 4 xors.
    for loop in philox:
        assert len(loop) / count(loop, VECTOR_PRODUCT[machine]) <= {"x86_64": 8.5, "aarch64": 5.0}[machine]
