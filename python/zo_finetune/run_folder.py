"""The folder of a run: config.json, run.zoj (zo_kernels' journal), evaluations.jsonl, scores_*.csv, log.csv, result.json, curve.png, and its weights.

Belongs here: which files there are, what each holds, which folder may be used. Does not belong here: one file's safety (files.py), what a result
says (report.py), when a run writes what (run.py).
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zo_finetune import files, outcomes
from zo_finetune.config import Config
from zo_finetune.errors import UserError, one_line, shortened
from zo_finetune.evaluate import is_evaluation
from zo_finetune.files import BEST, FOLDERS, JOURNAL, PART, check_plain, open_plain, plain_json, read_json, remove_folder
from zo_finetune.tasks.base import Task
from zo_kernels import journal

FILES = (
    "result.json",
    "log.csv",
    "curve.png",
    "config.json",
    "evaluations.jsonl",
    *outcomes.NAMES,
    BEST,
)  # what a run writes besides its journal and weights
SAVING = "weights" + PART
MOST_LOG_BYTES = 4 << 30
LOG_FIELDS = ("step", "loss", "projected_gradient", "lr", "seconds")


# ---- which folder, and what is removed from it -------------------------------------------------------------------------------


def check_files(folder: Path) -> None:
    """Refuse a run directory in which what a run reads or writes is a link, a pipe, a device, a folder in place of a file."""
    for name in (*FILES, *(name + PART for name in FILES)):
        check_plain(folder / name)
    for name in (*FOLDERS, *(name + PART for name in FOLDERS), SAVING):
        check_plain(folder / name, folder=True)
    check_plain(journal.factors_path(folder / JOURNAL))
    record = folder / JOURNAL  # the one file that is written to where it stands
    if check_plain(record) and record.stat().st_nlink > 1:
        raise UserError(f"{record} has a second name elsewhere (a hard link), which would be written too: put a copy in its place")


def holds_run(folder: Path) -> bool:
    """Whether a run began in the folder, as its config.json or its journal tells, or what a killed one was writing."""
    if check_plain(folder / "config.json"):
        with contextlib.suppress(UserError):
            return set(read_json(folder / "config.json")) == {"directory", "config"}
    if check_plain(folder / JOURNAL):
        with open_plain(folder / JOURNAL, most=sys.maxsize) as file:
            head = file.read(len(journal.MAGIC))
            return head == journal.MAGIC[: len(head)]
    return all(name in {n + PART for n in FILES} for name in os.listdir(folder))


def strangers(folder: Path) -> list[str]:
    """What lies in a run's folders of weights and is not known to be of the run."""
    result: dict[str, Any] = {}
    if check_plain(folder / "result.json"):
        with contextlib.suppress(UserError):
            result = read_json(folder / "result.json")
    ours = result.get("saved_files")
    known = {name for name in ours if isinstance(name, str)} if isinstance(ours, list) else set()
    return [
        f"{name}/{entry}" for name in FOLDERS if (folder / name).is_dir() for entry in sorted({*os.listdir(folder / name)} - known)
    ]


def check_run_dir(folder: Path, overwrite: bool, sources: Sequence[tuple[str, str]] = (), others: bool = False) -> None:
    """Refuse a run directory that holds something, before hours are spent.

    Args:
        overwrite: an earlier run may be in it, and goes.
        sources: (option, path of what is read or a hub id); none may lie in what goes.
        others: something may be in it, and stays.
    """
    try:
        if os.path.lexists(folder) and not folder.is_dir():
            raise UserError(f"--output {folder} is a file: give a folder")
        parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if not parent.is_dir():
            raise UserError(f"--output {folder} cannot be made: {parent} is a file; give another folder")
        if not others and folder.is_dir() and any(folder.iterdir()):
            if not overwrite:
                raise UserError(
                    f"--output {folder} is not empty: give another folder, or --overwrite to replace an earlier run in it"
                )
            check_overwrite(folder, sources)
        if not os.access(parent, os.W_OK):
            raise UserError(f"--output {folder} cannot be written: {parent} is read-only for this user; give another folder")
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise UserError(f"--output {folder} cannot be used: {one_line(error)}; give another folder") from error


def check_overwrite(folder: Path, sources: Sequence[tuple[str, str]]) -> None:
    if not holds_run(folder):
        raise UserError(
            f"--overwrite: {folder} never held a run of zo-finetune, and nothing in it is deleted: give another --output"
        )
    check_files(folder)
    for option, source in sources:
        path = Path(source).expanduser()
        if path.exists() and (inside := path.resolve()) is not None:
            goes = [folder.resolve() / name for name in (*FOLDERS, *FILES)]
            if inside == folder.resolve() or any(g == inside or g in inside.parents for g in goes):
                raise UserError(f"--overwrite: {option} {source} lies in what would be deleted of {folder}: give another --output")
    if more := strangers(folder):
        raise UserError(f"--overwrite: the run in {folder} did not write {shortened(more, 3)}: move that, or give another --output")


def clear_run_dir(folder: Path) -> None:
    """Remove an earlier run's files, as `check_overwrite` has looked at them; others stay, and so does the journal, whose lock this run holds."""
    for name in (*FILES, *(name + PART for name in FILES)):
        (folder / name).unlink(missing_ok=True)
    for name in (*FOLDERS, *(name + PART for name in FOLDERS), SAVING):
        remove_folder(folder / name)


def save_weights(folder: Path, save: Callable[[Path], Path]) -> tuple[Path, list[str]]:
    """Weights by `save(folder)`, which writes a folder of its own name into the one that it is given; whole or not at all. What is no part of
    them and lay in an earlier folder of that name stays there.

    Returns:
        the folder, and the names in it that are new.
    """
    part = folder / SAVING
    remove_folder(part)
    try:
        part.mkdir(parents=True)
        new = save(part)
        target, names = folder / new.name, sorted(os.listdir(new))
        if check_plain(target, folder=True):
            old = folder / (new.name + PART)
            remove_folder(old)
            target.rename(old)
            new.rename(target)
            for other in {*os.listdir(old)} - {*names}:
                (old / other).rename(target / other)
            shutil.rmtree(old)
        else:
            new.rename(target)
        return target, names
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_journal(path: Path) -> None:
    """Remove an earlier run's journal, unless that run is under way."""
    if not path.exists():
        return
    with contextlib.suppress(OSError, ValueError):  # a damaged one goes too
        try:
            journal.reopen(path)[0].close()
        except journal.LockedError as error:
            raise UserError(f"{path.parent}: {one_line(error)}") from error
    path.unlink()
    journal.factors_path(path).unlink(missing_ok=True)


@contextlib.contextmanager
def held(path: Path) -> Iterator[journal.Journal | None]:
    """The journal that this run has closed, whose lock keeps its folder for this process; None where there is none.

    Raises:
        UserError: another process goes on with it.
    """
    if not path.exists():
        yield None
        return
    try:
        writer, past = journal.reopen(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path.parent}: {one_line(error)}") from error
    try:
        yield past
    finally:
        writer.close()


# ---- what is read back -------------------------------------------------------------------------------------------------------


def write_config(folder: Path, config: Config) -> None:
    files.write_json(folder / "config.json", {"directory": os.getcwd(), "config": asdict(config)})


def saved_config(folder: Path) -> Config:
    """The options of the run in a folder, its paths as they were given then.

    Raises:
        UserError: there is none, or it is not as a run wrote it.
    """
    path = folder / "config.json"
    saved = read_json(path)
    if set(saved) != {"directory", "config"} or not isinstance(saved["directory"], str):
        raise UserError(f"{path} must have the keys directory and config")
    config = Config.of_json(saved["config"], str(path))
    return config.placed(saved["directory"] if "\0" not in saved["directory"] else "/")


def read_result(path: Path, task: Task, saves: bool) -> dict[str, Any] | None:
    """result.json of a run that has come to its end; None if there is none, the run was interrupted, or its weights are to be saved (`saves`) and
    were not.

    Raises:
        UserError: it holds something else.
    """
    if not check_plain(path):
        return None
    result = read_json(path)
    if result.get("interrupted") is True:
        return None
    if not (
        result.get("interrupted") is False
        and (result.get("task"), result.get("metric")) == (task.name, task.metrics[0])
        and type(result.get("steps")) is int
        and all(is_evaluation(task, result.get(name)) for name in ("before", "after"))
    ):
        raise UserError(f"{path} is not that of a run: remove it to go on with the run")
    return None if saves and result.get("saved") is None else result


class Evaluations:
    """evaluations.jsonl: the evaluation before the first step, then those of the dev examples, each on the disk before the next step is
    recorded, so that a resumed run need not repeat them."""

    def __init__(self, path: Path, task: Task) -> None:
        self.path, self.task = path, task

    def add(self, name: str, evaluation: Mapping[str, Any]) -> None:
        with open_plain(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as file:
            files.write_all(file, (json.dumps(plain_json({name: evaluation}), allow_nan=False) + "\n").encode())
            os.fsync(file.fileno())

    def recover(self, steps: int) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """(before, those of fewer than `steps` steps); the rest are cut off, and so is what follows a line that is torn or no evaluation."""
        before, history = self.read()
        history = [e for e in history if e["step"] < steps]
        kept = [("before", before)] * (before is not None) + [("dev", e) for e in history]
        files.write_text(self.path, "".join(json.dumps({name: e}) + "\n" for name, e in kept))
        return before, history

    def read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """(before, the others), up to a line that is torn or no evaluation. Changes nothing: the run may be another process's."""
        before: dict[str, Any] | None = None
        history: list[dict[str, Any]] = []
        text = b""
        with contextlib.suppress(FileNotFoundError), open_plain(self.path) as file:
            text = file.read()
        for line in text.decode(errors="replace").splitlines():
            try:
                (name, evaluation), *_ = json.loads(line, parse_constant=lambda _: None).items()
            except (ValueError, AttributeError, RecursionError):
                break
            if not is_evaluation(self.task, evaluation) or (name != "before" and type(evaluation.get("step")) is not int):
                break
            if name == "before":
                before = evaluation
            else:
                history.append(evaluation)
        return before, history


class Log:
    """log.csv, a line for each step, written at once so that a killed run keeps what it had. What it had lost, the journal has.

    Attributes:
        losses: of the steps. still: steps whose projected gradient was 0: both losses were the same to the bit.
    """

    def __init__(self, path: Path, past: Iterable[Sequence[float]] = ()) -> None:
        path.unlink(missing_ok=True)
        self._file = open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self.losses: list[float] = []
        self.still = 0
        self._write([LOG_FIELDS])
        self.write(past)

    @staticmethod
    def read(path: Path) -> list[tuple[int, float]]:
        """(step, loss) of each row.

        Raises:
            OSError, UserError: see `open_plain`. LookupError, ValueError, csv.Error: it is not as a run wrote it.
        """
        with open_plain(path, most=MOST_LOG_BYTES) as raw:
            return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(io.TextIOWrapper(raw, newline=""))]

    @staticmethod
    def seconds(path: Path) -> dict[int, float]:
        """The seconds after each step, as far as an earlier log has them."""
        found = {}
        with contextlib.suppress(FileNotFoundError), open_plain(path, most=MOST_LOG_BYTES) as file:
            while line := file.readline(1000):
                try:
                    step, _, _, _, text = line.split(b",")
                    number, seconds = int(step), float(text)
                except ValueError:
                    continue
                if 0 <= seconds < math.inf:
                    found[number] = seconds
        return found

    def _write(self, rows: Iterable[Sequence[Any]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        files.write_all(self._file, text.getvalue().encode())

    def write(self, rows: Iterable[Sequence[float]]) -> None:
        rows = list(rows)
        self._write(rows)
        self.losses += (float(row[1]) for row in rows)
        self.still += sum(row[2] == 0 for row in rows)

    def close(self) -> None:
        self._file.close()
