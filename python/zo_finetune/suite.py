"""`zo-finetune suite`: a paper's table for a model of one's own.

Belongs here: the cells as they are made, in their order, and what is kept of them. Does not belong here: which there are (suite_plan.py), tables of papers
(suites/), what is made of the scores (suite_table.py), a run (run.py), a baseline (baseline.py), what stays of runs in a folder (runs.py).

A cell is a column of the table on a task with a seed: a run as `zo-finetune train` makes it, or a baseline as `evaluate` and `probe` do,
in a folder of its own. A seed's baselines come first and share the model, whose weights they leave alone; each run loads it anew from its files. Cells of one
task and seed share the sampled rows. A cell that ends with an error is told, and the others are made; the same command tries it again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from zo_finetune import baseline, console, files, run_folder, suite_table
from zo_finetune.common import Common
from zo_finetune.config import Config, Evaluation, Probing
from zo_finetune.errors import UserError, one_line, shortened
from zo_finetune.load import load_model
from zo_finetune.metrics.best_threshold import KEY as THRESHOLD
from zo_finetune.model import LanguageModel
from zo_finetune.options import difference
from zo_finetune.run import remedy
from zo_finetune.runs import Interrupted, check_folders, check_own, check_rows, earlier, on_dev, run_one, tune
from zo_finetune.suite_plan import Cell, Plan, describe, left_out, look
from zo_finetune.tasks import get_task

OWN = ("suite.json", "table.csv", "table.md", "table.png")


# ---- what was made before ----------------------------------------------------------------------------------------------------------


def earlier_baseline(options: Evaluation | Probing, root: Path) -> dict[str, Any] | None:
    """result.json of a finished baseline; None if there is none.

    Raises:
        UserError: its folder has one with other options, or something that is no baseline's.
    """
    folder = Path(options.output)
    check_folders(folder, root)
    baseline.check_folder(folder, overwrite=True)
    if not (folder / "result.json").exists():
        return None
    result = files.read_json(folder / "result.json")
    given = result.get("given")
    if name := difference(options, given if isinstance(given, dict) else {}, but=lambda option: option.place):
        raise UserError(f"{folder} has a baseline with another {name}: give another --output, or delete it")
    return result


def result_of(plan: Plan, cell: Cell, common: Common, lr: float | None = None) -> dict[str, Any] | None:
    """result.json of a cell that is finished, else None; `lr`: see `Plan.config`. Raises UserError: it has other options, or is of other rows."""
    if cell.way.entry is None:
        options = plan.baseline(cell)
        config, result = options.run(), earlier_baseline(options, plan.root)
    else:
        config = plan.config(cell, lr)
        result = earlier(config, plan.root)[1]
    if result is not None:
        check_rows(config, result, common)
    return result


def finished(plan: Plan) -> int:
    """How many cells there are already.

    Raises:
        UserError: a folder has a cell with other options, or the names of what will be written belong to something else.
    """
    run_folder.check_run_dir(plan.output, overwrite=False, others=True)
    check_own(plan.output, OWN, ("suite", "cells"), "suite")
    count, common = 0, Common()
    for cell in plan.cells():
        tried = plan.rates.tried(plan.recipe(cell.way).lr) if cell.way.entry else []
        if tried:
            results = [result_of(plan, cell, common, lr) for lr in tried]
            count += all(results) if cell.seed == plan.seeds[0] else any(results)
        else:
            count += result_of(plan, cell, common) is not None
    return count


# ---- the cells themselves ----------------------------------------------------------------------------------------------------------


def measure(plan: Plan, cell: Cell, lr: float | None, model: Callable[[], LanguageModel], command: Sequence[str]) -> dict[str, Any]:
    """A cell's row of table.csv: of what is finished, or after making it. `model`: for baselines.

    Raises:
        UserError: it ended with an error, or its files are not as they were written. Interrupted: Ctrl-C.
    """
    if cell.way.entry is None:
        options = plan.baseline(cell)
        result = earlier_baseline(options, plan.root)
        if result is None:
            baseline.in_folder(options, command, model())
            result = files.read_json(Path(options.output) / "result.json")
        made, folder = row_of_baseline, options.output
    else:
        config = plan.config(cell, lr)
        result = run_one(config, plan.root)
        made, folder = row_of_run, config.output
    try:
        return row_of(plan, cell) | made(cell, result)
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: its result.json is not as it was written ({one_line(error)}): delete that folder, and the same command makes it again"
        ) from error


def row_of(plan: Plan, cell: Cell) -> dict[str, Any]:
    fixed = {"suite": plan.suite.name, "source": suite_table.OURS, "model": Path(str(plan.given["model"])).name}
    way = {"column": cell.way.label, "title": cell.way.column.title, "peft": cell.way.peft}
    return {**fixed, "task": cell.task, **way, "seed": cell.seed, "metric": get_task(cell.task).metrics[0]}


def row_of_run(cell: Cell, result: Mapping[str, Any]) -> dict[str, Any]:
    metric = get_task(cell.task).metrics[0]
    after, chosen = result["after"], result["hyperparameters"]
    return {
        "score": after[metric],
        "stderr": after[f"{metric}_stderr"],
        "examples": after["examples"],
        "majority": result["majority"],
        "threshold": result["before"].get(THRESHOLD),
        "steps": result["steps"],
        "forwards": result["forwards"],
        "lr": chosen["lr"],
        "eps": chosen["eps"],
        "loss": after.get("loss"),
        "dev_loss": on_dev(result),
        "seconds": round(result["training_seconds"], 2),
        "peak_memory_bytes": result["peak_memory_bytes"],
        "state_bytes": result["state_bytes"],
    }


def row_of_baseline(cell: Cell, result: Mapping[str, Any]) -> dict[str, Any]:
    metric, metrics = get_task(cell.task).metrics[0], result["metrics"]
    return {
        "score": metrics[metric],
        "stderr": metrics[f"{metric}_stderr"],
        "examples": result["rows"],
        "majority": result["majority"],
        "threshold": metrics.get(THRESHOLD) if cell.way.label == "zero-shot" else None,
        "loss": metrics.get("loss"),
        "seconds": round(result["seconds"], 2),
        "peak_memory_bytes": result["peak_memory_bytes"],
    }


def chosen_rates(plan: Plan) -> Callable[[Cell], float | None]:
    """The learning rate of a cell: with `--lr-factors` the best on its task and in its column, tried with the first seed when it is first asked for.

    Raises:
        as `tune`: UserError, Interrupted. A choice that failed is tried again for the next cell.
    """
    best: dict[tuple[str, str], float] = {}

    def rate(cell: Cell) -> float | None:
        if cell.way.entry is None or not (tried := plan.rates.tried(plan.recipe(cell.way).lr)):
            return None
        place = cell.task, cell.way.label
        if place not in best:
            first = replace(cell, seed=plan.seeds[0])
            best[place], _ = tune(f"{cell.task}, {cell.way.label}", lambda lr: [plan.config(first, lr)], tried, plan.root)
        return best[place]

    return rate


def make(plan: Plan, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Print the plan, make its cells, and write the table after each; returns what suite.json holds. Ctrl-C ends it and keeps what is finished; the
    same command then goes on.

    Raises:
        UserError: something the user can put right. If cells ended with an error, the others are made and the table is written before.
    """
    plan.check()
    command = list(sys.argv if command is None else command)
    look(plan)
    done = finished(plan)
    console.tell(describe(plan, done))
    if plan.options.plan:
        return {"interrupted": False}
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    interrupted = False
    rate, total = chosen_rates(plan), len(list(plan.cells()))

    def content() -> dict[str, Any]:
        return {
            "suite": plan.suite.name,
            "interrupted": interrupted,
            "options": {**asdict(plan.options), **plan.given},
            "cells": rows,
            "failed": failed,
            "skipped": [{"task": task, "column": label, "why": why} for (task, label), why in plan.skipped.items()],
            "command": command,
        }

    held: list[LanguageModel] = []  # the model of the baselines, until the first run

    def model() -> LanguageModel:
        if not held:
            held.append(load_model(Config(**plan.shared(cell, "")).placed(os.getcwd())))
        return held[0]

    try:
        for number, cell in enumerate(plan.cells(), 1):
            console.say(f"cell {number} of {total}: {cell}")
            if cell.way.entry is not None:
                held.clear()
            try:
                rows.append(measure(plan, cell, rate(cell), model, command))
            except UserError as error:
                failed[str(cell)] = str(error)
                console.say(f"{cell}: {error}")
            write(plan, content(), last=False)
    except (KeyboardInterrupt, Interrupted):
        interrupted = True
    write(plan, content(), last=True)
    if interrupted:
        console.say(f"interrupted: {len(rows)} of {total} cells are finished and kept in {plan.output}; the same command goes on")
    elif failed:
        what, why = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} of {total} cells ended with an error, the first {what}: {why}; the same command tries them again"
        )
    return content()


def write(plan: Plan, content: Mapping[str, Any], last: bool) -> None:
    """suite.json, and where there are cells table.csv and table.md; `last`: table.png too, and the table is printed.

    Raises:
        UserError: they cannot be written.
    """
    rows = [*content["cells"], *suite_table.paper_rows(plan.suite, plan.tasks)]
    try:
        plan.output.mkdir(parents=True, exist_ok=True)
        files.write_json(plan.output / "suite.json", content)
        if not content["cells"]:
            return
        text = suite_table.page(rows, plan.suite.apart)
        for one in content["skipped"]:
            text += f"\nLeft out: {left_out((one['task'], one['column']))}: {one['why']}\n"
        for what, why in content["failed"].items():
            text += f"\nEnded with an error: {what}: {why}\n"
        files.write_text(plan.output / "table.csv", suite_table.to_csv(rows))
        files.write_text(plan.output / "table.md", text)
    except OSError as error:
        raise UserError(f"{one_line(error)}; {remedy(error)}, then give the same command again: finished cells are kept") from error
    if not last:
        return
    console.tell(text)
    try:
        title = f"suite {plan.suite.name}, {Path(str(plan.given['model'])).name}: {shortened(map(str, plan.seeds))}"
        suite_table.draw(plan.output / "table.png", title, rows, plan.suite.apart)
    except Exception as error:  # as of a run's curve
        console.say(f"table.png could not be drawn ({one_line(error)}); table.csv has what it shows")
