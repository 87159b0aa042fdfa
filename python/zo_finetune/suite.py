"""`zo-finetune suite`: a paper's table for a model of one's own.

Belongs here: which cells there are, what of them cannot be done and why, their order, what is kept. Does not belong here: tables of papers (suites/),
what is made of the scores (suite_table.py), a run (run.py), a baseline (baseline.py), what stays of runs in a folder (runs.py).

A cell is a column of the table on a task with a seed: a run as `zo-finetune train` makes it, or a baseline as `evaluate` and `probe` do,
in a folder of its own. A seed's baselines come first and share the model, whose weights they leave alone; each run loads it anew from its files. Cells of one
task and seed share the sampled rows. A cell that ends with an error is
told, and the others are made; the same command tries it again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from zo_finetune import baseline, console, files, run_folder, suite_table
from zo_finetune.config import ADAPTERS, Baseline, Config, Evaluation, Probing, SuiteRuns
from zo_finetune.errors import UserError, did_you_mean, one_line, shortened
from zo_finetune.files import path_of
from zo_finetune.load import Loaded, load, load_model
from zo_finetune.methods import PEFTS, Recipe
from zo_finetune.metrics.best_threshold import KEY as THRESHOLD
from zo_finetune.model import LanguageModel
from zo_finetune.options import check, difference, options_of
from zo_finetune.run import remedy
from zo_finetune.runs import Entry, Interrupted, Rates, check_folders, check_own, dev_loss, earlier, folder_name, run_one, tune
from zo_finetune.sources import TRAIN_NAMES, Shard, readable
from zo_finetune.suites import SUITES, Column, Suite
from zo_finetune.suites.base import BASELINES, SHOTS
from zo_finetune.tasks import get_task
from zo_finetune.tasks.base import Task
from zo_finetune.train import make_optimizer

HUB = "hub"  # --data: the data sets that the tasks name
OWN = ("suite.json", "table.csv", "table.md", "table.png")


@dataclass(frozen=True)
class Way:
    """A column of the table, as it runs. `entry`: None of a baseline."""

    column: Column
    entry: Entry | None = None
    peft: str = "none"

    @classmethod
    def of(cls, column: Column) -> Way:
        """Raises UserError: the label is none that `Column` knows."""
        if (label := column.label) in BASELINES:
            return cls(column)
        name, *options = label.split(":")
        kinds = [option.removeprefix("peft=") for option in options if option.startswith("peft=")]
        if len(kinds) > 1 or (kinds and kinds[0] not in PEFTS):
            raise UserError(f"--methods {label}: give peft once, as one of {', '.join(PEFTS)}")
        if hint := did_you_mean(name, BASELINES):
            raise UserError(f"--methods {label}: there is no {name!r}{hint}")
        entry = Entry.of(":".join([name, *(option for option in options if not option.startswith("peft="))]))
        return cls(column, replace(entry, label=label), kinds[0] if kinds else "none")

    @property
    def label(self) -> str:
        return self.column.label

    @property
    def short(self) -> str:
        """The name by which a learning rate may be given, besides the label: without the method's options."""
        if self.entry is None:
            return self.label
        return self.entry.method.name + ("" if self.peft == "none" else f":peft={self.peft}")


@dataclass(frozen=True)
class Cell:
    task: str
    way: Way
    seed: int

    def __str__(self) -> str:
        return f"{self.task}, {self.way.label}, seed {self.seed}"


@dataclass
class Look:
    """What the rows of a task are with the first seed, in tokens. `train`, `evaluation`: tokens of an example, on average."""

    counts: tuple[int, int, int]  # train, dev, evaluation
    train: float
    evaluation: float
    longest: int
    notes: list[str]


@dataclass
class Plan:
    """A suite's cells for one model. `given`: what the user gave of the options that all cells share."""

    suite: Suite
    options: SuiteRuns
    given: Mapping[str, Any]
    ways: list[Way]
    tasks: list[str]
    data: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # task -> --data and --data-config
    skipped: dict[tuple[str, str], str] = field(default_factory=dict)  # (task or "", label or "") -> why; "" is all of them
    looks: dict[str, Look] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        return path_of("--output", self.options.output)

    @property
    def root(self) -> Path:
        return self.output.absolute()

    @property
    def seeds(self) -> list[int]:
        return list(self.suite.seeds) if self.options.seeds is None else self.options.seeds

    @property
    def rates(self) -> Rates:
        return Rates(self.options.lrs, self.options.epses, self.options.lr_factors)

    def why_not(self, task: str, way: Way) -> str | None:
        """Why a task's cells in a column are left out."""
        return next((self.skipped[k] for k in ((task, ""), ("", way.label), (task, way.label)) if k in self.skipped), None)

    def cells(self) -> Iterator[Cell]:
        """In the order in which they are made: one seed of the whole table after the other, its baselines first."""
        for seed in self.seeds:
            for trains in (False, True):
                for task in self.tasks:
                    ways = (way for way in self.ways if (way.entry is not None) == trains)
                    yield from (Cell(task, way, seed) for way in ways if self.why_not(task, way) is None)

    def recipe(self, way: Way) -> Recipe:
        assert way.entry is not None
        return self.rates.recipe(way.entry, way.peft, way.short)

    def shared(self, cell: Cell, folder: str) -> dict[str, Any]:
        """The options of a cell that do not depend on its kind."""
        merged = {**self.suite.options, **cell.way.column.options, **self.given}
        merged = {name: value for name, value in merged.items() if cell.way.peft in ADAPTERS.get(name, (cell.way.peft,))}
        if self.options.steps is not None:
            merged["steps"] = self.options.steps
        if "keep" not in self.given and (not self.options.points or self.given.get("dev_examples") == 0):
            merged["keep"] = "last"  # there is no evaluation to choose by
        data, config = self.data[cell.task]
        output = str(self.output / "cells" / cell.task / folder_name(cell.way.label) / folder)
        return merged | {
            "task": cell.task,
            "data": data,
            "data_config": config,
            "seed": cell.seed,
            "output": output,
            "overwrite": True,
        }

    def config(self, cell: Cell, lr: float | None = None) -> Config:
        """Of a cell that trains; `lr`: in place of the recipe's."""
        assert cell.way.entry is not None
        recipe, method = self.recipe(cell.way), cell.way.entry.method
        lr = recipe.lr if lr is None else lr
        config = Config(
            **self.shared(cell, f"lr{lr:g}-seed{cell.seed}"),
            method=method.name,
            options=dict(cell.way.entry.given),
            peft=cell.way.peft,
            lr=lr,
            eps=recipe.eps,
            save=False,
        )
        points = self.options.points if config.dev_examples != 0 else 0
        config = replace(config, eval_every=max(1, -(-config.steps // points)) if points else 0)
        return (config.without_perturbing() if method.first_order and recipe.eps is None else config).placed(os.getcwd())

    def baseline(self, cell: Cell) -> Evaluation | Probing:
        """Of a cell that does not train."""
        config = Config(**self.shared(cell, f"seed{cell.seed}")).placed(os.getcwd())
        known = {o.name for o in options_of(Baseline)}
        common = {name: value for name, value in asdict(config).items() if name in known} | {"batch_size": config.eval_batch_size}
        if cell.way.label == "probe":
            return Probing(**common)
        shots = SHOTS if cell.way.label == "in-context" else 0
        return Evaluation(**common | {"train_examples": self.given.get("train_examples"), "shots": shots})

    def check(self) -> None:
        """Everything that can be known before data are looked for.

        Raises:
            UserError: names the option, its value and the remedy.
        """
        given = self.options
        check(given)
        for what, values in (
            ("--tasks", self.tasks),
            ("--methods", [folder_name(w.label) for w in self.ways]),
            ("--seeds", self.seeds),
        ):
            if not values or len(set(values)) != len(values):
                raise UserError(f"{what}: give at least one, and none twice")
        if strange := [kind for kind in given.pefts or () if kind not in PEFTS]:
            raise UserError(f"--peft {strange[0]!r:.80} must be one of {', '.join(PEFTS)}{did_you_mean(strange[0], PEFTS)}")
        self.rates.check({name for way in self.ways if way.entry for name in (way.label, way.short)})
        for way in self.ways:
            if way.entry is not None:
                self.recipe(way)
        if len(given.lr_factors) > 1 and (not given.points or self.given.get("dev_examples") == 0):
            raise UserError(
                "--lr-factors chooses by the dev examples: give --dev-examples and --points greater than 0, or one factor"
            )


def plan_of(own: dict[str, Any], given: dict[str, Any]) -> Plan:
    """From the command line's values: the suite's own, and those that its runs share.

    Raises:
        UserError: names the option.
    """
    options = SuiteRuns(**own)
    path_of("--output", options.output)
    suite = SUITES[options.suite]
    known = {column.label: column for column in suite.columns}
    labels = [*known] if options.methods is None else options.methods
    ways = [Way.of(known.get(label, Column(label, label))) for label in labels]
    if options.pefts is not None:
        ways = [way for way in ways if way.entry is None or way.peft in options.pefts]
    tasks = [*suite.tasks] if options.tasks is None else options.tasks
    for task in tasks:
        get_task(task)
    return Plan(suite, options, given, ways, tasks)


def left_out(place: tuple[str, str]) -> str:
    """A key of `Plan.skipped` in words."""
    return ", ".join(filter(None, place))


# ---- where rows are --------------------------------------------------------------------------------------------------------------


def find(root: str, task: Task) -> tuple[str, str | None]:
    """--data and --data-config of a task under a root.

    Raises:
        UserError: there is nothing.
    """
    if root == HUB:
        if task.source is None:
            raise UserError("no data set on the hub is known for it")
        return task.source, task.source_config
    top = path_of("--data", root)
    names = (task.name, f"{task.name}[-_]*", f"{task.name}.*")
    for place in (top, top / "extras"):
        for found in (path for name in names for path in sorted(place.glob(name))):
            if found.is_dir():
                return str(one_file(found) or found), None
            if readable(found):
                return str(found), None
    raise UserError(f"no rows: there is no {task.name} or extras/{task.name}* in {root}")


def one_file(folder: Path) -> Path | None:
    """The only data file of a folder without training rows of their own: splits are cut from it."""
    found = [path for path in sorted(folder.iterdir()) if readable(path)]
    return found[0] if len(found) == 1 and Shard.of(found[0]).split not in TRAIN_NAMES else None


# ---- what can be done --------------------------------------------------------------------------------------------------------------


def look(plan: Plan) -> None:
    """Find the rows of every task, read them with every seed, and try every column on the model: what the data or the model cannot do is left out,
    with the reason in `plan.skipped`.

    Raises:
        UserError: the model cannot be loaded, or nothing can be done.
    """
    ways = plan.ways
    model = None
    for name in plan.tasks:
        task = get_task(name)
        try:
            plan.data[name] = find(plan.options.data, task)
        except UserError as error:
            plan.skipped[name, ""] = str(error)
            continue
        for seed in plan.seeds:
            config = Config(**plan.shared(Cell(name, ways[0], seed), "")).placed(os.getcwd())
            model = model or load_model(config)
            try:
                loaded = load(config, model)
            except UserError as error:
                plan.skipped[name, ""] = str(error)
                break
            if seed == plan.seeds[0]:
                plan.looks[name] = look_at(loaded)
                leave_out(plan, task, loaded)
    del model
    for peft in dict.fromkeys(way.peft for way in ways if way.entry):
        try_methods(plan, [way for way in ways if way.entry and way.peft == peft])
    if not any(plan.cells()):
        raise UserError("nothing can be done: " + "; ".join(f"{left_out(place)}: {why}" for place, why in plan.skipped.items()))


def look_at(loaded: Loaded) -> Look:
    sets = (loaded.train_set, loaded.dev_set, loaded.eval_set)
    lengths = [[sum(map(len, e.inputs)) for e in part] for part in sets]
    longest = max(e.length for part in sets for e in part)
    notes = [note for note in loaded.notes if "are longer than" in note or note.startswith("warning:")]
    train, _, evaluation = (sum(part) / max(1, len(part)) for part in lengths)
    return Look((len(sets[0]), len(sets[1]), len(sets[2])), train, evaluation, longest, notes)


def leave_out(plan: Plan, task: Task, loaded: Loaded) -> None:
    """What a task's rows or form do not allow."""
    lm, look = loaded.language_model, plan.looks[task.name]
    for way in plan.ways:
        if way.label == "probe" and task.decoding != "scores":
            plan.skipped[task.name, way.label] = "its answers are free, and a probe chooses among labels or candidates"
        elif way.label == "in-context" and lm.form != "causal":
            plan.skipped[task.name, way.label] = (
                f"demonstrations are text that a causal model goes on with, and this model is {lm.form}"
            )
        elif way.label == "in-context" and look.counts[0] < min(SHOTS, loaded.config.train_examples or SHOTS):
            plan.skipped[task.name, way.label] = (
                f"{SHOTS} demonstrations are drawn from the training rows, and there are {look.counts[0]}"
            )
        elif way.label == "in-context" and (length := (SHOTS + 1) * look.evaluation) > loaded.max_length:
            look.notes.append(
                f"with {SHOTS} demonstrations a prompt has about {length:,.0f} tokens, and {loaded.max_length:,} are read: most lose their beginning"
            )


def try_methods(plan: Plan, ways: Sequence[Way]) -> None:
    """Make the optimizer of each on the model, once for all tasks: all of these train the same weights."""
    model = None
    for way in ways:
        task = next((t for t in plan.tasks if t in plan.looks and plan.why_not(t, way) is None), None)
        if task is None:
            continue
        try:
            config = plan.config(Cell(task, way, plan.seeds[0]))
            config.check()
            config.check_use()
            model = model or load_model(config)
            make_optimizer(model, config)
        except UserError as error:
            plan.skipped["", way.label] = str(error)


# ---- what it costs -----------------------------------------------------------------------------------------------------------------


def describe(plan: Plan, finished: int) -> str:
    """The plan as text: tasks with their rows, columns with their runs, what is left out and why, and an estimate of the cost.

    `finished`: cells that are made already."""
    cells = list(plan.cells())
    lines = [
        f"suite {plan.suite.name} for {plan.given['model']}: {len(cells)} cells, {finished} of them finished; seeds "
        f"{', '.join(map(str, plan.seeds))}",
        "",
        "| task | data | train | dev | evaluated | tokens an example | longest |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, look in plan.looks.items():
        counts = " | ".join(f"{n:,}" for n in look.counts)
        lines.append(f"| {task} | {plan.data[task][0]} | {counts} | {look.evaluation:.0f} | {look.longest:,} |")
    lines += ["", "| column | steps | lr | eps | forwards a run |", "|---|---|---|---|---|"]
    for way in plan.ways:
        if way.entry is None:
            lines.append(f"| {way.label} | | | | |")
        elif (cell := next((c for c in cells if c.way == way), None)) is not None:
            config, recipe = plan.config(cell), plan.recipe(way)
            rates = ", ".join(f"{lr:g}" for lr in plan.rates.tried(recipe.lr) or [recipe.lr])
            eps = "" if recipe.eps is None else f"{recipe.eps:g}"
            lines.append(f"| {way.label} | {config.steps:,} | {rates} | {eps} | {recipe.forwards(config.steps):,} |")
    for (task, label), why in plan.skipped.items():
        lines.append(f"\nleft out: {left_out((task, label))}: {why}")
    notes = [f"\n{task}: {note}" for task, look in plan.looks.items() for note in look.notes]
    forwards, rows, tokens = (sum(numbers) for numbers in zip(*(cost(plan, cell) for cell in cells), strict=True))
    estimate = f"\nabout {forwards:,} forward passes of a training batch and {rows:,} rows evaluated, {tokens / 1e6:,.1f} million tokens in all"
    return "\n".join([*lines, *notes, estimate, ""])


def cost(plan: Plan, cell: Cell) -> tuple[int, int, float]:
    """(forward passes of a batch, rows evaluated, tokens read) of a cell, and of the learning rates that are tried for it. Answers that are written
    token by token are not counted."""
    look = plan.looks[cell.task]
    train, dev, evaluated = look.counts
    if cell.way.entry is None:
        rows = evaluated + (train + dev if cell.way.label == "probe" else 0)
        return 0, rows, rows * look.evaluation * (SHOTS + 1 if cell.way.label == "in-context" else 1)
    config, recipe = plan.config(cell), plan.recipe(cell.way)
    runs = max(1, len(plan.rates.tried(recipe.lr))) if cell.seed == plan.seeds[0] else 1
    forwards, batch = recipe.forwards(config.steps), min(train, config.batch_size * config.accumulate)
    rows = 2 * evaluated + ((plan.options.points + 1) * dev if config.eval_every else 0)
    return runs * forwards, runs * rows, runs * (forwards * batch * look.train + rows * look.evaluation)


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


def result_of(plan: Plan, cell: Cell, lr: float | None = None) -> dict[str, Any] | None:
    """result.json of a cell that is finished, else None; `lr`: see `Plan.config`. Raises UserError: it has other options."""
    if cell.way.entry is None:
        return earlier_baseline(plan.baseline(cell), plan.root)
    return earlier(plan.config(cell, lr), plan.root)[1]


def finished(plan: Plan) -> int:
    """How many cells there are already.

    Raises:
        UserError: a folder has a cell with other options, or the names of what will be written belong to something else.
    """
    run_folder.check_run_dir(plan.output, overwrite=False, others=True)
    check_own(plan.output, OWN, ("suite", "cells"), "suite")
    count = 0
    for cell in plan.cells():
        tried = plan.rates.tried(plan.recipe(cell.way).lr) if cell.way.entry else []
        if tried:
            results = [result_of(plan, cell, lr) for lr in tried]
            count += all(results) if cell.seed == plan.seeds[0] else any(results)
        else:
            count += result_of(plan, cell) is not None
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
        "dev_loss": dev_loss(result),
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
            best[place], _ = tune(f"{cell.task}, {cell.way.label}", lambda lr: plan.config(first, lr), tried, plan.root)
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
