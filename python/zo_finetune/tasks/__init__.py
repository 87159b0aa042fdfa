"""The tasks by name. A new task is a file beside this one; what it has to say is in base.py."""

from __future__ import annotations

from zo_finetune.errors import UserError, did_you_mean
from zo_finetune.registry import discovered
from zo_finetune.tasks.base import Task

TASKS: dict[str, Task] = discovered(__name__, __path__, Task)


def get_task(name: str) -> Task:
    """The task called `name`; an unknown one is a `UserError` that lists the known ones."""
    try:
        return TASKS[name]
    except KeyError:
        raise UserError(
            f"--task {name!r} is unknown; known tasks are: {', '.join(TASKS)}; one of your own needs --task-file, or --prompt with --words or "
            f"--answer-column{did_you_mean(name, TASKS)}"
        ) from None
