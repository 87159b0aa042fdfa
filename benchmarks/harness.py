"""What every benchmark shares: the description of the machine, interleaved timing, memory, bytes moved, the one CSV writer.

Belongs here: measuring and recording, on any device. Does not belong here: what is measured (one script for each question), and
assertions about time: nothing here or in the tests ever decides on one.

A row holds what a reader needs to judge a figure (processor, GPU, versions) and nothing that identifies a machine: no host name,
no path, no user.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
RESULTS = Path(__file__).parent / "results"
MACHINE_COLUMNS = ("cpu", "cores", "gpu", "torch", "triton", "cuda", "zo_kernels", "commit")


# ---- the machine ------------------------------------------------------------------------------------------------------


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line for line in lines if line.startswith("flags")), "")
    widest = "AVX-512" if " avx512f" in flags else "AVX2" if " avx2" in flags else ""
    return f"{name} ({widest})" if widest else name


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit that was measured, with a + if files other than results and pages differ from it; $COMMIT where there is no repository
    (a copy of the tree on another machine); empty where nobody knows."""
    here = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*here, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
        unchanged = subprocess.run(
            [*here, "diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)benchmarks/results", ":(top,exclude)docs"]
        )
    except OSError:
        return os.environ.get("COMMIT", "")
    if found.returncode:
        return os.environ.get("COMMIT", "")
    return found.stdout.strip() + ("+" if unchanged.returncode else "")


def machine() -> dict[str, str | int]:
    """The columns that start every row; empty where there is no such thing."""
    import zo_kernels

    gpu = torch.cuda.is_available()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "gpu": torch.cuda.get_device_name() if gpu else "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": (torch.version.cuda or "") if gpu else "",
        "zo_kernels": zo_kernels.__version__,
        "commit": commit(),
    }


# ---- timing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over all rounds. The spread is stated with every median; a mean would hide a disturbed round.

    `cpu`: of the process's processor time, which other work of the machine disturbs less; () where it was not taken."""

    seconds: tuple[float, ...]
    cpu: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def columns(self) -> dict[str, float | int]:
        return {
            "rounds": len(self.seconds),
            "median_s": significant(self.median),
            "min_s": significant(min(self.seconds)),
            "max_s": significant(max(self.seconds)),
        }


TIMING_COLUMNS = ("rounds", "median_s", "min_s", "max_s")


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    device: torch.device | str = "cpu",
    warmup: int = 1,
    calls: int | Mapping[str, int] = 1,
    around: Mapping[str, tuple[Callable[[], Any], Callable[[], Any]]] | None = None,
) -> dict[str, Timing]:
    """Time every contender once in each round, so that a slow minute of the machine falls on all of them alike.

    Args:
        contenders: name -> a function without arguments.
        rounds: timings of each; the order is reversed in every other round.
        device: synchronised before a clock is read.
        warmup: untimed calls of each, first.
        calls: back-to-back calls inside one timing, without a synchronisation between them, as in a training loop; of each, or of
            all.
        around: untimed calls right before and after each timing, for contenders that must not leave their state to the others.
    """
    calls = calls if isinstance(calls, Mapping) else dict.fromkeys(contenders, calls)
    for function in contenders.values():
        for _ in range(warmup):
            function()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            before, after = (around or {}).get(name, (_nothing, _nothing))
            before()
            cpu = time.process_time()
            wall = seconds_of(contenders[name], calls[name], device)
            seconds[name].append((wall, (time.process_time() - cpu) / calls[name]))
            after()
    return {name: Timing(*zip(*values, strict=True)) for name, values in seconds.items()}


def _nothing() -> None:
    pass


def seconds_of(function: Callable[[], Any], calls: int, device: torch.device | str) -> float:
    """Seconds of one of `calls` back-to-back calls."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def calls_lasting(function: Callable[[], Any], seconds: float, device: torch.device | str, most: int = 1000) -> int:
    """How many calls in a row last about so long: at least one. The function is called twice, so that one call is warm."""
    function()
    return max(1, min(most, round(seconds / max(1e-9, seconds_of(function, 1, device)))))


def rewrite_(t: Tensor) -> None:
    """Read every byte of `t` and write it back: the plainest pass over memory that torch has. Integers, since half-precision
    arithmetic on a CPU is bound by its conversions, not by memory."""
    t.view(-1).view(torch.int32).bitwise_xor_(0)


def device_script(
    doc: str, columns: Sequence[str], rows: Callable[[torch.device, bool], Iterable[Mapping[str, Any]]], arguments: list[str] | None
) -> int:
    """The command line of a script that times backends on one device and writes one CSV file: --device, --out, --quick."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="the CSV file")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs; the figures mean nothing")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    table = None
    for row in rows(torch.device(args.device), args.quick):
        table = table or Table(args.out, columns)
        table.add(row)
    if table is None:
        print("no backend could be timed", file=sys.stderr)
        return 1
    return 0


def calls(function: Callable[[], Any]) -> int:
    """How many functions are called, C's too."""
    count = 0

    def note(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


# ---- memory -----------------------------------------------------------------------------------------------------------


def reset_peak(device: torch.device | str) -> None:
    """Start a new peak. CPU: the kernel's high-water mark of resident memory (Linux); CUDA: torch's allocator.

    glibc keeps freed memory resident; it is first asked to give it back, or a mode would be charged for the one before.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except (AttributeError, OSError):
            return


def peak_bytes(device: torch.device | str) -> int | None:
    """The peak since `reset_peak`; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def free_bytes(device: torch.device | str) -> int:
    """Memory that can still be allocated. On the CPU: what the kernel calls available (Linux), else 4 GiB, a cautious guess."""
    if torch.device(device).type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 4 << 30
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch has a class for that on GPUs, and none on the CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


# ---- bytes moved ------------------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations of torch read and write: floating-point tensors of at least one dimension, whole, each argument
    once. `counting`: asked after each operation whether it counts. `storages`: only reads of these (by address of the storage).

    What a gather reads is what it returns. Views move nothing, nor does allocation; noise is written without a read. Caches are not
    modelled: these are the bytes that kernels ask for.
    """

    def __init__(self, counting: Callable[[], bool] = lambda: True, storages: set[int] | None = None) -> None:
        super().__init__()
        self.counting, self.storages, self.read, self.written = counting, storages, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not func.is_view and not func.name().startswith(("aten::empty", "aten::new_empty")) and self.counting():
            self.count(func, args, kwargs, result)
        return result

    def count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name, schema = func.name().partition("::")[2].partition(".")[0], func._schema.arguments
        passed = [*zip(schema, args, strict=False), *((a, kwargs[a.name]) for a in schema if a.name in kwargs)]
        written: dict[int, Tensor] = {id(t): t for t in _tensors(result)}
        read: dict[int, Tensor] = {}
        for argument, value in passed:
            mutated = argument.alias_info is not None and argument.alias_info.is_write
            if mutated:
                written |= {id(t): t for t in _tensors(value)}
            # An in-place operation reads what it changes, unless all of it is overwritten.
            if not (mutated and (argument.is_out or name in OVERWRITES)):
                read |= {id(t): t for t in _tensors(value)}
        moved = sum(t.nbytes for t in written.values())
        for t in read.values():
            if self.storages is None or t.untyped_storage().data_ptr() in self.storages:
                self.read += min(t.nbytes, moved) if name in GATHERS else t.nbytes
        self.written += moved if self.storages is None else 0


GATHERS = ("embedding", "index_select")
NUMBERS = 16  # float64 numbers that are no weights
OVERWRITES = ("copy_", "fill_", "zero_", "normal_", "uniform_")


def _tensors(tree: Any) -> list[Tensor]:
    """The plain floating-point tensors in an argument or a result, but for numbers of a step: its losses, what follows from them."""
    if isinstance(tree, (tuple, list)):
        return [t for node in tree for t in _tensors(node)]
    plain = type(tree) in (Tensor, torch.nn.Parameter) and tree.is_floating_point()
    return [tree] if plain and (tree.dtype != torch.float64 or tree.numel() > NUMBERS) and tree.dim() else []


# ---- results ----------------------------------------------------------------------------------------------------------


def significant(x: float, digits: int = 5) -> float:
    """`x` to so many significant digits: more would be noise in a committed file."""
    return float(f"{x:.{digits}g}")


def write_csv(path: Path | str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], append: bool = False) -> None:
    """The one writer: `MACHINE_COLUMNS`, then `columns`. A row that lacks a column or has another one is a mistake and refused.

    Raises:
        ValueError: a row's keys are not `columns`, or `append` to a file with another header. Nothing has been written.
    """
    rows = [dict(row) for row in rows]
    for row in rows:
        _check_row(Path(path), columns, row)
    table = Table(path, columns, append)
    for row in rows:
        table.add(row)


class Table:
    """A CSV file that grows row by row: who is cut off keeps what was measured. `write_csv` says what is in it, and what is refused.

    Raises:
        ValueError: as `write_csv`, or nobody knows which commit is measured.
    """

    def __init__(self, path: Path | str, columns: Sequence[str], append: bool = False) -> None:
        self.path, self.columns = Path(path), columns
        self.header = [*MACHINE_COLUMNS, *columns]
        append = append and self.path.exists()
        if append and (found := next(csv.reader(self.path.open(newline="")), [])) != self.header:
            raise ValueError(f"{self.path.name} has the columns {found}, not {self.header}: write to another file")
        self.machine = machine()
        if not self.machine["commit"]:
            raise ValueError(f"{self.path.name}: a row names its commit, and here is no repository: set COMMIT")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not append:
            with self.path.open("w", newline="") as file:
                csv.DictWriter(file, self.header, lineterminator="\n").writeheader()

    def add(self, row: Mapping[str, Any]) -> None:
        _check_row(self.path, self.columns, row)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.header, lineterminator="\n").writerow({**self.machine, **row})


def _check_row(path: Path, columns: Sequence[str], row: Mapping[str, Any]) -> None:
    if set(row) != set(columns):
        raise ValueError(f"{path.name}: a row differs from the columns in {sorted(set(row) ^ set(columns))}")


def read_csv(path: Path | str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def fill(page: Path, name: str, text: str) -> None:
    """Put `text` between <!-- table NAME --> and <!-- end --> of a page.

    Raises:
        ValueError: the page has no such place.
    """
    old = page.read_text(encoding="utf-8")
    place = re.compile(rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    filled, found = place.subn(lambda m: f"{m[1]}\n{text}\n{m[2]}", old)
    if not found:
        raise ValueError(f"{page} has no <!-- table {name} --> ... <!-- end -->")
    page.write_text(filled, encoding="utf-8")
