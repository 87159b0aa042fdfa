"""Several runs in one folder: what is finished is kept, what began goes on, what another command wrote there is refused.

Belongs here: what `compare` and the suite have in common: a method as a user writes it, learning rates that are given or tried, a folder's earlier runs.
Does not belong here: which runs there are (compare.py, suite.py), one run (run.py), what a method costs and its defaults (methods.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from zo_finetune import console, files, methods, run_folder
from zo_finetune.common import Common
from zo_finetune.config import SPLITS, Config
from zo_finetune.errors import UserError, once, one_line, shortened
from zo_finetune.files import JOURNAL, check_plain
from zo_finetune.load import common_splits
from zo_finetune.methods import Method, Recipe
from zo_finetune.options import difference
from zo_finetune.run import resume, run
from zo_kernels import journal


class Interrupted(Exception):
    """A run was ended by Ctrl-C, and its folder says so."""


@dataclass(frozen=True)
class Entry:
    """One method. `label`: as the user wrote it, such as momentum:state=recomputed."""

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
        return folder_name(self.label)


def folder_name(label: str) -> str:
    return re.sub(r"[^\w.=-]", "-", label)


@dataclass(frozen=True)
class Rates:
    """Learning rates and eps that are given in place of a method's own, by its label or a shorter name; `factors`: of the rates to try; `grid`: the rates to
    try instead, of every method."""

    lrs: Mapping[str, float]
    epses: Mapping[str, float]
    factors: Sequence[float]
    grid: Sequence[float] = ()

    @property
    def several(self) -> bool:
        """Whether there is a choice to be made."""
        return bool(self.grid) or len(self.factors) > 1

    def recipe(self, entry: Entry, peft: str, name: str) -> Recipe:
        """The method, its learning rate and eps those given for its label, for its shorter name, or the preset's."""
        lr, eps = (given.get(entry.label, given.get(name)) for given in (self.lrs, self.epses))
        return entry.method.recipe(peft, entry.given, lr, eps)

    def tried(self, lr: float) -> list[float]:
        """The learning rates to choose from, if there is more than one."""
        if self.grid:
            return list(self.grid)
        return [float(f"{lr * factor:.6g}") for factor in self.factors] if len(self.factors) > 1 else []

    def check(self, known: Collection[str]) -> None:
        """`known`: labels and shorter names. Raises UserError: names the option."""
        if not self.factors or len(set(self.factors)) != len(self.factors):
            raise UserError("--lr-factors: give at least one, and none twice")
        for what, rates in (("--lr", self.lrs), ("--eps", self.epses)):
            if strange := sorted(set(rates).difference(known)):
                raise UserError(
                    f"{what} {strange[0]}={rates[strange[0]]:g}: --methods has no {strange[0]!r}: it has {', '.join(sorted(known))}"
                )
        if not all(math.isfinite(f) and f > 0 for f in self.factors):
            raise UserError("--lr-factors must be finite and greater than 0")
        if not all(math.isfinite(lr) and lr > 0 for lr in self.grid) or len(set(self.grid)) != len(self.grid):
            raise UserError("--lr-grid must be finite and greater than 0, and none twice")
        if self.grid and (len(self.factors) > 1 or self.lrs):
            raise UserError(f"--lr-grid has the rates of every method: leave out {'--lr' if self.lrs else '--lr-factors'}")
        if not all(math.isfinite(lr) for lr in (*self.lrs.values(), *self.epses.values())):
            raise UserError("--lr and --eps must be finite")


def tune(
    what: str,
    configs: Callable[[float], Sequence[Config]],
    rates: Sequence[float],
    root: Path,
    by: str = "loss",
    common: Common | None = None,
) -> tuple[float, dict[str, float]]:
    """Make runs with each learning rate; the rate whose kept weights are the best on the dev examples, and the numbers by rate, as text. Nothing of the
    evaluation rows is looked at.

    Args:
        what: the method, in a line for the user.
        configs: of the runs with a learning rate, of several seeds; their mean counts.
        root: see `earlier`.
        by: what is judged: loss, or a metric, the larger the better. No number, or none that is finite, is the worst.
        common: what the runs have in common.
    """
    found: dict[float, float] = {}
    worst = math.inf if by == "loss" else -math.inf
    for lr in rates:
        numbers = []
        for tried in configs(lr):
            console.say(f"{what}: lr {lr:g}, seed {tried.seed}, to choose by the dev examples")
            numbers.append(on_dev(run_one(tried, root, common), by))
        found[lr] = worst if any(n is None for n in numbers) else sum(n for n in numbers if n is not None) / len(numbers)
    if not any(map(math.isfinite, found.values())):
        console.say(
            f"{what}: with no learning rate is the {by} of the dev examples a number; the first is taken, and none was chosen"
        )
    best = (min if by == "loss" else max)(found, key=found.__getitem__)
    return best, {f"{lr:g}": number for lr, number in found.items()}


def on_dev(result: Mapping[str, Any], name: str = "loss") -> float | None:
    """A number of the dev examples, of the weights that a run kept; None: it has no evaluation of them, or the number is not finite."""
    number: float | None = next((e.get(name) for e in result["history"] if e["step"] == result["kept"]["step"]), None)
    return number


# ---- what is there already -----------------------------------------------------------------------------------------------------


def check_folders(folder: Path, root: Path) -> None:
    """Refuse a folder inside `root` that is, or leads to, anything but folders."""
    for one in (*reversed([above for above in folder.parents if root in above.parents]), folder):
        check_plain(one, folder=True)


def earlier(config: Config, root: Path) -> tuple[bool, dict[str, Any] | None]:
    """What is in a run's folder: whether it began there, and result.json if it is finished.

    Args:
        root: the folder that all of the runs are in, absolute.

    Raises:
        UserError: it has a run with other options, or something that is no run's.
    """
    folder = Path(config.output)
    check_folders(folder, root)
    run_folder.check_files(folder)
    if not (folder / "config.json").exists():
        return False, None
    saved = run_folder.saved_config(folder)
    if name := difference(config, asdict(saved), but=lambda option: option.place):
        raise UserError(f"{folder} has a run with another {name}: give another --output, or delete it")
    task = config.the_task()
    return (folder / JOURNAL).exists(), run_folder.read_result(folder / "result.json", task, config.save)


def run_one(config: Config, root: Path, common: Common | None = None) -> dict[str, Any]:
    """result.json of the run: a finished one's as it is, an unfinished one's after going on with it. `common`: with the other runs.

    Raises:
        UserError: its folder has a run with other options. Interrupted: Ctrl-C.
    """
    begun, result = earlier(config, root)
    if result is None:
        going_on = begun and not methods.get(config.method).no_journal
        result = resume(config.output, common=common) if going_on else run(config, common=common)
    if result["interrupted"]:
        raise Interrupted
    return result


def check_rows(config: Config, result: Mapping[str, Any], common: Common) -> None:
    """Refuse a finished result whose rows are not those that its options give now: one table would hold both. Results of versions that did not note them are
    taken as they are; so are all where the data are gone, which is told.

    Args:
        config: of the run, or the baseline's `run()`.

    Raises:
        UserError: says what to do.
    """
    known = result.get("rows_sha256")
    if not isinstance(known, dict) or not set(known) <= set(SPLITS):
        return
    try:
        now = common_splits(common, config, config.the_task(), result["hyperparameters"]["form"]).sha256(known)
    except UserError as reason:
        console.say(f"{config.output}: whether its rows are those of --data {config.data} cannot be looked at: {one_line(reason)}")
        return
    if changed := next((name for name in known if known[name] != now[name]), None):
        raise UserError(
            f"{config.output} has a result of other examples than --data {config.data} gives now ({changed} rows): put back what they were, or delete "
            "that folder, and the same command makes it again"
        )


def check_same(config: Config, examples: str, model: nn.Module | None) -> None:
    """Refuse a run that is there already, if it was of other examples or weights than there are now: one table would hold both. Nothing is known of one
    without a journal.

    Args:
        examples: `run.digest_of` what is loaded now.
        model: as it is loaded; None: its weights are not looked at.

    Raises:
        UserError: says what to do.
    """
    try:
        header = journal.read(Path(config.output) / JOURNAL, strict=False).header
    except (OSError, ValueError):
        return
    again = "put back what it was, or delete that folder, and the same command makes the run again"
    if header.hyperparameters.get("data") != examples:
        raise UserError(f"{config.output} has a run of other examples than --data {config.data} gives now: {again}")
    try:
        if model is not None:
            journal.verify_base(header, model)
    except ValueError as error:
        raise UserError(f"{config.output}: {one_line(error)}; or {again}") from error


def check_own(folder: Path, names: Sequence[str], keys: Collection[str], what: str) -> None:
    """Refuse a folder in which something else has the names of what will be written, before hours are spent and it is lost.

    Args:
        names: of the files; the first is a JSON file with at least these `keys`, by which an earlier one of its kind (`what`) is known.
    """
    found = [name for name in names if check_plain(folder / name)]
    for name in names:
        check_plain(folder / (name + files.PART))
    if found and not (names[0] in found and set(keys) <= files.read_json(folder / names[0]).keys()):
        raise UserError(
            f"--output {folder}: its {shortened(found)} would be replaced, and no {what} wrote that: give another folder"
        )
