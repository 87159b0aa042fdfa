"""What do the options of a method rest on? Rank, power and matrices of input directions, which block is trained, a rate that two models share, a pull back.

    python benchmarks/choices.py --shared ../shared --work runs/choices --plan          what there is to do
    python benchmarks/choices.py --shared ../shared --work runs/choices                 do it; a second call goes on where the first was stopped
    python benchmarks/choices.py --work runs/choices --written --page docs/learning.md

Belongs here: questions about one option of a method at a time, asked by `zo-finetune compare`, and the tables of their answers. Does not belong here: which
method is above which (ranking.py), what of a step is noise (noise.py).

inputs: FZOO in the space of each matrix's inputs, pairs, the last block: ranks, powers of the eigenvalues, matrices, beside dense FZOO. The variant with the
highest AUC on the dev rows, the mean of the seeds, is what the preset should be; the evaluation rows say what that is worth.
where: FZOO, pairs: the last block, the dominant one, all weights.
rates: MeZO with and without division by g's running root mean square, pairs, the last block, each with one grid of rates on every model and data set: what the
best rate of one costs the others. A rate's number is the dev rows' AUC; nothing is evaluated for it.
anchor: FZOO, pairs, SmolLM2's last block: by how much plain language modelling on texts of another kind gets worse, and what the task gains, of rates without
a pull toward the start and with pulls, and among the inputs. Every run is a point; none is chosen.

Rates are chosen by the dev rows, training rows that no run trains on (500 of them, or 300 of film reviews), with the first seed where `rates` does not say
otherwise. The sample of rows is the same for all seeds of a question.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from ranking import ended, source
from zo_finetune.blocks import blocks_of
from zo_finetune.cli import main as zo_finetune
from zo_finetune.demo import cache_dir
from zo_finetune.model import load
from zo_finetune.pace import Pace
from zo_finetune.runs import folder_name, on_dev

FORWARDS, TEXTS = 600, "plain_texts.txt"
ONCE = {"train-blocks": "last:1"}
GRIDS = {"mezo": "1.25e-5,5e-5,2e-4,8e-4,3.2e-3", "mezo:scale_free=true": "2.5e-5,1e-4,4e-4,1.6e-3,6.4e-3"}
BY_RANK = {4: 2.0, 16: 1.0, 64: 0.5}  # of the middle rate: outputs move by about sqrt(rank)
INPUTS = {
    **{f"fzoo-inputs:rank={rank}:power={power:g}": factor for rank, factor in BY_RANK.items() for power in (-0.5, 0, 0.5)},
    **{f"fzoo-inputs:rank={rank}:power=-0.5:matrices=o_proj|mlp": BY_RANK[rank] for rank in (16, 64)},
}
COLUMNS = (
    *("question", "model", "data", "train_blocks", "dominant_block", "method", "anchor", "objective", "forwards", "lr", "seed"),
    *("dev_rows", "dev_auc", "dev_loss", "rows", "auc_before", "auc", "accuracy", "accuracy_at_best_threshold", "loss"),
    *("language_before", "language_after", "last_movement"),
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A model and its data. `dense`, `inputs`: the middle of the rates of FZOO and of FZOO among the inputs, at rank 16; `size`: root mean square of the
    matrices of its last block, as --weights prints it."""

    model: str
    data: str
    dense: float
    inputs: float
    size: float
    sizes: Mapping[str, int]

    @property
    def name(self) -> str:
        return f"{self.model}-{self.data}"


ROWS = {"train-examples": 1000, "data-seed": 0, "points": 1}
STORIES = Place("stories15m", "sst2", 4e-6, 1.5e-5, 0.027, {**ROWS, "batch-size": 32, "dev-examples": 500, "eval-examples": 0})
FILMS = Place("smollm2", "film_reviews", 2e-5, 1.2e-4, 0.19, {**ROWS, "batch-size": 16, "dev-examples": 300, "eval-examples": 800})
SST2 = Place("smollm2", "sst2", 2e-5, 1.2e-4, FILMS.size, {**FILMS.sizes, "dev-examples": 500})
QUICK = {"train-examples": 16, "data-seed": 0, "points": 1, "batch-size": 4, "dev-examples": 6, "eval-examples": 8}


@dataclass(frozen=True)
class Comparison:
    """One call of `zo-finetune compare`. `methods`: each with the middle of its rates, or none where `grid` has all; `more`: its other options."""

    question: str
    place: Place
    part: str
    methods: Mapping[str, float | None]
    more: Mapping[str, str]
    seeds: str = "0,1,2"
    factors: str = "0.25,1,4"

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.question, self.place.name, self.part)))


def comparisons() -> Iterator[Comparison]:
    for place in (STORIES, FILMS):
        rates = {"fzoo": place.dense, **{name: factor * place.inputs for name, factor in INPUTS.items()}}
        yield Comparison("inputs", place, "", rates, ONCE)
    for blocks in ("last:1", "dominant", "all"):
        yield Comparison("where", STORIES, blocks, {"fzoo": STORIES.dense}, {} if blocks == "all" else {"train-blocks": blocks})
    for blocks in ("last:1", "dominant"):
        yield Comparison("where", FILMS, blocks, {"fzoo": FILMS.dense}, {"train-blocks": blocks})
    for place in (STORIES, FILMS, SST2):
        for method, grid in GRIDS.items():
            yield Comparison("rates", place, method, {method: None}, {**ONCE, "lr-grid": grid, "lr-seeds": "2"}, seeds="0,1")
    every = {**ONCE, "language-texts": "", "lr-seeds": "3"}
    for pull, factors in (("", (0.25, 0.5, 1, 2)), ("0.01", (1, 2)), ("0.03", (1, 2))):
        grid = ",".join(f"{factor * FILMS.dense:g}" for factor in factors)
        more = {**every, "lr-grid": grid, **({"anchor": pull} if pull else {})}
        yield Comparison("anchor", FILMS, f"{pull or 0}", {"fzoo": None}, more)
    rates = {f"fzoo-inputs:rank={rank}:power=-0.5": BY_RANK[rank] * FILMS.inputs for rank in (16, 64)}
    yield Comparison("anchor", FILMS, "inputs", rates, every, factors="0.25,1")


class Bench:
    """The comparisons that were asked for, and the folder that their runs are in."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        wanted = (c for c in comparisons() if c.question in (options.questions or [c.question]))
        self.comparisons = [c for c in wanted if c.place.name in (options.places or [c.place.name])]
        if options.quick:  # of each question the first two
            of = defaultdict(list)
            for one in self.comparisons:
                of[one.question].append(one)
            self.comparisons = [one for mine in of.values() for one in mine[:2]]

    def folder(self, one: Comparison) -> Path:
        return self.options.work / one.name.replace(":", "-")

    def command(self, one: Comparison) -> list[str]:
        model, data = source(self.options, one.place.model, one.place.data)
        quick = self.options.quick
        methods = list(one.methods)[:2] if quick else list(one.methods)
        words = ["compare", "--model", str(model), "--task", "sst2", "--data", str(data), "--output", str(self.folder(one))]
        words += ["--methods", ",".join(methods), "--objective", "pairs", "--lr-by", "auc"]
        words += [
            "--forwards",
            "18" if quick else str(FORWARDS),
            "--seeds",
            "0,1" if quick else one.seeds,
            "--baseline",
            methods[0],
        ]
        if "lr-grid" not in one.more:
            words += ["--lr-factors", "1" if quick else one.factors]
        for method in methods:
            rate = one.methods[method]
            words += ["--eps", f"{method}=1e-3"] + ([] if rate is None else ["--lr", f"{method}={rate:g}"])
        more = {**one.more, **(QUICK if quick else one.place.sizes)}
        if quick and "lr-grid" in more:
            more |= {"lr-grid": ",".join(more["lr-grid"].split(",")[:2]), "lr-seeds": "2"}
        if "language-texts" in more:
            more["language-texts"] = str(self.options.texts or cache_dir() / TEXTS)
        return [*words, *(word for name, value in more.items() for word in (f"--{name}", str(value))), "--device", "cpu"]

    def rows(self, one: Comparison) -> Iterator[dict[str, Any]]:
        """Of choices.csv: every run that came to its end."""
        labels = {folder_name(label): label for label in one.methods}
        for path, result in ended(self.folder(one)).items():
            row = self.row(one, labels[path.parent.parent.name], result)
            yield {name: harness.significant(v) if isinstance(v, float) else v for name, v in row.items()}

    def row(self, one: Comparison, label: str, result: Mapping[str, Any]) -> dict[str, Any]:
        used, before, after = result["hyperparameters"], result["before"], result["after"]
        dominant = result["dominant_block"]
        return {
            "question": one.question,
            "model": one.place.model,
            "data": one.place.data,
            "train_blocks": used["train_blocks"] or "all",
            "dominant_block": "" if dominant is None else dominant["block"],
            "method": label,
            "anchor": one.more.get("anchor", ""),
            "objective": used["objective"],
            "forwards": result["forwards"],
            "lr": float(used["lr"]),
            "seed": used["seed"],
            "dev_rows": result["data"]["dev"]["rows"],
            "dev_auc": on_dev(result, "auc"),
            "dev_loss": on_dev(result),
            "rows": after["examples"],
            "auc_before": before["auc"],
            **{name: after[name] for name in ("auc", "accuracy", "accuracy_at_best_threshold", "loss")},
            "language_before": before.get("language_model_loss", ""),
            "language_after": after.get("language_model_loss", ""),
            "last_movement": result["last_movement"],
        }


# ---- the tables --------------------------------------------------------------------------------------------------------------------

Row = Mapping[str, str]


def grouped(rows: Sequence[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in names)].append(row)
    return found


def mean(rows: Sequence[Row], name: str) -> float:
    return statistics.fmean(float(row[name]) for row in rows)


def spread(rows: Sequence[Row], name: str) -> str:
    numbers = [float(row[name]) for row in rows]
    return f"{statistics.fmean(numbers):.3f}" + (f" ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else "")


def chosen(rows: Sequence[Row]) -> tuple[list[Row], str]:
    """Of a method the runs with the rate of which there are the most seeds, and whether that is at an end of the rates."""
    rates = sorted(grouped(rows, "lr").values(), key=lambda mine: float(mine[0]["lr"]))
    best = max(range(len(rates)), key=lambda k: (len(rates[k]), float(rates[k][0]["dev_auc"])))
    return rates[best], "" if len(rates) == 1 else "↓" if best == 0 else "↑" if best == len(rates) - 1 else ""


def of_dev_rows(rows: Sequence[Row], what: str, names: Sequence[str]) -> str:
    """Each variant at its rate, the highest AUC on the dev rows first."""
    text = []
    for (model, data), mine in grouped(rows, "model", "data").items():
        best = [(key, *chosen(runs)) for key, runs in grouped(mine, *names).items()]
        first = best[0][1][0]
        text.append(
            f"{model}, {data}: {len(best[0][1])} seeds, {first['dev_rows']} dev and {first['rows']} evaluation rows; "
            f"zero-shot AUC {float(first['auc_before']):.3f}.\n\n"
            f"| {what} | lr | AUC, dev rows | AUC | accuracy | at the best line |\n| --- | --- | --- | --- | --- | --- |\n"
        )
        for key, runs, edge in sorted(best, key=lambda line: -mean(line[1], "dev_auc")):
            numbers = [spread(runs, name) for name in ("dev_auc", "auc", "accuracy", "accuracy_at_best_threshold")]
            label = " ".join(filter(None, key)) + (f" (block {runs[0]['dominant_block']})" if runs[0]["dominant_block"] else "")
            named = label.replace("|", "\\|")
            text.append(f"| `{named}` | {runs[0]['lr']}{edge} | {' | '.join(numbers)} |\n")
        text.append("\n")
    return "".join(text).rstrip("\n") + "\n"


def of_rates(rows: Sequence[Row]) -> str:
    """AUC on the dev rows by rate, and what each place loses at the best rate of the others."""
    text = []
    for (method,), mine in grouped(rows, "method").items():
        rates = sorted({row["lr"] for row in mine}, key=float)
        places = {
            key: {lr: mean(of, "dev_auc") for (lr,), of in grouped(runs, "lr").items()}
            for key, runs in grouped(mine, "model", "data").items()
        }
        best = {key: max(auc, key=auc.__getitem__) for key, auc in places.items()}
        text.append(f"| `{method}` | {' | '.join(rates)} | at most lost by another's rate |\n|{' --- |' * (len(rates) + 2)}\n")
        for key, auc in places.items():
            lost = max((auc[best[key]] - auc[rate], rate) for rate in best.values() if rate in auc)
            cells = [f"**{auc[lr]:.3f}**" if lr == best[key] else f"{auc[lr]:.3f}" if lr in auc else "" for lr in rates]
            text.append(f"| {', '.join(key)} | {' | '.join(cells)} | {lost[0]:.3f} |\n")
        text.append("\n")
    return "".join(text).rstrip("\n") + "\n"


def of_anchor(rows: Sequence[Row]) -> str:
    """Every rate and pull, those that leave most of the model first."""
    text = [
        "| method | pull a step | lr | AUC | accuracy | nats a token more, other texts |\n| --- | --- | --- | --- | --- | --- |\n"
    ]
    lines = []
    for (method, pull, lr), runs in grouped(rows, "method", "anchor", "lr").items():
        more = [{"more": str(float(row["language_after"]) - float(row["language_before"]))} for row in runs]
        scores = " | ".join([spread(runs, "auc"), spread(runs, "accuracy"), spread(more, "more")])
        lines.append((mean(more, "more"), f"| `{method}` | {pull or 'none'} | {lr} | {scores} |\n"))
    return "".join([*text, *(line for _, line in sorted(lines))])


TABLES = {
    "inputs": lambda rows: of_dev_rows(rows, "method", ("method",)),
    "where": lambda rows: of_dev_rows(rows, "trained", ("train_blocks",)),
    "rates": of_rates,
    "anchor": of_anchor,
}


def size_of(model: Path) -> float:
    """The root mean square of the matrices of the last block."""
    _, blocks = blocks_of(load(str(model), device="cpu").model)
    return Pace((p for p in blocks[-1].parameters() if p.ndim == 2), ()).size


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shared", type=Path, default=Path("../shared"), help="a folder with models/ and data/ (default: %(default)s)"
    )
    parser.add_argument("--model", type=Path, help="this for every comparison, and --shared for its data")
    parser.add_argument("--texts", type=Path, help="texts of another kind for `anchor` (default: the demo's)")
    parser.add_argument("--work", type=Path, default=Path("runs/choices"), help="the runs themselves (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "choices.csv")
    parser.add_argument("--page", type=Path, help="a page with tables between <!-- table choices_QUESTION --> and <!-- end -->")
    parser.add_argument("--questions", nargs="+", choices=list(TABLES), help="(default: all)")
    parser.add_argument("--places", nargs="+", choices=[p.name for p in (STORIES, FILMS, SST2)], help="(default: all)")
    parser.add_argument("--weights", action="store_true", help="print how large the matrices of the last blocks are, and end")
    parser.add_argument("--plan", action="store_true", help="print what there is to do, and end")
    parser.add_argument("--written", action="store_true", help="make nothing: take what is in --work")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    bench = Bench(options)
    if options.weights:
        for place in (STORIES, FILMS):
            print(f"{place.model}: {size_of(source(options, place.model, place.data)[0]):.3f}")
        return 0
    if options.plan:
        for one in bench.comparisons:
            print(f"{one.name}: {sum(1 for _ in bench.rows(one))} runs done")
        return 0
    code = 0
    for one in bench.comparisons if not options.written else ():
        if code := zo_finetune(bench.command(one)):
            break
    rows = [row for one in bench.comparisons for row in bench.rows(one)]
    if rows:
        harness.write_csv(options.out, COLUMNS, rows)
        if options.page:
            written = harness.read_csv(options.out)
            for (question,), mine in grouped(written, "question").items():
                harness.fill(options.page, f"choices_{question}", TABLES[question](mine))
    return code


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
