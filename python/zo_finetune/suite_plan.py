"""The plan of a suite: its cells for one model, what of them cannot be done and why, and what they cost.

Belongs here: columns and cells, their options, where a task's rows are, what is tried before anything is made. Does not belong here: making cells and what
is kept of them (suite.py), tables of papers (suites/), what is made of the scores (suite_table.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from zo_finetune import console
from zo_finetune.config import ADAPTERS, Baseline, Config, Evaluation, Probing, SuiteRuns
from zo_finetune.errors import UserError, did_you_mean, plural
from zo_finetune.files import path_of
from zo_finetune.load import Loaded, load, load_model
from zo_finetune.methods import PEFTS, Recipe
from zo_finetune.options import check, options_of
from zo_finetune.runs import Entry, Rates, folder_name
from zo_finetune.sources import TRAIN_NAMES, Shard, readable
from zo_finetune.suites import SUITES, Column, Suite
from zo_finetune.suites.base import BASELINES, SHOTS
from zo_finetune.tasks import TASKS, get_task
from zo_finetune.tasks.base import Task
from zo_finetune.train import make_optimizer

HUB = "hub"  # --data: the data sets that the tasks name


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
        return (config.without_perturbing() if method.first_order and recipe.eps is None else config).placed(os.getcwd()).settled()

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
    if strange := [task for task in tasks if task not in TASKS]:
        raise UserError(f"--tasks {strange[0]!r:.80} must be of {', '.join(TASKS)}{did_you_mean(strange[0], TASKS)}")
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
    with console.Counter("looking at the rows", len(plan.tasks) * len(plan.seeds), "sample") as counter:
        for name in plan.tasks:
            task = get_task(name)
            try:
                plan.data[name] = find(plan.options.data, task)
            except UserError as error:
                plan.skipped[name, ""] = str(error)
                counter.advance(len(plan.seeds), name)
                continue
            for seed in plan.seeds:
                config = Config(**plan.shared(Cell(name, ways[0], seed), "")).placed(os.getcwd())
                model = model or load_model(config)
                try:
                    loaded = load(config, model)
                except UserError as error:
                    plan.skipped[name, ""] = str(error)
                    counter.advance(len(plan.seeds) - plan.seeds.index(seed), name)
                    break
                if seed == plan.seeds[0]:
                    plan.looks[name] = look_at(loaded)
                    leave_out(plan, task, loaded)
                counter.advance(1, f"{name}, seed {seed}")
    del model
    for peft in dict.fromkeys(way.peft for way in ways if way.entry):
        with console.Phase("trying the methods on the model" + ("" if peft == "none" else f" with {peft}")):
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
        f"suite {plan.suite.name} for {plan.given['model']}: {plural(len(cells), 'cell')}, {finished} of them finished; seeds "
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
