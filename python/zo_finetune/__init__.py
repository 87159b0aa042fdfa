"""zo_finetune: the application. It turns a model, a task and a file of examples into a fine-tuned model, with forward passes only.

Belongs here: the command line, tasks and their prompts, data, models, evaluation, the run's record and its figures. Does not
belong here: noise, weights' arithmetic and step rules; those are `zo_kernels`, which in turn knows nothing of tasks.

From Python: `run.run(config.Config(...))` is a whole run with its folder; `load.load`, `evaluate.evaluate` and `train.train` are its parts."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zo_finetune.trainer import ZOArguments, ZOTrainer, ZOTrainerMixin, ZOTrainingArguments
    from zo_finetune.trl_trainers import ZOGRPOConfig, ZOGRPOTrainer, ZOSFTConfig, ZOSFTTrainer

__all__ = [
    "ZOArguments",
    "ZOGRPOConfig",
    "ZOGRPOTrainer",
    "ZOSFTConfig",
    "ZOSFTTrainer",
    "ZOTrainer",
    "ZOTrainerMixin",
    "ZOTrainingArguments",
]
_OF_TRL = {"ZOGRPOConfig", "ZOGRPOTrainer", "ZOSFTConfig", "ZOSFTTrainer"}  # which only they load


def __getattr__(name: str) -> Any:
    """The trainers' names are loaded when they are asked for: the command line answers at once, without torch."""
    if name in __all__:
        return getattr(importlib.import_module(f"zo_finetune.{'trl_trainers' if name in _OF_TRL else 'trainer'}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
