"""What recording a step costs: appending one record to the journal by durability policy, reading a journal back, and whole steps with and
without a journal.

    python benchmarks/journal.py --out journal.csv --folder RUNS           a folder on the disk in question; default: a temporary one

Belongs here: what a journal costs. Does not belong here: what a step costs (step.py).

The record is that of plain MeZO in scratch mode. `append, fsync every N` includes its share of the `fsync`; N = 0 is a `write` to the
operating system alone. `read` checks every record of the longest journal. What `fsync` costs is the disk's affair: the file system's type is
in the row. `step` and `step, recorded` are MeZOStep's on a CPU, scratch mode, a model of each its own, fp32, 4x32 tokens; `us_per_record` is then
a step's time. Where steps are slow and noisy, the cost of `append` over the time of a step is the better measure of the overhead.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import step as steps
import torch
from torch import Tensor

from zo_kernels import MeZOStep, journal

COLUMNS = ("operation", "fsync_every", "file_system", "record_bytes", "records", *harness.TIMING_COLUMNS, "us_per_record")


def file_system(folder: Path) -> str:
    """Its type, such as ext4 or tmpfs; empty where the system does not tell."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    mounts = {Path(line.split()[4]): line.split(" - ")[1].split()[0] for line in lines}
    folder = folder.resolve()
    return next((mounts[p] for p in (folder, *folder.parents) if p in mounts), "")


def sample_header() -> journal.Header:
    """Of a model with 100 parameters."""
    sha256 = journal.digest(torch.zeros(1))
    return journal.Header(
        0, tuple(journal.Parameter(f"layers.{k}.weight", (64, 64), "float16", sha256, stream=k) for k in range(100))
    )


def appender(path: Path, fsync_every: int, records: int) -> Callable[[], None]:
    """A function that appends so many records to one journal, which grows from call to call."""
    writer = journal.create(path, sample_header(), fsync_every=fsync_every)

    def append() -> None:
        first = writer.records
        for tag in range(first, first + records):
            writer.append(tag, [[-1.25e-6]], decay=[1.0], loss=0.5, stochastic=True)

    return append


def stepper(shape: str, path: Path | None) -> Callable[[], Tensor]:
    """A function that does one step on a model of its own."""
    model = steps.make_model(shape, torch.device("cpu"), torch.float32)
    ids = torch.randint(0, 500, (4, 32), generator=torch.Generator().manual_seed(0))
    optimizer = MeZOStep(model, lr=1e-6, eps=1e-3, perturbation="scratch", journal=path)

    def closure() -> Tensor:
        return model(input_ids=ids, labels=ids).loss.float()

    return lambda: optimizer.step(closure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="CSV file")
    parser.add_argument("--folder", type=Path, help="where the journals are written")
    parser.add_argument("--records", type=int, default=2000, help="appended in one timing; fsync after each: a twentieth of it")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model-shape", choices=steps.SHAPES, metavar="SHAPE", default="llama-15m", help="of the steps")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        counts = {0: args.records, 100: args.records, 1: max(1, args.records // 20)}
        contenders = {f"append, fsync every {every}": appender(folder / f"{every}.zoj", every, n) for every, n in counts.items()}
        timings = harness.interleaved(contenders, rounds=args.rounds)
        longest = folder / "0.zoj"
        held = len(journal.read(longest))
        timings |= harness.interleaved({"read": lambda: journal.read(longest)}, rounds=args.rounds)
        whole = {"step": stepper(args.model_shape, None), "step, recorded": stepper(args.model_shape, folder / "step.zoj")}
        timings |= harness.interleaved(whole, rounds=args.rounds)
        rows: list[dict[str, Any]] = []
        for label, timing in timings.items():
            operation, _, every = label.partition(", fsync every ")
            records = counts[int(every)] if every else held if operation == "read" else 1
            rows.append({
                "operation": operation,
                "fsync_every": every,
                "file_system": file_system(folder),
                "record_bytes": sample_header().record.itemsize,
                "records": records,
                **timing.columns(),
                "us_per_record": harness.significant(1e6 * timing.median / records),
            })  # fmt: skip
            print(f"{label}: {rows[-1]['us_per_record']} µs a record", flush=True)
    harness.write_csv(args.out, COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
