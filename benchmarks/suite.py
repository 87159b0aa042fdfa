"""What does the suite say of a model? Zero-shot, in-context, probe, Adam, MeZO and DiZO on the tasks at hand, three seeds, as large as two CPU cores allow.

    python benchmarks/suite.py --model PATH --data ROOT --figures docs/figures --page docs/suite.md

Belongs here: which cells, and where the outcome goes. Does not belong here: the suite itself, which is `zo-finetune suite`; a second call goes on where
the first was stopped, and --written takes what is there. The CSV holds ours alone, and leaves times and memory out: the runs may share their machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import harness
from zo_finetune import suite_table
from zo_finetune.cli import main as zo_finetune
from zo_finetune.suites import SUITES

SUITE = SUITES["mezo"]
SIZES = {
    "tasks": "sst2,rte,cb,wsc,copa,boolq", "methods": "zero-shot,in-context,probe,adam,mezo,dizo", "steps": 20, "seeds": "0,1,2",
    "lr-factors": "1,10", "points": 1, "train-examples": 200, "dev-examples": 40, "eval-examples": 100, "batch-size": 8, "max-length": 96,
    "keep": "last",
}  # fmt: skip
QUICK = {
    "steps": 1,
    "seeds": "0",
    "methods": "zero-shot,mezo",
    "lr-factors": "1",
    "train-examples": 8,
    "dev-examples": 4,
    "eval-examples": 4,
}
OWN = tuple(name for name in suite_table.COLUMNS if name not in ("source", "seconds", "peak_memory_bytes"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "suite.csv")
    parser.add_argument("--work", type=Path, default=Path("runs/suite"), help="the cells themselves (default: %(default)s)")
    parser.add_argument("--figures", type=Path, help="folder for suite.png")
    parser.add_argument("--page", type=Path, help="a page with a table between <!-- table suite --> and <!-- end -->")
    parser.add_argument("--tasks", help="(default: those of the page)")
    parser.add_argument("--written", action="store_true", help="make nothing: take the cells that are in --work")
    parser.add_argument("--quick", action="store_true", help="a step or two, to see that it runs")
    options = parser.parse_args()
    if not options.written:
        sizes = SIZES | (QUICK if options.quick else {}) | ({"tasks": options.tasks} if options.tasks else {})
        arguments = [
            "suite",
            "--suite",
            SUITE.name,
            "--model",
            options.model,
            "--data",
            options.data,
            "--output",
            str(options.work),
        ]
        if code := zo_finetune([*arguments, *(part for name, value in sizes.items() for part in (f"--{name}", str(value)))]):
            return code
    rows = [row for row in harness.read_csv(options.work / "table.csv") if row["source"] == suite_table.OURS]
    harness.write_csv(options.out, OWN, ({name: row[name] for name in OWN} for row in rows))
    written = [{"source": suite_table.OURS, **row} for row in harness.read_csv(options.out)]
    written += suite_table.paper_rows(SUITE, dict.fromkeys(row["task"] for row in rows))
    if options.figures:
        title = f"suite {SUITE.name}, {rows[0]['model']}"
        suite_table.draw(options.figures / "suite.png", title, written, SUITE.apart)
    if options.page:
        harness.fill(options.page, "suite", suite_table.page(written, SUITE.apart))
    return 0


if __name__ == "__main__":
    sys.exit(main())
