"""`zo-finetune compare`: several methods on the same data, noise seeds and number of forward passes.

Belongs here: which runs there are, the table and curves of what came out. Does not belong here: a run (run.py), what stays of it in a folder of several
(runs.py), what a method costs and its defaults (methods.py).

Equal cost means equal forward passes of a step's batch (`Method.forwards`), evaluations not counted: a method that needs more of them a step
takes fewer steps. Runs of one seed share the sampled examples, the order of the batches and the noise's seed.
"""

from __future__ import annotations

import csv
import functools
import io
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zo_finetune import console, figures, files, run_folder
from zo_finetune.config import Comparison, Config
from zo_finetune.errors import UserError, one_line
from zo_finetune.files import path_of
from zo_finetune.load import load, objective_of
from zo_finetune.methods import Recipe
from zo_finetune.options import check
from zo_finetune.run import remedy
from zo_finetune.runs import Entry, Interrupted, Rates, check_own, dev_loss, earlier, run_one, tune
from zo_finetune.train import make_optimizer

ABOUT = ("task", "weights", "data", "versions", "machine")  # of result.json, in compare.json
OWN = ("compare.json", "compare.csv", "table.md", "curves.png")


def columns(metric: str) -> tuple[str, ...]:
    """Of compare.csv, for tasks of this metric."""
    scores = (f"{metric}_before", metric, f"{metric}_stderr", "examples", "majority", "loss_before", "loss", "dev_loss")
    cost = ("seconds", "state_bytes", "trained_weights", "skipped_steps")
    return ("method", "seed", "forwards", "steps", "lr", "eps", *scores, *cost)


@dataclass
class Plan:
    """A comparison. `base`: the options that all of its runs share; its others are the defaults, which `config` replaces."""

    entries: list[Entry]
    options: Comparison
    base: Config

    @property
    def output(self) -> Path:
        return path_of("--output", self.options.output)

    @property
    def root(self) -> Path:
        return self.output.absolute()

    @property
    def metric(self) -> str:
        return self.base.the_task().metrics[0]

    @property
    def rates(self) -> Rates:
        return Rates(self.options.lrs, self.options.epses, self.options.lr_factors)

    def recipe(self, entry: Entry) -> Recipe:
        return self.rates.recipe(entry, self.base.peft, entry.method.name)

    def tried(self, entry: Entry) -> list[float]:
        return self.rates.tried(self.recipe(entry).lr)

    def config(self, entry: Entry, seed: int, lr: float | None = None) -> Config:
        """Of one run; `lr`: in place of the recipe's."""
        recipe, points = self.recipe(entry), self.options.points
        steps = recipe.steps(self.options.forwards)
        lr = recipe.lr if lr is None else lr
        config = replace(
            self.base,
            output=str(self.output / "runs" / entry.folder / f"lr{lr:g}-seed{seed}"),
            method=entry.method.name,
            options=dict(entry.given),
            steps=steps,
            lr=lr,
            eps=recipe.eps,
            seed=seed,
            eval_every=max(1, -(-steps // points)) if points and self.base.dev_examples != 0 else 0,
            save=False,
            overwrite=True,
        )
        others = any(not e.method.first_order for e in self.entries)
        if entry.method.first_order and others and recipe.eps is None:
            config = config.without_perturbing()
        return config.placed(os.getcwd())

    def check(self) -> None:
        """Everything that can be known before a model is loaded.

        Raises:
            UserError: names the option, its value and the remedy.
        """
        given = self.options
        check(given)
        for what, values in (
            ("--methods", [e.folder for e in self.entries]),
            ("--seeds", given.seeds),
        ):
            if not values or len(set(values)) != len(values):
                raise UserError(f"{what}: give at least one, and none twice")
        self.rates.check({name for e in self.entries for name in (e.label, e.method.name)})
        if len(given.lr_factors) > 1 and (not given.points or self.base.dev_examples == 0):
            raise UserError(
                "--lr-factors chooses by the dev examples: give --dev-examples and --points greater than 0, or one factor"
            )
        for entry in self.entries:
            if given.forwards < (least := self.recipe(entry).forwards(1)):
                raise UserError(f"--forwards {given.forwards}: a step of {entry.label} needs {least}; give more")
            for seed in given.seeds:
                config = self.config(entry, seed)
                config.check()
                config.check_use()


def plan_of(given: dict[str, Any], base: dict[str, Any]) -> Plan:
    """From the command line's values: the comparison's own, and those of its runs."""
    options = Comparison(**given)
    path_of("--output", options.output)
    return Plan([Entry.of(label) for label in options.methods.split(",")], options, Config(**base).settled())


def check_runs(plan: Plan) -> None:
    """Everything that can be known of all runs before the first step of any: what is in their folders, the rows that each seed samples, and
    whether each method fits the model.

    Raises:
        UserError: names the method.
    """
    run_folder.check_run_dir(plan.output, overwrite=False, others=True)
    check_own(plan.output, OWN, ("runs", "curves"), "comparison")
    seeds = plan.options.seeds
    planned = [(e, plan.config(e, seeds[0], lr)) for e in plan.entries for lr in plan.tried(e)]
    tuning = bool(planned)
    planned += [] if tuning else [(e, plan.config(e, seed)) for seed in seeds for e in plan.entries]
    results = [earlier(config, plan.root)[1] for _, config in planned]
    for (entry, config), result in zip(planned, results, strict=True):
        if result is not None:
            finished(entry, config, result)
    if all(results) and not tuning:
        return
    for entry in plan.entries:
        objective_of(plan.config(entry, seeds[0]), plan.base.the_task())
    console.say(f"checking the methods ({len(plan.entries)}) and seeds ({len(seeds)}) before the first run")
    model = None
    for seed in seeds:
        model = load(plan.config(plan.entries[0], seed), model).language_model
    if model is not None:
        for entry in plan.entries:
            make_optimizer(model, plan.config(entry, seeds[0]))


def finished(entry: Entry, config: Config, result: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a finished run is in the table and in the figure.

    Raises:
        UserError: its files are not as a run wrote them.
    """
    try:
        _ = [result[name] for name in ABOUT]
        return row_of(entry, config, result), curve_of(config, result)
    except (OSError, LookupError, TypeError, ValueError, csv.Error) as error:
        raise UserError(
            f"{config.output}: its result.json or log.csv is not as the run wrote it ({one_line(error)}): delete that folder, and the same command "
            "makes the run again"
        ) from error


def row_of(entry: Entry, config: Config, result: Mapping[str, Any]) -> dict[str, Any]:
    before, after = result["before"], result["after"]
    metric = config.the_task().metrics[0]
    return {
        "method": entry.label,
        "seed": config.seed,
        "forwards": result["forwards"],
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
        "dev_loss": dev_loss(result),
        "seconds": round(result["training_seconds"], 2),
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
    rows: list[dict[str, Any]] = []
    curves: dict[str, list[dict[str, Any]]] = {}
    about: dict[str, Any] = {}
    interrupted = False
    check_runs(plan)
    try:
        for entry in plan.entries:
            if rates := plan.tried(entry):
                config_of = functools.partial(plan.config, entry, options.seeds[0])
                chosen[entry.label], tuned[entry.label] = tune(entry.label, config_of, rates, plan.root)
        for seed in options.seeds:
            for entry in plan.entries:
                config = plan.config(entry, seed, chosen.get(entry.label))
                console.say(f"{entry.label}: seed {seed}, lr {config.lr:g}, {config.steps} steps")
                result = run_one(config, plan.root)
                row, curve = finished(entry, config, result)
                rows.append(row)
                curves.setdefault(entry.label, []).append(curve)
                about = {name: result[name] for name in ABOUT}
    except (KeyboardInterrupt, Interrupted):
        interrupted = True
    content = {
        "interrupted": interrupted,
        "model": Path(plan.base.model).name,
        "forwards": options.forwards,
        "seeds": options.seeds,
        "peft": plan.base.peft,
        "methods": {e.label: plan.recipe(e).options for e in plan.entries},
        "tuned": tuned,
        **about,
        "runs": rows,
        "curves": curves,
        "command": list(command or sys.argv),
    }
    if rows:
        try:
            write(plan, content)
        except OSError as error:
            raise UserError(
                f"{one_line(error)}; {remedy(error)}, then give the same command again: finished runs are kept"
            ) from error
    if interrupted:
        console.say(f"interrupted: {len(rows)} runs are finished and kept in {plan.output}; the same command goes on")
    return content


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


def write(plan: Plan, content: Mapping[str, Any]) -> None:
    """compare.json, compare.csv, table.md, curves.png; the table is printed too."""
    plan.output.mkdir(parents=True, exist_ok=True)
    files.write_json(plan.output / "compare.json", content)
    rows = io.StringIO(newline="")
    writer = csv.DictWriter(rows, columns(plan.metric))
    writer.writeheader()
    writer.writerows(content["runs"])
    files.write_text(plan.output / "compare.csv", rows.getvalue())
    text = table(plan, content["runs"])
    files.write_text(plan.output / "table.md", text)
    console.tell(text)
    try:
        draw(plan.output / "curves.png", content)
    except Exception as error:  # as of a run's curve
        console.say(f"curves.png could not be drawn ({one_line(error)}); compare.json has what it shows")


def spread(values: Sequence[float | None], digits: int) -> str:
    """Mean and, of several, the sample standard deviation; None is a number that was not finite."""
    numbers = [math.nan if value is None else value for value in values]
    mean = statistics.fmean(numbers)
    return f"{mean:.{digits}f}" + (f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 and math.isfinite(mean) else "")


def sure(metric: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The mean of a metric and, of several seeds, its standard deviation; of one seed the standard error over the rows."""
    alone = len(rows) == 1 and rows[0][metric] is not None
    return spread([r[metric] for r in rows], 3) + (f" ± {rows[0][f'{metric}_stderr']:.3f}" if alone else "")


def table(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a row for each method: means over its seeds ± their standard deviation."""
    by_label: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_label.setdefault(row["method"], []).append(row)
    metric = plan.metric
    head = ("method", "steps", "forwards", "lr", metric, "gain", "loss", "dev loss", "state, bytes a weight", "seeds")
    lines = [head, tuple("---" for _ in head)]
    for label, mine in by_label.items():
        dev = [r["dev_loss"] for r in mine]
        lines.append(
            (
                label,
                str(mine[0]["steps"]),
                str(mine[0]["forwards"]),
                f"{mine[0]['lr']:g}",
                sure(metric, mine),
                spread([r[metric] - r[f"{metric}_before"] for r in mine], 3),
                spread([r["loss"] for r in mine], 3),
                spread(dev, 3) if plan.options.points and any(d is not None for d in dev) else "",
                f"{mine[0]['state_bytes'] / mine[0]['trained_weights']:.3g}",
                str(len(mine)),
            )
        )
    before = {r["seed"]: r for r in rows}.values()
    majority = "" if any(r["majority"] is None for r in before) else f", majority {spread([r['majority'] for r in before], 3)}"
    meaning = (
        "means over the seeds ± their standard deviation" if len(before) > 1 else f"{metric} ± its standard error over the rows"
    )
    text = (
        f"Before: {metric} {spread([r[f'{metric}_before'] for r in before], 3)} on {min(r['examples'] for r in before)} examples{majority}, loss "
        f"{spread([r['loss_before'] for r in before], 3)}. "
        f"At most {plan.options.forwards} forward passes a run; {meaning}.\n\n"
    )
    return text + "".join(f"| {' | '.join(line)} |\n" for line in lines)


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
