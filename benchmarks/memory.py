"""What does a step of each method take of memory, beside inference and first-order fine-tuning? For bare shapes, nothing downloaded.

    python benchmarks/memory.py --shapes opt-125m,gpt2 --work /tmp/profiles --out benchmarks/results/memory.csv

Belongs here: which shapes, and where the outcome goes. Does not belong here: the measuring, which is `zo-finetune profile`; a profile that lies in --work
already is taken where the same commit made it, and else made anew. Bytes on a CPU are counted and the same every time; the seconds are those of a machine
that may be shared.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import harness
from zo_finetune.cli import main as zo_finetune

COLUMNS = (
    *("shape", "method", "peft", "weights", "trained_weights", "dtype", "batch", "sequence", "threads", "forwards", "model_bytes", "state_bytes"),
    *("gradient_bytes", "buffer_bytes", "peak_bytes", "peak_rss_bytes", "seconds_per_step", "reason"),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="opt-125m,gpt2")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    rows, now = [], harness.commit()
    for shape in args.shapes.split(","):
        work, measured = args.work / shape, args.work / f"{shape}.commit"
        if now.endswith("+") or not measured.exists() or measured.read_text() != now:
            sizes = ["--batch-size", args.batch, "--length", args.length, "--steps", args.steps]
            if code := zo_finetune(["profile", "--shape", shape, *map(str, sizes), "--output", str(work)]):
                return code
            measured.write_text(now)
        content = json.loads((work / "result.json").read_text())
        for row in content["rows"]:
            more = {
                "shape": shape,
                "batch": row["batch_size"],
                "sequence": row["length"],
                "threads": content["machine"]["torch_threads"],
            }
            rows.append({**{name: row.get(name, "") for name in COLUMNS}, **more})
    harness.write_csv(args.out, COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
