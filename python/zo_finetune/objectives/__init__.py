"""The objectives by name. A new one is a file beside this one; what it has to say is in base.py."""

from __future__ import annotations

from zo_finetune.errors import UserError, did_you_mean
from zo_finetune.metrics import METRICS
from zo_finetune.metrics.base import Goal
from zo_finetune.objectives.base import Objective
from zo_finetune.objectives.metric import OfMetric
from zo_finetune.registry import discovered
from zo_finetune.tasks.base import Task

OBJECTIVES: dict[str, Objective] = discovered(__name__, __path__, Objective)


def get_objective(name: str | None, task: Task, centre: float | None = None) -> Objective:
    """What is lowered: of the name "loss", or none, the task's own; one of `OBJECTIVES`; or of a metric of the task what it lacks to 1.

    Args:
        centre: --centre, which one of them has.

    Raises:
        UserError: it is none of them, or says nothing of the task.
    """
    if name in (None, "loss"):
        name = task.objective
    goals = {m: goal for m in task.metrics if isinstance(goal := METRICS[m], Goal) and goal.suits(task.class_names)}
    if name in goals:
        return OfMetric(task, goals[name]).of(task, centre)
    losses = [one for one, objective in OBJECTIVES.items() if not objective.chooses or task.decoding == "scores"]
    if name not in losses:
        why = " has one candidate for an answer:" if name in OBJECTIVES else ":"
        raise UserError(
            f"--objective {name!r:.80}: task {task.name}{why} give loss, {', '.join([*losses, *goals])}{did_you_mean(name, [*losses, *goals])}"
        )
    return OBJECTIVES[name].of(task, centre)
