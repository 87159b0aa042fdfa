"""What do the methods reach with equal forward passes? Three seeds each, on a real model and real text, as large as two CPU cores allow.

    python benchmarks/compare.py --model PATH --data PATH --out benchmarks/results/compare.csv --figures docs/figures --page docs/algorithms.md

Belongs here: which methods, with which learning rates, and where the outcome goes. Does not belong here: the comparison itself, which is
`zo-finetune compare`; a second call goes on where the first was stopped. The CSV leaves times out: the runs may share their machine.

Two settings: LN tuning for all methods that it suits, and full tuning for those that need matrices, beside MeZO. The two rates of each method lie
so that a step moves a weight about as far by all methods: MeZO's step is lr |g|, |g| about 1 for LN here, a sign's or Adam's lr, FZOO's
lr / (eps sqrt(queries)).
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from pathlib import Path

import harness
from zo_finetune.cli import main as zo_finetune

RATES = {  # by --peft: the lower of two; the other is four times as large
    "ln": {
    "mezo": 3e-3, "mezo:queries=4": 3e-3, "sign": 3e-3, "momentum": 1e-3, "zo-adam": 3e-3, "conservative": 3e-3, "forward-grad": 3e-3,
    "hybrid:first_order_lr=1e-3": 3e-3, "blockwise": 3e-3, "sparse": 3e-3, "random-sparse": 3e-3, "layer-scale": 3e-3, "hizoo": 3e-3,
    "fzoo": 1e-4,
    },
    "none": {"mezo": 1e-6, "lozo": 1e-6, "dizo:every=20": 1e-6},
}  # fmt: skip
SIZES = {
    "forwards": "200", "seeds": "0,1,2", "lr-factors": "1,4", "points": 4, "clip": 15, "batch-size": 8, "train-examples": 1000,
    "dev-examples": 100, "eval-examples": 300, "max-length": 32,
}  # fmt: skip
QUICK = {"forwards": "10", "seeds": "0,1", "lr-factors": "1", "train-examples": 20, "dev-examples": 4, "eval-examples": 6}
OWN = (
    "model",
    "task",
    "peft",
    "batch",
    "method",
    "seed",
    "forwards",
    "steps",
    "lr",
    "eps",
    "accuracy_before",
    "accuracy",
    "accuracy_stderr",
)
OWN += ("loss_before", "loss", "dev_loss", "state_bytes", "trained_weights", "skipped_steps")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "compare.csv")
    parser.add_argument("--work", type=Path, default=Path("runs/compare"), help="the runs themselves (default: %(default)s)")
    parser.add_argument("--figures", type=Path, help="folder for compare.png")
    parser.add_argument("--page", type=Path, help="a page with a table between <!-- table compare --> and <!-- end -->")
    parser.add_argument("--peft", nargs="+", default=list(RATES), choices=list(RATES), help="the settings (default: all)")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="(default: the setting's)")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    sizes = SIZES | (QUICK if options.quick else {})
    rows: list[dict[str, object]] = []
    tables: list[str] = []
    for peft in options.peft:
        work, rates = options.work / peft, RATES[peft]
        arguments = [
            "compare",
            "--model",
            options.model,
            "--data",
            options.data,
            "--task",
            "sst2",
            "--output",
            str(work),
            "--peft",
            peft,
        ]
        arguments += [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
        methods = [name for name in rates if name in (options.methods or rates)]
        arguments += ["--methods", ",".join(methods)]
        arguments += [part for name in methods for part in ("--lr", f"{name}={rates[name]:g}")]
        if code := zo_finetune(arguments):
            return code
        content = json.loads((work / "compare.json").read_text(encoding="utf-8"))
        fixed = {name: content[name] for name in ("model", "task", "peft")}
        rows += [{**row, **harness.machine(), **fixed, "batch": sizes["batch-size"]} for row in content["runs"]]
        tables.append(f"`--peft {peft}`. " + (work / "table.md").read_text(encoding="utf-8").lstrip())
        if options.figures:
            shutil.copyfile(work / "curves.png", options.figures / f"compare-{peft}.png")
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, (*harness.MACHINE_COLUMNS, *OWN), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    if options.page:
        harness.fill(options.page, "compare", "\n".join(tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
