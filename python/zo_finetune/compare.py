"""`zo-finetune compare`: several methods on the same data, noise seeds and number of forward passes.

Belongs here: which runs there are, the curves and files of what came out. Does not belong here: a run (run.py), what stays of it in a folder of several
(runs.py), which method is above which (ranking.py), what a method costs and its defaults (methods.py).

Equal cost means equal forward passes of a step's batch (`Method.forwards`), evaluations not counted: a method that needs more of them a step
takes fewer steps. Where what is frozen runs once (cached.py), a forward is of what is trained alone, and that once is counted beside it, in forwards of a
batch, and in the seconds. Runs of one seed share the sampled examples, the order of the batches and the noise's seed.

Nothing is chosen by the evaluation rows: a learning rate by the dev examples, which are training rows that no run trains on, and so a run's weights, if
--keep says best.
"""

from __future__ import annotations

import csv
import functools
import io
import math
import os
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zo_finetune import console, figures, files, outcomes, ranking, run_folder
from zo_finetune.common import Common
from zo_finetune.config import Comparison, Config
from zo_finetune.errors import UserError, did_you_mean, one_line
from zo_finetune.files import path_of
from zo_finetune.keep import criterion
from zo_finetune.load import load, objective_of
from zo_finetune.methods import Recipe
from zo_finetune.options import check
from zo_finetune.outcomes import Outcomes
from zo_finetune.run import digest_of, remedy
from zo_finetune.runs import (
    Entry,
    Interrupted,
    Rates,
    check_own,
    check_rows,
    check_same,
    earlier,
    folder_name,
    on_dev,
    run_one,
    tune,
)
from zo_finetune.tasks.base import Task
from zo_finetune.train import make_optimizer

ABOUT = ("task", "weights", "data", "versions", "machine")  # of result.json, in compare.json
OWN = ("compare.json", "compare.csv", "ranking.csv", "table.md", "curves.png", "ranking.png")


def columns(task: Task) -> tuple[str, ...]:
    """Of compare.csv."""
    metric, others = task.metrics[0], [name for name in ranking.measures(task) if name not in (task.metrics[0], "loss")]
    scores = (
        f"{metric}_before",
        metric,
        f"{metric}_stderr",
        "examples",
        "majority",
        "loss_before",
        "loss",
        "dev_loss",
        "dev_score",
        *others,
    )
    cost = ("seconds", "state_bytes", "trained_weights", "skipped_steps")
    return ("method", "objective", "budget", "seed", "forwards", "frozen_forwards", "steps", "lr", "eps", *scores, *cost)


@dataclass(frozen=True)
class Contender:
    """A method with an objective and the most forward passes that it may make. `label`: what tells it from the others, and names its folder."""

    entry: Entry
    objective: str
    budget: int
    label: str

    @property
    def folder(self) -> str:
        return "@".join(map(folder_name, self.label.split(", ")))


@dataclass
class Plan:
    """A comparison. `base`: the options that all of its runs share; its others are the defaults, which `config` replaces. `wanted`: each method with the one
    objective and the one number of forwards that its label asks for; None: with all of them."""

    wanted: list[tuple[Entry, str | None, int | None]]
    options: Comparison
    base: Config

    @property
    def entries(self) -> list[Entry]:
        """The methods, each once."""
        return list({e.label: e for e, _, _ in self.wanted}.values())

    @property
    def output(self) -> Path:
        return path_of("--output", self.options.output)

    @property
    def root(self) -> Path:
        return self.output.absolute()

    @functools.cached_property
    def task(self) -> Task:
        return self.base.the_task()

    @property
    def rates(self) -> Rates:
        return Rates(self.options.lrs, self.options.epses, self.options.lr_factors, self.options.lr_grid or ())

    @property
    def objectives(self) -> list[str]:
        return self.options.objectives or [self.base.objective or "loss"]

    @property
    def budgets(self) -> list[int]:
        return self.options.forwards

    @property
    def lr_seeds(self) -> list[int]:
        return self.options.seeds[: self.options.lr_seeds]

    @functools.cached_property
    def contenders(self) -> list[Contender]:
        """Every method with every objective and number of forward passes that it is wanted with, the most of them first."""
        most, found = max(self.budgets, default=0), []
        for budget in sorted(self.budgets, reverse=True):
            for objective in self.objectives:
                more = [objective] if objective != self.base.objective else []
                more += [str(budget)] if budget != most else []
                found += [
                    Contender(e, objective, budget, ", ".join([e.label, *more]))
                    for e, with_objective, with_budget in self.wanted
                    if with_objective in (None, objective) and with_budget in (None, budget)
                ]
        return found

    @property
    def baseline(self) -> str:
        """The label of the contender that the others are set against."""
        wanted = self.options.baseline or "mezo"
        return next((c.label for c in self.contenders if c.entry.label == wanted), self.contenders[0].label)

    def recipe(self, one: Contender) -> Recipe:
        return self.rates.recipe(one.entry, self.base.peft, one.entry.method.name)

    def tried(self, one: Contender) -> list[float]:
        return self.rates.tried(self.recipe(one).lr)

    def config(self, one: Contender, seed: int, lr: float | None = None) -> Config:
        """Of one run; `lr`: in place of the recipe's."""
        recipe, points, method = self.recipe(one), self.options.points, one.entry.method
        steps = recipe.steps(one.budget)
        lr = recipe.lr if lr is None else lr
        config = replace(
            self.base,
            output=str(self.output / "runs" / one.folder / f"lr{lr:g}-seed{seed}"),
            method=method.name,
            options=dict(one.entry.given),
            objective=one.objective,
            task_file=None,  # all it says is in the options by now, and its objective may be another than this run's
            steps=steps,
            lr=lr,
            eps=recipe.eps,
            seed=seed,
            eval_every=max(1, -(-steps // points)) if points and self.base.dev_examples != 0 else 0,
            save=False,
            overwrite=True,
        )
        others = any(not e.method.first_order for e in self.entries)
        if method.first_order and others and recipe.eps is None:
            config = config.without_perturbing()
        return config.placed(os.getcwd())

    def check(self) -> None:
        """Everything that can be known before a model is loaded.

        Raises:
            UserError: names the option, its value and the remedy.
        """
        given = self.options
        check(given)
        for entry, objective, budget in self.wanted:
            if objective not in (None, *self.objectives) or budget not in (None, *self.budgets):
                what = f"@{objective}" if objective not in (None, *self.objectives) else f"@{budget}"
                raise UserError(
                    f"--methods {entry.label}{what}: it is none of --objectives ({', '.join(self.objectives)}) and --forwards "
                    f"({', '.join(map(str, self.budgets))}): add it there"
                )
        for what, values in (
            ("--seeds", given.seeds),
            ("--forwards", given.forwards),
            ("--objectives", self.objectives),
            ("--methods", [c.folder for c in self.contenders]),
        ):
            if not values or len(set(values)) != len(values):
                raise UserError(f"{what}: give at least one, and none twice")
        if given.baseline is not None and given.baseline not in (labels := [e.label for e in self.entries]):
            raise UserError(f"--baseline {given.baseline!r:.80} must be one of --methods{did_you_mean(given.baseline, labels)}")
        self.rates.check({name for e in self.entries for name in (e.label, e.method.name)})
        if self.rates.several and (not given.points or self.base.dev_examples == 0):
            raise UserError(
                "--lr-factors and --lr-grid choose by the dev examples: give --dev-examples and --points greater than 0, or one factor"
            )
        if given.lr_seeds > len(given.seeds):
            raise UserError(f"--lr-seeds {given.lr_seeds}: there are {len(given.seeds)} --seeds: give more, or less")
        for one in self.contenders:
            if one.budget < (least := self.recipe(one).forwards(1)):
                raise UserError(f"--forwards {one.budget}: a step of {one.entry.label} needs {least}; give more")
            for seed in given.seeds:
                config = self.config(one, seed)
                config.check()
                config.check_use()


def plan_of(given: dict[str, Any], base: dict[str, Any]) -> Plan:
    """From the command line's values: the comparison's own, and those of its runs."""
    options = Comparison(**given)
    path_of("--output", options.output)
    if options.objectives and (said := base.get("objective")) not in (None, *options.objectives):
        raise UserError(f"--objective {said} is none of --objectives: leave it out")
    return Plan([wanted_of(label) for label in options.methods.split(",")], options, Config(**base).settled())


def wanted_of(label: str) -> tuple[Entry, str | None, int | None]:
    """METHOD[:KEY=VALUE...][@OBJECTIVE][@FORWARDS]. Raises UserError: there is no such method, or something is said twice."""
    name, *more = label.split("@")
    budgets = [int(word) for word in more if re.fullmatch("[0-9]{1,18}", word, re.ASCII)]
    objectives = [word for word in more if not re.fullmatch("[0-9]{1,18}", word, re.ASCII)]
    if len(budgets) > 1 or len(objectives) > 1:
        raise UserError(f"--methods {label:.80}: behind @ is one objective, and one number of forwards")
    return Entry.of(name), next(iter(objectives), None), next(iter(budgets), None)


def check_runs(plan: Plan, common: Common) -> None:
    """Everything that can be known of all runs before the first step of any: what is in their folders, the rows that each seed samples, and
    whether each method fits the model.

    Raises:
        UserError: names the method.
    """
    run_folder.check_run_dir(plan.output, overwrite=False, others=True)
    check_own(plan.output, OWN, ("runs", "curves"), "comparison")
    by = criterion(plan.options.lr_by, plan.task, "--lr-by")
    seeds = plan.options.seeds
    planned = [(c, plan.config(c, seed, lr)) for c in plan.contenders for lr in plan.tried(c) for seed in plan.lr_seeds]
    tuning = bool(planned)
    planned += [] if tuning else [(c, plan.config(c, seed)) for seed in seeds for c in plan.contenders]
    results = [earlier(config, plan.root)[1] for _, config in planned]
    for (one, config), result in zip(planned, results, strict=True):
        if result is not None:
            Finished.of(one, config, result, by)
            check_rows(config, result, common)
    if all(results) and not tuning:
        return
    for one in plan.contenders:
        objective_of(plan.config(one, seeds[0]), plan.task)
    console.say(f"checking the methods ({len(plan.contenders)}) and seeds ({len(seeds)}) before the first run")
    model = weights = None
    for seed in seeds:
        loaded = load(plan.config(plan.contenders[0], seed), model, common)
        if model is None:
            weights = loaded.language_model.model
        elif plan.base.peft != "none":
            weights = None  # an adapter's are of a seed
        model, now = loaded.language_model, digest_of(loaded)
        for (_, config), result in zip(planned, results, strict=True):
            if result and config.seed == seed and objective_of(config, plan.task).gold_only == loaded.objective.gold_only:
                check_same(config, now, weights)
                weights = None  # those of one stand for all
    if model is not None:
        for one in plan.contenders:
            make_optimizer(model, plan.config(one, seeds[0]))


@dataclass(frozen=True)
class Finished:
    """A run that came to its end: its row in compare.csv, its curve, and what each row of the evaluations came to."""

    row: dict[str, Any]
    curve: dict[str, Any]
    about: dict[str, Any]
    outcomes: dict[str, Outcomes | None]  # by the names of the files

    @classmethod
    def of(cls, one: Contender, config: Config, result: Mapping[str, Any], by: str) -> Finished:
        """`by`: what chooses learning rates. Raises UserError: its files are not as a run wrote them."""
        try:
            task, after = config.the_task(), result["after"]
            about = {name: result[name] for name in ABOUT}
            found = {name: outcomes.read(Path(config.output) / name) for name in outcomes.NAMES}
            if (last := found[outcomes.AFTER]) and not outcomes.fits(last, after["examples"], after[outcomes.value_name(task)]):
                raise ValueError(f"{outcomes.AFTER} is of another evaluation")
            return cls(row_of(one, config, result, by), curve_of(config, result), about, found)
        except (OSError, LookupError, TypeError, ValueError, csv.Error, UserError) as error:
            raise UserError(
                f"{config.output}: its result.json, log.csv or scores are not as the run wrote them ({one_line(error)}): delete that folder, and the same "
                "command makes the run again"
            ) from error


def row_of(one: Contender, config: Config, result: Mapping[str, Any], by: str) -> dict[str, Any]:
    before, after, task = result["before"], result["after"], config.the_task()
    metric, kept = task.metrics[0], result["cache"]
    frozen = result["forwards"]  # every forward runs the frozen part, too, or it ran once for each kept input
    if kept is not None:  # runs of earlier versions have no `forwards`: of one input an example these are they
        frozen = round(kept.get("forwards", kept["examples"] / (config.batch_size * config.accumulate)), 1)
    return {
        "method": one.entry.label,
        "objective": one.objective,
        "budget": one.budget,
        "seed": config.seed,
        "forwards": result["forwards"],
        "frozen_forwards": frozen,
        "steps": result["steps"],
        "lr": result["hyperparameters"]["lr"],
        "eps": result["hyperparameters"]["eps"],
        f"{metric}_before": before[metric],
        metric: after[metric],
        f"{metric}_stderr": after[f"{metric}_stderr"],
        "examples": after["examples"],
        "majority": result["majority"],
        "loss_before": before["loss"],
        "loss": after["loss"],
        "dev_loss": on_dev(result),
        "dev_score": on_dev(result, by),
        **{name: after.get(name) for name in ranking.measures(task) if name not in (metric, "loss")},
        "seconds": round(result["training_seconds"] + (0.0 if kept is None else kept["seconds"]), 2),
        "state_bytes": result["state_bytes"],
        "trained_weights": result["weights"]["trainable"],
        "skipped_steps": result["skipped_steps"],
    }


def compare(plan: Plan, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the plan; returns what compare.json holds. Ctrl-C ends it and keeps what is finished; the same command then goes on.

    Raises:
        UserError: something the user can put right.
    """
    plan.check()
    options = plan.options
    chosen: dict[str, float] = {}
    tuned: dict[str, dict[str, float]] = {}  # an infinity is null in the file
    found: dict[str, list[Finished]] = {}
    interrupted = False
    common = Common()
    check_runs(plan, common)
    by = criterion(options.lr_by, plan.task, "--lr-by")
    try:
        for one in plan.contenders:
            if rates := plan.tried(one):
                configs_of = functools.partial(configs, plan, one)
                chosen[one.label], tuned[one.label] = tune(one.label, configs_of, rates, plan.root, by, common)
        for seed in options.seeds:
            for one in plan.contenders:
                config = plan.config(one, seed, chosen.get(one.label))
                console.say(f"{one.label}: seed {seed}, lr {config.lr:g}, {config.steps} steps")
                finished = Finished.of(one, config, run_one(config, plan.root, common), by)
                found.setdefault(one.label, []).append(finished)
    except (KeyboardInterrupt, Interrupted):
        interrupted = True
    content: dict[str, Any] = {
        "interrupted": interrupted,
        "model": Path(plan.base.model).name,
        "forwards": options.forwards,
        "objectives": plan.objectives,
        "seeds": options.seeds,
        "peft": plan.base.peft,
        "methods": {c.entry.label: plan.recipe(c).options for c in plan.contenders},
        "lr_by": by,
        "tuned": tuned,
        **next((mine[-1].about for mine in found.values()), {}),
        "runs": [f.row for f in sorted_by_seed(options.seeds, found)],
        "curves": {label: [f.curve for f in mine] for label, mine in found.items()},
        "command": list(command or sys.argv),
    }
    if found:
        try:
            write(plan, content, standing_of(plan, found, tuned))
        except OSError as error:
            raise UserError(
                f"{one_line(error)}; {remedy(error)}, then give the same command again: finished runs are kept"
            ) from error
    if interrupted:
        console.say(f"interrupted: {len(content['runs'])} runs are finished and kept in {plan.output}; the same command goes on")
    return content


def configs(plan: Plan, one: Contender, lr: float) -> list[Config]:
    """Of the runs that say what a learning rate is worth."""
    return [plan.config(one, seed, lr) for seed in plan.lr_seeds]


def sorted_by_seed(seeds: Sequence[int], found: Mapping[str, Sequence[Finished]]) -> list[Finished]:
    """As they were made."""
    return [f for seed in seeds for mine in found.values() for f in mine if f.row["seed"] == seed]


def standing_of(plan: Plan, found: Mapping[str, Sequence[Finished]], tuned: Mapping[str, Mapping[str, float]]) -> ranking.Standing:
    """The methods against the baseline."""
    runs = []
    for one in plan.contenders:
        made = ranking.Runs(
            one.label, one.entry.label, one.objective, one.budget, edge=edge_of(found.get(one.label, []), tuned.get(one.label, {}))
        )
        for f in found.get(one.label, []):
            seed = f.row["seed"]
            made.rows[seed] = f.row
            for kept, name in ((made.before, outcomes.BEFORE), (made.dev, outcomes.DEV), (made.after, outcomes.AFTER)):
                if (of_run := f.outcomes[name]) is not None:
                    kept[seed] = of_run
        runs.append(made)
    return ranking.Standing(plan.task, runs, plan.baseline)


def edge_of(mine: Sequence[Finished], tried: Mapping[str, float]) -> str:
    """Whether the learning rate is the lowest or the highest of those that were tried, beyond which a better one may lie."""
    rates = [float(lr) for lr in tried]
    if not mine or len(rates) < 2:
        return ""
    lr = float(f"{mine[0].row['lr']:g}")
    return "low" if lr == min(rates) else "high" if lr == max(rates) else ""


def curve_of(config: Config, result: Mapping[str, Any]) -> dict[str, Any]:
    """The loss along one run against forward passes: on the dev examples, and of training."""
    recipe, metric = config.recipe(), config.the_task().metrics[0]
    losses = run_folder.Log.read(Path(config.output) / "log.csv")
    if len(losses) != result["steps"]:
        raise ValueError(f"log.csv has {len(losses)} steps, result.json {result['steps']}")
    window = max(1, len(losses) // 20)
    means = figures.smoothed([loss for _, loss in losses], window)
    picked = [*range(window - 1, len(losses), max(1, len(losses) // 50))]
    return {
        "seed": config.seed,
        "dev": [(recipe.forwards(e["step"]), e["loss"], e[metric]) for e in result["history"]],
        "training": [(recipe.forwards(losses[k][0]), means[k]) for k in picked],
    }


def write(plan: Plan, content: dict[str, Any], standing: ranking.Standing) -> None:
    """compare.json, compare.csv, ranking.csv, table.md and the figures; the table is printed too."""
    plan.output.mkdir(parents=True, exist_ok=True)
    content["ranking"] = {
        "baseline": plan.baseline,
        "resamples": standing.resamples,
        "seed": standing.seed,
        "methods": standing.lines,
    }
    files.write_json(plan.output / "compare.json", content)
    for name, names, rows in (
        ("compare.csv", columns(plan.task), content["runs"]),
        ("ranking.csv", ranking.columns(plan.task), standing.lines),
    ):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(rows)
        files.write_text(plan.output / name, text.getvalue())
    table = page(plan, content, standing)
    files.write_text(plan.output / "table.md", table)
    console.tell(table)
    for name, drawn in (("curves.png", lambda path: draw(path, content)), ("ranking.png", standing.draw)):
        try:
            drawn(plan.output / name)
        except Exception as error:  # as of a run's curve
            console.say(f"{name} could not be drawn ({one_line(error)}); compare.json has what it shows")


def page(plan: Plan, content: Mapping[str, Any], standing: ranking.Standing) -> str:
    """table.md: what was done, and the standing."""
    options, rows = plan.options, content["runs"]
    count = len({row["seed"] for row in rows})
    said = [f"Means over {count} seeds ± their standard deviation, {min(r['examples'] for r in rows):,} evaluation rows." if count > 1 else
            f"One seed, {rows[0]['examples']:,} evaluation rows."]  # fmt: skip
    said.append(f"At most {' or '.join(f'{n:,}' for n in options.forwards)} forward passes of a batch a run.")
    if content["tuned"]:
        dev = content["data"]["dev"]["rows"]
        tried = max(len(rates) for rates in content["tuned"].values())
        said.append(
            f"Each learning rate is the best of {tried} by the {content['lr_by']} on {dev:,} held-out training rows with {len(plan.lr_seeds)} of the "
            "seeds; an arrow: it is the last of those tried, and a better one may lie beyond."
        )
        if no_choice := [label for label, rates in content["tuned"].items() if not any(map(math.isfinite, rates.values()))]:
            said.append(f"Of {', '.join(no_choice)} it is the first, and none was chosen: with no rate is that a number.")
    said.append(standing.words())
    return " ".join(filter(None, said)) + "\n\n" + standing.markdown()


def draw(path: Path, content: Mapping[str, Any]) -> None:
    """Loss against forward passes: mean over the seeds, the band from the lowest to the highest. On the dev examples, which differ from seed
    to seed, what it has changed by; without any, that of training."""
    runs = [run for mine in content["curves"].values() for run in mine]
    kind = next((kind for kind in ("dev", "training") if any(run[kind] for run in runs)), None)
    if kind is None:
        return
    with figures.plain_figure(path, 110, figsize=(11, 5.5)) as figure:
        _draw(figure.subplots(), content, kind)


def _draw(axes: Any, content: Mapping[str, Any], kind: str) -> None:
    from matplotlib import colormaps

    for k, (label, mine) in enumerate(content["curves"].items()):
        points = list(zip(*(run[kind] for run in mine), strict=False))  # runs of one method have the same steps
        x = [point[0][0] for point in points]
        starts = [run["dev"][0][1] if kind == "dev" else 0.0 for run in mine]
        values = [
            [math.nan if p[1] is None or start is None else p[1] - start for p, start in zip(point, starts, strict=True)]
            for point in points
        ]
        color = colormaps["tab10"](k % 10)
        axes.plot(x, [statistics.fmean(v) for v in values], label=label, color=color, linestyle=("-", "--", ":")[k // 10 % 3])
        axes.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.06)
    axes.set(ylabel="change of the loss on the dev examples" if kind == "dev" else "training loss, running mean")
    axes.set(
        xlabel="forward passes of a batch",
        title=f"{content.get('task', '')}, {content['model']}, {content['peft']}: {len(content['seeds'])} seeds",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize="small")
