"""Which weights a run keeps: those after its last step, or those of the evaluation on the dev examples that was the best.

Belongs here: the choice, and how the chosen weights come back. Does not belong here: when evaluations are made (run.py), what a metric is (metrics/).

A run with a journal keeps no copy while it trains: the weights after a step are those of the base model with the journal's steps up to it made again.
A run without one writes its trained weights to the disk at each evaluation that is the best so far.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import zo_kernels
from zo_finetune import adapters, console, inputs, methods
from zo_finetune.config import Config
from zo_finetune.errors import UserError, did_you_mean, one_line, plural
from zo_finetune.files import BEST, JOURNAL, PART
from zo_finetune.load import Loaded, load_model
from zo_finetune.metrics import METRICS
from zo_finetune.metrics.base import Goal
from zo_finetune.model import LanguageModel
from zo_finetune.tasks.base import Task
from zo_kernels import journal
from zo_kernels.interrupts import uninterrupted


def criterion(given: str | None, task: Task, option: str = "--keep-by") -> str:
    """What an evaluation on the dev examples is judged by: what is given, else the loss, or the first metric of a task that has no loss.

    Args:
        option: that gave it.

    Raises:
        UserError: the task has no such number.
    """
    known = [name for name in task.metrics if name == "loss" or isinstance(METRICS[name], Goal)]
    if not known:
        raise UserError(
            f"--keep best: no metric of task {task.name} ({', '.join(task.metrics)}) says what is better: give it the loss, or --keep last"
        )
    if given is None:
        return "loss" if "loss" in known else known[0]
    if given not in known:
        raise UserError(f"{option} {given!r:.80} must be one of {', '.join(known)}{did_you_mean(given, known)}")
    return given


def best(history: Sequence[Mapping[str, Any]], by: str) -> Mapping[str, Any] | None:
    """The evaluation with the lowest loss, or the highest of another number; the first of those that are equal. None: no number is finite."""
    finite = [e for e in history if isinstance(e.get(by), float) and math.isfinite(e[by])]
    return min(finite, key=lambda e: e[by] if by == "loss" else -e[by], default=None)


def made_again(
    config: Config, past: journal.Journal, upto: int | None, mode: str, name: str, path: Path, adapter: dict[str, Any] | None = None
) -> LanguageModel:
    """The model of a run after so many steps (None: all), from its base model and its journal.

    Args:
        mode: of `zo_kernels.replay`.
        name: of the journal, for messages. path: of the journal, beside which factors of the inputs lie, if it began with any.
        adapter: of a run of the library on a bare model, the configuration of the adapter that it trained, see `adapters.described`.

    Raises:
        UserError: the base model is not the one that the run started from, or the journal has fewer steps.
    """
    with console.Phase(f"loading the model {config.model}"):
        language_model = load_model(replace(config, offload="none"))  # a replay is onto weights that are there
        inputs.begin_again(config, language_model, path)
        if adapter:
            adapted, kind = adapters.from_described(language_model.model, adapter, f"the adapter in {name}")
            language_model = replace(language_model, model=adapted.eval(), peft=kind)
    start = beside if (beside := journal.start_path(path)).exists() else None
    try:
        with console.Phase(f"replaying {plural(len(past.steps) if upto is None else upto, 'step')}"):
            zo_kernels.replay(
                language_model.model, past, upto, mode=mode, backend=config.backend, factors=journal.factors_path(path), start=start
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{name}: {one_line(error)}") from error
    return language_model


class Keeper:
    """What becomes of the weights of one run. `kept`: what result.json says of that.

    Raises:
        UserError: see `criterion`.
    """

    def __init__(self, loaded: Loaded) -> None:
        config, self.loaded = loaded.config, loaded
        self.best = config.keep == "best"
        self.by = criterion(config.keep_by, loaded.task) if self.best else "last"
        if self.best and not loaded.dev_set:
            raise UserError("--keep best chooses by the dev examples, and there are none: give --dev-examples, or --keep last")
        self.copies = self.best and bool(methods.get(config.method).no_journal)
        self.path = Path(config.output) / BEST

    def saw(self, history: Sequence[Mapping[str, Any]]) -> None:
        """After each evaluation on the dev examples: writes the weights down if they are the best so far and there is no journal."""
        if self.copies and best(history, self.by) is history[-1]:
            with console.Phase("writing down the best weights so far"):
                write(self.loaded.language_model.model, self.path)

    def settle(self, history: Sequence[Mapping[str, Any]], steps: int, past: journal.Journal | None) -> dict[str, Any]:
        """Bring the chosen weights into the run's `language_model`, whose present ones go first: there are never two models. Whatever else holds the model,
        as an optimizer does, must be gone.

        Args:
            past: the run's journal, if it has one.

        Returns:
            what result.json says.

        Raises:
            UserError: the base model has changed meanwhile.
        """
        chosen = best(history, self.by) if self.best else None
        if self.best and chosen is None:
            console.say(f"--keep best: no {self.by} of an evaluation is finite, and the weights after the last step are kept")
        if chosen is None:
            return last(steps)
        console.say(
            f"kept: the weights after step {chosen['step']} of {steps}, whose {self.by} on the dev examples is the best, {chosen[self.by]:.4f}"
        )
        if chosen["step"] != steps:
            if past is None:
                read(self.loaded.language_model.model, self.path)
            else:
                self.replay(past, chosen["step"])
        self.path.unlink(missing_ok=True)
        return {"step": chosen["step"], "by": self.by, "value": chosen[self.by], "split": "dev"}

    def replay(self, past: journal.Journal, step: int) -> None:
        lm = self.loaded.language_model
        lm.model = None
        gc.collect()  # hooks and the optimizer refer to each other
        if lm.device.type == "cuda":
            torch.cuda.empty_cache()
        lm.model = made_again(
            self.loaded.config, past, step, "sequential", "--keep best", Path(self.loaded.config.output) / JOURNAL
        ).model


def last(steps: int) -> dict[str, Any]:
    """What result.json says where the weights are those after the last step."""
    return {"step": steps, "by": "last", "value": None, "split": None}


# ---- a copy on the disk --------------------------------------------------------------------------------------------------------


def write(model: torch.nn.Module, path: Path) -> None:
    """The trained weights, whole or not at all."""
    from safetensors.torch import save_file

    part = path.with_name(path.name + PART)
    part.unlink(missing_ok=True)
    try:
        save_file({name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}, part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@torch.no_grad()
def read(model: torch.nn.Module, path: Path) -> None:
    """What `write` wrote, back into the model."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file, uninterrupted():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(file.get_tensor(name))
