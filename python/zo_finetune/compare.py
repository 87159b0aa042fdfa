"""`zo-finetune compare`: several methods on the same data, noise seeds and number of forward passes.

Belongs here: which runs there are, the choice of learning rates, the table and curves of what came out. Does not belong here: a run
(train.py), what a method costs and its defaults (methods.py).

Equal cost means equal forward passes of a step's batch (`Method.forwards`), evaluations not counted: a method that needs more of them a step
takes fewer steps. Runs of one seed share the sampled examples, the order of the batches and the noise's seed.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zo_finetune import console, methods, report
from zo_finetune.errors import UserError, once, one_line, shortened
from zo_finetune.methods import Method
from zo_finetune.train import Config, make_stepper, prepare, remedy, resolved, resume, saved_config, train

COLUMNS = (
    "method", "seed", "forwards", "steps", "lr", "eps", "accuracy_before", "accuracy", "accuracy_stderr", "loss_before", "loss", "dev_loss",
    "seconds", "state_bytes", "trained_weights", "skipped_steps",
)  # fmt: skip


ABOUT = ("task", "weights", "data", "versions", "machine")  # of result.json, in compare.json
OWN = ("compare.json", "compare.csv", "table.md", "curves.png")


@dataclass(frozen=True)
class Entry:
    """One method of the comparison. `label`: as the user wrote it, such as momentum:state=recomputed."""

    label: str
    method: Method
    given: Mapping[str, str]

    @classmethod
    def of(cls, label: str) -> Entry:
        name, *options = label.split(":")
        pairs = [option.partition("=") for option in options]
        if wrong := next(
            (o for o, (key, equals, value) in zip(options, pairs, strict=True) if not (key and equals and value)), None
        ):
            raise UserError(f"--methods {label}: {wrong!r} must be KEY=VALUE, as in momentum:state=recomputed")
        return cls(label, methods.get(name), once(f"--methods {label}:", ((key, value) for key, _, value in pairs)))

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.=-]", "-", self.label)


@dataclass
class Plan:
    """A comparison. `base`: the fields of `Config` that all of its runs share."""

    entries: list[Entry]
    forwards: int
    output: Path
    base: dict[str, Any]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    lrs: dict[str, float] = field(default_factory=dict)
    epses: dict[str, float] = field(default_factory=dict)
    lr_factors: list[float] = field(default_factory=lambda: [1.0])
    points: int = 5

    def peft(self) -> str:
        return str(self.base.get("peft", "none"))

    def lr(self, entry: Entry) -> float:
        return self.lrs.get(entry.label, self.lrs.get(entry.method.name, entry.method.preset(self.peft()).lr))

    def tried(self, entry: Entry, factor: float) -> float:
        return float(f"{self.lr(entry) * factor:.6g}")

    def eps(self, entry: Entry) -> float:
        return self.epses.get(entry.label, self.epses.get(entry.method.name, entry.method.preset(self.peft()).eps))

    def steps(self, entry: Entry) -> int:
        return entry.method.steps(entry.method.options(entry.given, self.peft()), self.forwards)

    def config(self, entry: Entry, lr: float, seed: int) -> Config:
        steps = self.steps(entry)
        config = Config(
            **self.base,
            output=str(self.output / "runs" / entry.folder / f"lr{lr:g}-seed{seed}"),
            method=entry.method.name,
            options=dict(entry.given),
            steps=steps,
            lr=lr,
            eps=self.eps(entry),
            seed=seed,
            eval_every=max(1, -(-steps // self.points)) if self.points and self.base.get("dev_examples") != 0 else 0,
            save=False,
            overwrite=True,
        )
        return resolved(config, os.getcwd())

    def check(self) -> None:
        """Everything that can be known before a model is loaded.

        Raises:
            UserError: names the option, its value and the remedy.
        """
        for what, values in (
            ("--methods", [e.folder for e in self.entries]),
            ("--seeds", self.seeds),
            ("--lr-factors", self.lr_factors),
        ):
            if not values or len(set(values)) != len(values):
                raise UserError(f"{what}: give at least one, and none twice")
        for what, given in (("--lr", self.lrs), ("--eps", self.epses)):
            known = {name for e in self.entries for name in (e.label, e.method.name)}
            if strange := sorted(set(given) - known):
                raise UserError(
                    f"{what} {strange[0]}={given[strange[0]]:g}: --methods has no {strange[0]!r}: it has {', '.join(sorted(known))}"
                )
        if not all(math.isfinite(f) and f > 0 for f in self.lr_factors):
            raise UserError("--lr-factors must be finite and greater than 0")
        if not all(math.isfinite(lr) for lr in (*self.lrs.values(), *self.epses.values())):
            raise UserError("--lr and --eps must be finite")
        if self.points < 0:
            raise UserError(f"--points {self.points} must be at least 0")
        if len(self.lr_factors) > 1 and (not self.points or self.base.get("dev_examples") == 0):
            raise UserError(
                "--lr-factors chooses by the dev examples: give --dev-examples and --points greater than 0, or one factor"
            )
        for entry in self.entries:
            options = entry.method.options(entry.given, self.peft())
            if self.forwards < (least := entry.method.forwards(options, 1)):
                raise UserError(f"--forwards {self.forwards}: a step of {entry.label} needs {least}; give more")
            for seed in self.seeds:
                config = self.config(entry, self.lr(entry), seed)
                config.check()
                config.check_use()


def plan_of(given: dict[str, Any]) -> Plan:
    """From the command line's values."""
    own = ("forwards", "seeds", "lrs", "epses", "lr_factors", "points")
    base = {name: value for name, value in given.items() if name not in (*own, "methods", "output")}
    return Plan(
        entries=[Entry.of(label) for label in given["methods"].split(",")],
        output=report.path_of("--output", given["output"]),
        base=base,
        **{name: given[name] for name in own if name in given},
    )


class _Interrupted(Exception):
    pass


def earlier(config: Config) -> tuple[bool, dict[str, Any] | None]:
    """What is in a run's folder: whether it began there, and result.json if it is finished.

    Raises:
        UserError: it has a run with other options, or something that is no run's.
    """
    folder = Path(config.output)
    for above in (folder.parents[1], folder.parents[0], folder):
        report.check_plain(above, folder=True)
    report.check_files(folder)
    if not (folder / "config.json").exists():
        return False, None
    saved = saved_config(folder)
    for name, value in asdict(config).items():
        if name not in ("output", "overwrite") and getattr(saved, name) != value:
            raise UserError(f"{folder} has a run with another {name}: give another --output, or delete it")
    return (folder / report.JOURNAL).exists(), report.read_result(folder / "result.json", config.save)


def run_one(config: Config) -> dict[str, Any]:
    """result.json of the run: a finished one's as it is, an unfinished one's after going on with it.

    Raises:
        UserError: its folder has a run with other options. _Interrupted: Ctrl-C.
    """
    begun, result = earlier(config)
    if result is None:
        result = resume(config.output) if begun and not methods.get(config.method).no_journal else train(config)
    if result["interrupted"]:
        raise _Interrupted
    return result


def check_runs(plan: Plan) -> None:
    """Everything that can be known of all runs before the first step of any: what is in their folders, the rows that each seed samples, and
    whether each method fits the model.

    Raises:
        UserError: names the method.
    """
    report.check_run_dir(plan.output, overwrite=False, others=True)
    check_own(plan.output)
    factors = plan.lr_factors if len(plan.lr_factors) > 1 else []
    planned = [(e, plan.config(e, plan.tried(e, f), plan.seeds[0])) for e in plan.entries for f in factors]
    planned += [] if factors else [(e, plan.config(e, plan.lr(e), seed)) for seed in plan.seeds for e in plan.entries]
    results = [earlier(config)[1] for _, config in planned]
    for (entry, config), result in zip(planned, results, strict=True):
        if result is not None:
            finished(entry, config, result)
    if all(results) and not factors:
        return
    console.say(f"checking {len(plan.entries)} methods and {len(plan.seeds)} seeds before the first run")
    first, model = plan.entries[0], None
    for seed in plan.seeds:
        model = prepare(plan.config(first, plan.lr(first), seed), model).language_model
    if model is not None:
        for entry in plan.entries:
            make_stepper(model, plan.config(entry, plan.lr(entry), plan.seeds[0]), plan.lr(entry), plan.eps(entry))


def check_own(folder: Path) -> None:
    """Refuse a folder in which something else has the names of what a comparison writes, before hours are spent and it is lost."""
    found = [name for name in OWN if report.check_plain(folder / name)]
    for name in OWN:
        report.check_plain(folder / (name + report.PART))
    if found and not ("compare.json" in found and {"runs", "curves"} <= report.read_json(folder / "compare.json").keys()):
        raise UserError(
            f"--output {folder}: its {shortened(found)} would be replaced, and no comparison wrote that: give another folder"
        )


def finished(entry: Entry, config: Config, result: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a finished run is in the table and in the figure.

    Raises:
        UserError: its files are not as a run wrote them.
    """
    try:
        _ = [result[name] for name in ABOUT]
        return row_of(entry, config, result), curve_of(entry, config, result)
    except (OSError, LookupError, TypeError, ValueError, csv.Error) as error:
        raise UserError(
            f"{config.output}: its result.json or log.csv is not as the run wrote it ({one_line(error)}): delete that folder, and the same command "
            "makes the run again"
        ) from error


def row_of(entry: Entry, config: Config, result: Mapping[str, Any]) -> dict[str, Any]:
    before, after, history = result["before"], result["after"], result["history"]
    return {
        "method": entry.label,
        "seed": config.seed,
        "forwards": result["forwards"],
        "steps": result["steps"],
        "lr": result["hyperparameters"]["lr"],
        "eps": result["hyperparameters"]["eps"],
        "accuracy_before": before["accuracy"],
        "accuracy": after["accuracy"],
        "accuracy_stderr": after["accuracy_stderr"],
        "loss_before": before["loss"],
        "loss": after["loss"],
        "dev_loss": history[-1]["loss"] if history else None,
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
    chosen: dict[str, float] = {}
    tuned: dict[str, dict[str, float | None]] = {}
    rows: list[dict[str, Any]] = []
    curves: dict[str, list[dict[str, Any]]] = {}
    about: dict[str, Any] = {}
    interrupted = False
    check_runs(plan)
    try:
        for entry in plan.entries if len(plan.lr_factors) > 1 else ():
            losses: dict[float, float] = {}
            for factor in plan.lr_factors:
                lr = plan.tried(entry, factor)
                console.say(f"{entry.label}: lr {lr:g}, seed {plan.seeds[0]}, to choose by the dev examples")
                loss = run_one(plan.config(entry, lr, plan.seeds[0]))["history"][-1]["loss"]
                losses[lr] = math.inf if loss is None else loss
            chosen[entry.label] = min(losses, key=losses.__getitem__)
            tuned[entry.label] = {f"{lr:g}": loss for lr, loss in losses.items()}  # an infinity is null in the file
        for seed in plan.seeds:
            for entry in plan.entries:
                config = plan.config(entry, chosen.get(entry.label, plan.lr(entry)), seed)
                console.say(f"{entry.label}: seed {seed}, lr {config.lr:g}, {config.steps} steps")
                result = run_one(config)
                row, curve = finished(entry, config, result)
                rows.append(row)
                curves.setdefault(entry.label, []).append(curve)
                about = {name: result[name] for name in ABOUT}
    except (KeyboardInterrupt, _Interrupted):
        interrupted = True
    content = {
        "interrupted": interrupted,
        "model": Path(str(plan.base["model"])).name,
        "forwards": plan.forwards,
        "seeds": plan.seeds,
        "peft": plan.peft(),
        "methods": {e.label: e.method.options(e.given, plan.peft()) for e in plan.entries},
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


def curve_of(entry: Entry, config: Config, result: Mapping[str, Any]) -> dict[str, Any]:
    """The loss along one run against forward passes: on the dev examples, and of training."""
    options = entry.method.options(entry.given, config.peft)
    with report.open_plain(Path(config.output) / "log.csv", most=report.MOST_LOG_BYTES) as raw:
        losses = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(io.TextIOWrapper(raw, newline=""))]
    if len(losses) != result["steps"]:
        raise ValueError(f"log.csv has {len(losses)} steps, result.json {result['steps']}")
    window = max(1, len(losses) // 20)
    means = report.smoothed([loss for _, loss in losses], window)
    picked = [*range(window - 1, len(losses), max(1, len(losses) // 50))]
    return {
        "seed": config.seed,
        "dev": [(entry.method.forwards(options, e["step"]), e["loss"], e["accuracy"]) for e in result["history"]],
        "training": [(entry.method.forwards(options, losses[k][0]), means[k]) for k in picked],
    }


def write(plan: Plan, content: Mapping[str, Any]) -> None:
    """compare.json, compare.csv, table.md, curves.png; the table is printed too."""
    plan.output.mkdir(parents=True, exist_ok=True)
    report.write_json(plan.output / "compare.json", content)
    rows = io.StringIO(newline="")
    writer = csv.DictWriter(rows, COLUMNS)
    writer.writeheader()
    writer.writerows(content["runs"])
    report.write_text(plan.output / "compare.csv", rows.getvalue())
    text = table(plan, content["runs"])
    report.write_text(plan.output / "table.md", text)
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


def table(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a row for each method: means over its seeds ± their standard deviation."""
    by_label: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_label.setdefault(row["method"], []).append(row)
    head = ("method", "steps", "forwards", "lr", "accuracy", "gain", "loss", "dev loss", "state, bytes a weight", "seeds")
    lines = [head, tuple("---" for _ in head)]
    for label, mine in by_label.items():
        dev = [r["dev_loss"] for r in mine]
        lines.append(
            (
                label,
                str(mine[0]["steps"]),
                str(mine[0]["forwards"]),
                f"{mine[0]['lr']:g}",
                spread([r["accuracy"] for r in mine], 3),
                spread([r["accuracy"] - r["accuracy_before"] for r in mine], 3),
                spread([r["loss"] for r in mine], 3),
                spread(dev, 3) if plan.points and any(d is not None for d in dev) else "",
                f"{mine[0]['state_bytes'] / mine[0]['trained_weights']:.3g}",
                str(len(mine)),
            )
        )
    before = {r["seed"]: r for r in rows}.values()
    text = (
        f"Before: accuracy {spread([r['accuracy_before'] for r in before], 3)}, loss {spread([r['loss_before'] for r in before], 3)}. "
        f"At most {plan.forwards} forward passes a run; means over the seeds ± their standard deviation.\n\n"
    )
    return text + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(path: Path, content: Mapping[str, Any]) -> None:
    """Loss against forward passes: mean over the seeds, the band from the lowest to the highest. On the dev examples, which differ from seed
    to seed, what it has changed by; without any, that of training."""
    runs = [run for mine in content["curves"].values() for run in mine]
    kind = next((kind for kind in ("dev", "training") if any(run[kind] for run in runs)), None)
    if kind is None:
        return
    with report.plain_figure(path, 110, figsize=(11, 5.5)) as figure:
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
