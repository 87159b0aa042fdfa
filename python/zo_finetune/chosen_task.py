"""Which task a command is of: one by its name, or one of the user's own, by a TOML file or by options.

Belongs here: the options that say so, the file, and the task that comes of both. Does not belong here: what a description must have (tasks/own.py).

A file says no more than options can: what it has becomes the options, so that a run's record has the whole task, whatever becomes of the file.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from zo_finetune import values
from zo_finetune.errors import UserError, did_you_mean, one_line
from zo_finetune.files import path_of, shown
from zo_finetune.options import DATA, OWN, option
from zo_finetune.tasks import TASKS, get_task
from zo_finetune.tasks.base import Task
from zo_finetune.tasks.own import own_task

C = TypeVar("C", bound="TaskChoice")
MOST_BYTES = 1 << 20
KEYS = {  # of the file -> option
    "name": "task",
    "prompt": "prompt",
    "masked": "masked",
    "words": "words",
    "labels": "labels",
    "label": "label_column",
    "answer": "answer_column",
    "objective": "objective",
    "metrics": "task_metrics",
    "decoding": "decoding",
    "neutral": "neutral",
}
LISTS = ("words", "labels", "metrics")


@dataclass(kw_only=True)
class TaskChoice:
    """The part of a command's options that says which task it is of."""

    task: str | None = option(
        DATA, f"one of {', '.join(TASKS)}, which `zo-finetune tasks` describes; or a name for your own", None, metavar="TASK"
    )
    task_file: str | None = option(OWN, "its description, as TOML: docs/tasks.md", None, metavar="FILE", path=True, movable=True)
    prompt: str | None = option(
        OWN, r"what a causal model goes on with: {column} is the text of one, \n a new line", None, metavar="TEXT", read=values.text
    )
    masked: str | None = option(
        OWN, "the same for a masked model, with {mask} where a word belongs", None, metavar="TEXT", read=values.text
    )
    words: list[str] | None = option(OWN, "the answers to choose from", None, metavar="WORD,...", read=values.texts)
    labels: list[str] | None = option(
        OWN, "what the words stand for, in the same order", None, metavar="NAME,...", usual="the words", read=values.texts
    )
    label_column: str | None = option(OWN, "the column with one of --labels, or its number", None, metavar="NAME", usual="label")
    answer_column: str | None = option(
        OWN, "the column with the answer, or a list of accepted ones, which a model writes freely", None, metavar="NAME"
    )
    neutral: str | None = option(
        OWN, "what stands for the prompt in the calibrated score", None, metavar="TEXT", usual="nothing", read=values.text
    )
    decoding: str | None = option(
        OWN, "how an answer comes about", None, choices=("scores", "generate"), usual="scores of words, generate of answers"
    )
    task_metrics: list[str] | None = option(
        OWN, "what is measured, the one that curves and tables show first", None, metavar="NAME,...", usual="all that go with it",
        read=values.texts,
    )  # fmt: skip

    def description(self) -> dict[str, Any]:
        """What of a task of one's own is said, by the file's keys."""
        said = {key: getattr(self, name) for key, name in KEYS.items() if key not in ("name", "objective")}
        return {key: value for key, value in said.items() if value is not None}

    def the_task(self) -> Task:
        """The task that these options are of.

        Raises:
            UserError: there is none, or its description is wrong.
        """
        if said := self.description():
            return own_task(self.task, known=[*TASKS], **said)
        if self.task_file is not None:
            return self.with_file().the_task()
        if self.task is None:
            raise UserError(
                f"give --task, one of {', '.join(TASKS)}; or a task of your own, by --task-file, or by --prompt with --words or --answer-column"
            )
        return get_task(self.task)

    def with_file(self: C) -> C:
        """With what --task-file says.

        Raises:
            UserError: it cannot be read, or says other than an option does.
        """
        if self.task_file is None:
            return self
        names = {f.name for f in fields(self)}  # a command that trains nothing has no objective
        found = {KEYS[key]: value for key, value in read_task_file(self.task_file).items() if KEYS[key] in names}
        for name, value in found.items():
            if (given := getattr(self, name)) not in (None, value):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{self.task_file}: it has {shown(value)}, and {flag} is {shown(given)}: leave one of them out")
        return replace(self, **found)

    def check_file(self) -> None:
        """Refuse a file that is not as it was when these options were recorded. One that is gone is not missed.

        Raises:
            UserError: names what differs.
        """
        if self.task_file is None or not Path(self.task_file).exists():
            return
        for key, value in read_task_file(self.task_file).items():
            if value != (recorded := getattr(self, KEYS[key])):
                raise UserError(
                    f"{self.task_file}: {key} is {shown(value)}, and was {shown(recorded)} when the run began: put it back, or begin a new run"
                )


def read_task_file(name: str) -> dict[str, Any]:
    """The keys of a task's file, each a text or a list of texts.

    Raises:
        UserError: names the file, the key and the remedy.
    """
    path = path_of("--task-file", name)
    where = f"--task-file {name}"
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{where} is no file: give one")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"{where} cannot be read: {one_line(error)}") from error
    if len(content) > MOST_BYTES:
        raise UserError(f"{where} has more than {MOST_BYTES:,} bytes: it is no description of a task")
    try:
        found = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"{where} is not TOML: {one_line(error)}") from error
    for key, value in found.items():
        if key not in KEYS:
            raise UserError(f"{where}: there is no key {key!r:.80}; the keys are {', '.join(KEYS)}{did_you_mean(key, KEYS)}")
        if key in LISTS and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            raise UserError(f'{where}: {key} is {value!r:.80}: give a list of texts, as in ["low", "high"]')
        if key not in LISTS and not isinstance(value, str):
            raise UserError(f"{where}: {key} is {value!r:.80}: give a text")
    if "name" not in found:
        raise UserError(f'{where} has no name: give one, as in name = "mood"')
    return found
