"""Which method is above which? Ten with cross-entropy and with pairs, five seeds, equal forward passes, intervals; then four with half of MeZO's.

    python benchmarks/ranking.py --shared ../shared --work runs/ranking --plan          what there is to do, and how long it takes
    python benchmarks/ranking.py --shared ../shared --work runs/ranking                 do it; a second call goes on where the first was stopped
    python benchmarks/ranking.py --work runs/ranking --written --figures docs/figures --page docs/algorithms.md

Belongs here: which cells there are, and where the outcome goes. Does not belong here: the comparison itself, which is `zo-finetune compare`.

The last block is trained, from hidden states that are computed once (--train-blocks last:1). The first cell has every method with both objectives. In the
others `OURS` have half of the forward passes that MeZO has; they were named before any run, for what is expected of them: the space of the inputs, several
one-sided queries, pairs. Every learning rate is the best of three, a factor of 4 apart, by the dev rows of the first seed, which are training rows that no
run trains on. (A rate of the larger model's is higher, so its three begin higher.)

Each run is saved as it ends, and the CSV is written after each cell. Times in it are of this machine, whatever else it did.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from zo_finetune import figures, ranking
from zo_finetune.cli import main as zo_finetune
from zo_finetune.demo import MODEL, cache_dir
from zo_finetune.tasks import get_task

BASELINE, OBJECTIVES, FACTORS = "mezo", ("loss", "pairs"), "0.25,1,4"
# The middle of each method's learning rates, so that a step moves a weight about as far by all: MeZO's lr |g|, a sign's or Adam's lr,
# FZOO's lr / (eps sqrt(q)); masks that leave a share of the weights move these further. With eps 1e-3.
RATES = {
    "stories15m": {
        "mezo": 5e-5, "mezo:queries=8:one_sided=true": 5e-5, "sign": 8e-5, "momentum": 5e-6, "zo-adam": 8e-5, "sparse": 2e-4,
        "lozo": 1e-5, "fzoo": 4e-6, "mezo-inputs:rank=16": 1.5e-4, "fzoo-inputs:rank=16": 1.5e-5,
    },
    "smollm2": {"mezo": 4e-4, "fzoo": 2e-5, "mezo-inputs:rank=16": 1.2e-3, "fzoo-inputs:rank=16": 3e-5},
}  # fmt: skip
OURS = ("fzoo-inputs:rank=16@loss", "fzoo-inputs:rank=16@pairs", "mezo-inputs:rank=16@pairs", "fzoo@pairs")
FIRST_ORDER = {
    "adamw": 1e-4
}  # what backpropagation reaches with as many forward passes, with the first objective: a row beside, which is never chosen


@dataclass(frozen=True)
class Cell:
    """One comparison. `sizes`: of its runs, as options of `zo-finetune compare`."""

    model: str
    task: str
    data: str
    forwards: int
    sizes: Mapping[str, str | int]

    @property
    def name(self) -> str:
        return f"{self.model}-{self.data}"

    @property
    def by(self) -> str:
        """What chooses on the dev rows: AUC of two labels, which calibration does not move."""
        names = get_task(self.task).class_names
        return "auc" if names is not None and len(names) == 2 else "loss"


SMALL = {"batch-size": 32, "train-examples": 2000, "dev-examples": 300, "eval-examples": 0, "seeds": "0,1,2,3,4", "points": 1}
LARGE = {**SMALL, "batch-size": 16, "train-examples": 1000, "eval-examples": 800, "data-seed": 0}
CELLS = (
    Cell("stories15m", "sst2", "sst2", 1200, SMALL),
    Cell("smollm2", "sst2", "film_reviews", 1200, LARGE),
    Cell("smollm2", "sst2", "sst2", 1200, LARGE),
    Cell("smollm2", "sst5", "sst5", 1200, LARGE),
    Cell("stories15m", "sst5", "sst5", 1200, SMALL),
    Cell("stories15m", "rte", "rte", 1200, {**SMALL, "batch-size": 16}),
)
QUICK = {"batch-size": 4, "train-examples": 16, "dev-examples": 6, "eval-examples": 8, "seeds": "0,1", "points": 1}
OWN = (
    "model", "task", "data", "batch", "train_rows", "dev_rows", "baseline",
    *(name for name in ranking.columns(get_task("sst2")) if name != "kind"),
)  # fmt: skip


def source(options: argparse.Namespace, model: str, data: str) -> tuple[Path, Path]:
    """Where model and data of these names are."""
    if options.model:
        return options.model, options.shared
    at_model = cache_dir() / MODEL.name if model == "smollm2" else options.shared / "models" / model
    at_data = cache_dir() / data if data == "film_reviews" else options.shared / "data" / data
    return at_model, at_data


def ended(folder: Path) -> dict[Path, dict[str, Any]]:
    """By its path, each result.json of a comparison's runs that came to their end."""
    found = {p: json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("runs/*/*/result.json"))}
    return {p: result for p, result in found.items() if not result["interrupted"]}


class Bench:
    """The cells, and the folder that their runs are in."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.beside = {} if options.methods else FIRST_ORDER
        chosen = [cell for cell in CELLS if cell.name in (options.cells or [c.name for c in CELLS])]
        self.cells = [Cell(c.model, c.task, c.data, 20, QUICK) for c in chosen] if options.quick else chosen
        self.factors = "1,4" if options.quick else FACTORS

    def folder(self, cell: Cell) -> Path:
        return self.options.work / cell.name

    def methods(self, cell: Cell) -> list[str]:
        if cell.name == CELLS[0].name:
            names = self.options.methods or RATES[cell.model]
            return [*(f"{m}@{cell.forwards}" for m in names), *(f"{m}@{OBJECTIVES[0]}@{cell.forwards}" for m in self.beside)]
        return [f"{BASELINE}@{OBJECTIVES[0]}@{cell.forwards}", *(f"{ours}@{cell.forwards // 2}" for ours in OURS)]

    def command(self, cell: Cell, methods: Sequence[str]) -> list[str]:
        model, data = source(self.options, cell.model, cell.data)
        words = ["compare", "--model", str(model), "--task", cell.task, "--data", str(data), "--output", str(self.folder(cell))]
        words += ["--methods", ",".join(methods), "--objectives", ",".join(OBJECTIVES)]
        words += ["--baseline", BASELINE] if any(m.split("@")[0] == BASELINE for m in methods) else []
        budgets = sorted({int(m.rsplit("@", 1)[1]) for m in methods}, reverse=True)
        words += [
            "--forwards",
            ",".join(map(str, budgets)),
            "--lr-factors",
            self.factors,
            "--lr-by",
            cell.by,
            "--train-blocks",
            "last:1",
        ]
        names = dict.fromkeys(m.split("@")[0] for m in methods)
        for name in names:
            rate = (RATES[cell.model] | FIRST_ORDER)[name]
            words += ["--lr", f"{name}={rate:g}"] + ([] if name in FIRST_ORDER else ["--eps", f"{name}=1e-3"])
        return [*words, *(word for name, value in cell.sizes.items() for word in (f"--{name}", str(value))), "--device", "cpu"]

    def runs(self, cell: Cell, methods: Sequence[str]) -> int:
        """How many the cell has: of each method with each objective, every rate with the first seed and one with the others."""
        rates, seeds = len(self.factors.split(",")), len(str(cell.sizes["seeds"]).split(","))
        return sum(1 if name.count("@") == 2 else len(OBJECTIVES) for name in methods) * (rates + seeds - 1)

    def plan(self) -> str:
        """The cells, how many runs of each are done, and from the seconds that these took what the others will."""
        lines, of_model = ["cell, runs, done, seconds a run so far, hours left"], dict[str, list[float]]()
        for cell in self.cells:
            methods = self.methods(cell)
            total = self.runs(cell, methods)
            spent = [seconds_of(result) for result in ended(self.folder(cell)).values()]
            of_model.setdefault(cell.model, []).extend(spent)
            known = spent or of_model[cell.model]
            each = statistics.fmean(known) if known else None
            left = "not known before a run has ended" if each is None else f"{max(0, total - len(spent)) * each / 3600:.1f}"
            lines.append(f"{cell.name}, {total}, {len(spent)}, {'-' if each is None else f'{each:.0f}'}, {left}")
        return "\n".join(lines)

    def rows(self, cell: Cell) -> Iterator[dict[str, Any]]:
        """Of ranking.csv."""
        path = self.folder(cell) / "compare.json"
        if not path.exists():
            return
        content = json.loads(path.read_text(encoding="utf-8"))
        fixed = {"model": cell.model, "task": cell.task, "data": cell.data, "batch": cell.sizes["batch-size"]}
        rows = {f"{split}_rows": content["data"][split]["rows"] for split in ("train", "dev")}
        for line in content["ranking"]["methods"]:
            made = {name: line.get(name) for name in OWN if name not in (*fixed, *rows, "baseline")}
            rounded = {name: harness.significant(v) if isinstance(v, float) else "" if v is None else v for name, v in made.items()}
            yield {**fixed, **rows, "baseline": content["ranking"]["baseline"], **rounded}


def seconds_of(result: Mapping[str, Any]) -> float:
    """What a run took, all told."""
    kept = result["cache"]["seconds"] if result["cache"] else 0.0
    return float(result["training_seconds"] + result["evaluation_seconds"] + result["loading_seconds"] + kept)


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Of the page: a table for each cell."""
    text = []
    for name in dict.fromkeys((r["model"], r["data"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["data"]) == name]
        first = mine[0]
        text.append(
            f"{name[0]}, {name[1]}: {first['train_rows']} training, {first['dev_rows']} dev and {first['rows']} evaluation rows, batch {first['batch']}, "
            f"{max(int(r['seeds']) for r in mine)} seeds; against `{first['baseline']}`.\n\n"
            "| method | objective | forwards | of the frozen part | lr | AUC | accuracy | at the best line | loss | AUC against the baseline | |\n"
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        )
        for row in mine:
            difference = (
                f"{float(row['auc_difference']):+.3f} [{float(row['auc_low']):+.3f}, {float(row['auc_high']):+.3f}]"
                if row["auc_low"]
                else ""
            )
            numbers = [number(row, name) for name in ("auc", "accuracy", "accuracy_at_best_threshold", "loss")]
            edge = {"low": "↓", "high": "↑"}.get(row["edge"], "")
            cells = [
                row["method"],
                row["objective"],
                row["forwards"],
                row["frozen_forwards"],
                row["lr"] + edge,
                *numbers,
                difference,
                row["verdict"],
            ]
            text.append(f"| {' | '.join(cells)} |\n")
        text.append("\n")
    return "".join(text).rstrip("\n") + "\n"


def number(row: Mapping[str, str], name: str) -> str:
    deviation = f" ± {float(row[f'{name}_deviation']):.3f}" if row[f"{name}_deviation"] else ""
    return f"{float(row[name]):.3f}{deviation}" if row[name] else ""


def draw(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Each cell's differences of AUC from the baseline, with their intervals."""
    cells = {}
    for row in rows:
        if row["auc_low"]:
            cells.setdefault((row["model"], row["data"]), []).append(row)
    if not cells:
        return
    heights = [len(mine) for mine in cells.values()]
    with figures.plain_figure(path, 110, figsize=(9, 1.2 * len(cells) + 0.22 * sum(heights))) as figure:
        all_axes = figure.subplots(len(cells), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for axes, ((model, data), mine) in zip(all_axes, cells.items(), strict=True):
            for k, row in enumerate(reversed(mine)):
                colour = ranking.COLOURS[row["verdict"]]
                axes.plot([float(row["auc_low"]), float(row["auc_high"])], [k, k], color=colour)
                axes.plot([float(row["auc_difference"])], [k], "o", color=colour, markersize=4)
            names = [", ".join(filter(None, (r["method"], r["objective"], r["forwards"]))) for r in reversed(mine)]
            axes.set_yticks(range(len(mine)), names, fontsize=7)
            axes.axvline(0, color="0.7", linewidth=0.8)
            axes.set_title(f"{model}, {data}: AUC less that of {mine[0]['baseline']}, 95 %", fontsize=9)
            axes.grid(alpha=0.3, axis="x")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shared", type=Path, default=Path("../shared"), help="a folder with models/ and data/ (default: %(default)s)"
    )
    parser.add_argument("--model", type=Path, help="this for every cell, and --shared for its data")
    parser.add_argument("--work", type=Path, default=Path("runs/ranking"), help="the runs themselves (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "ranking.csv")
    parser.add_argument("--figures", type=Path, help="folder for ranking.png")
    parser.add_argument("--page", type=Path, help="a page with a table between <!-- table ranking --> and <!-- end -->")
    parser.add_argument("--cells", nargs="+", choices=[c.name for c in CELLS], help="(default: all)")
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", choices=list(RATES[CELLS[0].model]), help="of the first cell (default: all)"
    )
    parser.add_argument("--plan", action="store_true", help="print what there is to do, and end")
    parser.add_argument("--written", action="store_true", help="make nothing: take what is in --work")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    bench = Bench(options)
    if options.plan:
        print(bench.plan())
        return 0
    code = 0
    for cell in bench.cells if not options.written else ():
        if code := zo_finetune(bench.command(cell, bench.methods(cell))):
            break
        write(bench, options)
    write(bench, options)
    return code


def write(bench: Bench, options: argparse.Namespace) -> None:
    """The CSV, the figure and the page, of the cells that there are."""
    rows = [row for cell in bench.cells for row in bench.rows(cell)]
    if not rows:
        return
    harness.write_csv(options.out, OWN, rows)
    written = harness.read_csv(options.out)
    if options.figures:
        draw(options.figures / "ranking.png", written)
    if options.page:
        harness.fill(options.page, "ranking", table(written))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
